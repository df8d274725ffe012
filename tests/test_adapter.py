"""Adapters written by hand in PEFT's format, against W + scale·B·A worked out here. The same cases were compared with PEFT 0.21's
own merge_and_unload: the largest difference of a value is 2.4e-7."""
import json
from pathlib import Path
import pytest
import torch
import transformers as tf
from merginguriel.adapter import *
from merginguriel.base_model import model_labels
from merginguriel.checkpoint import open_checkpoint, save_checkpoint
from merginguriel.core import CheckpointError, IncompatibleError, MissingDataError
from merginguriel.merge import merge

labels = ['alarm','news','weather']
wrap = 'base_model.model.'
query = 'roberta.encoder.layer.0.attention.self.query'

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('MERGINGURIEL_CACHE', str(tmp_path/'cache'))
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()

def random(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def tensors(path): c = open_checkpoint(path); return {k:c.read(k) for k in c}

def model(kind, form, path, seed=0, **kw):
    "A saved model of random values, and its tensors"
    cfg = dict(vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, max_position_embeddings=20)
    if kind=='GPT2': cfg = dict(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=20, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    if kind=='ViT': cfg = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4)
    m = getattr(tf, kind+form)(getattr(tf, kind+'Config')(**cfg, **kw))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in m.parameters(): p.copy_(torch.randn(p.shape, generator=g)*.3)
    m.save_pretrained(path)
    return path,tensors(path)

def adapter(path, t, **config):
    "Write tensors `t` and a configuration as PEFT does"
    path.mkdir(exist_ok=True)
    known = dict(peft_type='LORA', task_type='SEQ_CLS', base_model_name_or_path='/somewhere/base', bias='none', fan_in_fan_out=False,
        inference_mode=True, init_lora_weights=True, lora_alpha=3, lora_dropout=.1, megatron_core='megatron.core', qalora_group_size=16,
        modules_to_save=['classifier','score'], r=2, rank_pattern={}, alpha_pattern={}, target_modules=['query'], use_dora=False,
        use_rslora=False, layer_replication=None, loftq_config={}, peft_version='0.21.2')
    (path/'adapter_config.json').write_text(json.dumps(known|config))
    save_checkpoint({wrap+k:v for k,v in t.items()}, path/'adapter_model.safetensors')
    return path

def factors(module, out, inp, r=2, seed=1):
    return {f'{module}.lora_A.weight':random(r, inp, seed=seed), f'{module}.lora_B.weight':random(out, r, seed=seed+1)}
def head(n=3): return {'classifier.dense.weight':random(8, 8, seed=5), 'classifier.dense.bias':random(8, seed=6),
    'classifier.out_proj.weight':random(n, 8, seed=7), 'classifier.out_proj.bias':random(n, seed=8)}
def change(t, module): return t[f'{module}.lora_B.weight'].double()@t[f'{module}.lora_A.weight'].double()

def check(path, base, changed, replaced):
    "The model in `path` is `base` plus `changed`, with `replaced` put in place"
    got = tensors(path)
    assert changed.keys()|replaced.keys() <= got.keys()
    for k,v in got.items():
        want = replaced.get(k, base.get(k)).double()+changed.get(k, 0)
        torch.testing.assert_close(v.double(), want, atol=1e-6, rtol=0, msg=k)
    return tf.AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)

