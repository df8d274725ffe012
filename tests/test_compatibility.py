"""Compatibility: what is exact, what is read and what is not, what survives a kill, and what is refused."""
import json, math, os, signal, subprocess, sys, time
import numpy as np
import pandas as pd
import pytest
import torch
from merginguriel import checkpoint, inner_products
from merginguriel.base_model import match_base
from merginguriel.checkpoint import open_checkpoint, save_checkpoint
from merginguriel.compatibility import *
from merginguriel.inner_products import *
from merginguriel.compute_compatibility_matrix import compute_compatibility_matrix, find_models, main, model_features, shared_texts
from merginguriel.core import CheckpointError, IncompatibleError, MissingDataError
from merginguriel.representation import *
from merginguriel.tensor_files import entry_bytes
from merginguriel.task_vector import TensorNamesError, task_vector, task_vector_gram
from merginguriel.toy import toy_base, toy_locales, toy_rows, toy_sources


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    d = tmp_path_factory.mktemp('toy')
    models = toy_sources(d/'models', toy_locales)
    base = toy_base(d/'base')
    time.sleep(.2) # A file changed a moment ago is not recognised by its times
    return base, models

@pytest.fixture
def fetched(monkeypatch):
    "Bytes read or hashed from each file, by the name of its folder"
    seen, read, hashed = {}, checkpoint.Checkpoint.read, checkpoint._hash
    checkpoint._digests.clear() # As in a new process
    def count(where, n):
        k = os.path.basename(os.path.dirname(where.name))
        seen[k] = seen.get(k, 0)+n
    def read_and_count(self, k, *args, **kw):
        t = read(self, k, *args, **kw)
        count(self.entry(k).where, t.nbytes)
        return t
    def hash_and_count(e):
        count(e.where, entry_bytes(e))
        return hashed(e)
    monkeypatch.setattr(checkpoint.Checkpoint, 'read', read_and_count)
    monkeypatch.setattr(checkpoint, '_hash', hash_and_count)
    return seen

def tensors(path): c = open_checkpoint(path); return {k: c.read(k) for k in c}
def rewrite(path, change):
    t = tensors(path)
    change(t)
    save_checkpoint(t, path)
def some(models, *names): return {k: models[k] for k in names}
def body(path): c = open_checkpoint(path); return sum(math.prod(c.shape(k))*4 for k in c if not k.startswith('classifier'))
def size(path): return open_checkpoint(path).nbytes
def dense(base, models):
    "Gram of the encoder by the definition"
    b, taus = tensors(base), []
    for p in models.values():
        t = tensors(p)
        taus.append(torch.cat([(v.double()-b[k.removeprefix('roberta.')].double()).flatten() for k, v in t.items() if not k.startswith('classifier')]))
    v = torch.stack(taus)
    return (v@v.T).numpy()


# ---- exact

def test_a_known_cosine_over_a_hundred_million_values():
    "Triples (a,0,2a) and (a,2a,0), a drawn at random: the cosine is 1/5 whatever a is, and float32 sums miss it"
    a = torch.randn(3_400_000, generator=torch.Generator().manual_seed(0)).mul_(5e-4)
    u, v = (torch.stack([o*a for o in p], 1).flatten() for p in ((1, 0, 2), (1, 2, 0)))
    names = [f'w{i}' for i in range(10)] # Ten tensors in one memory
    models = {k: dict.fromkeys(names, t) for k, t in dict(base=torch.zeros_like(u), u=u, v=v).items()}
    assert 10*len(u) >= 100_000_000
    g = task_vector_gram(models.pop('base'), models).to_numpy()
    assert abs(g[0, 1]/math.sqrt(g[0, 0]*g[1, 1])-.2) < 1e-6
    assert abs(g[0, 0]/(50*float(a.double().square().sum()))-1) < 1e-6
    u, v = u.repeat(10), v.repeat(10)
    assert abs(torch.nn.functional.cosine_similarity(u, v, dim=0).item()-.2) > 1e-4

def test_gram_of_files_is_the_dense_one(toy):
    base, models = toy
    p = measure_products(base, models)
    use = [not k.startswith('classifier') for k in p.tensors]
    np.testing.assert_allclose(p.gram[use].sum(0), dense(base, models), rtol=1e-5)

