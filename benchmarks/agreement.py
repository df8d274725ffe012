"""Do merges here give what mergekit and FusionBench give on the same files?

    python benchmarks/agreement.py PATH/OF/python          # of an environment with mergekit and fusion-bench
    python benchmarks/agreement.py PATH/OF/python --base BASE --sources M1 M2 M3 M4 …

Without folders of one's own, the mini base is fine-tuned for four languages of the embedded set, in a minute. The classifier is left
out: it is merged by the head policy here (recipes.py compares whole models). Each row is one merge by a peer, in its own interpreter, and
the same one by `merge_state_dicts`, from the same float32 or bfloat16 files. *largest* is the largest difference of a value, *relative*
the norm of all differences over the norm of what the merge changes in the base, and *beyond rounding* the share of values that differ by
more than four units in the last place of the largest of what went into them. A peer that cannot do it is quoted."""
import argparse,json,math,os,subprocess,sys,tempfile,traceback
from pathlib import Path

K,DENSITY = 4,.05 # Sources; and what TIES keeps, of files in which 88 % of the values, the word vectors, are frozen
weights = [.1,.4,.3,.2]
# Row -> (the peer's method and settings, our method and hyperparameters, sources, equal weights)
mergekit = {
    'linear':('linear',{}, 'linear',{}),
    'task arithmetic, λ .3':('task_arithmetic',{'lambda':.3}, 'task_arithmetic',dict(scale=.3)),
    'TIES':('ties',dict(density=DENSITY), 'ties',dict(density=DENSITY, scope='tensor')),
    'TIES; ours: whole model':('ties',dict(density=DENSITY), 'ties',dict(density=DENSITY)),
    'DARE (p 0) then linear':('dare_linear',dict(density=1.), 'dare',dict(drop=0, hp=dict(scale=1.))),
    'DARE (p 0) then TIES':('dare_ties',dict(density=1., normalize=True), 'dare',dict(drop=0, then='ties', hp=dict(density=1.))),
    'Breadcrumbs':('breadcrumbs',{'density':.3,'gamma':.1,'lambda':.3}, 'breadcrumbs',dict(density=.3, gamma=.1, scope='tensor', hp=dict(scale=.3))),
    'DELLA (p 0)':('della',dict(density=1.), 'della',dict(drop=0, window=0)),
    'SLERP':('slerp',dict(t=.3), 'slerp',{}),
    'NuSLERP: of task vectors':('nuslerp',{}, 'slerp',dict(of='task_vectors', straight=1.)),
    'Karcher mean':('karcher',{}, 'karcher',{}),
    'Karcher mean; theirs in float64, tol 1e-9':('karcher',dict(max_iter=100, tol=1e-9, dtype='float64'), 'karcher',{}),
    'Model Stock':('model_stock',{}, 'model_stock',{})}
# Row -> (FusionBench's class and arguments, our method and hyperparameters, sources, whether they have weights)
fusion = {
    'simple average':('SimpleAverageAlgorithm',{}, 'linear',{}, K, False),
    'weighted average':('WeightedAverageAlgorithm',dict(normalize=True, weights=weights, verbose=False), 'linear',{}, K, True),
    'task arithmetic, λ .3':('TaskArithmeticAlgorithm',dict(scaling_factor=.3), 'task_arithmetic',dict(scale=.3), K, False),
    'TIES, sum':('TiesMergingAlgorithm',dict(scaling_factor=.3, threshold=DENSITY, remove_keys=[], merge_func='sum'),
        'ties',dict(density=DENSITY, scale=.3, combine='sum', trim_rule='kth_ge', zero='official'), K, False),
    'TIES, mean':('TiesMergingAlgorithm',dict(scaling_factor=1., threshold=DENSITY, remove_keys=[], merge_func='mean'),
        'ties',dict(density=DENSITY, trim_rule='kth_ge', zero='official'), K, False),
    'TIES, mean; ours: defaults':('TiesMergingAlgorithm',dict(scaling_factor=1., threshold=DENSITY, remove_keys=[], merge_func='mean'),
        'ties',dict(density=DENSITY), K, False),
    'DARE (p 0), task arithmetic':('DareTaskArithmetic',dict(scaling_factor=.3, sparsity_ratio=0., only_on_linear_weights=False),
        'dare',dict(drop=0, hp=dict(scale=.3)), K, False),
    'DARE (p 0), TIES':('DareTiesMerging',dict(sparsity_ratio=0., only_on_linear_weights=False, rescale=True, scaling_factor=1.,
        threshold=DENSITY, remove_keys=[], merge_func='mean'),
        'dare',dict(drop=0, then='ties', hp=dict(density=DENSITY, trim_rule='kth_ge', zero='official')), K, False),
    'SLERP':('SlerpMergeAlgorithm',dict(t=.3), 'slerp',{}, 2, True),
    'Model Stock, K = 2':('ModelStock',{}, 'model_stock',{}, 2, False),
    'Model Stock, K = 4':('ModelStock',{}, 'model_stock',{}, K, False),
    'TSV-M':('TaskSingularVectorMerging',{}, 'tsv_m',{}, K, False),
    'Iso-C':('ISO_C_Merge',dict(scaling_factor=1.), 'iso_c',{}, K, False),
    'Iso-CTS':('ISO_CTS_Merge',dict(scaling_factor=1., common_space_fraction=.8), 'iso_cts',{}, K, False),
    'WUDI, 300 steps':('WUDIMerging',dict(iter_num=300), 'wudi',dict(solve='adam'), K, False),
    'WUDI, 300 steps; ours: closed form':('WUDIMerging',dict(iter_num=300), 'wudi',{}, K, False),
    'Consensus, λ .4':('tall masks',dict(tall_mask_lambda=.4), 'consensus',dict(lam=.4), K, False)}
