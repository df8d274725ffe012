"""Laws of task-vector bases for every kind, against dense matrices: what comes back, what is lost, and what is refused."""
import json, math
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
import torch
import merginguriel.basis_solvers as solvers_module
import merginguriel.bases as bases_module
import merginguriel.raw_vectors as vectors_module
from merginguriel.bases import *
from merginguriel.basis_solvers import basis_kinds
from merginguriel.checkpoint import open_checkpoint, save_checkpoint
from merginguriel.clustering import adjusted_rand, cosines, eigengap, laplacian_spectrum
from merginguriel.core import CheckpointError, IncompatibleError, MissingDataError
from merginguriel.factorization import encoding_loss, loss_bound
from merginguriel.merge import merge, merge_state_dicts
from merginguriel.task_vector import task_vector_gram
from merginguriel.toy import toy_base, toy_locales, toy_sources

TASKS = ['c','a','f','b','e','d']
SHAPES = {'embeddings.w':(11,3), 'encoder.layer.0.w':(7,5), 'encoder.layer.0.b':(5,), 'encoder.layer.1.w':(4,2,3), 's':()}
BY = dict(c='x', a='y', f='x', b='x', e='y', d='z')
KINDS = {'ae':dict(steps=300), 'linear_ae':dict(steps=300), 'pca':{}, 'svd':{}, 'subset':{}, 'random':{}, 'spectral':dict(), 'linkage':dict(by='linkage'),
    'drawn':dict(by='random'), 'metagpt':dict(by=BY, inner='metagpt'), 'ties':dict(by=BY, inner='ties', hp=dict(density=.3)),
    'topk':dict(by=BY, inner='topk', hp=dict(density=.3))}


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Six models near three directions, in memory and as files, and their task vectors as columns"
    g = torch.Generator().manual_seed(0)
    draw = lambda scale: {k:scale*torch.randn(s, generator=g) for k,s in SHAPES.items()}
    base,groups = draw(1.),{o:draw(.1) for o in 'xyz'}
    sources = {}
    for t in TASKS:
        own = draw(.06)
        sources[t] = {k:base[k]+groups[BY[t]][k]+own[k] for k in SHAPES}
    for m in (base, *sources.values()): m['embeddings.position_ids'] = torch.arange(4)
    d = tmp_path_factory.mktemp('models')
    paths = {k:save_checkpoint(m, d/f'{k}.safetensors') for k,m in {**sources, 'base':base}.items()}
    return SimpleNamespace(base=base, sources=sources, V=np.stack([tau(base, m) for m in sources.values()], 1),
        path=paths.pop('base'), paths=paths)

def tau(base, m): return torch.cat([(m[k].double()-base[k].double()).flatten() for k in SHAPES]).numpy()

def fit(world, name, m=3, **kw):
    kind = name if name in basis_kinds else 'cluster'
    return fit_bases(kw.pop('base', world.base), kw.pop('sources', world.sources), m, kind, **KINDS.get(name, {})|kw)

def back(world, b): return np.stack([tau(world.base, b.expand(t)) for t in b.names], 1)
def equal(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype==b[k].dtype for k in a)

every = pytest.mark.parametrize('name', KINDS)


# ---- what comes back, and what is lost

@every
def test_the_error_is_that_of_the_vectors(world, name):
    b = fit(world, name)
    lost = ((back(world, b)-world.V)**2).sum(0)
    assert b.error().error == pytest.approx(lost.sum()/(world.V**2).sum(), abs=2e-6)
    assert b.error(per_task=True).to_numpy() == pytest.approx(lost/(world.V**2).sum(0), abs=2e-6)
    assert list(b.error(per_task=True).index) == TASKS

@every
def test_no_vectors_beat_the_bound(world, name):
    b = fit(world, name)
    kept = b.mix.shape[1]
    assert b.error().bound == pytest.approx((np.linalg.svd(world.V)[1][kept:]**2).sum()/(world.V**2).sum(), rel=1e-4)
    assert b.error().error >= b.error().bound-1e-9

