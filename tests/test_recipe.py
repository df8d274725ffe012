"""mergekit's configurations: what each setting means, against mergekit's arithmetic written out here in NumPy, and what is refused.
`benchmarks/recipes.py` compares with mergekit itself."""
import json
import numpy as np
import pytest
import torch
import yaml
from merginguriel.base_model import add_head, head_keys, model_labels
from merginguriel.checkpoint import open_checkpoint, save_checkpoint
from merginguriel.core import IncompatibleError, MissingDataError
from merginguriel.merge import merge, methods
from merginguriel.recipe import *
from merginguriel.toy import toy_base, toy_sources

weights = {'de-DE':.2,'en-US':.5,'sq-AL':.3}

@pytest.fixture
def here(tmp_path, monkeypatch):
    "The toy models as classifiers with one base, in the working folder"
    monkeypatch.setenv('MERGINGURIEL_CACHE', str(tmp_path/'cache'))
    monkeypatch.chdir(tmp_path)
    toy_sources(tmp_path/'models')
    toy_base(tmp_path/'encoder')
    add_head('encoder', ['lights','music'], tmp_path/'base')
    return tmp_path

def recipe(method, w=weights, base='base', **parameters):
    c = dict(merge_method=method, models=[dict(model=f'models/{k}', parameters=dict(weight=v)) for k,v in w.items()], parameters=parameters)
    return c|(dict(base_model=base) if base else {})

def arrays(path): c = open_checkpoint(path); return {k:c.read(k).double().numpy() for k in c}

def theirs(method, base, fts, w, density=1., lam=1., normalize=False):
    "One tensor as mergekit merges it"
    taus = np.stack([f-base for f in fts])
    if method=='ties':
        k = max(1, int(density*base.size))
        for t in taus: t.reshape(-1)[np.argsort(-np.abs(t.reshape(-1)))[k:]] = 0
    v = np.array(w).reshape(-1, *[1]*base.ndim)
    x,share = v*taus,np.broadcast_to(v, taus.shape)
    if method=='ties':
        keep = np.sign(x)==np.where(x.sum(0)>=0, 1, -1)
        x,share = x*keep,share*keep
    total = share.sum(0)
    return base+lam*x.sum(0)/(np.where(np.abs(total)<1e-8, 1, total) if normalize else 1)

@pytest.mark.parametrize('method,given,meant', [
    ('task_arithmetic', {}, {}), ('task_arithmetic', {'lambda':.3}, dict(lam=.3)),
    ('task_arithmetic', dict(normalize=True), dict(normalize=True)), ('task_arithmetic', dict(density=.5), {}),
    ('ties', {}, dict(normalize=True)), ('ties', dict(density=.25), dict(density=.25, normalize=True)),
    ('ties', {'density':'5e-1', 'lambda':2, 'normalize':0}, dict(density=.5, lam=2, normalize=False))])
def test_settings_mean_what_they_mean_in_mergekit(here, method, given, meant):
    w = dict(zip(weights, (.3,.6,.4))) # They do not sum to 1
    r = run_recipe(recipe(method, w, **given), 'out')
    got,base,fts = arrays('out'),arrays('base'),[arrays(f'models/{k}') for k in w]
    for k in got:
        if k not in head_keys(got):
            want = theirs(method, base[k], [f[k] for f in fts], list(w.values()), **meant)
            np.testing.assert_allclose(got[k], want, atol=1e-6, err_msg=k)
        else: np.testing.assert_allclose(got[k], sum(o*f[k] for o,f in zip(w.values(), fts))/1.3, atol=1e-6)
    assert r.path.name=='out' and r.record['recipe']==recipe(method, w, **given)==json.loads((here/'out/merge_record.json').read_text())['recipe']
    assert any('head policy' in o for o in r.record['notes'])

