"The pretrained base: architectures, forms of the pretrained model, labels, tokenizers, cache."
import json,os,shutil,threading,warnings
from pathlib import Path
import pytest
import torch
from merginguriel.base_model import *
from merginguriel.tokenizer import *
from merginguriel.checkpoint import *
from merginguriel.core import *
from merginguriel.toy import *

labels = ['alarm','news','weather']

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('MERGINGURIEL_CACHE', str(tmp_path/'cache'))

def tiny(kind, n=3, vocab=30, names=labels, **kw):
    "(encoder, masked language model, classifier) classes and a configuration of a few hundred values"
    import transformers as tf
    size = dict(vocab_size=vocab, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    cfg = {'XLMRoberta':dict(max_position_embeddings=20), 'Bert':dict(max_position_embeddings=20),
        'DebertaV2':dict(max_position_embeddings=20, pooler_hidden_size=8), 'Electra':dict(embedding_size=8),
        'DistilBert':dict(vocab_size=vocab, dim=8, n_layers=2, n_heads=2, hidden_dim=8, max_position_embeddings=20),
        'GPT2':dict(vocab_size=vocab, n_embd=8, n_layer=2, n_head=2, n_positions=20, pad_token_id=1,
            bos_token_id=0, eos_token_id=2),
        'ModernBert':dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2)}[kind]
    cfg = cfg if kind in ('DistilBert','GPT2') else size|cfg
    ids = dict(enumerate(names)) if names else {i:f'LABEL_{i}' for i in range(n)}
    return lambda form: getattr(tf, kind+form)(getattr(tf, kind+'Config')(**cfg, **kw, id2label=ids,
        label2id={v:k for k,v in ids.items()}))

def save(model, path, seed=None):
    "Save `model` after moving every value, so that no tensor is at its initial value"
    if seed is not None:
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters(): p.add_(torch.randn(p.shape, generator=g))
    model.save_pretrained(path)
    return Path(path)

def reload(path):
    from transformers import AutoModelForSequenceClassification
    m,info = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
    assert not any(info[k] for k in ('missing_keys','unexpected_keys','mismatched_keys')), info
    return m

kinds = [('XLMRoberta','ForMaskedLM'),('Bert','ForMaskedLM'),('DistilBert','ForMaskedLM'),('DebertaV2','ForMaskedLM'),
    ('Electra','ForMaskedLM'),('ModernBert','ForMaskedLM'),('GPT2','LMHeadModel')]

@pytest.mark.parametrize('kind,lm', kinds)
@pytest.mark.parametrize('form', ['encoder','language model','classifier'])
def test_every_form_of_the_pretrained(tmp_path, kind, lm, form):
    if form=='classifier': pre = tiny(kind, names=None, n=5)('ForSequenceClassification')
    else: pre = tiny(kind)('Model' if form=='encoder' else lm)
    pre,ref = save(pre, tmp_path/'pre', 1),save(tiny(kind)('ForSequenceClassification'), tmp_path/'ref', 2)
    b = match_base(pre, ref)
    o,c,r = open_checkpoint(pre),open_checkpoint(b),open_checkpoint(ref)
    assert {k:(c.shape(k),c.dtype(k)) for k in c}=={k:(r.shape(k),r.dtype(k)) for k in r}
    info = base_info(b)
    assert info['head']=='new' and set(head_keys(r)) <= set(info['initialised'])
    body = [k for k in c if k not in info['initialised']]
    assert set(c.digests()[k] for k in body) <= set(o.digests().values()) and len(body)>10
    assert not any(torch.equal(c.read(k), r.read(k)) for k in c)
    m = reload(b)
    assert type(m).__name__==f'{kind}ForSequenceClassification' and m.config.id2label==dict(enumerate(labels))
    logits = m(torch.tensor([[0,5,6,2]])).logits
    assert logits.shape==(1,3) and torch.isfinite(logits).all()

def test_head_is_drawn_as_the_class_draws_it(tmp_path):
    pre = save(tiny('XLMRoberta', initializer_range=.5)('Model'), tmp_path/'pre')
    ref = save(tiny('XLMRoberta')('ForSequenceClassification'), tmp_path/'ref')
    c = open_checkpoint(match_base(pre, ref))
    assert .25<c.read('classifier.dense.weight').std()<.75 and not c.read('classifier.dense.bias').any()