@pytest.mark.parametrize('name', ['svd','pca'])
def test_more_vectors_never_lose_more(world, name):
    e = [fit(world, name, m).error().error for m in range(1, 7)]
    assert all(a>=b-1e-12 for a,b in zip(e, e[1:])) and e[0]>.3
    assert name=='pca' or e == pytest.approx([fit(world, name, m).error().bound for m in range(1, 7)])

@pytest.mark.parametrize('name', ['ae','linear_ae','pca','svd','subset','all','spectral','linkage'])
def test_all_vectors_lose_nothing(world, name):
    b = fit(world, name, 6)
    assert b.error().error == pytest.approx(0, abs=1e-9)
    assert np.abs(back(world, b)-world.V).max() < 1e-6

@pytest.mark.parametrize('m', range(1, 7))
def test_the_sum_of_all_tasks_is_exact_with_pca(world, m):
    assert tau(world.base, fit(world, 'pca', m).add_tasks()) == pytest.approx(world.V.sum(1), abs=2e-6)

def test_the_values_worked_out_by_hand():
    V = np.array([[1,0,0,0],[.8,.6,0,0],[0,0,2,0],[0,0,1.6,1.2]]).T
    sources = {k:{'w':torch.tensor(v)} for k,v in zip('pqrs', V.T)}
    fit = lambda m,kind: fit_bases({'w':torch.zeros(4).double()}, sources, m, kind)
    assert [fit(m, 'svd').error().error*10/16 for m in (2,3)] == pytest.approx([.0625,.0125])
    assert [loss_bound(V.T@V, m) for m in (2,3)] == pytest.approx([.0625,.0125])
    assert fit(1, 'pca').add_tasks()['w'].tolist() == pytest.approx([1.8,.6,3.6,1.2])
    assert fit(1, 'pca').add_tasks(dict.fromkeys('pqrs', .25))['w'].tolist() == pytest.approx([.45,.15,.9,.3])
    c = cosines(V.T@V)
    assert laplacian_spectrum(c) == pytest.approx([0,0,1.6,1.6], abs=1e-12) and eigengap(c)==2
    assert fit(None, 'cluster').clusters.tolist() == [0,0,1,1]

def test_kinds_of_the_optimum_against_a_dense_svd(world):
    u,s,vh = np.linalg.svd(world.V, full_matrices=False)
    assert back(world, fit(world, 'svd', 2)) == pytest.approx((u[:,:2]*s[:2])@vh[:2], abs=1e-5)
    mean = world.V.mean(1, keepdims=True)
    u,s,vh = np.linalg.svd(world.V-mean, full_matrices=False)
    assert back(world, fit(world, 'pca', 2)) == pytest.approx(mean+(u[:,:2]*s[:2])@vh[:2], abs=1e-5)

def test_the_published_loss(world):
    b = fit(world, 'ae')
    G = world.V.T@world.V
    assert encoding_loss(G, b.encoder, b.decoder) == pytest.approx(((world.V@b.encoder@b.decoder-world.V)**2).sum()/36)
    assert b.encoder.min()>0 and b.encoder.sum(0) == pytest.approx(1)

def test_random_directions_are_a_projection(world):
    b = fit(world, 'random', 4)
    keys = sorted(SHAPES)
    R = np.stack([torch.cat([s.flatten() for s in one]).numpy() for one in zip(*(b._vectors(bases_module.Block(k, None, 0, SHAPES[k]),
        world.base[k]) for k in keys))], 1)
    order = np.concatenate([np.arange(n)+o for k in keys for n,o in [(math.prod(SHAPES[k]), sum(math.prod(SHAPES[j]) for j in
        list(SHAPES)[:list(SHAPES).index(k)]))]])
    V = world.V[order]
    assert set(R.flatten()) == {-1,1}
    assert back(world, b)[order] == pytest.approx(R@np.linalg.lstsq(R, V, rcond=None)[0], abs=1e-5)
    assert fit(world, 'random', 4, seed=1).decoder.tolist() != b.decoder.tolist()


# ---- arithmetic