def test_a_masked_language_model_and_an_adapter_are_a_classifier(tmp_path):
    base,b = model('XLMRoberta', 'ForMaskedLM', tmp_path/'base')
    t = factors(query, 8, 8)|factors('roberta.encoder.layer.1.output.dense', 8, 12, seed=3)
    p = apply_adapter(base, adapter(tmp_path/'a', t|head()), labels=labels)
    changed = {f'{k}.weight':1.5*change(t, k) for k in (query,'roberta.encoder.layer.1.output.dense')}
    m,info = check(p, {k:v for k,v in b.items() if not k.startswith('lm_head')}, changed, head())
    assert not any(info[k] for k in ('missing_keys','unexpected_keys','mismatched_keys'))
    assert m.config.id2label==dict(enumerate(labels)) and m.config.architectures==['XLMRobertaForSequenceClassification']
    assert apply_adapter(base, tmp_path/'a', labels=labels)==p, "made once"
    f = p/'model.safetensors'
    f.write_bytes(f.read_bytes()[:-4]+b'abcd')
    assert apply_adapter(base, tmp_path/'a', labels=labels)==p
    check(p, b, changed, head())
    other = apply_adapter(base, tmp_path/'a')
    assert other!=p and model_labels(other)==['LABEL_0','LABEL_1','LABEL_2']
    with pytest.raises(IncompatibleError, match='has 3 labels; 2 were given'): apply_adapter(base, tmp_path/'a', labels=labels[:2])

@pytest.mark.parametrize('config,rank,scale', [(dict(lora_alpha=4), 2, 2.), (dict(lora_alpha=4, r=4, use_rslora=True), 4, 2.),
    (dict(rank_pattern={'layer.0.attention.self.query':1}, alpha_pattern={'query':5}), 1, 5.),
    (dict(rank_pattern={'uery':1}, alpha_pattern={'layer.1.*':5}), 2, 1.5), (dict(alpha_pattern={r'.*\.0\..*':8}), 2, 4.)])
def test_scale(tmp_path, config, rank, scale):
    base,b = model('XLMRoberta', 'ForSequenceClassification', tmp_path/'base', num_labels=3)
    t = factors(query, 8, 8, rank)
    check(apply_adapter(base, adapter(tmp_path/'a', t, **config)), b, {f'{query}.weight':scale*change(t, query)}, {})

def test_embedding(tmp_path):
    base,b = model('XLMRoberta', 'ForSequenceClassification', tmp_path/'base', num_labels=3)
    words = 'roberta.embeddings.word_embeddings'
    t = {f'{words}.lora_embedding_A':random(2, 30), f'{words}.lora_embedding_B':random(8, 2, seed=1)}
    want = 1.5*(t[f'{words}.lora_embedding_B']@t[f'{words}.lora_embedding_A']).T.double()
    check(apply_adapter(base, adapter(tmp_path/'a', t)), b, {f'{words}.weight':want}, {})
    trained = {f'{words}.base_layer.weight':random(30, 8, seed=4)} # Stored whole as well: the words were resized
    check(apply_adapter(base, adapter(tmp_path/'b', t|trained)), b, {f'{words}.weight':want}, {f'{words}.weight':random(30, 8, seed=4)})

@pytest.mark.parametrize('flag', [True, False])
def test_weights_stored_as_inputs_by_outputs(tmp_path, flag):
    "GPT-2: only of its square matrices the shape does not tell"
    base,b = model('GPT2', 'ForSequenceClassification', tmp_path/'base', num_labels=3)
    attn,proj = 'transformer.h.0.attn.c_attn','transformer.h.0.attn.c_proj'
    t = factors(attn, 24, 8)|(factors(proj, 8, 8, seed=3) if flag else {})
    changed = {f'{k}.weight':1.5*change(t, k).T for k in [attn]+[proj]*flag}
    check(apply_adapter(base, adapter(tmp_path/'a', t, fan_in_fan_out=flag)), b, changed, {})

