"""The card of a merged model: what it carries over, what it warns of, and that the hub's own reader understands it."""
import json
import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from merginguriel.adapter import apply_adapter
from merginguriel.base_model import head_keys
from merginguriel.card import *
from merginguriel.checkpoint import open_checkpoint, save_checkpoint
from merginguriel.merge import merge
from merginguriel.toy import toy_base, toy_sources

@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setenv('MERGINGURIEL_CACHE', str(tmp_path/'cache'))
    return toy_base(tmp_path/'base'),toy_sources(tmp_path/'models')

def say(path, **kw): (path/'README.md').write_text('---\n'+'\n'.join(f'{k}: {json.dumps(v)}' for k,v in kw.items())+'\n---\n\n# About', encoding='utf-8')

def test_a_merge_brings_its_card(toy, tmp_path):
    base,sources = toy
    for p in (base,*sources.values()): say(p, license='cc-by-4.0')
    w = {'de-DE':.2,'en-US':.8,'sq-AL':0}
    r = merge(base, sources, tmp_path/'two in one', 'ties', w, density=.5)
    card = ModelCard.load(r.path/'README.md')
    d = card.data
    assert d.language==['de','en'] and d.license=='cc-by-4.0' and d.tags==['merge','merginguriel'] and d.library_name=='transformers'
    assert d.pipeline_tag=='text-classification' and d.eval_results is None and d.base_model is None, "folders have no address on the hub"
    text = card.text
    assert text.strip().startswith('# two in one\n\nA merge of 2 fine-tuned models by `ties` (density = 0.5, scale = 1.0, ')
    for o in r.record['sources']:
        assert f"`{o['digest'][:16]}…`" in text and o['digest']==open_checkpoint(sources[o['name']]).digest()
    for row in ('| de-DE | 0.2 | 0.2 | cc-by-4.0 |','| en-US | 0.8 | 0.8 |','| sq-AL | 0 | left out |'): assert row in text
    assert 'Labels, in order: lights, music.' in text and 'Not measured.' in text and 'mean of the heads of the sources, by weight' in text
    assert f"The base is base, SHA-256 of its tensors `{open_checkpoint(base).digest()[:16]}…`" in text and 'Stored as float32.' in text
    assert str(tmp_path) not in text, "no path of this machine"
    assert '## Warnings' not in text

def test_warnings_and_head(toy, tmp_path):
    base,sources = toy
    (sources['sq-AL']/'tokenizer.json').unlink()
    (sources['sq-AL']/'tokenizer_config.json').unlink()
    r = merge(base, sources, tmp_path/'out', weights=[.2,.5,.3], head='best')
    text = (r.path/'README.md').read_text()
    assert r.warnings and all(f'- {o}' in text for o in r.warnings) and 'The classifier head is that of en-US, the heaviest source.' in text
    r = merge(None, sources, tmp_path/'no base')
    assert 'No base took part.' in (r.path/'README.md').read_text()

@pytest.mark.parametrize('licences,one,says', [ # Of the base, de-DE, en-US, sq-AL
    (('mit','mit','mit','mit'), 'mit', 'All models that went in have the licence `mit`.'),
    (('mit','mit','cc-by-nc-4.0','mit'), None, 'different licences (`mit`: de-DE, sq-AL and the base; `cc-by-nc-4.0`: en-US). The merged model must'),
    ((None,None,'mit','mit'), None, 'The licence of de-DE and the base is not known here. en-US and sq-AL: `mit`. Look it up'),
    ((None,'mit','other','mit'), None, '`other`: en-US). The licence of the base is not known here.'),
    ((None,None,None,None), None, 'The licence of de-DE, en-US, sq-AL and the base is not known here. Look it up'),
    (('mit','mit',['mit','apache-2.0'],'mit'), None, '`mit, apache-2.0`: en-US')])
def test_licences(toy, tmp_path, licences, one, says):
    base,sources = toy
    for p,o in zip((base,*sources.values()), licences): say(p, **({'license':o} if o else {}))
    text = (merge(base, sources, tmp_path/'out').path/'README.md').read_text()
    assert says in text and ModelCard(text).data.license==one

