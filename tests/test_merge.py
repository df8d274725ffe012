"""Merging checkpoints: what is refused and leaves nothing behind, what the record says, and what becomes of the head."""
import json, math, subprocess, sys
from pathlib import Path
import pandas as pd
import pytest
import torch
from merginguriel.base_model import add_head, head_keys, match_base
from merginguriel.checkpoint import open_checkpoint, save_checkpoint
from merginguriel.core import CheckpointError, IncompatibleError
from merginguriel.merge import merge, merge_cost, merge_state_dicts, methods
from merginguriel.toy import toy_base, toy_sources
from test_laws import given

@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    d = tmp_path_factory.mktemp('toy')
    return toy_base(d/'base'),toy_sources(d/'sources')

@pytest.fixture
def fresh(tmp_path):
    "Models that a test may damage"
    return toy_base(tmp_path/'base'),toy_sources(tmp_path/'sources')

MANY = [m for m in methods if m!='slerp'] # slerp takes two sources, the toy world has three

def tensors(path): c = open_checkpoint(path); return {k:c.read(k) for k in c}
def rewrite(path, change):
    t = tensors(path)
    change(t)
    save_checkpoint(t, path)
def config(path, **kw): (path/'config.json').write_text(json.dumps(json.loads((path/'config.json').read_text())|kw))
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def heads(path): return {k:v for k,v in tensors(path).items() if k in head_keys(tensors(path))}

def measured(method, sources, folder): return given(method, {k:tensors(p) for k,p in sources.items()}, folder)

def refused(tmp_path, error, words, base, sources, *args, **kw):
    with pytest.raises(error) as e: merge(base, sources, tmp_path/'out', *args, **kw)
    for w in words.split('|'): assert w in str(e.value), (w,str(e.value))
    assert not (tmp_path/'out').exists() and not list(tmp_path.glob('.out*')), "a refused merge left something behind"

# ---- bad input

@pytest.mark.parametrize('weights,words', [
    ({'de-DE':1,'en-US':1}, "no weight for ['sq-AL']"), ({'de-DE':1,'en-US':1,'sq-AL':1,'vi-VN':1}, "no source for ['vi-VN']"),
    ([.5,.5], '2 weights for 3 sources'), ([.5,.5,math.nan], 'weight of sq-AL is nan'), ([.5,.5,math.inf], 'inf'),
    ([1,1,-1], 'weight of sq-AL is -1'), ([0,0,0], 'all 3 weights are 0')])
def test_weights(toy, tmp_path, weights, words):
    refused(tmp_path, ValueError, words, *toy, 'linear', weights)
    if isinstance(weights, dict): refused(tmp_path, ValueError, words, *toy, 'linear', pd.Series(weights))

def test_negative_weights_where_they_mean_something(toy, tmp_path):
    refused(tmp_path, ValueError, "head='best'", *toy, 'task_arithmetic', [1,1,-1])
    r = merge(*toy, tmp_path/'out', 'task_arithmetic', [1,1,-1], head='best')
    assert r.weights['sq-AL']==-1

@pytest.mark.parametrize('method,hp,error,words', [
    ('tise', {}, KeyError, 'did you mean ties'), ('ties', dict(densty=.2), TypeError, "'densty'; it takes density"),
    ('ties', dict(density=0), ValueError, 'got 0'), ('ties', dict(density=1.5), ValueError, '(0, 1]; got 1.5'),
    ('ties', dict(density=-.1), ValueError, 'got -0.1'), ('ties', dict(density=math.nan), ValueError, 'got nan'),
    ('ties', dict(combine='median'), ValueError, "mean, sum, max; got 'median'"), ('linear', dict(scale=1), TypeError, 'takes none'),
    ('ties', dict(threshold=.1), TypeError, 'threshold'), ('linear', dict(head='mean'), ValueError, "average, best, base; got 'mean'")])
def test_method_and_hyperparameters(toy, tmp_path, method, hp, error, words): refused(tmp_path, error, words, *toy, method, **hp)

def test_sources_must_be_named(toy, tmp_path):
    refused(tmp_path, ValueError, 'at least one', toy[0], {})
    refused(tmp_path, ValueError, 'dictionary', toy[0], list(toy[1].values()))

