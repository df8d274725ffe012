"""Models of other architectures, with the base as it is published, in the files people have: what is merged is compared with a
merge worked out here from the models that transformers loads, value by value and in the logits."""
import json
from pathlib import Path
import pytest
import torch
import transformers as tf
from merginguriel.base_model import head_keys
from merginguriel.checkpoint import open_checkpoint, save_checkpoint
from merginguriel.core import IncompatibleError
from merginguriel.merge import merge, merge_state_dicts

labels = ['alarm','news','weather']
weights = {'en-US':.5,'sq-AL':.2,'vi-VN':.3}

@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setenv('MERGINGURIEL_CACHE', str(tmp_path/'cache'))
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()

def tiny(kind, form, **kw):
    "A model of a few hundred values"
    size = dict(vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    cfg = {'XLMRoberta':size|dict(max_position_embeddings=20), 'Roberta':size|dict(max_position_embeddings=20),
        'Bert':size|dict(max_position_embeddings=20), 'DebertaV2':size|dict(max_position_embeddings=20, pooler_hidden_size=8,
            relative_attention=True, position_buckets=4, pos_att_type=['p2c','c2p'], norm_rel_ebd='layer_norm', share_att_key=True), # As v3
        'Electra':size|dict(embedding_size=4), 'DistilBert':dict(vocab_size=30, dim=8, n_layers=2, n_heads=2, hidden_dim=8),
        'ModernBert':size|dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2),
        'ViT':dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4)}[kind]
    ids = dict(enumerate(labels))
    return getattr(tf, kind+form)(getattr(tf, kind+'Config')(**(cfg|kw), id2label=ids, label2id={v:k for k,v in ids.items()}))

def moved(model, seed, size=.01):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape, generator=g)*size)
    return model

def task(kind): return 'ForImageClassification' if kind=='ViT' else 'ForSequenceClassification'

def world(d, kind, form, **kw):
    "Folder of the base, folders of its fine-tuned classifiers, and the classifier they all started from"
    torch.manual_seed(0)
    moved(tiny(kind, form), 0, .3).save_pretrained(d/'base')
    torch.manual_seed(1)
    start = getattr(tf, kind+task(kind)).from_pretrained(d/'base')
    for i,k in enumerate(weights):
        m = tiny(kind, task(kind))
        m.load_state_dict(start.state_dict())
        moved(m, 10+i).save_pretrained(d/k, **kw)
    return d/'base',{k:d/k for k in weights},start.state_dict()

def loaded(path, kind):
    auto = tf.AutoModelForImageClassification if kind=='ViT' else tf.AutoModelForSequenceClassification
    m,info = auto.from_pretrained(path, output_loading_info=True)
    assert not any(info[k] for k in ('missing_keys','unexpected_keys','mismatched_keys')), info
    assert type(m).__name__==kind+task(kind) and m.config.id2label==dict(enumerate(labels))
    return m.eval()

def logits(model, kind):
    x = torch.linspace(-1, 1, 2*3*8*8).reshape(2,3,8,8) if kind=='ViT' else torch.tensor([[0,5,6,7,2],[0,9,8,4,2]])
    with torch.no_grad(): return model(x).logits

def trimmed(taus, density):
    "The largest values of each task vector over the whole model, by a sort"
    out = []
    for t in taus:
        v = torch.cat([t[k].flatten() for k in sorted(t)])
        least = v.abs().sort(descending=True).values[int(len(v)*density)-1]
        out.append({k:o*(o.abs()>=least) for k,o in t.items()})
    return out

def by_hand(start, fts, heads, method):
    "The merge of state dictionaries `fts`, written out; `start` is the base"
    w = list(weights.values())
    mean = {k:sum(o*f[k].double() for o,f in zip(w, fts)) for k in start}
    body = [k for k in start if k not in heads and start[k].is_floating_point()]
    taus = [{k:f[k].double()-start[k].double() for k in body} for f in fts]
    if method=='linear': new = {k:mean[k] for k in body}
    elif method=='task_arithmetic': new = {k:start[k].double()+.3*sum(o*t[k] for o,t in zip(w, taus)) for k in body}
    else:
        t,new = trimmed(taus, .2),{}
        for k in body:
            x = torch.stack([o[k] for o in t])
            v = torch.tensor(w, dtype=torch.float64).view(-1, *[1]*(x.dim()-1))
            agree = (x.sign()==(v*x).sum(0).sign())&(x!=0)
            new[k] = start[k].double()+torch.nan_to_num((v*x*agree).sum(0)/(v*agree).sum(0))
    return {k:(new[k] if k in new else mean[k] if k in heads else fts[0][k]).to(start[k].dtype) for k in start}