def test_blocks_sum_to_the_whole(toy, tmp_path):
    base, models = toy
    whole = match_base(base, models['en-US'], out=tmp_path/'base')
    parts, g = task_vector_gram(whole, models, blocks=True), task_vector_gram(whole, models)
    assert list(parts) == ['embeddings', 'layer.0', 'head']
    np.testing.assert_allclose(sum(parts.values()), g, rtol=1e-12)
    assert np.linalg.eigvalsh(g).min() > 0

def test_float64_models_are_summed_in_float64():
    x = torch.randn(2, 5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    g = task_vector_gram({'w': torch.zeros(5000, dtype=torch.float64)}, {'a': {'w': x[0]}, 'b': {'w': x[1]}})
    np.testing.assert_allclose(g, (x@x.T).numpy(), rtol=1e-12)

def test_mixed_types_and_the_order_of_sources():
    "bfloat16 is exact in float32; another order of the sources is the same matrix in another order"
    base = {'layer.0.w': torch.randn(64, 40, generator=torch.Generator().manual_seed(0))}
    models = {k: {'layer.0.w': (base['layer.0.w']+i).bfloat16()} for i, k in enumerate('abc', 1)}
    c = task_vector_cosine(base, models)
    d = task_vector_cosine(base, some(models, 'c', 'a', 'b'))
    np.testing.assert_allclose(c.loc[list('cab'), list('cab')], d, rtol=1e-9)
    t = [task_vector(base, m)['layer.0.w'].flatten().double() for m in models.values()]
    assert abs(c.loc['a', 'b']-float(t[0]@t[1]/(t[0].norm()*t[1].norm()))) < 1e-6

def test_signs_by_the_definition(toy):
    base, models = toy
    s, b = sign_agreement(base, some(models, 'de-DE', 'sq-AL')), tensors(base)
    x, y = (torch.cat([(v-b[k.removeprefix('roberta.')]).flatten() for k, v in tensors(models[o]).items() if 'classifier' not in k]) for o in s)
    both = (x != 0)&(y != 0)
    assert abs(s.iloc[0, 1]-float((x.sign() == y.sign())[both].float().mean())) < 1e-6

@pytest.mark.parametrize('n,d', [(5, 12), (12, 5), (8, 8)])
def test_both_forms_of_cka_agree(n, d):
    r = np.random.default_rng(0)
    x, y = r.normal(size=(n, d)), r.normal(size=(n, d+1))
    for e in ('debiased', 'biased'): assert abs(linear_cka(x, y, e, form='gram')-linear_cka(x, y, e, form='features')) < 1e-12
    m = cka_matrix({'x': x, 'y': y, 'z': None})
    assert m.loc['x', 'y'] == m.loc['y', 'x'] == linear_cka(x, y) and m['z'].isna().all()

def test_a_head_reads_its_own_encoder_as_the_model_does(toy):
    "The hidden state through `classifier_head` gives the logits of the model itself"
    from merginguriel.train import load_classifier, pad
    found, labels, heads = {}, {}, {}
    for k in ('de-DE', 'en-US'):
        m, tok = load_classifier(toy[1][k])
        rows = toy_rows(k, 'dev')
        ids = tok([r['text'] for r in rows])['input_ids']
        batches = [pad(ids[i:i+20], tok.pad_token_id) for i in range(0, len(ids), 20)]
        found[k], labels[k], heads[k] = hidden_features(m, batches), [r['label'] == 'music' for r in rows], classifier_head(m)
        with torch.no_grad(): z = torch.cat([m(**b).logits for b in batches]).numpy()
        np.testing.assert_allclose(heads[k](found[k]), z, atol=1e-5)
        mean = hidden_features(m, batches, 'all', 'mean')
        assert mean.shape == (2, len(rows), 16)
    a = cross_head_accuracy(found, heads, labels)
    assert a.loc['de-DE', 'de-DE'] == ((heads['de-DE'](found['de-DE']).argmax(1) == labels['de-DE']).mean())

def test_overlap_of_random_directions_is_rank_over_dimension():
    g = torch.Generator().manual_seed(0)
    base = {'layer.0.w': torch.zeros(40, 30), 'layer.1.w': torch.zeros(30, 60)}
    models = {k: {n: torch.randn(v.shape, generator=g) for n, v in base.items()} for k in 'ab'}
    for side, d in (('out', (40, 30)), ('in', (30, 60))):
        assert abs(subspace_overlap(base, models, rank=10, side=side).loc['a', 'b']-np.mean([10/o for o in d])) < .12
    turned = {'a': models['a'], 'b': {n: 3*v for n, v in models['a'].items()}}
    assert abs(subspace_overlap(base, turned, rank=4).loc['a', 'b']-1) < 1e-9


# ---- what is read

def test_a_known_matrix_reads_nothing(toy, tmp_path, fetched):
    base, models = toy
    first = measure_products(base, models, cache=tmp_path)
    assert sum(fetched.values()) == first.bytes_read
    assert fetched['sq-AL'] == size(models['sq-AL'])+body(models['sq-AL'])
    fetched.clear()
    again = task_vector_cosine(base, models, cache=tmp_path)
    assert not fetched
    pd.testing.assert_frame_equal(again, task_vector_cosine(first))
    for o in (dict(embeddings='no_embeddings'), dict(off_base=True)): task_vector_cosine(base, models, cache=tmp_path, **o)
    layer_cosine(base, models, cache=tmp_path)
    assert not fetched

def test_a_new_model_reads_itself_and_its_partners_once(toy, tmp_path, fetched):
    base, models = toy
    measure_products(base, some(models, 'de-DE', 'en-US', 'sq-AL'), cache=tmp_path)
    fetched.clear()
    p = measure_products(base, some(models, 'vi-VN', 'de-DE', 'en-US'), cache=tmp_path)
    assert 'sq-AL' not in fetched
    assert fetched == {'vi-VN': size(models['vi-VN'])+body(models['vi-VN']), **{k: body(models[k]) for k in ('de-DE', 'en-US')},
        'base': body(base)} and sum(fetched.values()) == p.bytes_read
    fetched.clear()
    whole = measure_products(base, some(models, 'de-DE', 'en-US', 'sq-AL', 'vi-VN'), cache=tmp_path) # Lacks one pair: sq-AL and vi-VN
    assert set(fetched) == {'sq-AL', 'vi-VN', 'base'}
    np.testing.assert_allclose(whole.gram, measure_products(base, some(models, 'de-DE', 'en-US', 'sq-AL', 'vi-VN')).gram, rtol=1e-6)

def test_signs_are_added_to_known_products(toy, tmp_path, fetched):
    base, models = toy
    measure_products(base, models, cache=tmp_path)
    s = sign_agreement(base, models, cache=tmp_path)
    pd.testing.assert_frame_equal(s, sign_agreement(base, models))
    fetched.clear()
    sign_agreement(base, models, cache=tmp_path)
    assert not fetched

def test_a_changed_model_is_measured_again_and_a_copy_is_not(tmp_path, fetched):
    base, models = toy_base(tmp_path/'base'), toy_sources(tmp_path/'models')
    time.sleep(.2)
    old = task_vector_cosine(base, models, cache=tmp_path/'cache')
    os.rename(models['sq-AL'], tmp_path/'elsewhere')
    fetched.clear()
    pd.testing.assert_frame_equal(old, task_vector_cosine(base, models|{'sq-AL': tmp_path/'elsewhere'}, cache=tmp_path/'cache'))
    assert 'de-DE' not in fetched and 'base' not in fetched
    rewrite(models['de-DE'], lambda t: t.update({k: v+.1 for k, v in t.items()}))
    new = task_vector_cosine(base, models|{'sq-AL': tmp_path/'elsewhere'}, cache=tmp_path/'cache')
    assert abs(new.loc['de-DE', 'en-US']-old.loc['de-DE', 'en-US']) > 1e-3
    assert new.loc['en-US', 'sq-AL'] == old.loc['en-US', 'sq-AL']

def test_one_model_under_two_names(toy, tmp_path):
    base, models = toy
    m = {'a': models['de-DE'], 'b': models['en-US'], 'c': models['de-DE'], 'x': None}
    for cache in (None, tmp_path):
        c = task_vector_cosine(base, m, cache=cache)
        assert abs(c.loc['a', 'c']-1) < 1e-12 and abs(c.loc['a', 'b']-c.loc['c', 'b']) < 1e-12 and c.loc['x'].isna().all()


# ---- interruptions

KILLED = """
import itertools, os, signal, sys
from merginguriel import inner_products
steps, fill = itertools.count(), inner_products._fill
def dying(*args):
    if next(steps) == 5: os.kill(os.getpid(), signal.SIGKILL)
    fill(*args)
inner_products._fill = dying
base, cache, *models = sys.argv[1:]
inner_products.measure_products(base, {os.path.basename(o): o for o in models}, cache=cache, save_every=0)
"""

def test_a_killed_run_goes_on(toy, tmp_path, fetched):
    base, models = toy
    r = subprocess.run([sys.executable, '-c', KILLED, str(base), str(tmp_path), *map(str, models.values())])
    assert r.returncode == -signal.SIGKILL
    p = measure_products(base, models, cache=tmp_path)
    done = sum(math.prod(open_checkpoint(base).shape(k.removeprefix('roberta.')))*4 for k in p.tensors[:5])
    assert p.tensors[0].startswith('roberta') and p.bytes_read == sum(fetched.values()) == 6*(body(base)-done)
    np.testing.assert_array_equal(p.gram, measure_products(base, models).gram)

def test_ctrl_c_keeps_what_was_measured(toy, tmp_path, monkeypatch, fetched):
    base, models = toy
    fill, steps = inner_products._fill, iter(range(100))
    def stop(*args):
        if next(steps) == 7: raise KeyboardInterrupt
        fill(*args)
    monkeypatch.setattr(inner_products, '_fill', stop)
    with pytest.raises(KeyboardInterrupt): measure_products(base, models, cache=tmp_path, save_every=1e9)
    monkeypatch.setattr(inner_products, '_fill', fill)
    fetched.clear()
    p = measure_products(base, models, cache=tmp_path)
    assert 0 < p.bytes_read < 6*body(base)

def test_an_interrupted_command_reads_no_model_twice(toy, tmp_path, monkeypatch):
    import merginguriel.compute_compatibility_matrix as command
    base, models = toy
    read, asked = command._read_texts, []
    def third(folder, *args):
        asked.append(folder.name)
        if len(asked) == 3: raise KeyboardInterrupt
        return read(folder, *args)
    monkeypatch.setattr(command, '_read_texts', third)
    args = ['--models-dir', str(models['de-DE'].parent), '--pretrained', str(base), '--output-dir', str(tmp_path/'out'),
        '--cache', str(tmp_path/'cache'), '--dataset', 'toy', '--n', '12', '--metric', 'cka']
    assert main(args) == 130 and not (tmp_path/'out').exists()
    assert main(args) == 0
    assert len(asked) == 6 and len(set(asked)) == 5
    m = read_matrix(tmp_path/'out'/'cka_matrix.csv')
    assert list(m) == sorted(toy_locales) and np.allclose(np.diag(m), 1)

def test_damaged_caches_are_named(toy, tmp_path):
    base, models = toy
    measure_products(base, models, cache=tmp_path)
    file, = tmp_path.glob('products-*.npz')
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=file.name): measure_products(base, models, cache=tmp_path)
    (tmp_path/'digests.json').write_text('{')
    with pytest.raises(CheckpointError, match='digests.json'): measure_products(base, models, cache=tmp_path)
    texts = [r['text'] for r in toy_rows('en-US', 'dev')]
    model_features(models['de-DE'], texts, tmp_path/'x')
    file, = (tmp_path/'x').glob('features-*.npy')
    file.write_bytes(b'')
    with pytest.raises(CheckpointError, match=file.name): model_features(models['de-DE'], texts, tmp_path/'x')


