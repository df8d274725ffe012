"""What does one more merge cost `Trials`, beside the passes over the texts that it needs in any case?

    python benchmarks/trials.py                          # embedded texts, about a minute
    python benchmarks/trials.py --dataset massive        # MASSIVE's 2,974 test utterances

The models are the mini base with a head and noise of its own for each source, as large as fine-tuning makes it; what they answer does
not matter here. *passes* is the same classifier run on the same tokenized texts without a merge. The rows take turns, and every turn
has other weights, so that only what does not depend on weights is there from the turn before; `--fresh` keeps nothing between merges."""
import argparse,platform,statistics,sys,tempfile,time
from pathlib import Path
import torch
from merginguriel.checkpoint import *
from merginguriel.base_model import *
from merginguriel.merge import *
from merginguriel.data import *
from merginguriel.mini import *
from merginguriel.classifier import *
from merginguriel.train import *
from merginguriel.evaluate import *
from merginguriel.trials import *


def sources(start, folder, k):
    "`k` copies of the model in `start` with noise on everything but the word vectors, which the mini base does not train"
    c,out = open_checkpoint(start),{}
    for i in range(k):
        g,d = torch.Generator().manual_seed(i),folder/f'm{i}'
        copy_model_files(start, d)
        t = {n:c.read(n) for n in c}
        for n,v in t.items():
            if v.is_floating_point() and 'embeddings' not in n: v.add_(torch.randn(v.shape, generator=g)*.1*v.std().nan_to_num(0.))
        save_checkpoint(t, d)
        out[f'm{i}'] = d
    return out

def cpu(f):
    start = time.process_time()
    f()
    return time.process_time()-start

def main():
    p = argparse.ArgumentParser(description='one more merge against the passes it needs')
    p.add_argument('--k', type=int, default=5, help='number of sources')
    p.add_argument('--dataset', default='home', help='home, massive or a path')
    p.add_argument('--locale', default='vi-VN', help='locale of the texts')
    p.add_argument('--turns', type=int, default=5, help='turns of each row')
    p.add_argument('--methods', nargs='+', default=None, help='methods; all that need no measurement if not given')
    p.add_argument('--fresh', action='store_true', help='keep nothing between merges')
    a = p.parse_args()
    torch.set_num_threads(1)
    data = load_intents(a.dataset, a.locale, 'test')
    with tempfile.TemporaryDirectory() as d:
        start = add_head(mini_path(), label_names(data), seed=0)
        paths = sources(start, Path(d), a.k)
        t = Trials(start, paths, data, keep=not a.fresh)
        weights = torch.rand(a.turns, a.k, generator=torch.Generator().manual_seed(0)).add(.5)
        model,tok = load_classifier(paths['m0'])
        passes = lambda: predict(model, data, device='cpu', tokenizer=tok)
        rows = {}
        for m in a.methods or methods:
            try: rows[m] = t.accuracy(m) and []
            except (ValueError,TypeError,KeyError) as e: print(f'{m} left out: {str(e)[:90]}', file=sys.stderr)
        passes()
        floor = []
        for w in weights.tolist():
            floor.append(cpu(passes))
            for m,r in rows.items(): r.append(cpu(lambda: t.accuracy(m, w)))
        base = statistics.median(floor)
        print(f'{len(data)} texts of {a.locale} ({a.dataset}), K = {a.k}, 1 thread, median of {a.turns} turns; Python '
            f'{platform.python_version()}, PyTorch {torch.__version__.split("+")[0]}\n\n| what | CPU s | ÷ passes | in each turn |\n|---|---|---|---|')
        print(f'| passes | {base:.2f} | 1.00 | |')
        for m,r in rows.items():
            print(f"| {m} | {statistics.median(r):.2f} | {statistics.median(r)/base:.2f} | {', '.join(f'{o/f:.2f}' for o,f in zip(r, floor))} |")


if __name__=='__main__': sys.exit(main())