def test_bert_pooler_is_pretrained_only_if_it_was(tmp_path):
    ref = save(tiny('Bert')('ForSequenceClassification'), tmp_path/'ref')
    enc,mlm = save(tiny('Bert')('Model'), tmp_path/'enc'),save(tiny('Bert')('ForMaskedLM'), tmp_path/'mlm')
    assert 'bert.pooler.dense.weight' not in base_info(match_base(enc, ref))['initialised']
    assert 'bert.pooler.dense.weight' in base_info(match_base(mlm, ref))['initialised']

def test_same_seed_same_bytes(tmp_path):
    pre = save(tiny('XLMRoberta')('ForMaskedLM'), tmp_path/'pre')
    ref = save(tiny('XLMRoberta')('ForSequenceClassification'), tmp_path/'ref')
    state = torch.random.get_rng_state()
    a,b,c = (match_base(pre, ref, out=tmp_path/n, seed=s) for n,s in [('a',3),('b',3),('c',4)])
    assert torch.equal(state, torch.random.get_rng_state())
    for n in ('model.safetensors','config.json','base_record.json'): assert file_digest(a/n)==file_digest(b/n)
    x,y = open_checkpoint(a).digests(),open_checkpoint(c).digests()
    assert {k for k in x if x[k]!=y[k]}=={k for k in head_keys(x) if k.endswith('weight')}
    with pytest.raises(ValueError, match='seed'): match_base(pre, ref, seed=-1)

def test_head_does_not_depend_on_the_encoder(tmp_path):
    ref = save(tiny('XLMRoberta')('ForSequenceClassification'), tmp_path/'ref')
    pre = [save(tiny('XLMRoberta')('Model'), tmp_path/f'p{i}', i) for i in (1,2)]
    a,b = (head_fingerprint(match_base(p, ref))['digest'] for p in pre)
    assert a==b

def test_half_precision_base_stays_half(tmp_path):
    pre = save(tiny('XLMRoberta')('Model').half(), tmp_path/'pre')
    ref = save(tiny('XLMRoberta')('ForSequenceClassification'), tmp_path/'ref')
    c = open_checkpoint(match_base(pre, ref))
    assert {c.dtype(k) for k in c}=={torch.float16} and reload(match_base(pre, ref)).dtype==torch.float16

def test_old_names_and_stored_constants(tmp_path):
    pre = save(tiny('Bert')('Model'), tmp_path/'pre', 1)
    ref = save(tiny('Bert')('ForSequenceClassification'), tmp_path/'ref', 2)
    new = match_base(pre, ref, out=tmp_path/'new')
    o = open_checkpoint(pre)
    name = lambda k: k.replace('LayerNorm.weight','LayerNorm.gamma').replace('LayerNorm.bias','LayerNorm.beta')
    old = {name(k):o.read(k) for k in o}
    save_checkpoint(old|{'embeddings.position_ids':torch.arange(20)[None]}, pre)
    assert open_checkpoint(match_base(pre, ref)).digest()==open_checkpoint(new).digest()
    r = open_checkpoint(ref)
    save_checkpoint({k:r.read(k) for k in r}|{'bert.embeddings.position_ids':torch.arange(20)[None]}, ref)
    (pre/'model.safetensors').unlink(); save_checkpoint(old, pre)
    assert open_checkpoint(match_base(pre, ref)).read('bert.embeddings.position_ids').tolist()==[list(range(20))]

@pytest.mark.parametrize('kind,lm', kinds)
def test_embedding_stored_as_the_output_layer(tmp_path, kind, lm):
    m = tiny(kind)(lm)
    pre,ref = save(m, tmp_path/'pre', 1),save(tiny(kind)('ForSequenceClassification'), tmp_path/'ref', 2)
    new = match_base(pre, ref, out=tmp_path/'new')
    save_checkpoint(dict(m.named_parameters()), pre) # each shared tensor once, under its first name
    assert open_checkpoint(match_base(pre, ref)).digest()==open_checkpoint(new).digest()