def test_a_source_whose_licence_differs_but_is_left_out(toy, tmp_path):
    base,sources = toy
    for p in (base,*sources.values()): say(p, license='mit')
    say(sources['sq-AL'], license='other')
    text = (merge(base, sources, tmp_path/'out', weights=[1,1,0]).path/'README.md').read_text()
    assert 'All models that went in have the licence `mit`.' in text

@pytest.mark.parametrize('text', ['no table', '---\n- a list\n---\n', '---\n{ broken\n---\n', '---\nlicense: mit', '', b'\xff\xfe'])
def test_cards_that_say_nothing(tmp_path, text):
    (tmp_path/'README.md').write_bytes(text if isinstance(text, bytes) else text.encode())
    assert card_facts(tmp_path)=={}==card_facts(tmp_path/'absent')==card_facts(None)

def test_languages_of_other_names(toy, tmp_path):
    base,sources = toy
    named = dict(zip(['first','second','third'], sources.values()))
    say(named['first'], language='sq')
    say(named['second'], language=['en','de'])
    assert ModelCard.load(merge(base, named, tmp_path/'out').path/'README.md').data.language==['de','en','sq']

def test_what_came_from_the_hub_is_linked(toy, tmp_path):
    base,sources = toy
    home = tmp_path/'hub/models--FacebookAI--xlm-roberta-base/snapshots/0f1e'
    home.parent.mkdir(parents=True)
    base.rename(home)
    card = ModelCard.load(merge(home, sources, tmp_path/'out').path/'README.md')
    assert card.data.base_model==['FacebookAI/xlm-roberta-base']
    assert '[FacebookAI/xlm-roberta-base](https://huggingface.co/FacebookAI/xlm-roberta-base)' in card.text

def test_scores(toy, tmp_path):
    base,sources = toy
    p = merge(base, sources, tmp_path/'out').path
    rows = pd.DataFrame([dict(dataset='massive', locale='sq-AL', split='test', metric='accuracy', value=.8, low=.7, high=.9, n=96, hash='x'),
        dict(dataset='massive', locale='de-DE', split='test', metric='accuracy', value=np.nan, low=np.nan, high=np.nan, n=pd.NA, hash='x'),
        dict(dataset=None, locale='en-US', split='dev', metric='macro_f1', value=.5, low=np.nan, high=np.nan, n=pd.NA, hash='y')]).astype({'n':'Int64'})
    card = ModelCard.load(write_card(p, rows))
    a,b = card.data.eval_results
    assert (a.metric_type,a.metric_value,a.dataset_type,a.dataset_config,a.dataset_split)==('accuracy',.8,'massive','sq-AL','test')
    assert (b.metric_type,b.metric_value,b.dataset_type)==('macro_f1',.5,'unknown')
    assert '| massive | sq-AL | test | accuracy | 0.8000 | 0.7000–0.9000 | 96 |' in card.text and '|  | en-US | dev | macro_f1 | 0.5000 |  |  |' in card.text
    assert 'de-DE | test' not in card.text, "a score that is missing is not written"
    assert write_card(p, [dict(value=.5)], name='mine').read_text().count('mine')==2

def test_the_licence_of_an_adapter(toy, tmp_path):
    base,sources = toy
    c,q,a = open_checkpoint(sources['sq-AL']),'roberta.encoder.layer.0.attention.self.query',tmp_path/'lora'
    a.mkdir()
    say(a, license='gpl-3.0')
    (a/'adapter_config.json').write_text(json.dumps(dict(peft_type='LORA', r=1, lora_alpha=1)))
    t = {k:c.read(k) for k in head_keys(c)}|{f'{q}.lora_A.weight':torch.ones(1,16), f'{q}.lora_B.weight':torch.zeros(16,1)}
    save_checkpoint({f'base_model.model.{k}':v for k,v in t.items()}, a/'adapter_model.safetensors')
    full = apply_adapter(base, a, labels=['lights','music'])
    assert '| sq-AL | 1 | 1 | gpl-3.0 |' in (merge(base, {'sq-AL':full}, tmp_path/'out').path/'README.md').read_text()