@every
def test_adding_tasks_adds_what_comes_back(world, name):
    b,w = fit(world, name),dict(c=.5, b=-1.5, d=2.)
    want = sum(x*tau(world.base, b.expand(t)) for t,x in w.items())
    assert tau(world.base, b.add_tasks(pd.Series(w), scale=.5)) == pytest.approx(.5*want, abs=2e-6)
    assert tau(world.base, b.negate('a', .3)) == pytest.approx(-.3*tau(world.base, b.expand('a')), abs=2e-6)
    assert equal(b.add_tasks('a'), b.expand('a')) and equal(b.add_tasks(['a']), b.expand('a'))
    assert equal(b.add_tasks(w, scale=0), world.base) and equal(b.negate('a', 0), world.base)

@pytest.mark.parametrize('name', ['ae','svd','metagpt','ties','random'])
def test_adding_bases_adds_the_stored_vectors(world, name):
    b = fit(world, name)
    each = [tau(world.base, b.add_bases({i:1.})) for i in range(3)]
    assert tau(world.base, b.add_bases(scale=.7)) == pytest.approx(.7*sum(each), abs=2e-6)
    assert tau(world.base, b.add_bases(outer='mean')) == pytest.approx(sum(each)/3, abs=2e-6)

def test_groups_by_size_are_the_mean_of_all(world):
    b = fit(world, 'cluster', None, by=BY)
    assert tau(world.base, b.add_bases(outer='size_weighted')) == pytest.approx(world.V.mean(1), abs=2e-6)
    assert tau(world.base, b.expand('f')) == pytest.approx(world.V[:,[0,2,3]].mean(1), abs=2e-6)
    assert b.clusters.tolist() == [0,1,0,0,1,2]

def test_whole_model_inner_and_outer_merges_are_those_of_merge(world):
    group = {k:world.sources[k] for k in 'cfb'}
    merged = merge_state_dicts(world.base, group, 'ties', density=.3)
    assert tau(world.base, fit(world, 'ties').expand('f')) == pytest.approx(tau(world.base, merged), abs=1e-6)
    b = fit(world, 'cluster', None, by=BY)
    centroids = {str(i):b.add_bases({i:1.}) for i in range(3)}
    merged = merge_state_dicts(world.base, centroids, 'ties', density=.4)
    assert tau(world.base, b.add_bases(outer='ties', hp=dict(density=.4))) == pytest.approx(tau(world.base, merged), abs=1e-6)

def test_topk_keeps_the_largest_of_the_model_and_divides_by_all(world):
    V = world.V[:,[0,2,3]]
    n = int(.3*len(V))
    kept = np.where(abs(V)>=np.sort(abs(V), 0)[-n], V, 0)
    assert tau(world.base, fit(world, 'topk').expand('c')) == pytest.approx(kept.mean(1), abs=1e-6)
    assert tau(world.base, fit(world, 'topk').expand('d')) == pytest.approx(world.V[:,5], abs=1e-6) # Alone: as it is

def test_fisher_inside_a_group(world):
    information = {t:{k:torch.full(s, float(i+1)) for k,s in SHAPES.items()} for i,t in enumerate(TASKS)}
    b = fit_bases(world.base, world.sources, kind='cluster', by=BY, inner='fisher', hp=dict(information=information))
    assert tau(world.base, b.expand('c')) == pytest.approx(world.V[:,[0,2,3]]@[1/8,3/8,4/8], abs=1e-5)


# ---- streams, orders, seeds

@every
def test_blocks_and_files_change_nothing(world, name, monkeypatch, tmp_path):
    whole = fit(world, name)
    before = {k:{n:v.clone() for n,v in m.items()} for k,m in world.sources.items()}
    for o in (bases_module, vectors_module): monkeypatch.setattr(o, 'block_size', lambda n: 6)
    small = fit(world, name, base=world.path, sources=world.paths)
    assert np.abs(small.decoder-whole.decoder).max() < 1e-4 and small.error().error == pytest.approx(whole.error().error, abs=1e-6)
    assert back(world, small) == pytest.approx(back(world, whole), abs=1e-6)
    out = open_checkpoint(small.expand('b', tmp_path/'out'))
    assert equal({k:out.read(k) for k in out}, small.expand('b'))
    assert all(equal(before[k], m) for k,m in world.sources.items())