@pytest.mark.parametrize('change,says', [
    (dict(vocab=31), r"word_embeddings.weight' is \(30, 8\) in the fine-tuned model and \(31, 8\)"),
    (dict(num_hidden_layers=1), r"encoder.layer.1"),
    (dict(num_hidden_layers=3), r"has 16 encoder tensors that the fine-tuned model lacks, e.g. '.*encoder.layer.2"),
    (dict(num_attention_heads=4), 'num_attention_heads is 4'), (dict(hidden_act='relu'), "hidden_act is 'relu'")])
def test_another_encoder(tmp_path, change, says):
    import transformers as tf
    vocab = change.pop('vocab', 30)
    cfg = dict(vocab_size=vocab, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=20)|change
    for form in ('Model','ForMaskedLM'):
        pre = save(getattr(tf, 'XLMRoberta'+form)(tf.XLMRobertaConfig(**cfg)), tmp_path/form)
        ref = save(tiny('XLMRoberta')('ForSequenceClassification'), tmp_path/'ref')
        with pytest.raises(IncompatibleError, match=says): match_base(pre, ref)
    assert not list((tmp_path/'cache').glob('base/*'))

def test_another_architecture(tmp_path):
    ref = save(tiny('XLMRoberta')('ForSequenceClassification'), tmp_path/'ref')
    with pytest.raises(IncompatibleError, match="model_type is 'bert'"):
        match_base(save(tiny('Bert')('Model'), tmp_path/'b'), ref)
    mlm = save(tiny('XLMRoberta')('ForMaskedLM'), tmp_path/'mlm')
    with pytest.raises(IncompatibleError, match='ForMaskedLM, not a'): match_base(ref, mlm)

def test_missing_head_in_reference(tmp_path):
    pre = save(tiny('XLMRoberta')('Model'), tmp_path/'pre')
    ref = save(tiny('XLMRoberta')('ForSequenceClassification'), tmp_path/'ref')
    c = open_checkpoint(ref)
    save_checkpoint({k:c.read(k) for k in c if k not in head_keys(c)}, ref)
    with pytest.raises(IncompatibleError, match='no output layer'): match_base(pre, ref)
    (ref/'config.json').unlink()
    with pytest.raises(MissingDataError, match='config.json'): match_base(pre, ref)

# --- a pretrained model that is a classifier

def classifier(path, names=labels, seed=1, **kw):
    return save(tiny('XLMRoberta', names=names, **kw)('ForSequenceClassification'), path, seed)

def test_fitting_head_is_kept(tmp_path):
    pre,ref = classifier(tmp_path/'pre'),classifier(tmp_path/'ref', seed=2)
    b = match_base(pre, ref, seed=9)
    assert open_checkpoint(b).digest()==open_checkpoint(pre).digest()
    assert base_info(b)['head']=='kept' and base_info(b)['initialised']==[] and 'kept' in base_info(b)['note']
    assert base_info(match_base(pre, ref, new_head=True))['head']=='new'

def test_permuted_head_is_aligned(tmp_path):
    pre,ref = classifier(tmp_path/'pre', names=['weather','alarm','news']),classifier(tmp_path/'ref', seed=2)
    with pytest.warns(UserWarning, match='aligned by name'): b = match_base(pre, ref)
    k = 'classifier.out_proj.weight'
    assert torch.equal(open_checkpoint(b).read(k), open_checkpoint(pre).read(k)[[1,2,0]])
    x = torch.tensor([[0,5,6,2]])
    p,q = reload(pre).eval(),reload(b).eval()
    said = lambda m: m.config.id2label[int(m(x).logits.argmax())]
    assert said(p)==said(q)
    assert 'another order' in base_info(b)['note']

def test_other_label_set_is_an_error(tmp_path):
    pre,ref = classifier(tmp_path/'pre', names=['alarm','sport','weather']),classifier(tmp_path/'ref')
    with pytest.raises(IncompatibleError, match=r"missing \['news'\], extra \['sport'\]"): match_base(pre, ref)
    assert base_info(match_base(pre, ref, new_head=True))['head']=='new'

def test_placeholder_labels(tmp_path):
    pre,ref = classifier(tmp_path/'pre', names=None),classifier(tmp_path/'ref')
    b = match_base(pre, ref)
    assert base_info(b)['head']=='new' and 'placeholders' in base_info(b)['note'] and model_labels(b)==labels
    assert base_info(match_base(pre, ref, allow_generic=True))['head']=='kept'
    assert generic_labels(model_labels(match_base(classifier(tmp_path/'p2', names=None), pre)))