@pytest.mark.parametrize('change,error,words', [
    (lambda t: t.pop('roberta.encoder.layer.0.output.dense.weight'), KeyError, 'sq-AL lacks 1 tensor|output.dense.weight'),
    (lambda t: t.update(extra=torch.ones(1)), KeyError, 'sq-AL has 1 tensor|extra'),
    (lambda t: t.update({'classifier.out_proj.bias':torch.ones(3)}), IncompatibleError, 'out_proj.bias|[3] against [2]'),
    (lambda t: t['roberta.embeddings.LayerNorm.bias'].fill_(math.nan), CheckpointError, 'roberta.embeddings.LayerNorm.bias of sq-AL'),
    (lambda t: t['classifier.dense.bias'].fill_(math.inf), CheckpointError, 'classifier.dense.bias of sq-AL')])
@pytest.mark.parametrize('method', ['linear','ties'])
def test_damaged_source(fresh, tmp_path, change, error, words, method):
    base,sources = fresh
    rewrite(sources['sq-AL'], change)
    refused(tmp_path, error, words, base, sources, method)

def test_damaged_base(fresh, tmp_path):
    base,sources = fresh
    rewrite(base, lambda t: t['embeddings.LayerNorm.bias'].fill_(math.nan))
    refused(tmp_path, CheckpointError, 'LayerNorm.bias of the base', base, sources, 'ties')
    rewrite(base, lambda t: t.pop('embeddings.LayerNorm.bias'))
    refused(tmp_path, IncompatibleError, 'LayerNorm.bias', base, sources, 'ties')

def test_truncated_source(fresh, tmp_path):
    base,sources = fresh
    f = sources['sq-AL']/'model.safetensors'
    f.write_bytes(f.read_bytes()[:-10])
    refused(tmp_path, CheckpointError, 'truncated', base, sources)

def test_buffers(fresh, tmp_path):
    base,sources = fresh
    for i,p in enumerate(sources.values()): rewrite(p, lambda t: t.update({'roberta.embeddings.position_ids':torch.arange(4)}))
    out = merge(base, sources, tmp_path/'ids').path
    assert torch.equal(tensors(out)['roberta.embeddings.position_ids'], torch.arange(4))
    rewrite(sources['sq-AL'], lambda t: t.update({'roberta.embeddings.position_ids':torch.arange(4)+1}))
    refused(tmp_path, IncompatibleError, 'position_ids|integers', base, sources)

def test_tokenizer(fresh, tmp_path):
    base,sources = fresh
    f = sources['sq-AL']/'tokenizer.json'
    t = json.loads(f.read_text())
    a,b = list(t['model']['vocab'])[-2:]
    t['model']['vocab'] |= {a:t['model']['vocab'][b], b:t['model']['vocab'][a]}
    f.write_text(json.dumps(t))
    refused(tmp_path, IncompatibleError, a, base, sources)
    for p in (f, sources['sq-AL']/'tokenizer_config.json'): p.unlink()
    r = merge(base, sources, tmp_path/'out')
    assert any('no tokenizer in the folder of sq-AL' in o for o in r.warnings)
    r = merge(base, sources, tmp_path/'heaviest', weights=[.1,.1,.8]) # sq-AL, which has none: the others' is brought along
    assert (r.path/'tokenizer.json').read_text()==(base/'tokenizer.json').read_text()

def test_output_folder(toy, tmp_path):
    base,sources = toy
    (tmp_path/'thesis').mkdir(); (tmp_path/'thesis/chapter').write_text('1')
    with pytest.raises(FileExistsError, match='holds something else'): merge(base, sources, tmp_path/'thesis')
    assert (tmp_path/'thesis/chapter').read_text()=='1'
    merge(base, sources, tmp_path/'out')
    with pytest.raises(FileExistsError): merge(base, sources, tmp_path/'out')
    assert merge(base, sources, tmp_path/'out', 'ties', replace=True).record['method']=='ties'
    for bad in (base, sources['sq-AL'], sources['sq-AL'].parent, sources['sq-AL']/'merged'):
        with pytest.raises(FileExistsError): merge(base, sources, bad, replace=True)
    assert (sources['sq-AL']/'model.safetensors').exists()