# ---- refused

@pytest.fixture
def fresh(tmp_path): return toy_base(tmp_path/'base'), toy_sources(tmp_path/'models')

@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_not_a_number_is_named_and_not_kept(fresh, tmp_path, bad):
    base, models = fresh
    key = 'roberta.encoder.layer.0.output.dense.weight'
    rewrite(models['sq-AL'], lambda t: t[key].view(-1)[3:4].fill_(bad))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f'{key} of sq-AL'): task_vector_cosine(base, models, cache=tmp_path/'cache')
    assert task_vector_cosine(base, some(models, 'de-DE', 'en-US'), cache=tmp_path/'cache').notna().all(axis=None)

def test_models_that_do_not_fit(fresh, tmp_path):
    base, models = fresh
    word = 'roberta.embeddings.word_embeddings.weight'
    rewrite(models['sq-AL'], lambda t: t.update({word: t[word][:-1].clone()}))
    with pytest.raises(IncompatibleError, match='word_embeddings.*sq-AL'): task_vector_cosine(base, models)
    rewrite(models['sq-AL'], lambda t: t.pop(word))
    with pytest.raises(TensorNamesError, match='sq-AL lacks'): task_vector_cosine(base, models)
    other = tmp_path/'other.safetensors'
    save_checkpoint({'something.weight': torch.ones(3)}, other)
    with pytest.raises(IncompatibleError, match='fine-tuned from'): task_vector_cosine(other, some(models, 'de-DE', 'en-US'))

