"""The N×N matrix: how much of its time the forward passes take, and what a second call costs.

    python benchmarks/nxn.py                                     # three models of the mini base with new heads, data set `home`
    python benchmarks/nxn.py --models FOLDER --dataset massive --split test --bank FOLDER   # a folder of fine-tuned models

*passes* are the calls of the models alone, without reading, tokenizing, sorting and keeping; what is in the bank already takes none.
*operations* are two for each weight of a matrix outside the embeddings and each token, padding included, and the rate is given beside
that of a product of two 2048 × 2048 matrices of the same type on the same device."""
import argparse,platform,sys,tempfile,time,timeit
from pathlib import Path
import torch
from merginguriel import evaluate
from merginguriel.base_model import add_head
from merginguriel.data import available_locales,label_names,load_intents
from merginguriel.ensemble import ensemble,ways
from merginguriel.mini import mini_path


class Passes:
    "Seconds, texts and operations in the forward passes of the classifiers that `evaluate` loads"
    seconds = texts = operations = 0
    def __init__(self):
        load = evaluate.load_classifier
        def hooked(*args, **kw):
            model,tok = load(*args, **kw)
            self.weights = sum(w.numel() for k,w in model.named_parameters() if w.dim()==2 and 'embeddings' not in k)
            model.register_forward_pre_hook(self.before, with_kwargs=True)
            model.register_forward_hook(self.after, with_kwargs=True)
            return model,tok
        evaluate.load_classifier = hooked
    def wait(self):
        if torch.cuda.is_available(): torch.cuda.synchronize()
    def before(self, model, args, kw):
        self.wait()
        self.start = time.perf_counter()
    def after(self, model, args, kw, out):
        self.wait()
        self.seconds += time.perf_counter()-self.start
        self.texts += len(kw['input_ids'])
        self.operations += 2*self.weights*kw['input_ids'].numel()

def matrix_rate(device, dtype, n=2048, turns=5):
    "Operations a second in the best of a few products of two matrices"
    a = torch.rand(n, n, device=device, dtype=torch.bfloat16 if dtype=='bf16' else torch.float32)
    best = float('inf')
    for _ in range(turns):
        start = time.perf_counter()
        b = a@a
        if device!='cpu': torch.cuda.synchronize()
        best = min(best, time.perf_counter()-start)
    return 2*n**3/best

def models(a):
    "Locale -> model folder"
    if a.models: return {o.parent.name:o.parent for o in sorted(Path(a.models).glob('*/config.json'))}
    names = available_locales(a.dataset)[:3]
    labels = label_names(load_intents(a.dataset, names[0], a.split))
    return {o:add_head(mini_path(), labels, seed=i) for i,o in enumerate(names)}

def votes(models, data, bank, **options):
    "Milliseconds, the best of five: to read what a model says of one locale, and for each vote of up to five models"
    name,ms = list(data)[-1],lambda f: 1000*min(timeit.repeat(f, number=1, repeat=5))
    def read(model): return evaluate.banked(model, {name:data[name]}, bank, **options)[name]
    said = {o:read(m) for o,m in list(models.items())[:5]}
    return ms(lambda: read(next(iter(models.values())))),{how:ms(lambda: ensemble(said, how=how)) for how in ways}

def main():
    p = argparse.ArgumentParser(description='accuracy of every model on every locale, timed')
    p.add_argument('--models', default=None, help='folder with one model folder per locale')
    p.add_argument('--dataset', default='home', help='data set')
    p.add_argument('--split', default='test', help="'dev' or 'test'")
    p.add_argument('--bank', default=None, help='folder of kept predictions; a temporary one if not given')
    p.add_argument('--kept', default='fp32', help="'fp32' or 'fp16'")
    p.add_argument('--device', default='cpu', help="'cpu' or 'cuda'")
    p.add_argument('--dtype', default='fp32', help="'fp32' or 'bf16' (CUDA)")
    p.add_argument('--locales', type=int, default=None, help='only the first ones')
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        found = models(a)
        data = {o:load_intents(a.dataset, o, a.split) for o in list(found)[:a.locales]}
        found,passes,bank = {o:found[o] for o in data},Passes(),a.bank or d
        options = dict(split=a.split, device=a.device, dtype=a.dtype, kept=a.kept, progress=sys.stderr.isatty())
        rows = []
        for turn in ('first call','second call'):
            wall,cpu,before = time.perf_counter(),time.process_time(),passes.seconds
            m = evaluate.nxn(found, data, bank, **options)
            wall,cpu,spent = time.perf_counter()-wall,time.process_time()-cpu,passes.seconds-before
            rows.append(f'| {turn} | {m.size} | {wall:.1f} | {cpu:.1f} | {spent:.1f} | {spent/wall:.0%} |')
        read,vote = votes(found, data, bank, device=a.device, dtype=a.dtype, kept=a.kept)
        size = sum(o.stat().st_size for o in Path(bank).glob("*.parquet"))
    print(f'{len(m)} models × {m.shape[1]} locales, {a.dataset} {a.split}, {a.device} {a.dtype}, {torch.get_num_threads()} threads; '
        f'Python {platform.python_version()}, PyTorch {torch.__version__.split("+")[0]}\n')
    print('| | cells | s | CPU s | s in passes | share |\n|---|---|---|---|---|---|\n'+'\n'.join(rows))
    print(f'\nbank ({a.kept}): {size/1e6:.0f} MB; {read:.1f} ms to read a model on a locale; votes of {min(5, len(found))}, ms: '
        + ', '.join(f'{k} {v:.1f}' for k,v in vote.items()))
    if not passes.texts: return print('every cell was in the bank; there were no passes')
    rate,matrix = passes.operations/passes.seconds,matrix_rate(a.device, a.dtype)
    print(f'passes: {passes.texts} texts, {passes.texts/passes.seconds:.0f} a second, {rate/1e9:.1f} billion operations a second; '
        f'matrix rate {matrix/1e9:.1f}: {rate/matrix:.0%} of it')

if __name__=='__main__': sys.exit(main())