drawn = dict(SLERP=[.7,.3]) # Weights of two


def encoders(folder, base, sources):
    "Folders `DTYPE/base`, `DTYPE/0`, … with the encoders alone, as `XLMRobertaModel`"
    import torch
    from merginguriel.base_model import head_keys
    from merginguriel.checkpoint import open_checkpoint,save_checkpoint
    for name,path in dict(base=base, **{str(i):p for i,p in enumerate(sources)}).items():
        c = open_checkpoint(path)
        heads = set(head_keys(c))
        t = {k.removeprefix('roberta.'):c.read(k) for k in c if k not in heads and c.dtype(k).is_floating_point and not k.startswith('pooler')}
        config = json.loads((Path(path)/'config.json').read_text()) | dict(architectures=['XLMRobertaModel'])
        for dt in ('float32','bfloat16'):
            d = folder/dt/name
            d.mkdir(parents=True)
            save_checkpoint({k:v.to(getattr(torch, dt)) for k,v in t.items()}, d)
            (d/'config.json').write_text(json.dumps(config|dict(dtype=dt)))

def finetuned(folder):
    "The mini base with a head, and four fine-tuned models"
    from merginguriel.data import label_names,load_intents
    from merginguriel.base_model import add_head
    from merginguriel.mini import mini_path
    from merginguriel.train import finetune
    data = {o:load_intents('home', o, 'train') for o in ('de-DE','en-US','cy-GB','vi-VN')}
    base = add_head(mini_path(), label_names(next(iter(data.values()))), seed=0)
    return base,[finetune(base, d, folder/o, seed=0, progress=False) for o,d in data.items()]

# In the peers' interpreter: nothing of ours is imported
def by_mergekit(folder, out, method, settings):
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    if method in ('slerp','nuslerp'): n,ws = 2,[.7,.3]
    else: n,ws = K,[1/K]*K if method in ('karcher','model_stock') else weights
    models = [dict(model=str(folder/str(i))) for i in range(n)]
    if method not in ('slerp','karcher','model_stock'):
        for m,w in zip(models, ws): m['parameters'] = dict(weight=w)
    settings = dict(settings)
    c = dict(merge_method=method, models=models, dtype=settings.pop('dtype', folder.name), out_dtype=folder.name, parameters=settings)
    if method not in ('linear','karcher'): c |= dict(base_model=str(folder/('0' if method=='slerp' else 'base')))
    run_merge(MergeConfiguration.model_validate(c), str(out), options=MergeOptions(copy_tokenizer=False, write_model_card=False))

def by_fusion(folder, out, method, settings, n):
    import torch,transformers,fusion_bench.method as fm
    from safetensors.torch import save_file
    load = lambda o: transformers.AutoModel.from_pretrained(folder/o, add_pooling_layer=False, dtype=getattr(torch, folder.name))
    names = [str(i) for i in range(n)]
    if method=='tall masks': return save_file(by_masks(load, names, **settings), out)
    from fusion_bench import BaseModelPool
    if method in ('TaskSingularVectorMerging','ISO_C_Merge','ISO_CTS_Merge','WUDIMerging'):
        settings = settings|dict(exclude_keys=[k for k in load('base').state_dict() if 'embeddings' in k])
    base = {} if method in ('SimpleAverageAlgorithm','WeightedAverageAlgorithm','SlerpMergeAlgorithm') else {'_pretrained_':load('base')}
    m = getattr(fm, method)(**settings).run(BaseModelPool(base|{o:load(o) for o in names}))
    save_file({k:v.detach().clone().contiguous() for k,v in m.state_dict().items()}, out)

def by_masks(load, names, tall_mask_lambda):
    "Task arithmetic with FusionBench's masks, and what is in fewer than two left out, as in its `construct_consensus_mask`"
    import torch
    from fusion_bench.method.tall_mask.utils import generate_task_masks
    base,models = load('base').state_dict(),[load(o).state_dict() for o in names]
    out = {}
    for k,b in base.items():
        ft = torch.stack([m[k].flatten() for m in models])
        masks = generate_task_masks(ft-b.flatten(), ft, b.flatten(), tall_mask_lambda=tall_mask_lambda)
        out[k] = b+.3*((ft-b.flatten()).sum(0)*(masks.sum(0)>=2)).view_as(b)
    return out

