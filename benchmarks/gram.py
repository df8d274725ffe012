"""All cosines between the task vectors of K models of XLM-R base's size: one pass, against reading the files and against pairs.

    python benchmarks/gram.py

The checkpoints have the names and shapes of XLM-R base with 60 labels, 278 M values in float32, and are made in a temporary
folder: base + s·(0.5·shared + own), all normal, so that every true cosine is 0.2. *read* maps the same files and sums their
values, which is the least that any method does. *pairs* is what one writes first: load base and two models for each pair,
flatten, `cosine_similarity`; two pairs are run and the others counted at the same price. Each measurement is a process of its
own, imports not counted; they take turns, so that a busy machine slows all. Memory is the highest RssAnon seen, what the process
has allocated itself, without the pages of mapped files. The disk must hold K + 1 files of 1.1 GB."""
import argparse,json,mmap,os,platform,statistics,subprocess,sys,tempfile,threading,time
from pathlib import Path
import numpy as np
import torch
from merginguriel.checkpoint import CheckpointWriter,open_checkpoint
from merginguriel.task_vector import task_vector_gram


def shapes():
    "Names and shapes of the parameters"
    from transformers import AutoModelForSequenceClassification,XLMRobertaConfig
    config = XLMRobertaConfig(vocab_size=250002, max_position_embeddings=514, type_vocab_size=1, num_labels=60, layer_norm_eps=1e-5)
    with torch.device('meta'): m = AutoModelForSequenceClassification.from_config(config)
    return {k:tuple(v.shape) for k,v in m.named_parameters()}


def make(folder, k, seed=0):
    "The base `0.safetensors` and `k` models"
    spec,rng = {n:(torch.float32,s) for n,s in shapes().items()},np.random.default_rng(seed)
    writers = [CheckpointWriter(folder/f'{i}.safetensors', spec).__enter__() for i in range(k+1)]
    for name,(_,shape) in spec.items():
        step = max(1, (1<<20)//max(1, int(np.prod(shape[1:]))))
        for a in range(0, shape[0], step):
            rows = a,min(shape[0], a+step)
            draw = lambda: rng.standard_normal((rows[1]-a,*shape[1:]), dtype=np.float32)
            base,shared = draw()*np.float32(.02),draw()*np.float32(.5)
            for i,w in enumerate(writers):
                t = base if i==0 else base+np.float32(5e-4*(1+.25*((i-1)%5)))*(shared+draw())
                w.write(name, torch.from_numpy(t), rows)
    for w in writers: w.__exit__(None, None, None)


def read(paths):
    "Map every file and sum its values"
    for p in paths:
        with open(p, 'rb') as f: m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        x = torch.frombuffer(m, dtype=torch.float32, offset=os.path.getsize(p)%4, count=os.path.getsize(p)//4)
        for i in range(0, len(x), 1<<20): x[i:i+(1<<20)].sum()

def gram(paths):
    "Cosines from one pass"
    g = task_vector_gram(paths[0], {p.stem:p for p in paths[1:]}).to_numpy()
    return g/np.sqrt(np.outer(np.diag(g), np.diag(g)))

def pairs(paths):
    "Two pairs, each from files loaded for it"
    from safetensors.torch import load_file
    out = []
    for a,b in ((1,2),(2,3)):
        flat = []
        for i in (a,b):
            base,ft = load_file(paths[0]),load_file(paths[i])
            flat.append(torch.cat([(ft[k]-base[k]).flatten() for k in base]))
        out.append(torch.nn.functional.cosine_similarity(*flat, dim=0).item())
    return np.array(out)


def anonymous():
    "Megabytes that the process has allocated"
    return next(int(o.split()[1]) for o in Path('/proc/self/status').read_text().splitlines() if o.startswith('RssAnon'))/1024

def worker(what, folder, k):
    "Run one measurement and print it"
    torch.set_num_threads(1)
    f,paths,peak,running = dict(read=read, gram=gram, pairs=pairs)[what],[folder/f'{i}.safetensors' for i in range(k+1)],[anonymous()],True
    start = peak[0]
    def watch():
        while running: peak[0] = max(peak[0], anonymous()); time.sleep(.02)
    t = threading.Thread(target=watch, daemon=True)
    t.start()
    wall,cpu = time.perf_counter(),time.process_time()
    out = f(paths)
    cpu,wall,running = time.process_time()-cpu,time.perf_counter()-wall,False
    t.join()
    off = None if out is None else out[~np.eye(len(out), dtype=bool)] if out.ndim==2 else out
    print(json.dumps(dict(cpu=cpu, wall=wall, peak=peak[0], start=start, cosines=off is not None and [off.min(), off.max()])))

def measured(what, folder, k):
    "One measurement, in a process of its own"
    r = subprocess.run([sys.executable, __file__, '--worker', what, str(folder), '--k', str(k)], capture_output=True, text=True)
    if r.returncode: raise RuntimeError(r.stderr)
    return json.loads(r.stdout.splitlines()[-1])


def row(what, k, runs, ratio=None):
    cpu,wall,peak,start = (statistics.median(o[m] for o in runs) for m in ('cpu','wall','peak','start'))
    c = runs[0]['cosines']
    print(f"| {what} | {k} | {cpu:.2f} | {wall:.2f} | {peak:.0f} ({peak-start:.0f}) | "
        f"{'' if not c else f'{c[0]:.4f} to {c[1]:.4f}'} | {'' if ratio is None else f'{ratio:.2f}'} |", flush=True)

def main():
    p = argparse.ArgumentParser(description='Gram of task vectors against reading the files and against pairs')
    p.add_argument('--k', type=int, nargs='+', default=[5,10], help='numbers of models')
    p.add_argument('--repetitions', type=int, default=3, help='turns of each')
    p.add_argument('--folder', default=None, help='where the temporary folder is made')
    p.add_argument('--worker', nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker: return worker(a.worker[0], Path(a.worker[1]), a.k[0])
    with tempfile.TemporaryDirectory(dir=a.folder) as d:
        make(Path(d), max(a.k))
        size = open_checkpoint(Path(d)/'0.safetensors').nbytes
        print(f'{size:,} bytes a model, 1 thread, median of {a.repetitions} turns; Python {platform.python_version()}, '
            f'PyTorch {torch.__version__.split("+")[0]}\n')
        print('| what | K | CPU s | s | anonymous MB (above the start) | cosines (true: 0.2) | CPU ÷ read |\n|---|---|---|---|---|---|---|')
        for k in a.k:
            measured('read', Path(d), k) # Not counted: it warms the page cache
            turns = [(measured('read', Path(d), k), measured('gram', Path(d), k)) for _ in range(a.repetitions)]
            row('read', k, [r for r,_ in turns])
            row('gram', k, [g for _,g in turns], statistics.median(g['cpu']/r['cpu'] for r,g in turns))
        two,n = measured('pairs', Path(d), a.k[0]),a.k[0]*(a.k[0]-1)//2
        row(f'pairs, {n} at the price of 2', a.k[0], [two|dict(cpu=two['cpu']*n/2, wall=two['wall']*n/2)])


if __name__=='__main__': sys.exit(main())