def test_linear(here):
    r = run_recipe(recipe('linear', {'de-DE':1,'en-US':3}, base=None), 'out')
    a,b,got = arrays('models/de-DE'),arrays('models/en-US'),arrays('out')
    for k in got: np.testing.assert_allclose(got[k], .25*a[k]+.75*b[k], atol=1e-6)
    with pytest.raises(ValueError, match='sum to 4, scales the whole model'): read_recipe(recipe('linear', {'a':1,'b':3}, normalize=False))
    assert read_recipe(recipe('linear', normalize=False)).weights==weights
    c = recipe('linear', base='base') # mergekit counts the base as a source if it is listed
    c['models'].append(dict(model='base', parameters=dict(weight=1)))
    r = read_recipe(c)
    assert r.base is None and r.weights==weights|{'base':1}

def test_the_nearer_setting_counts(here):
    c = recipe('ties', weight=9, density=.5)
    del c['models'][0]['parameters']
    c['models'][1]['parameters']['density'] = c['models'][2]['parameters']['density'] = .5
    r = read_recipe(c)
    assert r.weights==weights|{'de-DE':9} and r.hp['density']==.5
    c['models'][1]['parameters']['density'] = .4
    with pytest.raises(ValueError, match=r'different densities, \[0.4, 0.5\]'): read_recipe(c)

def test_whole_slices(here):
    c = recipe('ties', density=.5)
    s = dict(c|dict(slices=[dict(sources=[o|dict(layer_range=[0,1]) for o in c['models']])]))
    del s['models']
    assert digest(s, 'a')==digest(c, 'b')
    s['slices'][0]['sources'][2]['layer_range'] = [1,1]
    with pytest.raises(ValueError, match=r'models/sq-AL has 1 layers, and the recipe takes \[1, 1\]'): run_recipe(s, 'c')
    with pytest.raises(ValueError, match='recipe of 2 slices stacks layers'): read_recipe(s|dict(slices=s['slices']*2))
    with pytest.raises(ValueError, match='either models or slices'): read_recipe(s|c)
    assert not (here/'c').exists()

def digest(c, out): return open_checkpoint(run_recipe(c, out).path).digest()

def test_the_base_among_the_models_is_no_source(here):
    c = recipe('ties')
    c['models'].insert(0, dict(model='base'))
    r = read_recipe(c)
    assert list(r.sources)==list(weights) and 'base is the base' in r.notes[0]
    assert digest(c, 'a')==digest(recipe('ties'), 'b')

def test_slerp_and_dare_are_translated():
    two = dict(merge_method='slerp', base_model='x/de', models=[dict(model='x/de'),dict(model='x/en')], parameters=dict(t=.25))
    r = read_recipe(two)
    assert (r.method,r.weights,r.hp,r.base)==('slerp',{'de':.75,'en':.25},dict(of='models', scope='tensor'),'x/de')
    assert read_recipe(two|dict(models=[dict(model='x/en')])).weights==r.weights
    for bad in ({'base_model':'x/other'}, {'models':[dict(model=f'x/{o}') for o in ('de','en','sq')]}, {'base_model':None}):
        with pytest.raises(ValueError, match='from base_model to one other'): read_recipe(two|bad)
    with pytest.raises(ValueError, match='slerp needs a t'): read_recipe(two|dict(parameters={}))
    r = read_recipe(recipe('dare_linear', density=.25, **{'lambda':2}))
    assert (r.method,r.weights,r.hp)==('dare',weights,dict(drop=.75, then='task_arithmetic', hp=dict(scale=2.), rescale='l1'))
    assert any('drawn from' in o for o in r.notes)
    r = read_recipe(recipe('dare_ties', density=.25, rescale=False))
    assert r.hp==dict(drop=.75, then='ties', hp=dict(density=1., scale=1., combine='sum'), rescale='none')
    assert read_recipe(recipe('dare_ties', normalize=True)).hp['hp']['combine']=='mean'

@pytest.mark.skipif('slerp' not in methods, reason='no method slerp is registered')
def test_slerp(here):
    c = dict(merge_method='slerp', base_model='models/de-DE', models=[dict(model='models/de-DE'),dict(model='models/en-US')], parameters=dict(t=.25))
    run_recipe(c, 'out')
    a,b,got = arrays('models/de-DE'),arrays('models/en-US'),arrays('out')
    for k in got:
        cos = (a[k]*b[k]).sum()/max(np.linalg.norm(a[k])*np.linalg.norm(b[k]), 1e-30)
        angle = np.arccos(np.clip(cos, -1, 1))
        f,g = (.75,.25) if abs(cos)>.9995 or k in head_keys(got) else np.sin(np.array([.75,.25])*angle)/np.sin(angle)
        np.testing.assert_allclose(got[k], f*a[k]+g*b[k], atol=2e-5, err_msg=k)