def peers(folder, which):
    "Run every row for both types; write what fails beside the results"
    for dt in ('float32','bfloat16'):
        for i,(method,settings,*_) in enumerate(mergekit.values() if 'mergekit' in which else ()):
            guarded(by_mergekit, folder, dt, f'mergekit{i}', method, settings)
        for i,(method,settings,_,_,n,_) in enumerate(fusion.values() if 'fusion' in which else ()):
            guarded(by_fusion, folder, dt, f'fusion{i}.safetensors', method, settings, n)

def guarded(f, folder, dt, name, *args):
    out = folder/dt/name
    try: f(folder/dt, out, *args)
    except Exception as e: # The table quotes it
        out.with_suffix('.error').write_text(f'{type(e).__name__}: {e}\n{traceback.format_exc()}')


def compared(ours, theirs, base, sources):
    "Largest difference, relative difference, share of values beyond rounding"
    import torch
    most = square = change = beyond = n = 0
    for k,a in ours.items():
        b,c = theirs[k].double(),base[k].double()
        d = (a.double()-b).abs()
        size = torch.stack([c.abs(), *(s[k].double().abs() for s in sources)]).amax(0)
        most,square,change = max(most, float(d.max())),square+float(d.square().sum()),change+float((a.double()-c).square().sum())
        beyond,n = beyond+int((d>4*torch.finfo(a.dtype).eps*size).sum()),n+d.numel()
        assert theirs[k].dtype==a.dtype
    return most,math.sqrt(square/change),beyond/n

def row(folder, dt, peer, i, name, method, hp, n, ws):
    from merginguriel.checkpoint import open_checkpoint
    from merginguriel.merge import merge_state_dicts
    d,out = folder/dt,folder/dt/(f'{peer}{i}'+'.safetensors'*(peer=='fusion'))
    if (e := d/f'{peer}{i}.error').exists(): return f"{e.read_text().splitlines()[0][:90]}",'',''
    read = lambda p: {k:c.read(k) for c in [open_checkpoint(p)] for k in c}
    base,sources,theirs = read(d/'base'),{str(j):read(d/str(j)) for j in range(n)},read(out)
    ours = merge_state_dicts(base, sources, method, ws and dict(zip(sources, ws)), **hp)
    most,relative,beyond = compared(ours, theirs, base, sources.values())
    return f'{most:.1e}',f'{relative:.1e}',f'{beyond:.1%}' if beyond>.0005 else '< 0.1%' if beyond else '0'

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('python', help='interpreter of an environment with mergekit and fusion-bench')
    p.add_argument('--base', help='folder of an XLM-R classifier or encoder'); p.add_argument('--sources', nargs=K, help='folders of four fine-tuned models')
    p.add_argument('--peers', nargs='+', default=['mergekit','fusion'], choices=['mergekit','fusion'], help='which of the two')
    p.add_argument('--child', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child: return peers(Path(a.child), a.peers)
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        base,sources = (a.base,a.sources) if a.base else finetuned(d/'models')
        encoders(d, base, sources)
        env = {k:v for k,v in os.environ.items() if k!='PYTHONPATH'} | dict(HF_HUB_OFFLINE='1')
        done = subprocess.run([a.python, __file__, a.python, '--child', str(d), '--peers', *a.peers], env=env, capture_output=True, text=True)
        if done.returncode: raise SystemExit(done.stderr[-3000:])
        rows = [('mergekit',i,name,m,hp,2 if t in ('slerp','nuslerp') else K,
            None if t in ('karcher','model_stock') else [.7,.3] if t in ('slerp','nuslerp') else weights)
            for i,(name,(t,_,m,hp)) in enumerate(mergekit.items())]
        rows += [('fusion',i,name,m,hp,n,(drawn.get(name) or weights) if w else None) for i,(name,(_,_,m,hp,n,w)) in enumerate(fusion.items())]
        for peer in a.peers:
            print(f'\n| {dict(mergekit="mergekit", fusion="FusionBench")[peer]} | float32: largest | relative | beyond rounding | '
                'bfloat16: largest | relative | beyond rounding |\n|---|---|---|---|---|---|---|')
            for r in rows:
                if r[0]==peer: print('| '+' | '.join([r[2], *row(d, 'float32', *r), *row(d, 'bfloat16', *r)])+' |', flush=True)
        if os.environ.get('KEEP_ERRORS'): print(*[f'{e}:\n{e.read_text()[-1500:]}' for e in d.rglob('*.error')], sep='\n')

if __name__=='__main__': sys.exit(main())
