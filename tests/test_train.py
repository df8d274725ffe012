"""Fine-tuning: killed and resumed runs, the shared head, the epoch that is kept, the options by hand, bad input."""
import json,os,shutil,signal,subprocess,sys,time
from dataclasses import asdict,fields
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel,Dataset,Features,Value
import merginguriel.train as T
from merginguriel.adapt import adapted
from merginguriel.base_model import *
from merginguriel.checkpoint import *
from merginguriel.core import *
from merginguriel.data import *
from merginguriel.evaluate import *
from merginguriel.experiment import Experiment
from merginguriel.toy import *
from merginguriel.classifier import *
from merginguriel.options import *
from merginguriel.train import *

words,head = 'roberta.embeddings.word_embeddings.weight','classifier.out_proj.weight'

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "Models this small are slower on several threads"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    "Starts with a head go to a cache of this module"
    old = os.environ.get('MERGINGURIEL_CACHE')
    os.environ['MERGINGURIEL_CACHE'] = str(tmp_path_factory.mktemp('cache'))
    yield
    if old is None: del os.environ['MERGINGURIEL_CACHE']
    else: os.environ['MERGINGURIEL_CACHE'] = old

@pytest.fixture(scope='module')
def base(tmp_path_factory): return toy_base(tmp_path_factory.mktemp('base')/'base')

@pytest.fixture(scope='module')
def train(): return load_intents('toy','en-US','train')

@pytest.fixture(scope='module')
def dev(): return load_intents('toy','en-US','dev')

@pytest.fixture(scope='module')
def short(base, train, dev, tmp_path_factory):
    "Two epochs on English"
    return finetune(base, train, tmp_path_factory.mktemp('short')/'en-US', dev=dev, epochs=2)

def with_config(base, out, **kw):
    "A copy of `base` with other fields in config.json"
    shutil.copytree(base, out)
    c = load_json(out/'config.json') | kw
    (out/'config.json').write_text(json.dumps(c))
    return out

def rows(texts, labels, names=('lights','music')):
    fs = Features({'text':Value('string'), 'label':ClassLabel(names=list(names)), 'id':Value('int64')})
    return Dataset.from_dict(dict(text=texts, label=labels, id=list(range(len(texts)))), features=fs)

def weights(path): return (path/'model.safetensors').read_bytes()
def states(out): return list(out.parent.glob(f'.{out.name}.*.state'))
def pick(accuracies, seen=None):
    "A stand-in for `logits` whose dev accuracy in each epoch is the next of `accuracies`; `seen` gets the weights"
    left = iter(accuracies)
    def f(model, ids, *args, **kw):
        if seen is not None: seen.append({k:v.clone() for k,v in model.state_dict().items()})
        y = np.array(load_intents('toy','en-US','dev')['label'])
        y[round(next(left)*len(y)):] ^= 1
        return np.eye(2, dtype=np.float32)[y]
    return f

# a run that was killed

KILLED = '''
import sys
from merginguriel.data import load_intents
from merginguriel.train import finetune
base,out = sys.argv[1:]
train,dev = (load_intents('toy','en-US',o) for o in ('train','dev'))
finetune(base, train, out, dev=dev, device='cpu', epochs=12, dropout=.1, anchor=.5, label_smoothing=.1)
'''