@pytest.mark.skipif('dare' not in methods, reason='no method dare is registered')
@pytest.mark.parametrize('method,then', [('dare_linear','task_arithmetic'),('dare_ties','ties')])
def test_dare(here, method, then):
    "Nothing dropped is the method alone; with drops, what is left is scaled so that each tensor keeps its sum of magnitudes"
    run_recipe(recipe(method, density=1., **{'lambda':.5}), 'all')
    got,base,fts = arrays('all'),arrays('base'),[arrays(f'models/{k}') for k in weights]
    for k in set(got)-set(head_keys(got)):
        want = theirs(then, base[k], [f[k] for f in fts], list(weights.values()), lam=.5)
        np.testing.assert_allclose(got[k], want, atol=1e-6, err_msg=k)
    run_recipe(recipe(method, {'de-DE':1.}, density=.5), 'half')
    half,k = arrays('half'),'roberta.embeddings.word_embeddings.weight'
    before,after = (np.abs(o[k]-base[k]) for o in (fts[0],half))
    np.testing.assert_allclose(after.sum(), before.sum(), rtol=1e-4)
    assert .3<(after<1e-6).mean()<.7

def test_a_base_without_a_head_and_an_adapter(here):
    "What mergekit cannot do: the head is there, and an adapter is a source, as a folder of its own or as base+adapter"
    a = here/'lora'
    a.mkdir()
    config = dict(peft_type='LORA', r=1, lora_alpha=2, base_model_name_or_path='encoder', modules_to_save=['classifier'])
    (a/'adapter_config.json').write_text(json.dumps(config))
    de,q = open_checkpoint('models/de-DE'),'roberta.encoder.layer.0.attention.self.query'
    t = {k:de.read(k) for k in head_keys(de)}|{f'{q}.lora_A.weight':torch.ones(1,16), f'{q}.lora_B.weight':torch.ones(16,1)}
    save_checkpoint({f'base_model.model.{k}':v for k,v in t.items()}, a/'adapter_model.safetensors')
    c = recipe('task_arithmetic', {'en-US':.5}, base='encoder')
    c['models'].append(dict(model='lora', parameters=dict(weight=.5)))
    run_recipe(c, 'out', labels=['lights','music'])
    got,en,base = arrays('out'),arrays('models/en-US'),arrays('base')
    np.testing.assert_allclose(got[f'{q}.weight'], base[f'{q}.weight']+.5*(en[f'{q}.weight']-base[f'{q}.weight'])+.5*2, atol=1e-5)
    for k in head_keys(got): np.testing.assert_allclose(got[k], .5*en[k]+.5*de.read(k).numpy(), atol=1e-6)
    c['models'][1]['model'] = 'encoder+lora'
    assert digest_of(c)==open_checkpoint('out').digest()

def digest_of(c): return open_checkpoint(run_recipe(c, 'again', labels=['lights','music']).path).digest()

@pytest.mark.parametrize('keys,dtype', [(dict(dtype='bfloat16'),torch.bfloat16), (dict(dtype='bfloat16', out_dtype='float16'),torch.float16),
    (dict(dtype='float32'),torch.float32), ({},torch.float32)])
def test_type_of_the_result(here, keys, dtype):
    from transformers import AutoModelForSequenceClassification
    r = run_recipe(recipe('ties')|keys, 'out')
    want,got = open_checkpoint(run_recipe(recipe('ties'), 'plain').path),open_checkpoint('out')
    assert all(torch.equal(got.read(k), want.read(k).to(dtype)) for k in want)
    assert r.record['dtypes']==[str(dtype)[6:]] and AutoModelForSequenceClassification.from_pretrained('out').dtype==dtype
    with pytest.raises(ValueError, match="float64; got 'int8'"): read_recipe(recipe('ties')|dict(dtype='int8'))