def dense(*names): return [f'{n}.{o}' for n in names for o in ('bias','weight')]
LINEAR_HEAD,TWO_LAYERS = dense('classifier'),dense('classifier.dense','classifier.out_proj')

WORLDS = [ # architecture, class of the base, the tensors that are treated as head, what is said of the base
    ('XLMRoberta','ForMaskedLM', TWO_LAYERS, 'a masked language model without a classifier: {}; its lm_head (5 tensors) played no part'),
    ('XLMRoberta','Model', TWO_LAYERS, 'its pooler (2 tensors) played no part'),
    ('Roberta','ForMaskedLM', TWO_LAYERS, 'its lm_head (5 tensors) played no part'),
    ('Electra','ForPreTraining', TWO_LAYERS, 'of class ElectraForPreTraining, without a classifier: {}; its discriminator_predictions (4'),
    ('Electra','ForMaskedLM', TWO_LAYERS, 'its generator_lm_head, generator_predictions (5 tensors)'),
    ('Bert','ForMaskedLM', dense('bert.pooler.dense','classifier'),
        'without a classifier, bert.pooler.dense.bias and bert.pooler.dense.weight: {}; its cls (5 tensors)'),
    ('Bert','ForPreTraining', LINEAR_HEAD, 'of class BertForPreTraining, without a classifier: {}; its cls (7 tensors)'),
    ('Bert','Model', LINEAR_HEAD, None), # Its pooler is pretrained
    ('DistilBert','ForMaskedLM', dense('pre_classifier','classifier'), 'its vocab_layer_norm, vocab_projector, vocab_transform (5'),
    ('DebertaV2','ForMaskedLM', dense('pooler.dense','classifier'), 'its cls (5 tensors)'),
    ('DebertaV2','Model', dense('pooler.dense','classifier'), None),
    ('ModernBert','ForMaskedLM', [*LINEAR_HEAD,'head.dense.weight','head.norm.weight'], 'its decoder (1 tensor) played no part'),
    ('ModernBert','Model', [*LINEAR_HEAD,'head.dense.weight','head.norm.weight'], None),
    ('ViT','Model', LINEAR_HEAD, 'of class ViTModel, without a classifier: {}; its pooler (2 tensors)'),
    ('ViT','ForMaskedImageModeling', LINEAR_HEAD, 'its decoder, vit.embeddings.mask_token (3 tensors)')]