@pytest.mark.parametrize('name', ['ae','linear_ae','pca','svd','random','spectral','linkage','metagpt','ties','topk'])
def test_the_order_of_tasks_is_irrelevant(world, name):
    a = fit(world, name)
    b = fit(world, name, sources={k:world.sources[k] for k in sorted(TASKS)})
    assert b.names == sorted(TASKS) and a.error().error == pytest.approx(b.error().error, abs=1e-6)
    for t in TASKS: assert tau(world.base, a.expand(t)) == pytest.approx(tau(world.base, b.expand(t)), abs=1e-4)

@pytest.mark.parametrize('name', ['subset','random','drawn'])
def test_seeds_say_what_is_drawn(world, name):
    a,b = fit(world, name, seed=3),fit(world, name, seed=3)
    assert equal(a.expand('e'), b.expand('e'))
    assert any(not equal(a.expand('e'), fit(world, name, seed=s).expand('e')) for s in range(4, 8))

def test_a_gram_that_is_known_is_not_measured_again(world, monkeypatch):
    a = fit(world, 'svd')
    g = task_vector_gram(world.base, world.sources)
    assert a.gram.to_numpy() == pytest.approx(g.to_numpy())
    monkeypatch.setattr(solvers_module, 'iter_products', None)
    b = fit(world, 'svd', gram=g.loc[sorted(TASKS),sorted(TASKS)])
    assert b.decoder == pytest.approx(a.decoder) and b.names == TASKS

def test_excluded_tensors_do_not_count(world):
    inside = [k for k in SHAPES if k!='embeddings.w']
    b = fit(world, 'svd', exclude='^embed')
    V = np.stack([np.concatenate([(m[k].double()-world.base[k].double()).flatten() for k in inside]) for m in world.sources.values()], 1)
    assert b.gram.to_numpy() == pytest.approx(V.T@V)
    assert b.error().error == pytest.approx((np.linalg.svd(V)[1][3:]**2).sum()/(V**2).sum(), rel=1e-4)


# ---- saving

@every
def test_what_is_saved_comes_back_exactly(world, name, tmp_path):
    b = fit(world, name, base=world.path, sources=world.paths)
    c = Bases.load(b.save(tmp_path/'bases'))
    assert all(equal(b.expand(t), c.expand(t)) for t in TASKS)
    assert equal(b.add_tasks(dict(a=.3, d=-.2)), c.add_tasks(dict(a=.3, d=-.2))) and equal(b.add_bases(), c.add_bases())
    assert repr(b)==repr(c) and b.error().equals(c.error()) and b.storage().equals(c.storage()) and b.gram.equals(c.gram)
    assert (b.encoder is None and c.encoder is None) or np.array_equal(b.encoder, c.encoder)
    new = world.sources['a']|{'s':torch.tensor(3.)}
    assert b.nearest(new).to_numpy() == pytest.approx(c.nearest(new).to_numpy(), abs=1e-6)
    again = Bases.load(c.save(tmp_path/'again'))
    assert equal(again.expand('f'), b.expand('f'))

def test_the_sources_are_not_needed_after_saving(world, tmp_path):
    paths = {k:save_checkpoint(m, tmp_path/f'{k}.safetensors') for k,m in world.sources.items()}
    fit(world, 'svd', base=world.path, sources=paths).save(tmp_path/'bases')
    for p in paths.values(): p.unlink()
    assert equal(Bases.load(tmp_path/'bases').expand('c'), fit(world, 'svd').expand('c'))