@pytest.mark.parametrize('id2label,says', [({'0':'a','2':'b'}, 'without gaps'), ({'x':'a'}, 'without gaps'),
    (['a','b'], 'without gaps'), ({'0':'a','1':'a'}, "two labels called 'a'")])
def test_broken_labels(tmp_path, id2label, says):
    (tmp_path/'config.json').write_text(json.dumps({'id2label':id2label}))
    with pytest.raises(IncompatibleError, match=says): model_labels(tmp_path)

def test_labels_in_id_order(tmp_path):
    ids = {str(i):f'l{i}' for i in (10,9,2,1,0,3,4,5,6,7,8)}
    (tmp_path/'config.json').write_text(json.dumps({'id2label':ids}))
    assert model_labels(tmp_path)==[f'l{i}' for i in range(11)]
    (tmp_path/'config.json').write_text('{}')
    assert model_labels(tmp_path)==['LABEL_0','LABEL_1']

def test_labels_against_weights(tmp_path):
    pre,ref = save(tiny('XLMRoberta')('Model'), tmp_path/'pre'),classifier(tmp_path/'ref')
    c = load_json(ref/'config.json')
    (ref/'config.json').write_text(json.dumps(c|{'id2label':{'0':'a','1':'b'}}))
    with pytest.raises(IncompatibleError, match='2 labels for 3 rows'): match_base(pre, ref)

@pytest.mark.parametrize('a,b', [(['a','b'],['a']), (['a'],['a','b']), (['a','a'],['a','b']),
    (['LABEL_0'],['LABEL_0','LABEL_1'])])
def test_permutations_that_do_not_exist(a, b):
    with pytest.raises(IncompatibleError, match='sets differ'): label_permutation(a, b, allow_generic=True)

# --- heads

def test_groups_and_alignment(tmp_path):
    start = save(tiny('XLMRoberta')('ForSequenceClassification'), tmp_path/'start', 5)
    c = open_checkpoint(start)
    turned = tmp_path/'turned'
    shutil.copytree(start, turned)
    names = ['weather','alarm','news']
    save_checkpoint(align_head({k:c.read(k) for k in c}, label_permutation(labels, names)), turned)
    (turned/'config.json').write_text(json.dumps(load_json(start/'config.json')|{'id2label':dict(enumerate(names))}))
    other = classifier(tmp_path/'other', seed=6)
    s = head_similarity({'start':start,'turned':turned,'other':other})
    assert s.loc['start','turned']==pytest.approx(1) and abs(s.loc['start','other'])<.5
    assert head_groups({'other':other,'start':start,'turned':turned})==[['start','turned'],['other']]
    assert head_fingerprint(start)['digest']!=head_fingerprint(turned)['digest']
    with pytest.raises(ValueError, match='no models'): head_similarity({})
    with pytest.raises(ValueError, match='cosine in'): head_groups({'a':start}, threshold=50)

def test_heads_that_cannot_be_compared(tmp_path):
    a,b = classifier(tmp_path/'a'),classifier(tmp_path/'b', names=['x','y','z'])
    with pytest.raises(IncompatibleError, match='missing'): head_similarity({'a':a,'b':b})
    with pytest.raises(IncompatibleError, match=r"out_proj.bias': \(3,\) and \(2,\)"):
        head_similarity({'a':a,'b':classifier(tmp_path/'c', names=['x','y'])})
    g = classifier(tmp_path/'g', names=None)
    with pytest.raises(IncompatibleError, match='placeholders'): head_similarity({'a':a,'g':g})
    head_similarity({'a':a,'g':g}, allow_generic=True)
    c = open_checkpoint(a)
    save_checkpoint({k:c.read(k)*(k not in head_keys(c)) for k in c}, a)
    with pytest.raises(IncompatibleError, match='zeros'): head_similarity({'a':a})
    save_checkpoint({k:c.read(k)*float('nan') for k in c}, a)
    with pytest.raises(CheckpointError, match='NaN'): head_similarity({'a':a})