def test_tokenizer(here):
    for p in ('models/en-US','models/sq-AL','base'):
        for f in ('tokenizer.json','tokenizer_config.json'): (here/p/f).unlink()
    run_recipe(recipe('ties'), 'none', replace=True)
    assert (here/'none/tokenizer.json').read_text()==(here/'models/de-DE/tokenizer.json').read_text() # Of the one that has it
    for p in ('base','models/sq-AL'): (here/p/'tokenizer.json').write_text((here/'models/de-DE/tokenizer.json').read_text()+' ')
    for words in (dict(tokenizer_source='base'), dict(tokenizer=dict(source='models/sq-AL'))):
        run_recipe(recipe('ties')|words, 'out', replace=True)
        assert (here/'out/tokenizer.json').read_text()==(here/'base/tokenizer.json').read_text()
    assert read_recipe(recipe('ties')|dict(tokenizer_source='union')).tokenizer is None
    with pytest.raises(ValueError, match="or a model of the recipe; got 'other'"): read_recipe(recipe('ties')|dict(tokenizer_source='other'))

@pytest.mark.parametrize('change,says', [
    (dict(merge_method='nuslerp'), "merge_method is one of linear, task_arithmetic, ties, dare_linear, dare_ties, slerp; got 'nuslerp'"),
    (dict(modules={}), "the top of the recipe has 'modules'; supported there: merge_method"), (dict(base_model=None), 'ties needs base_model'),
    (dict(models=[]), 'names each model'), (dict(models=[dict(model=dict(path='x'))]), 'names each model'), (dict(models=['x']), "got 'x'"),
    (dict(models=[dict(model='x', weight=1)]), "a model of the recipe has 'weight'; supported there: model, parameters"),
    (dict(models=[dict(model='x', parameters=dict(normalize=True))]), "parameters of x of the recipe has 'normalize'; supported there: weight, density"),
    (dict(models=[dict(model='x')]), 'ties needs a weight'), (dict(models=[dict(model='x', parameters=dict(weight='big'))]), "weight is a number; got 'big'"),
    (dict(models=[dict(model='x', parameters=dict(weight=1))]*2), 'a model stands twice'), (dict(tokenizer=dict(tokens={})), "'tokens'"),
    (dict(parameters=dict(t=1)), "'t'; supported there: weight, density, normalize"), (dict(parameters=dict(density=[.1,.9])), 'density is a list by filter or depth'),
    (dict(parameters=dict(density=[dict(filter='mlp', value=1), dict(value=.5)])), 'give one number'),
    (dict(parameters=dict(density=.5, rescale=True)), 'ties with rescale'), (dict(parameters=dict(density=float('nan'))), 'got nan')])
def test_what_is_refused(change, says):
    with pytest.raises(ValueError, match=says.replace('(', r'\(')): read_recipe(recipe('ties')|change)

def test_files(here):
    (here/'r.yaml').write_text(yaml.safe_dump(recipe('ties')))
    assert digest('r.yaml', 'a')==digest(read_recipe('r.yaml'), 'b')
    for text,says in [('merge_method: !!python/object:os.system {}', 'not YAML'), ('a: [', 'not YAML'), ('- 1', "got '\\[1\\]'")]:
        (here/'bad.yaml').write_text(text)
        with pytest.raises(ValueError, match=says): read_recipe('bad.yaml')
    with pytest.raises(FileNotFoundError): read_recipe('absent.yaml')
    with pytest.raises(MissingDataError, match='nowhere'): run_recipe(recipe('ties', base='./nowhere'), 'c')
    with pytest.raises(FileExistsError, match='another folder'): run_recipe('r.yaml', 'models/de-DE', replace=True)
    with pytest.raises(FileExistsError): run_recipe('r.yaml', 'a')
    assert len(open_checkpoint('models/de-DE'))==len(open_checkpoint('a')) and model_labels('a')==['lights','music']
    assert not [o for o in here.iterdir() if o.name.startswith('.')]