def test_what_was_altered_or_is_missing_is_an_error(world, tmp_path):
    fit(world, 'svd', base=world.path, sources=world.paths).save(tmp_path/'bases')
    for p in sorted((tmp_path/'bases').glob('[!.]*')):
        good = p.read_bytes()
        bad = good.replace(b'"seed": 0', b'"seed": 1') if p.suffix=='.json' else good[:-2]+bytes([good[-2]^1])+good[-1:]
        assert bad != good
        p.write_bytes(bad)
        with pytest.raises(CheckpointError, match='changed'): Bases.load(tmp_path/'bases')
        p.unlink()
        with pytest.raises(MissingDataError, match=p.name): Bases.load(tmp_path/'bases')
        p.write_bytes(good)
        Bases.load(tmp_path/'bases')
    other = save_checkpoint(world.base|{'s':torch.tensor(9.)}, tmp_path/'other.safetensors')
    with pytest.raises(IncompatibleError, match='not the base'): Bases.load(tmp_path/'bases', other)

def test_nothing_is_written_over_what_is_there(world, tmp_path):
    b = fit(world, 'svd', base=world.path, sources=world.paths)
    b.save(tmp_path/'bases')
    with pytest.raises(FileExistsError): b.save(tmp_path/'bases')
    with pytest.raises(FileExistsError): b.expand('a', world.path)
    with pytest.raises(FileExistsError): Bases.load(tmp_path/'bases').expand('a', tmp_path/'bases'/'out')

def test_storage_is_what_lies_on_disk(world, tmp_path):
    one,integers = sum(4*math.prod(s) for s in SHAPES.values()),world.base['embeddings.position_ids'].nbytes
    for name,vectors in (('svd',3),('pca',4),('random',0)):
        b = fit(world, name)
        assert b.storage().vectors==vectors and b.storage().bytes==vectors*one+8*3*6+integers and b.storage().whole==6*one
        d = b.save(tmp_path/name)
        assert sum(open_checkpoint(p).nbytes for p in d.glob('*.safetensors')) == vectors*one+integers


# ---- tasks that were not there

@pytest.mark.parametrize('name', ['ae','svd','pca','subset','random'])
def test_a_new_task_is_projected(world, name):
    sources = {k:v for k,v in world.sources.items() if k!='e'}
    b = fit(world, name, sources=sources)
    old = b.decoder.copy()
    coefs = b.add('e', world.sources['e'])
    stored = np.stack([tau(world.base, b.add_bases({i:1.})) for i in range(3)], 1)
    new,mean = world.V[:,4],world.V[:,[0,1,2,3,5]].mean(1)*(name=='pca')
    want = np.linalg.lstsq(stored, new-mean, rcond=None)[0]
    assert coefs.to_numpy() == pytest.approx(want, abs=2e-3)
    assert tau(world.base, b.expand('e')) == pytest.approx(mean+stored@want, abs=1e-5)
    assert np.array_equal(b.decoder[:,:-1], old) and b.names[-1]=='e'
    assert b.error(per_task=True)['e'] == pytest.approx(((mean+stored@want-new)**2).sum()/(new**2).sum(), abs=1e-5)

@pytest.mark.parametrize('saved', [False,True])
def test_a_new_task_joins_its_group(world, saved, tmp_path):
    sources = {k:world.paths[k] for k in 'cafbd'}
    b = fit_bases(world.path, sources, kind='cluster', by=BY)
    if saved: b = Bases.load(b.save(tmp_path/'bases'))
    assert b.nearest(world.paths['e']).idxmax()==1
    assert b.add('e', world.paths['e']).tolist() == [0,1,0]
    assert tau(world.base, b.expand('a')) == pytest.approx(world.V[:,[1,4]].mean(1), abs=1e-6)
    assert tau(world.base, b.expand('c')) == pytest.approx(world.V[:,[0,2,3]].mean(1), abs=1e-6)
    assert tau(world.base, b.add_bases(outer='size_weighted')) == pytest.approx(world.V.mean(1), abs=1e-6)
    with pytest.raises(ValueError, match='fit again'): b.error()
    c = Bases.load(b.save(tmp_path/'after'))
    assert equal(c.expand('e'), b.expand('e')) and c.clusters.tolist()==[0,1,0,0,2,1]