def test_study_size_heads(tmp_path):
    "Heads of XLM-R base on MASSIVE: separate starts are orthogonal, one start is recognised after fine-tuning"
    def write(n, seed, moved=0.):
        g,h = torch.Generator().manual_seed(seed),torch.Generator().manual_seed(99+len(n))
        shapes = {'classifier.dense.weight':(768,768), 'classifier.out_proj.weight':(60,768)}
        t = {k:torch.randn(*s, generator=g)*.02 for k,s in shapes.items()}
        t = {k:v+torch.randn(v.shape, generator=h)*moved for k,v in t.items()}
        (tmp_path/n).mkdir()
        save_checkpoint(t|{'roberta.w':torch.ones(1)}, tmp_path/n)
        (tmp_path/n/'config.json').write_text(json.dumps({'id2label':{str(i):f'i{i}' for i in range(60)}}))
        return tmp_path/n
    m = {'a':write('a', 0, .01), 'bb':write('bb', 0, .01), 'ccc':write('ccc', 1)}
    s = head_similarity(m)
    assert s.loc['a','bb']==pytest.approx(1/(1+.25), abs=.01) and abs(s.loc['a','ccc'])<.01
    assert head_groups(m)==[['a','bb'],['ccc']] and not shared_head(m)

# --- tokenizers

def words(path, **change):
    p = toy_base(path)/'tokenizer.json'
    t = json.loads(p.read_text())
    for k,v in change.items(): t[k] = v(t[k]) if callable(v) else v
    p.write_text(json.dumps(t, indent=7))
    return path

def test_cosmetic_differences(tmp_path):
    a = toy_base(tmp_path/'a')
    b = words(tmp_path/'b', version='1.0',
        truncation=dict(direction='Right', max_length=8, strategy='LongestFirst', stride=0),
        padding=dict(strategy='BatchLongest', direction='Right', pad_to_multiple_of=None, pad_id=1, pad_type_id=0,
            pad_token='<pad>'),
        pre_tokenizer={'type':'Sequence','pretokenizers':[{'type':'WhitespaceSplit'}]})
    assert file_digest(a/'tokenizer.json')!=file_digest(b/'tokenizer.json')
    check_tokenizer(a, b, a)

@pytest.mark.parametrize('change,says', [
    (dict(model=lambda m: m|{'vocab':m['vocab']|{'brandnew':999}}), "1 of .*id 999: None and 'brandnew'"),
    (dict(added_tokens=lambda o: o+[o[0]|{'id':777,'content':'<x>'}]), "id 777"),
    (dict(normalizer={'type':'Lowercase'}, pre_tokenizer={'type':'Whitespace'}), 'differ on '),
    (dict(post_processor=None), 'differ on ')])
def test_real_differences(tmp_path, change, says):
    with pytest.raises(IncompatibleError, match=says):
        check_tokenizer(toy_base(tmp_path/'a'), words(tmp_path/'b', **change))

def test_unigram_scores_and_missing_tokenizer(tmp_path):
    from tokenizers import Tokenizer,models
    for n,score in (('a',-1.),('b',-1.),('c',-2.)):
        (tmp_path/n).mkdir()
        t = Tokenizer(models.Unigram([('<unk>',0.),('a',score),('b',-3.)], unk_id=0))
        t.save(str(tmp_path/n/'tokenizer.json'))
    check_tokenizer(tmp_path/'a', tmp_path/'b')
    with pytest.raises(IncompatibleError, match='scores'): check_tokenizer(tmp_path/'a', tmp_path/'c')
    with pytest.raises(MissingDataError, match='no tokenizer in'): check_tokenizer(tmp_path/'a', tmp_path)

def test_match_base_refuses_another_tokenizer(tmp_path):
    ref = toy_sources(tmp_path/'s', ['sq-AL'])['sq-AL']
    with pytest.raises(IncompatibleError, match='tokenizers'):
        match_base(words(tmp_path/'b', model=lambda m: m|{'vocab':m['vocab']|{'brandnew':999}}), ref)
    b = match_base(toy_base(tmp_path/'c'), ref)
    check_tokenizer(tmp_path/'c', b)
    for n in ('tokenizer.json','tokenizer_config.json'): (tmp_path/'c'/n).unlink()
    check_tokenizer(match_base(tmp_path/'c', ref, out=tmp_path/'d'), ref)