def test_biases(tmp_path):
    base,b = model('XLMRoberta', 'ForSequenceClassification', tmp_path/'base', num_labels=3)
    t,bias = factors(query, 8, 8),random(8, seed=9)
    changed = {f'{query}.weight':1.5*change(t, query)}
    check(apply_adapter(base, adapter(tmp_path/'only', t|{f'{query}.base_layer.bias':bias}, bias='lora_only')), b, changed, {f'{query}.bias':bias})
    every = {k:random(*v.shape, seed=11) for k,v in b.items() if k.endswith('.bias')}
    stored = {k.replace('query.','query.base_layer.'):v for k,v in every.items() if not k.startswith('classifier.')} | {
        k.replace('classifier.', f'classifier.{o}.'):v for k,v in every.items() if k.startswith('classifier.')
        for o in ('modules_to_save.default','original_module')}
    stored['classifier.original_module.dense.bias'] = torch.zeros(8) # As it was before training: not used
    check(apply_adapter(base, adapter(tmp_path/'all', t|stored, bias='all')), b, changed, every)
    with pytest.raises(CheckpointError, match="trained with bias='lora_only', but holds no .*query.bias"):
        apply_adapter(base, adapter(tmp_path/'old', t, bias='lora_only'))
    t[f'{query}.lora_B.bias'] = random(8, seed=10)
    changed[f'{query}.bias'] = 1.5*t[f'{query}.lora_B.bias'].double()
    check(apply_adapter(base, adapter(tmp_path/'b', t, lora_bias=True)), b, changed, {})
    with pytest.raises(CheckpointError, match='two values'):
        open_adapter(adapter(tmp_path/'two', {'classifier.dense.bias':bias, 'classifier.modules_to_save.default.dense.bias':bias+1}))

def test_a_pooler_that_was_drawn_and_not_saved(tmp_path):
    base,_ = model('Bert', 'ForMaskedLM', tmp_path/'base')
    t = factors('bert.encoder.layer.0.attention.self.query', 8, 8)|{'classifier.weight':random(3, 8), 'classifier.bias':random(3)}
    with pytest.raises(IncompatibleError, match="'bert.pooler.dense.bias': it was drawn at random"): apply_adapter(base, adapter(tmp_path/'a', t))
    more = {'bert.pooler.dense.weight':random(8, 8), 'bert.pooler.dense.bias':random(8)}
    assert torch.equal(tensors(apply_adapter(base, adapter(tmp_path/'b', t|more)))['bert.pooler.dense.weight'], random(8, 8))
    encoder,_ = model('Bert', 'Model', tmp_path/'encoder') # Its pooler is pretrained
    assert 'bert.pooler.dense.bias' in open_checkpoint(apply_adapter(encoder, tmp_path/'a'))

def test_images_need_a_classifier(tmp_path):
    key = 'vit.layers.0.attention.q_proj'
    classifier,b = model('ViT', 'ForImageClassification', tmp_path/'classifier', num_labels=3)
    key = next(k for k in b if k.endswith('.weight') and b[k].shape==(8,8)).removesuffix('.weight')
    t = factors(key, 8, 8)|{'classifier.weight':random(3, 8), 'classifier.bias':random(3)}
    a = adapter(tmp_path/'a', t, task_type=None)
    got = tensors(apply_adapter(classifier, a, labels=labels))
    torch.testing.assert_close(got[f'{key}.weight'].double(), b[f'{key}.weight'].double()+1.5*change(t, key), atol=1e-6, rtol=0)
    with pytest.raises(IncompatibleError, match='gets no head.*give the classifier'): apply_adapter(model('ViT', 'Model', tmp_path/'b')[0], a)

def test_half_precision_stays_half(tmp_path):
    base,b = model('XLMRoberta', 'ForSequenceClassification', tmp_path/'base', num_labels=3)
    save_checkpoint({k:v.bfloat16() for k,v in b.items()}, base)
    t = factors(query, 8, 8)
    got = tensors(apply_adapter(base, adapter(tmp_path/'a', t)))
    assert {v.dtype for v in got.values()}=={torch.bfloat16}
    want = (b[f'{query}.weight'].bfloat16().double()+1.5*change(t, query)).bfloat16()
    assert torch.equal(got[f'{query}.weight'], want)

