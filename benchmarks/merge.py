"""Merging K models of XLM-R base's size on disk: CPU seconds, seconds and memory of a whole process, against the files themselves.

    python benchmarks/merge.py                                     # a few methods, float32 and bfloat16
    python benchmarks/merge.py --methods all --mergekit mergekit-yaml   # every method; and mergekit, where that command exists

The checkpoints are those of gram.py (278 M values, every true cosine 0.2), made in a temporary folder and deleted. *floor* maps the
K + 1 files, sums their values and writes one file: no merge does less. Each row is a process of its own, and all CPU seconds of it
count, those of its imports too (*imports* is a process that does nothing else). Rows take turns, so that a busy machine slows all.
Memory is the highest RssAnon of the process, sampled from outside: what it has allocated itself, without the pages of mapped files."""
import argparse,json,os,platform,shutil,statistics,subprocess,sys,tempfile,threading,time
from pathlib import Path
import numpy as np

# What is run: name -> (method, hyperparameters, number of sources or None for K)
ROWS = dict(linear=('linear',{},None), task_arithmetic=('task_arithmetic',{},None), ties=('ties',{},None),
    ties_tensor=('ties',dict(scope='tensor'),None), dare=('dare',dict(drop=.8),None), breadcrumbs=('breadcrumbs',{},None),
    slerp=('slerp',{},2), localize_and_stitch=('localize_and_stitch',{},None),
    localize_and_stitch_all=('localize_and_stitch',dict(keys='all'),None)) # With the embeddings, which are two thirds of the values
MERGEKIT = dict(linear='linear', task_arithmetic='task_arithmetic', ties='ties', dare='dare_linear', slerp='slerp',
    breadcrumbs='breadcrumbs') # Its `ties` trims each tensor by itself, ours the whole model


def prepare(folder, k):
    "Folders `float32/i` and `bfloat16/i`, 0 being the base"
    import torch
    from transformers import XLMRobertaConfig
    from merginguriel.checkpoint import CheckpointWriter,open_checkpoint
    from gram import make
    make(folder, k)
    config = XLMRobertaConfig(vocab_size=250002, max_position_embeddings=514, type_vocab_size=1, num_labels=60, layer_norm_eps=1e-5,
        architectures=['XLMRobertaForSequenceClassification'])
    for i in range(k+1):
        full,half = folder/'float32'/str(i),folder/'bfloat16'/str(i)
        for d,dt in ((full,'float32'),(half,'bfloat16')):
            d.mkdir(parents=True)
            config.dtype = dt
            config.save_pretrained(d)
        (folder/f'{i}.safetensors').rename(full/'model.safetensors')
        c = open_checkpoint(full)
        with CheckpointWriter(half, {n:(torch.bfloat16,c.shape(n)) for n in c}) as w:
            for n in c: w.write(n, c.read(n).to(torch.bfloat16))


def models(folder, k):
    "Folders of `k` sources; where there are fewer, the same ones under other names"
    have = sum(o.name.isdigit() for o in folder.iterdir())-1
    return [folder/str(i%have+1) for i in range(k)]