def test_a_failure_half_way_leaves_nothing(toy, tmp_path, monkeypatch):
    import merginguriel.merge as module
    def stop(self, *a): raise KeyboardInterrupt
    monkeypatch.setattr(module.CheckpointWriter, 'write', stop)
    with pytest.raises(KeyboardInterrupt): merge(*toy, tmp_path/'out')
    assert not list(tmp_path.iterdir())

# ---- the record

def test_record(toy, tmp_path):
    base,sources = toy
    w = {'de-DE':3,'en-US':1,'sq-AL':0}
    r = merge(base, sources, tmp_path/'out', 'task_arithmetic', w, scale=.5)
    rec = json.loads((tmp_path/'out/merge_record.json').read_text())
    assert rec==r.record
    assert [(o['name'],o['weight'],o['share'],o['used']) for o in rec['sources']] == [('de-DE',3,.75,True),('en-US',1,.25,True),('sq-AL',0,0,False)]
    assert [o['digest'] for o in rec['sources']] == [open_checkpoint(p).digest() for p in sources.values()]
    assert rec['base']==dict(path=str(base), digest=open_checkpoint(base).digest(), card={})
    assert rec['coefficients']=={'de-DE':1.5, 'en-US':.5, 'base':-1}
    assert (rec['method'],rec['hyperparameters'],rec['head']['policy'],rec['dtypes'],rec['labels']) == \
        ('task_arithmetic',{'scale':.5},'average',['float32'],['lights','music'])
    assert set(rec['head']['keys'])==set(head_keys(open_checkpoint(r.path).keys())) and len(rec['head']['keys'])==4
    assert {'merginguriel','torch','python'} <= set(rec['versions'])
    assert r.weights.to_dict()==w and r.path==tmp_path/'out' and r.head=='average'
    again = merge(base, dict(reversed(sources.items())), tmp_path/'again', 'task_arithmetic', w, scale=.5)
    assert open_checkpoint(again.path).digest()==open_checkpoint(r.path).digest()

def test_k_sources_in_means_k_sources_used(toy, tmp_path):
    base,sources = toy
    w = {'de-DE':.7,'en-US':.2,'sq-AL':.1}
    got = tensors(merge(base, sources, tmp_path/'out', 'linear', w).path)
    for k,v in got.items():
        want = sum(w[n]*tensors(p)[k].double() for n,p in sources.items())
        assert torch.allclose(v.double(), want, atol=1e-7), k

def test_one_hot_is_that_model_bit_for_bit(toy, tmp_path):
    base,sources = toy
    for method,hp in [('linear',{}),('task_arithmetic',dict(scale=1))]:
        r = merge(base, sources, tmp_path/method, method, {'de-DE':0,'en-US':1,'sq-AL':0}, **hp)
        assert open_checkpoint(r.path).digest()==open_checkpoint(sources['en-US']).digest()

def test_types(fresh, tmp_path):
    base,sources = fresh
    def half(t): t.update({k:v.bfloat16() for k,v in t.items()})
    for k in sources: rewrite(sources[k], half); config(sources[k], torch_dtype='bfloat16')
    r = merge(base, sources, tmp_path/'half', 'ties')
    assert r.record['dtypes']==['bfloat16'] and {v.dtype for v in tensors(r.path).values()}=={torch.bfloat16}
    rewrite(sources['sq-AL'], lambda t: t.update({k:v.float() for k,v in t.items()}))
    r = merge(base, sources, tmp_path/'mixed')
    assert r.record['dtypes']==['float32'] and json.loads((r.path/'config.json').read_text())['torch_dtype']=='float32'

def test_overflow_names_the_method(toy):
    base = {'w':torch.ones(2).half()}
    with pytest.raises(CheckpointError, match='merged by task_arithmetic as torch.float16'):
        merge_state_dicts(base, {'a':{'w':torch.full((2,), 3e4).half()}}, 'task_arithmetic', scale=9.)