@pytest.mark.parametrize('config,says', [(dict(peft_type='LOHA'), 'of type LOHA; LORA is read'), (dict(use_dora=True), 'use_dora=True'),
    (dict(layer_replication=[[0,1]]), 'layer_replication'), (dict(trainable_token_indices=[3]), 'trainable_token_indices'),
    (dict(target_parameters=['x']), 'target_parameters'), (dict(a_later_option=1), 'a_later_option=1'),
    (dict(init_lora_weights='pissa'), "init_lora_weights='pissa'"), (dict(init_lora_weights='loftq'), "'loftq'")])
def test_other_adapters_are_refused(tmp_path, config, says):
    with pytest.raises(IncompatibleError, match=says) as e: open_adapter(adapter(tmp_path/'a', factors(query, 8, 8), **config))
    assert 'merge_and_unload' in str(e.value)

@pytest.mark.parametrize('t,error,says', [
    ({f'{query}.lora_A.weight':random(2,8)}, CheckpointError, 'one factor of .*query and not the other'),
    (factors(query, 8, 8, r=3), CheckpointError, 'has 3 rows, but its configuration says r=2'),
    (factors(query, 9, 8), IncompatibleError, r'9 outputs and 8 inputs, but it is \(8, 8\); give the base it was trained on, /somewhere/base'),
    (factors('roberta.nowhere', 8, 8), IncompatibleError, "changes 'roberta.nowhere.weight', which .* lacks"),
    (factors(query, 8, 8)|{'more.weight':random(1)}, IncompatibleError, "replaces 'more.weight', which does not fit"),
    (factors(query, 8, 8)|{f'{query}.lora_magnitude_vector':random(8)}, IncompatibleError, 'lora_magnitude_vector.* is not a factor'),
    ({f'{query}.lora_A.weight':random(2,8,1,1), f'{query}.lora_B.weight':random(8,2,1,1)}, IncompatibleError, 'convolutions are not')])
def test_damaged_adapters(tmp_path, t, error, says):
    base,_ = model('XLMRoberta', 'ForSequenceClassification', tmp_path/'base', num_labels=3)
    with pytest.raises(error, match=says): apply_adapter(base, adapter(tmp_path/'a', t))

def test_files(tmp_path):
    base,b = model('XLMRoberta', 'ForSequenceClassification', tmp_path/'base', num_labels=3)
    t = factors(query, 8, 8)
    a = adapter(tmp_path/'a', t, base_model_name_or_path=str(base))
    p = apply_adapter(None, a, out=tmp_path/'out') # The base that the adapter names
    assert p==tmp_path/'out' and as_model(a, None)!=p and as_model(str(a), base)==as_model(a, None)
    (a/'adapter_model.safetensors').unlink()
    torch.save({wrap+k:v for k,v in t.items()}, a/'adapter_model.bin')
    with pytest.raises(CheckpointError, match='pickle'): apply_adapter(base, a)
    assert open_checkpoint(apply_adapter(base, a, allow_pickle=True)).digest()==open_checkpoint(p).digest()
    (a/'adapter_model.bin').unlink()
    with pytest.raises(MissingDataError, match='adapter_model.safetensors'): apply_adapter(base, a)
    with pytest.raises(ValueError, match='has no head'): apply_adapter(base, adapter(tmp_path/'b', t), labels=labels)

def test_adapters_are_merged_like_models(tmp_path):
    "Two adapters of a masked language model: the mean has half of each change, and the mean of the heads"
    base,b = model('XLMRoberta', 'ForMaskedLM', tmp_path/'base')
    ts = {k:factors(query, 8, 8, seed=s) for k,s in [('en-US',1),('sq-AL',3)]}
    sources = {k:as_model(adapter(tmp_path/k, t|head()), base, labels) for k,t in ts.items()}
    r = merge(base, sources, tmp_path/'out', 'task_arithmetic', scale=.5)
    changed = {f'{query}.weight':.75*sum(change(t, query) for t in ts.values())}
    check(r.path, b, changed, head())
    assert 'masked language model without a classifier' in r.warnings[0] and model_labels(r.path)==labels