def floor(folder, k, out):
    "Map and sum K + 1 files, write one"
    files = [o/'model.safetensors' for o in (folder/'0', *models(folder, k))]
    maps = [np.memmap(f, dtype=np.uint64, mode='r', offset=8, shape=(os.path.getsize(f)-8)//8) for f in files]
    with open(out, 'wb') as f:
        for a in range(0, len(maps[0]), 1<<17):
            for m in maps: m[a:a+(1<<17)].sum()
            f.write(maps[0][a:a+(1<<17)])

def ours(folder, k, out, method, hp):
    "One merge, as a user runs it"
    from merginguriel.runner import lean_process,passive_threads
    lean_process()
    passive_threads()
    from merginguriel.merge import merge
    merge(folder/'0', {f's{i}':o for i,o in enumerate(models(folder, k))}, out, method, **hp)

def recipe(method, folder, k):
    "The same merge as a configuration of mergekit"
    base,paths = str(folder/'0'),[str(folder/str(i)) for i in range(1, k+1)]
    one = dict(linear=dict(weight=1/k), task_arithmetic=dict(weight=.3), slerp={}, ties=dict(weight=1., density=.2),
        dare_linear=dict(weight=.3, density=.2), breadcrumbs=dict(weight=.3, density=.2, gamma=.1))[method]
    c = dict(merge_method=method, models=[dict(model=p, parameters=one) for p in paths], dtype=folder.name)
    if method=='slerp': c |= dict(parameters=dict(t=.5))
    return c if method=='linear' else c|dict(base_model=paths[0] if method=='slerp' else base)


def anonymous(pid):
    "Bytes that process `pid` has allocated"
    try: lines = Path(f'/proc/{pid}/status').read_text().splitlines()
    except OSError: return 0
    return sum(int(o.split()[1])*1024 for o in lines if o.startswith('RssAnon'))

def measured(args):
    "CPU seconds, user and system, seconds and peak of anonymous memory of one process"
    start,peak = time.perf_counter(),0
    p = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    reader = threading.Thread(target=lambda: said.append(p.stdout.read()), daemon=True)
    reader.start()
    while True:
        pid,status,use = os.wait4(p.pid, os.WNOHANG)
        if pid: break
        peak = max(peak, anonymous(p.pid))
        time.sleep(.01)
    reader.join()
    if status: raise RuntimeError(f'{args[-6:]} ended with {status}: {said[0][-2000:]}')
    return use.ru_utime,use.ru_stime,time.perf_counter()-start,peak

def once(row, folder, k, mergekit):
    "Run one row and drop what it wrote"
    what,_,dt = row.partition(':')
    out,python = folder/'out',[sys.executable, __file__, '--child']
    if what.startswith('mergekit '):
        method = MERGEKIT[what[9:]]
        (folder/'recipe.json').write_text(json.dumps(recipe(method, folder/dt, ROWS[what[9:]][2] or k)))
        args = [mergekit, str(folder/'recipe.json'), str(out)]
    else: args = [*python, what, str(folder/dt), str(out), '--k', str(k)]
    try: return measured(args)
    finally: shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)


def child(what, folder, out, k):
    if what=='floor': floor(Path(folder), k, out)
    elif what=='imports': from merginguriel.merge import methods; len(methods)
    else:
        method,hp,n = ROWS.get(what, (what,{},None))
        ours(Path(folder), n or k, out, method, hp)

def main():
    p = argparse.ArgumentParser(description='merges of checkpoints on disk against reading and writing them')
    p.add_argument('--k', type=int, default=5, help='number of sources')
    p.add_argument('--methods', nargs='+', default=list(ROWS), help="rows, or 'all' for every registered method besides")
    p.add_argument('--dtypes', nargs='+', default=['float32','bfloat16'], help='types of the checkpoints')
    p.add_argument('--turns', type=int, default=3, help='turns of each row')
    p.add_argument('--mergekit', default=None, help='the command mergekit-yaml, to measure it too')
    p.add_argument('--mergekit-turns', type=int, default=1, help='turns of its rows')
    p.add_argument('--folder', default=None, help='where the models are made and kept; used as it is if it has them')
    p.add_argument('--child', nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child: return child(*a.child, a.k)
    names = [*ROWS, *sorted(set(methods())-set(ROWS))] if a.methods==['all'] else a.methods
    with tempfile.TemporaryDirectory() if a.folder is None else _kept(a.folder) as d:
        d = Path(d)
        if not (d/'bfloat16').exists(): prepare(d, a.k)
        for dt in a.dtypes: table(d, a.k, names, dt, a)

def methods():
    "Names of the methods that need nothing measured and take any number of sources"
    from merginguriel.merge import check_hyperparameters,methods
    def ready(m):
        try: check_hyperparameters(m, {} if methods.traits(m).deterministic else {'seed':0}, 5)
        except ValueError: return False
        return True
    return [m for m in methods if ready(m)]

class _kept(str):
    "A folder that stays"
    def __enter__(self):
        Path(self).mkdir(parents=True, exist_ok=True)
        return self
    def __exit__(self, *_): pass

def table(d, k, names, dt, a):
    "Measure and print the rows of one type"
    rows = [f'floor:{dt}', f'imports:{dt}', *(f'{o}:{dt}' for o in names)]
    peers = [f'mergekit {o}:{dt}' for o in names if a.mergekit and o in MERGEKIT]
    once(rows[0], d, k, None) # Not counted: it warms the page cache
    runs = {o:[] for o in rows+peers}
    for i in range(a.turns):
        for o in rows + (peers if i<a.mergekit_turns else []): runs[o].append(once(o, d, k, a.mergekit))
    cpu = {o:statistics.median(u+s for u,s,*_ in r) for o,r in runs.items()}
    print(f'\n{dt}, K = {k}, median of {a.turns} turns{f" ({a.mergekit_turns} of mergekit)" if peers else ""}; Python '
        f'{platform.python_version()}\n')
    print('| row | CPU s | least, most | s | anonymous MB | CPU ÷ floor | without imports | mergekit ÷ ours |\n|---|---|---|---|---|---|---|---|')
    for o,r in runs.items():
        what,total = o.partition(':')[0],[u+s for u,s,*_ in r]
        own = 'mergekit' not in what and what not in ('floor','imports')
        peer = cpu.get(f'mergekit {o}') if own else None
        print(f"| {what} | {cpu[o]:.2f} | {min(total):.2f}, {max(total):.2f} | {statistics.median(w for *_,w,_ in r):.2f} | "
            f"{max(m for *_,m in r)/1e6:.0f} | {cpu[o]/cpu[rows[0]]:.2f} | {f'{(cpu[o]-cpu[rows[1]])/cpu[rows[0]]:.2f}' if own else ''} | "
            f"{f'{peer/cpu[o]:.1f}' if peer else ''} |", flush=True)


if __name__=='__main__': sys.exit(main())