def test_a_new_task_opens_a_group(world):
    b = fit_bases(world.base, {k:world.sources[k] for k in 'cafbe'}, kind='cluster', by=BY)
    assert b.add('d', world.sources['d'], threshold=.9).tolist() == [0,0,1]
    assert tau(world.base, b.expand('d')) == pytest.approx(world.V[:,5], abs=1e-6)
    assert b.n_bases==3 and b.storage().vectors==3 and b.error(per_task=True)['d'] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match='already'): b.add('d', world.sources['d'])
    with pytest.raises(ValueError, match='has none'): fit(world, 'svd').add('x', world.sources['d'], threshold=.5)


# ---- classifiers

@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    d = tmp_path_factory.mktemp('toy')
    return SimpleNamespace(base=toy_base(d/'base'), sources=toy_sources(d/'models', toy_locales), d=d)

def read(path): return {k:open_checkpoint(path).read(k) for k in open_checkpoint(path)}

def test_a_base_without_a_classifier_gets_their_mean(toy):
    b = fit_bases(toy.base, toy.sources, 5, 'all')
    models = {k:read(v) for k,v in toy.sources.items()}
    k = 'classifier.out_proj.weight'
    assert torch.allclose(b.add_tasks(scale=0)[k], torch.stack([m[k] for m in models.values()]).mean(0))
    assert torch.allclose(b.add_tasks(dict.fromkeys(toy_locales, .2))[k], torch.stack([m[k] for m in models.values()]).mean(0))
    for t,m in models.items(): assert all(torch.allclose(v, m[o], atol=1e-6) for o,v in b.expand(t).items())