def test_the_result_is_a_model(toy, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    base,sources = toy
    for i,method in enumerate(MANY):
        p = merge(base, sources, tmp_path/method, method, **measured(method, sources, tmp_path)).path
        m,info = AutoModelForSequenceClassification.from_pretrained(p, output_loading_info=True)
        assert not any(info[k] for k in ('missing_keys','unexpected_keys','mismatched_keys'))
        assert m.config.id2label=={0:'lights',1:'music'}
    text = AutoTokenizer.from_pretrained(p)('lamp on', return_tensors='pt')
    assert m(input_ids=text['input_ids'], attention_mask=text['attention_mask']).logits.shape==(1,2)

def test_registry_is_complete_in_a_fresh_process():
    code = "from merginguriel.merge import methods; print(*methods); import sys; assert 'transformers' not in sys.modules"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert {'linear','task_arithmetic','ties'} <= set(out)
    code = "from merginguriel.sparse import ties; from merginguriel.merge import methods; assert methods['ties'] is ties and 'linear' in methods"
    subprocess.run([sys.executable, '-c', code], check=True)

# ---- the head

@pytest.mark.parametrize('method', MANY)
@pytest.mark.parametrize('head', ['average','best'])
def test_head_is_the_same_for_two_random_base_heads(toy, tmp_path, method, head):
    "Guards against finding 5"
    base,sources = toy
    hp = dict(head=head, **measured(method, sources, tmp_path))
    outs = [merge(match_base(base, sources['de-DE'], tmp_path/f'base{s}', seed=s), sources, tmp_path/f'out{s}', method, **hp).path for s in (0,1)]
    outs.append(merge(base, sources, tmp_path/'no head', method, **hp).path)
    assert len({open_checkpoint(p).digest() for p in outs})==1

def test_head_policies(toy, tmp_path):
    base,sources = toy
    matched,w = match_base(base, sources['de-DE'], tmp_path/'matched', seed=3),{'de-DE':.2,'en-US':.4,'sq-AL':.4}
    for method in MANY:
        hp = measured(method, sources, tmp_path)
        out = {h:heads(merge(matched, sources, tmp_path/f'{method} {h}', method, w, head=h, **hp).path) for h in ('average','best','base')}
        assert same(out['best'], heads(sources['en-US'])), "the heaviest, ties by name"
        assert same(out['base'], heads(matched))
        for k,v in out['average'].items():
            assert torch.allclose(v.double(), sum(w[n]*heads(p)[k].double() for n,p in sources.items()), atol=1e-7)
    refused(tmp_path, KeyError, "head='base'|match_base", base, sources, head='base')

def test_mixed_heads(toy, tmp_path):
    base,mixed = toy[0],toy_sources(tmp_path/'mixed', shared_head=False)
    refused(tmp_path, IncompatibleError, "different initialisations|head='best'|head='base'|allow_mixed_heads=True|cosine", base, mixed)
    r = merge(base, mixed, tmp_path/'best', head='best')
    assert same(heads(r.path), heads(mixed['de-DE'])) and 'different initialisations' in r.warnings[-1]
    r = merge(base, mixed, tmp_path/'mean', allow_mixed_heads=True)
    assert 'allow_mixed_heads' in r.warnings[-1] and r.record['warnings']==r.warnings and r.record['head']['lowest_cosine']<.5
    one_hot = merge(base, mixed, tmp_path/'one', weights=[0,1,0])
    assert not one_hot.warnings, "only heads that are averaged matter"
    with pytest.raises(IncompatibleError, match='different initialisations'):
        merge_state_dicts(tensors(base), {k:tensors(p) for k,p in mixed.items()})

def turn_labels(path):
    def change(t):
        for k in ('classifier.out_proj.weight','classifier.out_proj.bias'): t[k] = t[k].flip(0)
    rewrite(path, change)
    config(path, id2label={0:'music',1:'lights'}, label2id={'music':0,'lights':1})

def test_permuted_labels_are_aligned_by_name(fresh, tmp_path):
    base,sources = fresh
    want = merge(base, sources, tmp_path/'want')
    turn_labels(sources['sq-AL'])
    got = merge(base, sources, tmp_path/'got')
    assert open_checkpoint(got.path).digest()==open_checkpoint(want.path).digest()
    assert got.record['aligned']==['sq-AL'] and 'aligned by name' in got.warnings[0]
    turned = merge(base, sources, tmp_path/'turned', weights=[1,1,5], head='best') # Now sq-AL gives the order, its own
    assert turned.record['labels']==['music','lights'] and turned.record['aligned']==['de-DE','en-US']
    assert same(heads(turned.path), heads(sources['sq-AL']))
    b = add_head(base, ['lights','music'], tmp_path/'b')
    got = heads(merge(b, sources, tmp_path/'base head', weights=[1,1,5], head='base').path)
    assert torch.equal(got['classifier.out_proj.weight'], heads(b)['classifier.out_proj.weight'].flip(0))

def test_other_labels_are_refused(fresh, tmp_path):
    base,sources = fresh
    config(sources['sq-AL'], id2label={0:'lights',1:'news'}, label2id={'lights':0,'news':1})
    refused(tmp_path, IncompatibleError, 'music|news', base, sources)

def test_placeholder_labels_are_said(fresh, tmp_path):
    base,sources = fresh
    for p in sources.values(): config(p, id2label={0:'LABEL_0',1:'LABEL_1'}, label2id={'LABEL_0':0,'LABEL_1':1})
    assert any('placeholders' in o for o in merge(base, sources, tmp_path/'a').warnings)
    config(sources['sq-AL'], id2label={0:'lights',1:'music'}, label2id={'lights':0,'music':1})
    refused(tmp_path, IncompatibleError, 'placeholders', base, sources)
    merge(base, sources, tmp_path/'b', allow_generic=True)

def test_masked_language_model_base(fresh, tmp_path):
    "What the hub calls xlm-roberta-base: prefix `roberta.`, an `lm_head` and no classifier"
    base,sources = fresh
    t = {f'roberta.{k}':v for k,v in tensors(base).items()} | {'lm_head.bias':torch.zeros(5), 'lm_head.dense.weight':torch.zeros(16,16)}
    hp = {m:measured(m, sources, tmp_path) for m in MANY}
    want = {m:open_checkpoint(merge(base, sources, tmp_path/m, m, **hp[m]).path).digest() for m in MANY}
    (base/'model.safetensors').unlink()
    save_checkpoint(t, base)
    config(base, architectures=['XLMRobertaForMaskedLM'])
    for m in MANY:
        r = merge(base, sources, tmp_path/f'{m} 2', m, **hp[m])
        assert open_checkpoint(r.path).digest()==want[m]
        assert r.warnings[0]==('the base is a masked language model without a classifier: the heads of the sources were averaged by weight; '
            'its lm_head (2 tensors) played no part')
    refused(tmp_path, KeyError, 'match_base', base, sources, head='base')

def test_files_and_dictionaries_mix(toy, tmp_path):
    base,sources = toy
    files = {k:p/'model.safetensors' for k,p in sources.items()}
    a = merge(base, files, tmp_path/'a', 'ties').path
    b = merge_state_dicts(tensors(base), {k:tensors(p) for k,p in sources.items()}, 'ties')
    assert same(tensors(a), b) and (a/'tokenizer.json').exists()

def test_the_cost_of_a_merge():
    "Bytes and passes are counted, not guessed; the base is not read where the coefficients sum to 1"
    base = {'a.weight':torch.zeros(6,4), 'classifier.weight':torch.ones(2,4)}
    models = {k:{n:v+i+1 for n,v in base.items()} for i,k in enumerate(['x','y'])}
    cost = {m:merge_cost(base, models, m) for m in ('linear','task_arithmetic','ties')}
    assert [c.read for c in cost.values()] == [2*96, 3*96, 3*96*cost['ties'].passes]
    assert [c.passes for c in cost.values()] == [1, 1, cost['ties'].passes] and cost['ties'].passes>=3
    assert {c.written for c in cost.values()} == {96+32} and all(c.seconds>0 for c in cost.values())

def test_a_record_keeps_what_was_measured(toy, tmp_path):
    "Statistics as tensors are named by their content, as paths by the path"
    base,sources = toy
    files = given('fisher', {k:tensors(v) for k,v in sources.items()}, tmp_path)['information']
    in_memory = {k:tensors(v) for k,v in files.items()}
    r = {k:merge(base, sources, tmp_path/k, 'fisher', information=o).record['hyperparameters']['information']
        for k,o in dict(paths={k:Path(v) for k,v in files.items()}, tensors=in_memory).items()}
    assert r['paths'] == files and r['tensors'] == {k:dict(digest=open_checkpoint(v).digest()) for k,v in files.items()}