def test_what_cannot_be_asked(toy):
    base, models = toy
    for args, words in [(dict(embeddings='none'), "'all' or 'no_embeddings'"), (dict(head=True), 'match_base')]:
        with pytest.raises(ValueError, match=words): task_vector_cosine(base, models, **args)
    with pytest.raises(ValueError, match='none of the 2 models'): task_vector_cosine(base, {'a': None, 'b': None})
    with pytest.raises(MissingDataError, match='no checkpoint at'): task_vector_cosine(base, {'a': base.parent/'nowhere'})
    with pytest.raises(ValueError, match='rank=99'): subspace_overlap(base, models, rank=99)
    with pytest.raises(ValueError, match="'out' or 'in'"): subspace_overlap(base, models, side='left')

@pytest.mark.parametrize('x,words', [(np.ones((3, 2)), '4 texts'), (np.ones(8), r'\(texts, dimensions\)'),
    (np.full((5, 2), np.inf), 'NaN or infinity')])
def test_representations(x, words):
    with pytest.raises(ValueError, match=words): cka_matrix({'a': x, 'b': x})

def test_texts_of_different_number():
    with pytest.raises(ValueError, match='same texts'): cka_matrix({'a': np.ones((5, 2)), 'b': np.ones((6, 2))})
    with pytest.raises(ValueError, match='batches of 3'): linear_cka(np.ones((9, 2)), np.ones((9, 2)), batch_size=3)