def test_a_folder_is_a_model(toy, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    fit_bases(toy.base, toy.sources, 2, 'svd').save(tmp_path/'bases')
    out = Bases.load(tmp_path/'bases').expand('sq-AL', tmp_path/'out')
    m = AutoModelForSequenceClassification.from_pretrained(out)
    assert m.config.id2label == {0:'lights', 1:'music'} and len(AutoTokenizer.from_pretrained(out))>10
    assert json.loads((out/'bases_record.json').read_text())['weights'] == {'sq-AL':1.0}

def test_labels_in_another_order_are_aligned(toy, tmp_path):
    turned = read(toy.sources['sw-KE'])
    for k in ('classifier.out_proj.weight','classifier.out_proj.bias'): turned[k] = turned[k].flip(0)
    (tmp_path/'m').mkdir()
    save_checkpoint(turned, tmp_path/'m')
    config = json.loads((toy.sources['sw-KE']/'config.json').read_text())|dict(id2label={'0':'music','1':'lights'})
    (tmp_path/'m'/'config.json').write_text(json.dumps(config))
    a,b = (fit_bases(toy.base, toy.sources|{'sw-KE':o}, 3, 'svd') for o in (toy.sources['sw-KE'],tmp_path/'m'))
    assert equal(a.expand('sw-KE'), b.expand('sw-KE'))
    c = fit_bases(toy.base, {k:v for k,v in toy.sources.items() if k!='sw-KE'}, 3, 'svd')
    assert c.nearest(tmp_path/'m').equals(c.nearest(toy.sources['sw-KE']))

def test_classifiers_that_do_not_belong_together_are_refused(toy, tmp_path):
    mixed = toy_sources(tmp_path/'mixed', shared_head=False)
    with pytest.raises(IncompatibleError, match="head='own'"): fit_bases(toy.base, mixed, 2, 'svd')
    fit_bases(toy.base, mixed, 2, 'svd', head='own')
    b = fit_bases(toy.base, toy.sources, 2, 'svd')
    with pytest.raises(IncompatibleError, match='initialisations'): b.add('other', mixed['sq-AL'])

@pytest.mark.parametrize('saved', [False,True])
def test_tasks_keep_their_classifiers(toy, saved, tmp_path):
    wide = read(toy.sources['de-DE'])|{'classifier.out_proj.weight':torch.ones(3,16), 'classifier.out_proj.bias':torch.arange(3.)}
    b = fit_bases(toy.base, {'a/b':toy.sources['sq-AL'], 'wide':wide}, 1, 'svd', head='own')
    if saved: b = Bases.load(b.save(tmp_path/'bases'))
    head = {k:v for k,v in wide.items() if k.startswith('classifier')}
    assert equal(b.classifier('wide'), head) and equal({k:b.expand('wide')[k] for k in head}, head)
    assert equal({k:v for k,v in b.negate('a/b').items() if k in head}, {k:v for k,v in read(toy.sources['sq-AL']).items() if k in head})
    assert equal({k:b.negate('a/b', head='wide')[k] for k in head}, head)
    both = b.add_tasks()
    assert not set(both)&set(head) and equal(b.add_tasks(head='wide'), both|head)
    b.add('new', toy.sources['vi-VN'])
    assert equal(b.classifier('new'), {k:v for k,v in read(toy.sources['vi-VN']).items() if k in head})
    with pytest.raises(ValueError, match='with head='): b.add_tasks(out=tmp_path/'out')
    with pytest.raises(KeyError, match='no task'): b.add_tasks(head='gone')
    out = b.expand('a/b', tmp_path/'out')
    assert json.loads((out/'config.json').read_text())['id2label'] == {'0':'lights','1':'music'}

def test_a_label_set_of_its_own_needs_a_classifier_of_its_own(toy):
    wide = read(toy.sources['de-DE'])|{'classifier.out_proj.weight':torch.ones(3,16), 'classifier.out_proj.bias':torch.arange(3.)}
    with pytest.raises(IncompatibleError, match='another shape'): fit_bases(toy.base, {'a':toy.sources['sq-AL'], 'wide':wide}, 1)
    with pytest.raises(IncompatibleError, match='no classifier'): fit_bases(*[{'w':torch.zeros(2)}, {'a':{'w':torch.ones(2)}}], 1, head='own')
    b = fit_bases(toy.base, toy.sources, 2, 'svd')
    with pytest.raises(ValueError, match="only with head='own'"): b.classifier('sq-AL')


# ---- types and faults

def test_types_are_kept(world):
    half = lambda m: {k:v.to(torch.bfloat16) if v.is_floating_point() else v for k,v in m.items()}
    b = fit(world, 'svd', base=half(world.base), sources={k:half(v) for k,v in world.sources.items()})
    assert {v.dtype for v in b.expand('a').values()} == {torch.bfloat16,torch.int64}
    assert b.storage().fraction > .99 # Three vectors in float32 are as large as six in bfloat16
    double = lambda m: {k:v.double() if v.is_floating_point() else v for k,v in m.items()}
    c = fit(world, 'all', 6, base=double(world.base), sources={k:double(v) for k,v in world.sources.items()})
    assert np.abs(back(world, c)-world.V).max() < 1e-12

@pytest.mark.parametrize('name', ['svd','random','ties'])
def test_a_value_that_is_no_number_is_named(world, name):
    bad = world.sources|{'b':world.sources['b']|{'encoder.layer.0.b':torch.tensor([1,2,math.nan,4,5])}}
    with pytest.raises(CheckpointError, match='encoder.layer.0.b of b'): fit(world, name, sources=bad)

def test_models_that_do_not_fit_are_refused(world):
    with pytest.raises(KeyError, match='lacks'): fit(world, 'svd', sources=world.sources|{'b':{k:v for k,v in world.sources['b'].items() if k!='s'}})
    with pytest.raises(IncompatibleError, match='another shape'): fit(world, 'svd', sources=world.sources|{'b':world.sources['b']|{'s':torch.zeros(1)}})
    b = fit(world, 'svd')
    with pytest.raises(KeyError, match='lacks'): b.nearest({k:v for k,v in world.sources['b'].items() if k!='s'})
    with pytest.raises(ValueError, match='all 2 vectors are 0'): fit(world, 'svd', 1, sources=dict(p=world.base, q=world.base))
    with pytest.raises(ValueError, match='density'): fit_bases(world.base, world.sources, 2, 'cluster', inner='topk', hp=dict(density=5))
