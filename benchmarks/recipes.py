"""Does a mergekit recipe give what mergekit gives?

    python benchmarks/recipes.py PATH/OF/mergekit-yaml

writes a base and four fine-tuned XLM-R classifiers of a few thousand values (one head for all, the same class for the base, which
is what mergekit needs), runs each recipe through mergekit in a process of its own and through `run_recipe`, and prints the largest
difference of a value, in the encoder and in the head. Methods that are not registered are left out and named."""
import argparse, json, os, subprocess, tempfile
from pathlib import Path
import torch
import transformers as tf
import yaml
from merginguriel.base_model import head_keys
from merginguriel.checkpoint import open_checkpoint
from merginguriel.merge import methods
from merginguriel.recipe import read_recipe, run_recipe

names = ['de-DE','en-US','sq-AL','vi-VN']
weights = dict(zip(names, (.1,.4,.3,.2)))

def models(out):
    "Write the models"
    ids = dict(enumerate(['alarm','news','weather']))
    cfg = tf.XLMRobertaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, id2label=ids, label2id={v:k for k,v in ids.items()})
    torch.manual_seed(0)
    base = tf.XLMRobertaForSequenceClassification(cfg)
    base.save_pretrained(out/'base')
    for i,name in enumerate(names):
        m = tf.XLMRobertaForSequenceClassification(cfg)
        m.load_state_dict(base.state_dict())
        g = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in m.parameters(): p.add_(torch.randn(p.shape, generator=g)*.003)
        m.save_pretrained(out/name)

def recipe(method, chosen=names, **parameters):
    "A recipe over `chosen`; `each`: settings of the models, other than weights"
    each = parameters.pop('each', {})
    if method=='slerp': return dict(merge_method=method, base_model=chosen[0], models=[dict(model=o) for o in chosen],
        parameters=parameters, dtype='float32')
    return dict(merge_method=method, **({} if method=='linear' else dict(base_model='base')), dtype='float32', parameters=parameters,
        models=[dict(model=o, parameters=dict(weight=weights[o])|each) for o in chosen])

recipes = {
    'linear':recipe('linear'), 'task_arithmetic, lambda 1':recipe('task_arithmetic'),
    'task_arithmetic, lambda .3':recipe('task_arithmetic', **{'lambda':.3}),
    'task_arithmetic, normalize':recipe('task_arithmetic', chosen=names[1:], normalize=True),
    'ties, density .2':recipe('ties', density=.2), 'ties, density .5':recipe('ties', each=dict(density=.5)),
    'ties, density .5, no normalize, lambda .7':recipe('ties', density=.5, normalize=False, **{'lambda':.7}),
    'slerp, t .3':recipe('slerp', names[:2], t=.3), 'dare_linear, density 1':recipe('dare_linear', density=1.),
    'dare_ties, density 1':recipe('dare_ties', density=1.), 'dare_ties, density 1, normalize':recipe('dare_ties', density=1., normalize=True)}

def difference(a, b, keys): return max(float((a.read(k).double()-b.read(k).double()).abs().max()) for k in keys)

def main():
    p = argparse.ArgumentParser()
    p.add_argument('mergekit', help='the mergekit-yaml program')
    program = Path(p.parse_args().mergekit).resolve()
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as d:
        os.chdir(d)
        models(Path(d))
        env = {k:v for k,v in os.environ.items() if k!='PYTHONPATH'} | dict(HF_HUB_OFFLINE='1')
        print('| recipe | encoder | head |\n|---|---|---|')
        for i,(name,r) in enumerate(recipes.items()):
            if read_recipe(r).method not in methods:
                print(f'| {name} | not registered | |')
                continue
            Path(f'{i}.yaml').write_text(yaml.safe_dump(r, sort_keys=False))
            done = subprocess.run([program, f'{i}.yaml', f'theirs{i}', '--no-write-model-card'], env=env, capture_output=True, text=True)
            if done.returncode: raise SystemExit(f'{name}: {done.stderr[-1500:]}')
            run_recipe(f'{i}.yaml', f'ours{i}')
            a,b = open_checkpoint(f'ours{i}'),open_checkpoint(f'theirs{i}')
            assert a.keys()==b.keys() and {a.dtype(k) for k in a}=={b.dtype(k) for k in b}
            head = head_keys(a)
            print(f'| {name} | {difference(a, b, [k for k in a if k not in head]):.1e} | {difference(a, b, head):.1e} |', flush=True)

if __name__=='__main__': main()