def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(base, train, dev, tmp_path, monkeypatch):
    kw = dict(dev=dev, device='cpu', epochs=12, dropout=.1, anchor=.5, label_smoothing=.1)
    out = tmp_path/'killed'
    p = subprocess.Popen([sys.executable, '-c', KILLED, str(base), str(out)], stderr=subprocess.PIPE,
        env=dict(os.environ, HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', OMP_NUM_THREADS='1'))
    try:
        until = time.time()+50
        while not states(out) and p.poll() is None and time.time()<until: time.sleep(.001)
        p.send_signal(signal.SIGKILL)
    finally:
        p.kill()
        err = p.communicate()[1]
    assert p.returncode==-signal.SIGKILL, err.decode()[-2000:]
    assert len(states(out))==1 and not out.exists()
    done = len(torch.load(states(out)[0], weights_only=True)['history'])
    assert 1<=done<12
    ran,epoch = [],T._epoch
    monkeypatch.setattr(T, '_epoch', lambda *a: ran.append(1) or epoch(*a))
    finetune(base, train, out, **kw)
    assert len(ran)==12-done and states(out)==[]
    whole = finetune(base, train, tmp_path/'whole', **kw)
    assert len(ran)==12-done+12
    assert weights(out)==weights(whole)
    assert training_record(out)['history']==training_record(whole)['history']

@pytest.fixture
def interrupted(base, train, dev, tmp_path, monkeypatch):
    "(out, its state file) of a run of three epochs that stopped after the first"
    def stop(*a): raise KeyboardInterrupt
    epoch,n = T._epoch,iter([1])
    with monkeypatch.context() as m:
        m.setattr(T, '_epoch', lambda *a: epoch(*a) if next(n,None) else stop())
        with pytest.raises(KeyboardInterrupt): finetune(base, train, tmp_path/'out', dev=dev, epochs=3)
    return tmp_path/'out', states(tmp_path/'out')[0]

@pytest.mark.parametrize('keep', [0,10,.5,-1])
def test_a_truncated_state_is_an_error_that_names_it(base, train, dev, interrupted, keep):
    out,state = interrupted
    b = state.read_bytes()
    state.write_bytes(b[:int(len(b)*keep) if isinstance(keep,float) else keep])
    with pytest.raises(CheckpointError, match='damaged; remove it') as e: finetune(base, train, out, dev=dev, epochs=3)
    assert str(state) in str(e.value) and not out.exists()

@pytest.mark.parametrize('what', [{'key':'another'}, {}, [1,2], {'text':'no state'}])
def test_a_foreign_state_is_an_error(base, train, dev, interrupted, what):
    out,state = interrupted
    s = torch.load(state, weights_only=True)
    torch.save(s|what if what=={'key':'another'} else what, state)
    with pytest.raises(CheckpointError, match='not a state of this run; remove it'):
        finetune(base, train, out, dev=dev, epochs=3)
    assert not out.exists()

def test_a_run_starts_afresh_when_its_state_is_removed(base, train, dev, interrupted):
    out,state = interrupted
    state.unlink()
    assert len(training_record(finetune(base, train, out, dev=dev, epochs=3))['history'])==3

def test_text_in_place_of_a_state_is_an_error(base, train, dev, interrupted):
    out,state = interrupted
    state.write_text('<html>Not found</html>')
    with pytest.raises(CheckpointError, match='damaged'): finetune(base, train, out, dev=dev, epochs=3)

def test_other_options_do_not_take_up_the_state(base, train, dev, interrupted, monkeypatch):
    out,_ = interrupted
    ran,epoch = [],T._epoch
    monkeypatch.setattr(T, '_epoch', lambda *a: ran.append(1) or epoch(*a))
    finetune(base, train, out, dev=dev, epochs=2)
    assert len(ran)==2

# the head

def test_locales_of_one_seed_start_from_one_head(base, tmp_path, monkeypatch):
    starts,load = [],T.load_classifier
    def spy(path, dropout=None):
        m,tok = load(path, dropout)
        starts.append({k:v.clone() for k,v in m.state_dict().items()})
        return m,tok
    monkeypatch.setattr(T, 'load_classifier', spy)
    for o,seed in (('en-US',0),('sw-KE',0),('en-US',1)):
        finetune(base, load_intents('toy',o,'train'), tmp_path/f'{o}{seed}', seed=seed, epochs=1)
    a,b,c = starts
    heads = head_keys(list(a))
    assert head in heads and all(torch.equal(a[k],b[k]) for k in a)
    assert not any(torch.equal(a[k],c[k]) for k in heads if a[k].dim()>1)
    assert all(torch.equal(a[k],c[k]) for k in a if k not in heads)

def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(base, train, dev, short, tmp_path):
    assert weights(finetune(base, train, tmp_path/'a', dev=dev, epochs=2))==weights(short)
    assert weights(finetune(base, train, tmp_path/'b', dev=dev, epochs=2, seed=1))!=weights(short)

def test_a_finished_run_is_returned_and_its_old_state_removed(base, train, dev, short):
    r = training_record(short)
    left = short.parent/f'.{short.name}.{r["key"]}.state'
    left.write_bytes(b'left by a kill after the rename')
    before = (short/'model.safetensors').stat().st_mtime_ns
    assert finetune(base, train, short, dev=dev, epochs=2)==short
    assert (short/'model.safetensors').stat().st_mtime_ns==before and not left.exists()

# the epoch that is kept

@pytest.mark.parametrize('accuracies,best', [((.5,.75,.75,.25),2), ((.75,.5,.25,.5),1), ((.25,.5,.5,.75),4),
    ((.5,.5,.5,.5),1)])
def test_the_first_epoch_of_the_highest_dev_accuracy_is_kept(base, train, dev, tmp_path, monkeypatch, accuracies, best):
    seen = []
    monkeypatch.setattr(T, 'logits', pick(accuracies, seen))
    out = finetune(base, train, tmp_path/'out', dev=dev, epochs=4)
    r,c = training_record(out),open_checkpoint(out)
    assert [h['dev_accuracy'] for h in r['history']]==list(accuracies) and r['best_epoch']==best
    assert all(torch.equal(c.read(k), seen[best-1][k]) for k in c)
    assert not torch.equal(c.read(head), seen[best%4][head])

def test_without_dev_the_last_epoch_is_kept(base, train, dev, short, tmp_path):
    out = finetune(base, train, tmp_path/'out', epochs=2, patience=1)
    r = training_record(out)
    assert r['best_epoch']==2 and r['dev'] is None and [h['dev_accuracy'] for h in r['history']]==[None,None]

@pytest.mark.parametrize('patience,ran,best', [(1,3,2), (2,4,2), (3,5,2), (0,6,6)])
def test_patience(base, train, dev, tmp_path, monkeypatch, patience, ran, best):
    monkeypatch.setattr(T, 'logits', pick([.25,.75,.75,.5,.75-1/48,1.]))
    r = training_record(finetune(base, train, tmp_path/'out', dev=dev, epochs=6, patience=patience))
    assert (len(r['history']),r['best_epoch'])==(ran,best)

# the options, by hand

def first_loss(base, train, tmp_path, **kw):
    "Mean loss over one step on all texts, from the start of seed 0"
    out = finetune(base, train, tmp_path/'first', epochs=1, batch_size=96, lr=1e-9, **kw)
    return training_record(out)['history'][0]['loss']

@pytest.mark.parametrize('e', [0.,.2])
def test_label_smoothing(base, train, tmp_path, e):
    model,tok = load_classifier(add_head(base, toy_labels, seed=0))
    z = logits(model, tok(list(train['text']))['input_ids'], tok.pad_token_id).astype(np.float64)
    logp = z-np.log(np.exp(z).sum(-1, keepdims=True))
    q = np.full((96,2), e/2)
    q[np.arange(96),train['label']] += 1-e
    assert first_loss(base, train, tmp_path, label_smoothing=e)==pytest.approx(-(q*logp).sum(-1).mean(), rel=1e-5)

def test_the_anchor_pulls_towards_the_base_by_lr_times_anchor():
    p,q = (torch.nn.Parameter(torch.tensor([3.,-1.])) for _ in 'ab')
    opt = torch.optim.AdamW([dict(params=[p], lr=.1), dict(params=[q], lr=1.)])
    T._pull(opt, 2., {p:torch.tensor([1.,-1.]), q:torch.tensor([5.,0.])})
    assert p.tolist()==pytest.approx([2.6,-1.]) # 3-.1*2*(3-1)
    assert q.tolist()==[5.,0.] # never beyond the base

def test_without_anchor_nothing_decays(base, train, tmp_path):
    "A word that does not occur has no gradient, so its vector moves by decay alone"
    start = add_head(base, toy_labels, seed=0)
    free,near = (open_checkpoint(finetune(base, train, tmp_path/str(a), epochs=1, anchor=a)) for a in (0.,5.))
    _,tok = load_classifier(start)
    used = {i for o in tok(list(train['text']))['input_ids'] for i in o}
    unused = [i for i in range(len(tok)) if i not in used]
    v = open_checkpoint(start).read(words)
    assert len(unused)>10
    for c in (free,near): assert torch.equal(c.read(words)[unused], v[unused])
    assert (near.read(words)-v).norm() < (free.read(words)-v).norm()

def test_a_learning_rate_of_its_own_for_words_and_head(base, train, tmp_path):
    start = open_checkpoint(add_head(base, toy_labels, seed=0))
    frozen = open_checkpoint(finetune(base, train, tmp_path/'frozen', epochs=1, embedding_lr=0.))
    moved = {k for k in start if not torch.equal(frozen.read(k), start.read(k))}
    assert words not in moved and head in moved and 'roberta.encoder.layer.0.intermediate.dense.weight' in moved
    headless = open_checkpoint(finetune(base, train, tmp_path/'headless', epochs=1, head_lr=0))
    assert all(torch.equal(headless.read(k), start.read(k)) for k in head_keys(start.keys()))
    model,_ = load_classifier(start.path)
    opt,_ = T._optimiser(model, TrainOptions(lr=.1, head_lr=.2, embedding_lr=.3, warmup=.5), 4)
    rate = {id(p):g['initial_lr'] for g in opt.param_groups for p in g['params']}
    named = dict(model.named_parameters())
    assert {k:rate[id(named[k])] for k in (words,head,'roberta.embeddings.LayerNorm.weight')}=={words:.3, head:.2,
        'roberta.embeddings.LayerNorm.weight':.1}
    assert len(rate)==len(named) and all(g['weight_decay']==0 for g in opt.param_groups)

def test_the_learning_rate_rises_and_falls_linearly():
    p = torch.nn.Linear(2, 2)
    p.get_input_embeddings = lambda: p
    opt,schedule = T._optimiser(p, TrainOptions(lr=1., warmup=.4), 10)
    seen = []
    for _ in range(10):
        seen.append(opt.param_groups[0]['lr'])
        opt.step(); schedule.step()
    assert seen==pytest.approx([0,.25,.5,.75,1,5/6,4/6,3/6,2/6,1/6])

def test_batches_cover_every_text_once_whatever_the_sizes():
    lens = np.random.default_rng(0).integers(1, 40, 107)
    for size in (1,8,107,500):
        b = bucketed_batches(lens, size, seed=3)
        assert sorted(np.concatenate(b))==list(range(107)) and max(map(len,b))<=size
        assert all(np.array_equal(x,y) for x,y in zip(b, bucketed_batches(lens, size, seed=3)))
    assert not np.array_equal(np.concatenate(bucketed_batches(lens,8,0)), np.concatenate(bucketed_batches(lens,8,1)))

def test_logits_do_not_depend_on_the_batch(short, dev):
    model,tok = load_classifier(short)
    ids = tok(list(dev['text']))['input_ids']
    a = logits(model, ids, tok.pad_token_id)
    assert a.dtype==np.float32 and a.shape==(48,2)
    assert logits(model, ids, tok.pad_token_id, batch_size=5)==pytest.approx(a, abs=1e-5)
    acc = training_record(short)['history'][training_record(short)['best_epoch']-1]['dev_accuracy']
    assert (a.argmax(-1)==np.array(dev['label'])).mean()==acc

def test_dropout_is_that_of_the_base_unless_given(base, tmp_path):
    start = add_head(with_config(base, tmp_path/'base', hidden_dropout_prob=.3), toy_labels)
    assert load_classifier(start)[0].config.hidden_dropout_prob==.3
    c = load_classifier(start, 0.)[0].config
    assert c.hidden_dropout_prob==c.attention_probs_dropout_prob==0

# the record

def test_a_base_with_another_tokenizer_or_configuration_is_another(base, tmp_path):
    same = shutil.copytree(base, tmp_path/'same')
    assert T.model_digest(same)==T.model_digest(base)
    for name in ('tokenizer.json','config.json'):
        other = shutil.copytree(base, tmp_path/name)
        said = json.loads((other/name).read_text())
        (other/name).write_text(json.dumps(said|dict(added=1)))
        assert T.model_digest(other)!=T.model_digest(base)

def test_the_record(base, train, dev, short):
    r = training_record(short)
    assert {'key','base','data','n','dev','labels','seed','dtype','options','best_epoch','history','seconds','ids','device','versions'}==set(r)
    assert (r['n'],r['labels'],r['seed'],r['dtype'])==(96,toy_labels,0,'fp32')
    assert r['options']==asdict(train_options(base, epochs=2)) and \
        set(r['options'])=={f.name for f in fields(TrainOptions)}
    assert (r['data'],r['dev'])==(train._fingerprint,dev._fingerprint)
    assert r['base']==T.model_digest(add_head(base, toy_labels, seed=0))
    assert [set(h) for h in r['history']]==[{'epoch','loss','dev_accuracy'}]*2 and \
        [h['epoch'] for h in r['history']]==[1,2]
    assert set(r['versions'])=={'merginguriel','torch','python'} and r['seconds']>=0
    assert not [v for v in r.values() if isinstance(v, str) and str(base) in v]

def test_the_folder_is_whole_and_names_its_labels(base, short):
    assert model_labels(short)==toy_labels and open_checkpoint(short).keys()==open_checkpoint(add_head(base,
        toy_labels)).keys()
    assert all(open_checkpoint(short).dtype(k)==torch.float32 for k in open_checkpoint(short))
    assert [p.name for p in short.parent.iterdir()]==[short.name]

def test_no_record(base):
    with pytest.raises(MissingDataError, match='not written by finetune'): training_record(base)

# bad input, before any work

@pytest.fixture
def refused(base, train, tmp_path, monkeypatch):
    "Call `finetune` with what is wrong; nothing may be loaded or written"
    def load(*a): raise AssertionError('a model was loaded')
    monkeypatch.setattr(T, 'load_classifier', load)
    def f(error, match, base=base, data=train, out=tmp_path/'out', **kw):
        with pytest.raises(error, match=match): finetune(base, data, out, **kw)
        assert out!=tmp_path/'out' or not out.exists()
    return f

def test_bad_data(refused, train, dev):
    refused(ValueError, 'the training set is empty', data=train.select([]))
    refused(ValueError, 'the dev set is empty', dev=dev.select([]))
    refused(IncompatibleError, r"different labels: \['alarm', 'music'\]", dev=rows(['a'], [0], ['alarm','lights']))
    refused(IncompatibleError, 'the same in another order', dev=rows(['a'], [0], ['music','lights']))
    refused(ValueError, '1 texts of the training set are empty or no strings, the first in row 1',
        data=rows(['a',None], [0,1]))
    refused(ValueError, '2 texts of the dev set are empty', dev=rows(['',' ','x'], [0,1,1]))
    refused(ValueError, 'no strings, the first in row 0', data=Dataset.from_dict({'text':[3], 'label':[0]},
        features=Features({'text':Value('int64'), 'label':ClassLabel(names=toy_labels)})))
    refused(ValueError, '1 texts of the training set have no label, the first in row 1', data=rows(['a','b'], [0,None]))
    refused(ValueError, 'have no label', dev=rows(['a','b'], [0,-1]))
    refused(ValueError, "no column 'text'; it has", data=train.rename_column('text','utt'))
    refused(ValueError, "dev set has no column 'label'", dev=dev.remove_columns('label'))
    refused(ValueError, 'make the column a ClassLabel', data=Dataset.from_dict({'text':['a'], 'label':[0]}))
    refused(ValueError, 'two or more different names', data=rows(['a'], [0], ['lights']))

@pytest.mark.parametrize('name,value', [('epochs',0), ('lr',0.), ('lr',-1e-5), ('lr',float('nan')),
    ('head_lr',-1.), ('embedding_lr',-1.),
    ('anchor',-.1), ('batch_size',0), ('warmup',1.), ('warmup',-.1), ('dropout',1), ('label_smoothing',1.),
        ('clip',0), ('patience',-1),
    ('max_length',2)])
def test_options_out_of_range(refused, name, value): refused(ValueError, f'{name} is out of range', **{name:value})

@pytest.mark.parametrize('name,value', [('epochs',2.5), ('batch_size','32'), ('lr','1e-3'), ('lr',None),
    ('patience',True), ('dropout','no')])
def test_options_of_another_type(refused, name, value): refused(TypeError, f'{name} is a (whole )?number; got',
    **{name:value})

def test_bad_options(refused, base, tmp_path):
    refused(TypeError, "no option 'learning_rate'; it takes anchor", learning_rate=1e-3)
    refused(ValueError, "dtype is 'fp32' or 'bf16'; got 'fp16'", dtype='fp16')
    odd = with_config(base, tmp_path/'odd', finetune=dict(epochs=2, optimizer='sgd'))
    refused(IncompatibleError, "recommends the unknown option 'optimizer'; remove it", base=odd)

def test_bad_base(refused, short, tmp_path):
    refused(MissingDataError, 'no model folder', base=tmp_path/'nowhere')
    other = with_config(short, tmp_path/'other', id2label={'0':'alarm','1':'music'}, label2id={'alarm':0,'music':1})
    refused(IncompatibleError, 'alarm', base=other)

three = rows(['a','b'], [0,2], ['lights','music','news'])

def test_a_classifier_of_other_labels_does_not_lose_its_head_unasked(refused, short):
    refused(IncompatibleError, 'classifies 2 labels and the data have 3', base=short, data=three)

def test_a_classifier_of_other_labels_loses_its_head_when_asked(short, tmp_path):
    start = add_head(short, label_names(three), new_head=True)
    assert model_labels(finetune(start, three, tmp_path/'three', epochs=1))==['lights','music','news']

def test_data_of_another_kind(refused): refused(TypeError, 'datasets.Dataset.*; got list', data=[dict(text='a', label=0)])

@pytest.mark.parametrize('change', ['missing','reshaped'])
def test_a_classifier_that_is_not_whole(short, dev, tmp_path, change):
    "transformers would draw the tensor at random"
    broken = shutil.copytree(short, tmp_path/'broken')
    d = {k:open_checkpoint(short).read(k) for k in open_checkpoint(short)}
    v = d.pop(head)
    if change=='reshaped': d[head] = torch.cat([v,v])
    save_checkpoint(d, broken)
    with pytest.raises(CheckpointError, match=f"lacks '{head}', or has it in another shape"): predict(broken, dev)

def test_a_truncated_model(short, dev, tmp_path):
    broken = shutil.copytree(short, tmp_path/'broken')
    (broken/'model.safetensors').write_bytes(weights(short)[:-10])
    with pytest.raises(CheckpointError): predict(broken, dev)

def test_texts_longer_than_the_model_reads(base, short, tmp_path):
    "The toy model has 34 positions, and RoBERTa's begin after the padding id 1"
    long = rows(['lamp '*60,'song '*60], [0,1])
    with pytest.raises(ValueError, match='max_length is 64 tokens and the model has positions for 32'):
        finetune(base, long, tmp_path/'no', max_length=64)
    assert not (tmp_path/'no').exists()
    with pytest.raises(ValueError, match='positions for 32'): predict(short, long, max_length=33)
    assert predict(short, long).logits.shape==(2,2)
    tiny = finetune(base, long, tmp_path/'tiny', epochs=1, max_length=8)
    assert load_json(tiny/'config.json')['finetune']['max_length']==8
    assert np.array_equal(predict(tiny, long).logits, predict(tiny, rows(['lamp '*6,'song '*6], [0,1])).logits)
    assert not np.array_equal(predict(tiny, long).logits, predict(tiny, long, max_length=32).logits)

def test_a_folder_that_holds_something_else_stays(refused, short, dev, tmp_path):
    (tmp_path/'notes').mkdir()
    (tmp_path/'notes'/'a.txt').write_text('keep')
    (tmp_path/'file').write_text('keep')
    refused(FileExistsError, 'holds something else', out=tmp_path/'notes')
    refused(FileExistsError, 'is a file', out=tmp_path/'file')
    before = weights(short)
    refused(FileExistsError, 'another fine-tuning run', out=short, dev=dev, epochs=1)
    assert weights(short)==before and (tmp_path/'notes'/'a.txt').read_text()==(tmp_path/'file').read_text()=='keep'

def test_a_loss_that_is_not_a_number_stops_the_run(base, train, tmp_path):
    with pytest.raises(ValueError, match='the loss is nan; lower the learning rate'):
        finetune(base, train, tmp_path/'out', lr=1e38, epochs=2)
    assert not (tmp_path/'out').exists()

# bfloat16

def without_bf16(monkeypatch): monkeypatch.setattr(T, 'has_bf16', lambda device: False)
def with_bf16(monkeypatch): monkeypatch.setattr(T, 'has_bf16', lambda device: True)

@pytest.fixture
def fast(base, tmp_path):
    "A base that recommends bfloat16"
    own = load_json(base/'config.json')['finetune']
    return with_config(base, tmp_path/'fast', finetune=own|dict(dtype='bf16'))

def test_a_cpu_without_bf16_says_so(base, train, tmp_path, monkeypatch):
    without_bf16(monkeypatch)
    with pytest.raises(ValueError, match='emulated: this cpu has no avx512_bf16 and no AMX; use dtype='):
        finetune(base, train, tmp_path/'out', dtype='bf16', device='cpu', epochs=1)
    assert not (tmp_path/'out').exists()

def test_without_a_recommendation_nothing_changes(base, train, tmp_path, monkeypatch):
    "The key is that of the versions before, which knew no default"
    with_bf16(monkeypatch)
    r = training_record(finetune(base, train, tmp_path/'out', epochs=1))
    assert r['dtype']=='fp32'
    assert r['key']==config_hash({k:r[k] for k in 'base data n dev labels seed dtype options'.split()})

def test_the_recommended_type_is_taken_where_the_machine_has_it(fast, train, tmp_path, monkeypatch):
    with_bf16(monkeypatch)
    here = finetune(fast, train, tmp_path/'here', epochs=1)
    assert training_record(here)['dtype']=='bf16'
    without_bf16(monkeypatch)
    assert training_record(finetune(fast, train, tmp_path/'there', epochs=1))['dtype']=='fp32'
    assert finetune(fast, train, here, epochs=1)==here # Found where bfloat16 is not
    with pytest.raises(FileExistsError, match='another fine-tuning run'): finetune(fast, train, here, epochs=1, dtype='fp32')

def test_what_a_machine_without_bf16_finished_is_found_on_one_with_it(fast, train, tmp_path, monkeypatch):
    without_bf16(monkeypatch)
    out = finetune(fast, train, tmp_path/'out', epochs=1)
    with_bf16(monkeypatch)
    assert finetune(fast, train, out, epochs=1)==out and training_record(out)['dtype']=='fp32'
    with pytest.raises(FileExistsError, match='another fine-tuning run'): finetune(fast, train, out, epochs=1, dtype='bf16')

def stopped(monkeypatch, *args, **kw):
    "A run that is interrupted in its second epoch"
    def stop(*a): raise KeyboardInterrupt
    epoch,n = T._epoch,iter([1])
    with monkeypatch.context() as m:
        m.setattr(T, '_epoch', lambda *a: epoch(*a) if next(n,None) else stop())
        with pytest.raises(KeyboardInterrupt): finetune(*args, **kw)

@pytest.mark.parametrize('began', ['bf16','fp32'])
def test_a_run_goes_on_in_the_type_in_which_it_began(fast, train, tmp_path, monkeypatch, began):
    out = tmp_path/'out'
    (with_bf16 if began=='bf16' else without_bf16)(monkeypatch)
    stopped(monkeypatch, fast, train, out, epochs=2)
    (without_bf16 if began=='bf16' else with_bf16)(monkeypatch)
    if began=='bf16':
        with pytest.raises(ValueError, match='was begun in bf16, which this cpu lacks'): finetune(fast, train, out, epochs=2)
        with_bf16(monkeypatch)
    ran,epoch = [],T._epoch
    monkeypatch.setattr(T, '_epoch', lambda *a: ran.append(1) or epoch(*a))
    assert training_record(finetune(fast, train, out, epochs=2))['dtype']==began and len(ran)==1

def test_a_base_with_an_unknown_type_is_refused(base, train, tmp_path):
    odd = with_config(base, tmp_path/'odd', finetune=dict(dtype='int8'))
    with pytest.raises(IncompatibleError, match="recommends dtype 'int8'"): finetune(odd, train, tmp_path/'out')

@pytest.mark.skipif(not T.has_bf16('cpu'), reason='this CPU has no bfloat16')
def test_bf16_learns_as_well_and_its_weights_are_float32(base, train, dev, tmp_path):
    out = finetune(base, train, tmp_path/'out', dev=dev, dtype='bf16', device='cpu')
    r,c = training_record(out),open_checkpoint(out)
    assert r['history'][r['best_epoch']-1]['dev_accuracy']>=.85
    assert {c.dtype(k) for k in c}=={torch.float32}
    full,half = (predict(out, dev, device='cpu', dtype=o) for o in ('fp32','bf16'))
    assert not np.array_equal(full.logits, half.logits) and (full.correct==half.correct).mean()>.95

# frozen word vectors

def test_frozen_words_are_neither_written_nor_copied(base, train, dev, tmp_path, monkeypatch):
    out = tmp_path/'out'
    stopped(monkeypatch, base, train, out, dev=dev, epochs=3, embedding_lr=0.)
    s = torch.load(states(out)[0], weights_only=True)
    assert words not in s['model'] and words not in s['best'] and head in s['model'] and head in s['best']
    assert s['model'][head].data_ptr()==s['best'][head].data_ptr() # One copy in the file while the last epoch is the best
    moments = [o for p in s['opt']['state'].values() for o in p.values() if o.dim()]
    sizes = {k:v.numel() for k,v in s['model'].items()}
    assert sum(o.numel() for o in moments)==2*sum(sizes.values())
    whole = finetune(base, train, tmp_path/'whole', dev=dev, epochs=3, embedding_lr=0.)
    assert weights(finetune(base, train, out, dev=dev, epochs=3, embedding_lr=0.))==weights(whole)
    start = open_checkpoint(add_head(base, toy_labels, seed=0))
    assert torch.equal(open_checkpoint(out).read(words), start.read(words))

def test_a_state_that_lacks_a_weight_is_an_error(base, train, dev, interrupted):
    out,state = interrupted
    s = torch.load(state, weights_only=True)
    del s['model'][head]
    torch.save(s, state)
    with pytest.raises(CheckpointError, match='lacks .*remove it'): finetune(base, train, out, dev=dev, epochs=3)

def test_the_ids_that_went_in_are_kept(base, tmp_path):
    part = load_intents('toy','en-US','train',part='A')
    r = training_record(finetune(base, part, tmp_path/'out', epochs=1))
    assert [int(o) for o in r['ids'].split()]==sorted(part['id'][:])
    assert training_record(finetune(base, part.remove_columns('id'), tmp_path/'none', epochs=1))['ids'] is None

# experiments on halves

def toy_experiment(**kw): return Experiment('sq-AL', dataset='toy', base='toy', k=2, **kw)
ada = ({'method':'adamerging','text':'train','steps':2},)

def test_an_id_from_before_halves_holds():
    "The fields of an experiment that uses none of what came later are hashed as ever"
    e = toy_experiment()
    c = {k:v for k,v in asdict(e).items() if k not in ('halves','compatibility','shuffled')}
    assert e.config()==c|dict(contract=dict(mode='ExcTar', touched=['none'], stamp='zero-shot'))
    assert e.id==config_hash(e.config()) and toy_experiment(halves=True).id!=e.id

def test_parallel_text_is_stamped_and_halves_are_not():
    assert toy_experiment(methods=ada).contract()['stamp']=='parallel'
    assert toy_experiment(methods=ada, halves=True).contract()['stamp']=='unsupervised'
    assert toy_experiment(methods=({'method':'adamerging','text':'dev'},)).contract()['stamp']=='unsupervised'

@pytest.mark.parametrize('halves,shared', [(True,0),(False,96)])
def test_adaptation_says_how_much_of_its_text_the_sources_know(tmp_path, halves, shared):
    e = toy_experiment(methods=ada, halves=halves, options=dict(epochs=1))
    models = {o:e.train(o, tmp_path) for o in ('en-US','de-DE')}
    out = e.merge_one(ada[0], models, pd.Series({'en-US':.5,'de-DE':.5}), tmp_path)
    record = adapted(out)[0]
    assert record['shared_ids']==shared and record['texts']==len(e.dataset_of('sq-AL','train','B'))
    assert {len(training_record(o)['ids'].split()) for o in models.values()}=={len(e.dataset_of('en-US','train'))}

def test_a_model_in_the_shared_folder_is_used_only_when_it_is_finished(tmp_path, monkeypatch):
    monkeypatch.setenv('MERGINGURIEL_MODELS', str(tmp_path/'shared'))
    (tmp_path/'shared/en-US-1').mkdir(parents=True)
    assert model_place('en-US-1', tmp_path)==tmp_path/'models/en-US-1'
    (tmp_path/'shared/en-US-1/training_record.json').write_text('{}')
    assert model_place('en-US-1', tmp_path)==tmp_path/'shared/en-US-1'
    assert model_place('en-US-1', tmp_path, tmp_path/'mine')==tmp_path/'mine/en-US-1'