# --- cache and output

def test_damaged_cache_is_made_again(tmp_path):
    pre,ref = toy_base(tmp_path/'pre'),toy_sources(tmp_path/'s', ['sq-AL'])['sq-AL']
    b = match_base(pre, ref)
    digest,p = open_checkpoint(b).digest(),b/'model.safetensors'
    stamp = p.stat().st_mtime_ns
    assert match_base(pre, ref)==b and p.stat().st_mtime_ns==stamp
    for harm in (lambda: os.truncate(p, 2000), lambda: (b/'base_record.json').unlink(), lambda: p.unlink(),
            lambda: p.write_bytes(p.read_bytes()[:-1]+b'\x41')):
        harm()
        assert match_base(pre, ref)==b and open_checkpoint(b).digest()==digest
    assert [q.name for q in b.parent.iterdir() if not q.name.endswith('.lock')]==[b.name]

def test_output_folder_that_holds_something_else(tmp_path):
    pre,ref = toy_base(tmp_path/'pre'),toy_sources(tmp_path/'s', ['sq-AL'])['sq-AL']
    (tmp_path/'out').mkdir(); (tmp_path/'out/thesis.txt').write_text('x')
    with pytest.raises(FileExistsError, match='holds something else'): match_base(pre, ref, out=tmp_path/'out')
    a = match_base(pre, ref, out=tmp_path/'new')
    assert match_base(pre, ref, out=tmp_path/'new')==a
    with pytest.raises(FileExistsError): match_base(pre, ref, out=tmp_path/'new', seed=5)

def test_many_at_once(tmp_path):
    pre,ref = toy_base(tmp_path/'pre'),toy_sources(tmp_path/'s', ['sq-AL'])['sq-AL']
    got = []
    ts = [threading.Thread(target=lambda: got.append(match_base(pre, ref))) for _ in range(4)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert len(got)==4 and len(set(got))==1 and open_checkpoint(got[0]).digest()==base_info(got[0])['digest']

def test_fine_tuned_model_finds_its_own_start(tmp_path):
    start = add_head(save(tiny('Bert')('ForMaskedLM'), tmp_path/'pre'), labels, seed=3)
    m = reload(start)
    m.config.problem_type = 'single_label_classification'
    ft = save(m, tmp_path/'ft', 1)
    assert open_checkpoint(match_base(tmp_path/'pre', ft, seed=3)).digest()==open_checkpoint(start).digest()

# --- the hub

def test_hub_when_offline(monkeypatch):
    import huggingface_hub.constants as c
    monkeypatch.setattr(c, 'HF_HUB_OFFLINE', True)
    with pytest.raises(MissingDataError, match="'someone/no-such-model' is not a folder here.*give its folder"):
        resolve_model('someone/no-such-model')

def test_hub_asks_for_what_is_needed(tmp_path, monkeypatch):
    import huggingface_hub
    asked = {}
    def download(name, **kw):
        asked.update(name=name, **kw)
        return str(toy_base(tmp_path/'snap'))
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    ref = toy_sources(tmp_path/'s', ['sq-AL'])['sq-AL']
    assert base_info(match_base('org/base', ref))['pretrained']=='org/base'
    assert asked['name']=='org/base' and {'*.safetensors','*.json'}<set(asked['allow_patterns'])-{'*.bin'}
    assert '*.bin' not in asked['allow_patterns']

@pytest.mark.parametrize('name', ['a/b/c','../x','','models\\x'])
def test_names_that_are_not_on_a_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MerginGurielError): resolve_model(name)

def test_pretrained_pickle(tmp_path):
    pre,ref = toy_base(tmp_path/'pre'),toy_sources(tmp_path/'s', ['sq-AL'])['sq-AL']
    whole = match_base(pre, ref, out=tmp_path/'a')
    c = open_checkpoint(pre)
    torch.save({k:c.read(k) for k in c}, pre/'pytorch_model.bin')
    (pre/'model.safetensors').unlink()
    with pytest.raises(CheckpointError, match='allow_pickle'): match_base(pre, ref)
    assert open_checkpoint(match_base(pre, ref, allow_pickle=True)).digest()==open_checkpoint(whole).digest()