@pytest.mark.parametrize('kind,form,heads,said', WORLDS, ids=lambda o: o if isinstance(o, str) and o.isalnum() else '')
def test_an_architecture_is_only_names(tmp_path, kind, form, heads, said):
    base,sources,start = world(tmp_path, kind, form)
    fts = [loaded(p, kind).state_dict() for p in sources.values()]
    for method in ('linear','task_arithmetic','ties'):
        r = merge(base, sources, tmp_path/method, method, weights)
        assert r.record['head']['keys']==sorted(heads) and set(head_keys(start)) <= set(heads)
        own = [k for k in heads if kind!='ModernBert' or not k.startswith('head.')] # The head of its language model has the same names
        assert r.record['head']['not_in_base']==sorted(own if form!='Model' or kind!='ModernBert' else heads)
        how = 'the heads of the sources were averaged by weight'
        if said is None: assert not any('the base is' in o for o in r.warnings)
        else: assert said.format(how) in r.warnings[0] and how in r.warnings[0] and r.record['warnings']==r.warnings
        got,want = loaded(r.path, kind),by_hand(start, fts, heads, method)
        assert got.state_dict().keys()==want.keys()
        for k,v in got.state_dict().items(): torch.testing.assert_close(v, want[k], atol=1e-6, rtol=1e-5, msg=k)
        m = tiny(kind, task(kind)).eval()
        m.load_state_dict(want)
        torch.testing.assert_close(logits(got, kind), logits(m, kind), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(logits(got, kind), logits(loaded(sources['en-US'], kind), kind), atol=1e-4)

# ---- the files people have

def tensors(path): c = open_checkpoint(path); return {k:c.read(k) for k in c}
def rewrite(path, change):
    t = tensors(path)
    change(t)
    save_checkpoint(t, path)
def digest(*args, **kw): return open_checkpoint(merge(*args, **kw).path).digest()

def test_shards(tmp_path):
    base,sources,_ = world(tmp_path/'whole', 'Bert', 'ForMaskedLM')
    _,shards,_ = world(tmp_path/'shards', 'Bert', 'ForMaskedLM', max_shard_size='2KB')
    assert len(list(shards['sq-AL'].glob('model-*.safetensors')))>2 and not (shards['sq-AL']/'model.safetensors').exists()
    tf.BertForMaskedLM.from_pretrained(base).save_pretrained(tmp_path/'base', max_shard_size='2KB')
    want = digest(base, sources, tmp_path/'a', 'ties', weights)
    assert digest(tmp_path/'base', shards, tmp_path/'b', 'ties', weights)==want
    assert digest(base, shards|{'sq-AL':shards['sq-AL']/'model.safetensors.index.json'}, tmp_path/'c', 'ties', weights)==want
    assert sorted(p.name for p in (tmp_path/'b').glob('[!.]*'))==['README.md','config.json','merge_record.json','model.safetensors']

def test_the_hub_form_of_xlm_roberta(tmp_path):
    "A pooler that nobody uses, position numbers, and the output layer stored once, twice, or in place of the embedding"
    base,sources,_ = world(tmp_path, 'XLMRoberta', 'ForMaskedLM')
    want = {m:digest(base, sources, tmp_path/m, m, weights) for m in ('linear','task_arithmetic','ties')}
    t,words = tensors(base),'roberta.embeddings.word_embeddings.weight'
    more = {'roberta.pooler.dense.weight':torch.ones(8,8), 'roberta.pooler.dense.bias':torch.ones(8),
        'roberta.embeddings.position_ids':torch.arange(20)[None]}
    twice,moved = t|{'lm_head.decoder.weight':t[words]},{k:v for k,v in t.items() if k!=words}|{'lm_head.decoder.weight':t[words]}
    for name,change,said in [('more',t|more,'its lm_head, roberta.embeddings.position_ids, roberta.pooler (8 tensors)'),
            ('twice',twice,'its lm_head (6 tensors)'), ('instead',moved,'its lm_head.bias, lm_head.dense, lm_head.layer_norm (5 tensors)')]:
        save_checkpoint(change, base)
        for m in want:
            r = merge(base, sources, tmp_path/f'{m} {name}', m, weights)
            assert open_checkpoint(r.path).digest()==want[m] and said in r.warnings[0]

def test_language_models_keep_tied_weights_tied(tmp_path):
    "Sources that are language models themselves: the shared matrix is stored once or twice, and both copies are merged alike"
    base,words = tmp_path/'base','roberta.embeddings.word_embeddings.weight'
    moved(tiny('XLMRoberta', 'ForMaskedLM'), 0).save_pretrained(base)
    sources = {k:tmp_path/k for k in 'ab'}
    for i,p in enumerate(sources.values()): moved(tf.XLMRobertaForMaskedLM.from_pretrained(base), i+1).save_pretrained(p)
    once = tensors(merge(base, sources, tmp_path/'once', 'ties', density=1.).path)
    for p in (base,*sources.values()): rewrite(p, lambda t: t.update({'lm_head.decoder.weight':t[words]}))
    r = merge(base, sources, tmp_path/'twice', 'ties', density=1.)
    t = tensors(r.path)
    assert torch.equal(t['lm_head.decoder.weight'], t[words]) and all(torch.equal(t[k], v) for k,v in once.items())
    m,info = tf.AutoModelForMaskedLM.from_pretrained(r.path, output_loading_info=True)
    assert not info['missing_keys'] and torch.equal(m.lm_head.decoder.weight, t[words])
    assert 'the sources have no classifier head' in r.warnings

def test_stored_position_numbers(tmp_path):
    base,sources,_ = world(tmp_path, 'Bert', 'Model')
    want,ids = digest(base, sources, tmp_path/'want', 'ties', weights),'bert.embeddings.position_ids'
    rewrite(sources['sq-AL'], lambda t: t.update({ids:torch.arange(20)[None]}))
    assert digest(base, sources, tmp_path/'one old source', 'ties', weights)==want
    rewrite(sources['en-US'], lambda t: t.update({ids:torch.arange(20)[None]}))
    for b in (base, None): # The heaviest source has them, so the result does
        out = merge(b, sources, tmp_path/f'out {b is None}', 'ties' if b else 'linear', weights).path
        assert torch.equal(tensors(out)[ids], torch.arange(20)[None])
        loaded(out, 'Bert')
    rewrite(sources['sq-AL'], lambda t: t.update({ids:torch.arange(20)[None]+1}))
    with pytest.raises(IncompatibleError, match='position_ids.*holds integers'): merge(base, sources, tmp_path/'no', 'ties', weights)

def test_types_of_the_result(tmp_path):
    base,sources,_ = world(tmp_path, 'DistilBert', 'ForMaskedLM')
    def store(k, dt):
        m = loaded(sources[k], 'DistilBert').to(dt)
        m.save_pretrained(sources[k])
    for k in sources: store(k, torch.bfloat16)
    r = merge(base, sources, tmp_path/'bf16', 'ties', weights) # The type of the base is not the sources' business
    assert r.record['dtypes']==['bfloat16'] and loaded(r.path, 'DistilBert').dtype==torch.bfloat16
    assert not any('stored as' in o for o in r.warnings)
    store('sq-AL', torch.float16)
    r = merge(base, sources, tmp_path/'mixed', 'ties', weights)
    assert r.record['dtypes']==['float32'] and loaded(r.path, 'DistilBert').dtype==torch.float32
    assert 'the sources are stored as bfloat16, float16, the result as float32' in r.warnings

def test_a_classifier_never_loses_its_head(tmp_path):
    base,sources,_ = world(tmp_path, 'XLMRoberta', 'ForMaskedLM')
    def behead(t): [t.pop(k) for k in head_keys(t)]
    rewrite(sources['sq-AL'], behead)
    with pytest.raises(KeyError, match='sq-AL lacks 4 tensors.*classifier'): merge(base, sources, tmp_path/'out')
    for k in ('en-US','vi-VN'): rewrite(sources[k], behead)
    for b in (base, None):
        with pytest.raises(IncompatibleError, match='XLMRobertaForSequenceClassification by its config.json.*no classifier'):
            merge(b, sources, tmp_path/'out')
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('head', ['average','best'])
def test_head_policy_is_said(tmp_path, head):
    base,sources,_ = world(tmp_path, 'XLMRoberta', 'ForMaskedLM')
    r = merge(base, sources, tmp_path/'out', 'ties', weights, head=head)
    say = {'average':'the heads of the sources were averaged by weight', 'best':'the head of en-US, the heaviest source, was taken'}[head]
    assert r.warnings[0]==f'the base is a masked language model without a classifier: {say}; its lm_head (5 tensors) played no part'
    assert r.record['warnings']==r.warnings==json.loads((r.path/'merge_record.json').read_text())['warnings'] and r.warnings[0] in repr(r)
    got,fts = tensors(r.path),[tensors(p) for p in sources.values()]
    for k in head_keys(got):
        want = sum(w*t[k].double() for w,t in zip(weights.values(), fts)) if head=='average' else fts[0][k].double()
        torch.testing.assert_close(got[k].double(), want, atol=1e-7, rtol=0)
    files = {k:tensors(p) for k,p in sources.items()}
    assert all(torch.equal(v, got[k]) for k,v in merge_state_dicts(tensors(base), files, 'ties', weights, head=head).items())

def test_images_bring_their_processor(tmp_path):
    base,sources,_ = world(tmp_path, 'ViT', 'Model')
    settings = {'image_processor_type':'ViTImageProcessor', 'size':{'height':8,'width':8}}
    for p in (base,*sources.values()): (p/'preprocessor_config.json').write_text(json.dumps(settings))
    r = merge(base, sources, tmp_path/'out')
    assert json.loads((r.path/'preprocessor_config.json').read_text())==settings
    assert not any('tokenizer' in o for o in r.warnings)