@pytest.mark.parametrize('weights,words', [({'a': -.1, 'b': 1}, '0 or more'), ({'a': math.nan, 'b': 1}, 'finite'), ({}, 'not all 0'),
    ({'a': 0, 'b': 0}, 'not all 0'), (pd.Series([1, 2], ['a', 'a']), 'two weights')])
def test_similarity_weights(weights, words):
    with pytest.raises(ValueError, match=words): compatibility_weights(weights, pd.DataFrame(np.eye(2), list('ab'), list('ab')))

def test_one_negative_mean_is_clipped_with_a_warning():
    c = pd.DataFrame([[1, .4, -.5], [.4, 1, -.1], [-.5, -.1, 1]], list('abc'), list('abc'))
    with pytest.warns(UserWarning, match="'a': -0.05, 'c': -0.3"): w = compatibility_weights(dict(a=.2, b=.3, c=.5), c)
    assert w.to_dict() == dict(a=0, b=1, c=0)

def test_the_control_keeps_the_values_and_moves_them():
    c = pd.DataFrame(np.add.outer(range(6), range(6)).astype(float), list('abcdef'), list('abcdef'))
    moved = [shuffled(c, s) for s in range(20)]
    assert all(np.array_equal(m, m.T) and sorted(m.values.flat) == sorted(c.values.flat) for m in moved)
    assert len({tuple(np.diag(m)) for m in moved}) > 10
    pd.testing.assert_frame_equal(shuffled(c, 3), shuffled(c, 3))

@pytest.mark.parametrize('text,words', [('model,a,b\na,1,2\nb,3,1\n', 'symmetric'), ('model,a,b\na,1,x\nb,x,1\n', 'not a number'),
    ('model,a,c\na,1,2\nb,2,1\n', 'different names'), ('model,a,b\na,1,inf\nb,inf,1\n', 'finite'), ('model,a,b\na,1,2\na,2,1\n', 'twice')])
def test_damaged_files(tmp_path, text, words):
    (tmp_path/'cka_matrix.csv').write_text(text)
    with pytest.raises(CheckpointError, match=words): CompatibilityWeightCalculator(tmp_path).weights({'a': 1, 'b': 1}, 'cka')

def test_missing_files(tmp_path):
    with pytest.raises(MissingDataError, match='task_vector_cosine_matrix.csv'): CompatibilityWeightCalculator(tmp_path)
    (tmp_path/'cka_matrix.csv').write_text('model,a,b\na,1,\nb,,\n')
    c = CompatibilityWeightCalculator(tmp_path)
    with pytest.raises(MissingDataError, match='no task_vector_cosine_matrix.csv'): c.weights({'a': 1, 'b': 1})
    with pytest.raises(MissingDataError, match='of b is NaN'): c.weights({'a': 1, 'b': 1}, 'similarity_x_cka_compatibility')


