"""Bases for K task vectors of XLM-R base's size, fitted and saved: CPU seconds, seconds and memory of a whole process.

    python benchmarks/bases.py                      # K = 10, M = 5
    python benchmarks/bases.py --k 20 --m 10 --kinds svd ae

The checkpoints are those of gram.py (278 M values, every true cosine 0.2), made in a temporary folder and deleted. *floor* maps the
K + 1 files, sums their values and writes M files: nothing that makes bases does less. *naive* is what one writes first: load base and
models, stack the task vectors in float32, `torch.linalg.svd` of the dense matrix, store M left vectors times singular values. It holds
all task vectors more than once, so it is run on a part of each model, `--naive-values` values, and so is ours (*svd, part*); what either
loses is printed. Each row is a process of its own, and all CPU seconds of it count, those of imports too. Rows take turns, so that a
busy machine slows all. Memory is the highest RssAnon of the process, sampled from outside."""
import argparse,json,os,platform,shutil,statistics,sys,tempfile
from pathlib import Path
import numpy as np
from merge import measured

KINDS = dict(svd=('svd',{}), ae=('ae',{}), pca=('pca',{}), cluster=('cluster',dict(by='linkage')),
    cluster_ties=('cluster',dict(by='linkage', inner='ties')), random=('random',{}))


def prepare(folder, k, values):
    "Files `whole/i.safetensors` and, with about `values` values of each, `part/i.safetensors`; 0 is the base"
    import torch
    from merginguriel.checkpoint import CheckpointWriter,open_checkpoint
    from gram import make
    (folder/'whole').mkdir(parents=True)
    (folder/'part').mkdir()
    make(folder/'whole', k)
    for i in range(k+1):
        c,n,spec = open_checkpoint(folder/'whole'/f'{i}.safetensors'),0,{}
        for key in c:
            size = int(np.prod(c.shape(key)))
            if 'encoder.layer' in key and n+size<=values: spec[key],n = (torch.float32,c.shape(key)),n+size
        with CheckpointWriter(folder/'part'/f'{i}.safetensors', spec) as w:
            for key in spec: w.write(key, c.read(key))


def files(folder): return sorted(Path(folder).glob('*.safetensors'), key=lambda p: int(p.stem))

def floor(folder, m, out):
    "Map and sum all files, write `m`"
    maps = [np.memmap(f, dtype=np.uint64, mode='r', offset=8, shape=(os.path.getsize(f)-8)//8) for f in files(folder)]
    out.mkdir()
    written = [open(out/str(i), 'wb') for i in range(m)]
    for a in range(0, len(maps[0]), 1<<17):
        for v in maps: v[a:a+(1<<17)].sum()
        for f in written: f.write(maps[0][a:a+(1<<17)])

def ours(folder, m, out, kind, options):
    "Fit and save"
    from merginguriel.bases import fit_bases
    base,*models = files(folder)
    fit_bases(base, {p.stem:p for p in models}, m, kind, **options).save(out)

def naive(folder, m, out):
    "All task vectors as one dense matrix"
    import torch
    from safetensors.torch import load_file,save_file
    base,*models = [load_file(p) for p in files(folder)]
    v = torch.stack([torch.cat([(f[k]-base[k]).flatten() for k in sorted(base)]) for f in models], 1)
    u,s,vh = torch.linalg.svd(v, full_matrices=False)
    out.mkdir()
    save_file(dict(bases=(u[:,:m]*s[:m]).T.contiguous(), decoder=vh[:m].contiguous()), out/'naive.safetensors')

def lost(folder, a, b):
    "Share of the squared lengths that naive bases in `a` and ours in `b` lose"
    from safetensors import safe_open
    dense = safe_open(a/'naive.safetensors', 'numpy')
    decoders = dense.get_tensor('decoder'),np.array(json.loads((b/'bases.json').read_text())['decoder'])
    models,parts,at = *([safe_open(p, 'numpy') for p in o] for o in (files(folder),sorted(b.glob('basis-*')))),0
    total,left = 0.,np.zeros(2)
    for k in sorted(models[0].keys()):
        base,*v = (m.get_tensor(k).ravel().astype(float) for m in models)
        v = np.stack(v)-base
        mine = np.stack([p.get_tensor(k).ravel() for p in parts])
        for i,x in enumerate((dense.get_slice('bases')[:,at:at+len(base)],mine)): left[i] += ((decoders[i].T@x-v)**2).sum()
        total,at = total+(v**2).sum(),at+len(base)
    return left/total


def child(what, folder, out, m):
    what = what.removesuffix(', part')
    if what=='floor': floor(folder, m, Path(out))
    elif what=='naive': naive(folder, m, Path(out))
    else: ours(folder, m, Path(out), *KINDS[what])

def once(what, d, m, keep=None):
    "Run one row; drop what it wrote, or keep it as `keep`"
    part = 'part' if what.endswith(', part') else 'whole'
    out = keep or d/'out'
    try: return measured([sys.executable, __file__, '--child', what, str(d/part), str(out), '--m', str(m)])
    finally:
        if not keep: shutil.rmtree(out, ignore_errors=True)

def main():
    p = argparse.ArgumentParser(description='bases of task vectors against reading and writing the files, and against a dense SVD')
    p.add_argument('--k', type=int, default=10, help='number of tasks')
    p.add_argument('--m', type=int, default=5, help='number of bases')
    p.add_argument('--kinds', nargs='+', default=list(KINDS), help='rows')
    p.add_argument('--turns', type=int, default=3, help='turns of each row')
    p.add_argument('--naive-values', type=int, default=20_000_000, help='values of each model for the dense SVD')
    p.add_argument('--folder', default=None, help='where the temporary folder is made')
    p.add_argument('--child', nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child: return child(*a.child, a.m)
    with tempfile.TemporaryDirectory(dir=a.folder) as d:
        d = Path(d)
        prepare(d, a.k, a.naive_values)
        rows = ['floor', *a.kinds, 'floor, part', 'naive, part', 'svd, part']
        once(rows[0], d, a.m) # Not counted: it warms the page cache
        runs = {o:[] for o in rows}
        for _ in range(a.turns):
            for o in rows: runs[o].append(once(o, d, a.m))
        sizes = {o:(d/o/'0.safetensors').stat().st_size for o in ('whole','part')}
        print(f"K = {a.k}, M = {a.m}, {sizes['whole']:,} bytes a model, {sizes['part']:,} in part, median of {a.turns} turns; "
            f"Python {platform.python_version()}\n")
        print('| row | CPU s | least, most | s | anonymous MB | CPU ÷ floor |\n|---|---|---|---|---|---|')
        cpu = {o:statistics.median(u+s for u,s,*_ in r) for o,r in runs.items()}
        for o,r in runs.items():
            total = [u+s for u,s,*_ in r]
            print(f"| {o} | {cpu[o]:.2f} | {min(total):.2f}, {max(total):.2f} | {statistics.median(w for *_,w,_ in r):.2f} | "
                f"{max(m for *_,m in r)/1e6:.0f} | {cpu[o]/cpu['floor, part' if o.endswith('part') else 'floor']:.2f} |", flush=True)
        for o in ('naive','svd'): once(f'{o}, part', d, a.m, d/o)
        print('\nlost of the squared lengths: naive {:.7f}, svd {:.7f}'.format(*lost(d/'part', d/'naive', d/'svd')))


if __name__=='__main__': sys.exit(main())