# ---- the command

def test_the_files_and_the_log(toy, tmp_path):
    base, models = toy
    r = compute_compatibility_matrix(str(models['de-DE'].parent), str(base), output_dir=str(tmp_path/'o'), cache=str(tmp_path/'c'),
        locales='sw-KE,th-TH,de-DE', dataset='toy', n=20, text_locale='vi-VN', split='dev')
    log = json.loads((tmp_path/'o'/'computation_log.json').read_text())
    assert log['missing'] == ['th-TH'] and log['models']['th-TH'] is None and log['off_diagonal']['task_vector_cosine']['pairs'] == 1
    assert log['models']['sw-KE']['digest'] == open_checkpoint(models['sw-KE']).digest()
    assert log['pretrained']['digest'] == open_checkpoint(base).digest()
    assert log['options']['text_locale'] == 'vi-VN' and log['texts']['n'] == 20
    assert sorted(log['seconds']) == sorted(log['bytes_read']) == ['cka', 'task_vector_cosine']
    m = read_matrix(tmp_path/'o'/'task_vector_cosine_matrix.csv')
    assert list(m) == ['sw-KE', 'th-TH', 'de-DE'] and m['th-TH'].isna().all()
    pd.testing.assert_frame_equal(m, r['task_vector_cosine'], check_names=False)

def test_in_a_process_of_its_own(toy, tmp_path):
    base, models = toy
    r = subprocess.run([sys.executable, '-m', 'merginguriel.compute_compatibility_matrix', '--models-dir', str(models['de-DE'].parent),
        '--pretrained', str(base), '--metric', 'task_vector_cosine', '--output-dir', str(tmp_path/'o'), '--cache', str(tmp_path/'c')],
        capture_output=True, text=True)
    assert (r.returncode, r.stderr) == (0, '') and 'pairs 10' in r.stdout
    assert sorted(p.name for p in (tmp_path/'o').iterdir()) == ['computation_log.json', 'task_vector_cosine_matrix.csv']

@pytest.mark.parametrize('folders,words', [(['sq-AL-1', 'sq-AL-2'], '2 models of sq-AL'), (['sq-AL_de-DE'], 'de-DE and sq-AL'),
    ([], 'nothing'), (['base'], 'no model')])
def test_folders(tmp_path, folders, words):
    for f in folders: save_checkpoint({'w': torch.ones(1)}, (tmp_path/f).joinpath('model.safetensors'))
    with pytest.raises(ValueError if folders and folders[0] != 'base' else MissingDataError, match=words): find_models(tmp_path)

def test_a_folder_without_a_model_is_missing(tmp_path):
    save_checkpoint({'w': torch.ones(1)}, tmp_path/'de-DE-0f'/'model.safetensors')
    (tmp_path/'sq-AL').mkdir()
    (tmp_path/'xde-DEx').mkdir()
    found, other = find_models(tmp_path)
    assert found == {'de-DE': tmp_path/'de-DE-0f', 'sq-AL': None} and other == ['xde-DEx']

@pytest.mark.parametrize('change,words', [(dict(metric='cosine'), 'metric is one of'), (dict(estimator='x'), 'estimator is one of'),
    (dict(n=3), 'n=3'), (dict(split='all'), "'all'"), (dict(locales='xx-XX'), 'unknown locale'), (dict(text_locale='de-DE,fr-FR'), 'fr-FR')])
def test_a_wrong_option_is_found_before_anything_is_read(toy, tmp_path, fetched, change, words):
    base, models = toy
    args = dict(models_dir=str(models['de-DE'].parent), pretrained=str(base), output_dir=str(tmp_path/'o'), cache=str(tmp_path/'c'), dataset='toy')
    with pytest.raises(ValueError, match=words): compute_compatibility_matrix(**args|change)
    assert not fetched and not (tmp_path/'o').exists()

def test_parallel_texts():
    texts, ids = shared_texts('toy', 'de-DE,vi-VN', 'dev', 8)
    rows = {k: {r['id']: r['text'] for r in toy_rows(k, 'dev')} for k in ('de-DE', 'vi-VN')}
    assert len(texts) == 16 and [o.split(':')[1] for o in ids[:8]] == [o.split(':')[1] for o in ids[8:]]
    assert texts == [rows[k][int(i)] for k, i in (o.split(':') for o in ids)]
