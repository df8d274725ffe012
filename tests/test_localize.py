"""Laws of masks and of stitching by them. The method itself, with masks that it finds, is under the laws of `test_laws.py` too."""
import json
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from torch import nn
from merginguriel.changes import *
from merginguriel.checkpoint import open_checkpoint, save_checkpoint
from merginguriel.core import CheckpointError, IncompatibleError
from merginguriel.learned_masks import *
from merginguriel.localize import *
from merginguriel.masks import *
from merginguriel.merge import merge, merge_state_dicts
from merginguriel.task_vector import TensorNamesError, task_vector, task_vector_gram
from merginguriel.toy import toy_base, toy_sources

SHAPES = {'b.bias':(6,), 'a.weight':(7,5), 'c.scale':(), 'layer.0.conv':(3,2,2), 'e.empty':(0,4), 'embeddings.w':(9,3)}
NAMES = ['sq-AL','de-DE','vi-VN','sw-KE']

def generator(seed): return torch.Generator().manual_seed(seed)

def world(n=4, seed=0, dtype=torch.float32, head=True):
    g = generator(seed)
    draw = lambda like=None: {k:(like[k]+.3*torch.randn(s, generator=g, dtype=torch.float64) if like else
        torch.randn(s, generator=g, dtype=torch.float64)) for k,s in SHAPES.items()}
    base = draw()
    sources = {k:{k2:v.to(dtype) for k2,v in draw(base).items()} for k in NAMES[:n]}
    if head: sources = {k:m|{'classifier.weight':(torch.ones(2, 3)+i*.01).to(dtype), 'ids':torch.arange(3)} for i,(k,m) in enumerate(sources.items())}
    return {k:v.to(dtype) for k,v in base.items()},sources

def drawn_masks(names, share=.4, seed=0, disjoint=False, keys=SHAPES):
    g,out = generator(seed),{n:{} for n in names}
    for k in keys:
        if disjoint:
            who = torch.randint(-1, len(names), SHAPES[k], generator=g)
            for i,n in enumerate(names): out[n][k] = who==i
        else:
            for n in names: out[n][k] = torch.rand(SHAPES[k], generator=g)<share
    return out

def body(m): return {k:v for k,v in m.items() if k in SHAPES}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# ---- coverage

@pytest.mark.parametrize('weights', [None, torch.tensor([.5,.3,.2,1.])])
def test_shares_sum_to_one_where_a_value_is_owned_and_to_nothing_elsewhere(weights):
    m = torch.rand(4, 50, 3, generator=generator(1))<.3
    share = coverage(m, weights)
    total = share.sum(0)
    assert torch.allclose(total[m.any(0)], torch.ones(1, dtype=torch.float64), atol=1e-15) and not total[~m.any(0)].any()
    assert (share[~m]==0).all() and (share[m]>0).all() and not m.any(0).all()

def test_disjoint_masks_give_each_value_to_its_owner():
    base,sources = world()
    masks = drawn_masks(sources, disjoint=True)
    got = stitch(base, sources, pack_masks(masks))
    taus = {n:task_vector(base, body(m)) for n,m in sources.items()}
    for k in SHAPES: assert torch.equal(got[k], base[k]+sum(torch.where(masks[n][k], taus[n][k], 0.) for n in sources)), k

def test_full_masks_give_the_mean():
    base,sources = world(dtype=torch.float64)
    full = pack_masks({n:{k:torch.ones(s, dtype=torch.bool) for k,s in SHAPES.items()} for n in sources})
    for weights in (None,dict(zip(sources, [.5,.3,.15,.05]))):
        want = merge_state_dicts(base, sources, 'linear', weights)
        for got in (stitch(base, sources, full, weights=weights), stitch(base, sources, localize(base, sources, 1, 'all'), weights=weights),
                merge_state_dicts(base, sources, 'localize_and_stitch', weights, density=1, keys='all')):
            assert all(torch.allclose(got[k], want[k], rtol=1e-12, atol=1e-14) for k in want if k!='ids')

def test_empty_masks_give_the_base_and_the_mean_of_the_classifiers():
    base,sources = world()
    got = stitch(base, sources, pack_masks(drawn_masks(sources, 0.)))
    assert same(body(got), base) and torch.allclose(got['classifier.weight'], torch.full((2,3), 1.015))

def test_outside_of_the_scope_is_the_base():
    base,sources = world()
    for got in (merge_state_dicts(base, sources, 'localize_and_stitch', density=1), stitch(base, sources, localize(base, sources, 1))):
        assert torch.equal(got['embeddings.w'], base['embeddings.w']) and not torch.equal(got['a.weight'], base['a.weight'])

# ---- one result, whichever way

@pytest.mark.parametrize('keys', [list(SHAPES), ['a.weight','layer.0.conv']], ids=['all','two'])
def test_packed_is_unpacked_and_streaming_is_in_memory(keys, tmp_path):
    base,sources = world()
    masks = drawn_masks(sources, keys=keys)
    packed,ones = pack_masks(masks),torch.ones(len(sources))
    taus = [task_vector(base, body(m)) for m in sources.values()]
    got = stitch(base, sources, packed)
    for k in SHAPES:
        m = torch.stack([masks[n][k] for n in sources]) if k in keys else torch.zeros(len(sources), *SHAPES[k], dtype=torch.bool)
        assert torch.allclose(got[k], localize_and_stitch(base[k], torch.stack([t[k] for t in taus]), ones, owned=m), atol=1e-7), k
    files = {n:save_checkpoint(m, tmp_path/f'{n}.safetensors') for n,m in sources.items()}
    b,folder = save_checkpoint(base, tmp_path/'base.safetensors'),packed.save(tmp_path/'masks')
    for size in (1,4,11,1<<17):
        assert same(got, stitch(base, sources, packed, max_elements=size)), size
        report = stitch(b, files, folder if size==4 else packed, tmp_path/f'out{size}', max_elements=size)
        c = open_checkpoint(report.path)
        assert same(got, {k:c.read(k) for k in c}), size
        said = json.loads((report.path/'merge_record.json').read_text())['hyperparameters']['masks']
        assert said==dict(digest=packed.digest())
    for m in (packed,folder): assert same(got, merge_state_dicts(base, sources, 'localize_and_stitch', masks=m, density=.5))

def test_order_of_sources_is_irrelevant():
    base,sources = world()
    masks = drawn_masks(sources)
    turn = lambda d: dict(reversed(d.items()))
    assert same(stitch(base, sources, pack_masks(masks)), stitch(base, turn(sources), pack_masks(turn(masks))))
    a,b = localize(base, sources, .2),localize(base, turn(sources), .2)
    assert all(np.array_equal(a[n][k], b[n][k]) for n in sources for k in a.shapes)
    two = dict(zip(NAMES, [0,1,0,1]))
    for f in (lambda s,m,c: stitch(base, s, shared_masks(m, c)), lambda s,m,c: stitch_twice(base, s, m, c)):
        assert same(f(sources, pack_masks(masks), two), f(turn(sources), pack_masks(turn(masks)), turn(two)))

def test_the_method_is_localize_then_stitch():
    base,sources = world()
    for density in (.01,.05,.3,.77,1):
        for keys in ('no_embeddings','all',['b.bias','a.weight']):
            want = stitch(base, sources, localize(base, sources, density, keys))
            assert same(want, merge_state_dicts(base, sources, 'localize_and_stitch', density=density, keys=keys, max_elements=5))

# ---- the largest values

@pytest.mark.parametrize('unit', [1.,1e-45,2e-39])
def test_radix_selection_is_a_full_sort(unit):
    "Equal magnitudes across tensors and blocks, zeros that must fill up the number, denormals"
    g = generator(3)
    keys = {'z':(9,2), 'b':(11,), 'a':(4,3)}
    base = {k:torch.zeros(s) for k,s in keys.items()}
    sources = {n:{k:torch.randint(-3, 4, s, generator=g).float()*unit*(torch.rand(s, generator=g)<share) for k,s in keys.items()}
        for n,share in zip('xyz', (1,.5,.1))}
    flat = lambda m: torch.cat([torch.as_tensor(m[k]).reshape(-1) for k in sorted(m)])
    for density in (.02,.1,.5,.77,1.):
        for size in (1,3,7,1000):
            found = localize(base, sources, density, max_elements=size)
            for n,m in sources.items():
                v = flat(m).tolist()
                order = sorted(range(len(v)), key=lambda i: (-abs(v[i]), i))[:max(1, int(len(v)*density))]
                assert flat(found[n]).nonzero()[:,0].tolist()==sorted(order), (n,density,size)

def test_types_may_be_mixed():
    base,sources = world(dtype=torch.bfloat16)
    base['a.weight'] = base['a.weight'].double()
    found = localize(base, sources, .3)
    v = torch.cat([task_vector(base, body(sources['sq-AL']))[k].double().reshape(-1) for k in sorted(found.shapes)])
    m = torch.cat([torch.as_tensor(found['sq-AL'][k]).reshape(-1) for k in sorted(found.shapes)])
    assert int(m.sum())==int(len(m)*.3) and v[m].abs().min()>=v[~m].abs().max()

def test_an_encoder_without_a_classifier_is_a_base(tmp_path):
    base,paths = toy_base(tmp_path/'base'),toy_sources(tmp_path/'models', ['de-DE','sq-AL'])
    found = localize(base, paths, .1)
    assert all(k.startswith('roberta.encoder.') for k in found.shapes)
    assert found.density().tolist()==pytest.approx([int(.1*found.size())/found.size()]*2)
    merge(base, paths, tmp_path/'out', 'localize_and_stitch', density=.1)
    got,want = open_checkpoint(tmp_path/'out'),stitch(base, paths, found)
    assert same(want, {k:got.read(k) for k in got})

def test_a_nan_is_an_error():
    base,sources = world()
    sources['de-DE']['a.weight'][2,1] = float('nan')
    with pytest.raises(CheckpointError, match="a.weight of de-DE.*at \\[2, 1\\]"): localize(base, sources)

# ---- clusters

@pytest.mark.parametrize('disjoint', [False,True])
def test_one_source_in_each_cluster_changes_nothing(disjoint):
    base,sources = world()
    masks = pack_masks(drawn_masks(sources, disjoint=disjoint))
    alone = {n:n for n in sources}
    plain = stitch(base, sources, masks)
    assert same(plain, stitch(base, sources, shared_masks(masks, alone))) and same(plain, stitch_twice(base, sources, masks, alone))

def test_stitching_twice_changes_nothing_where_masks_are_disjoint():
    base,sources = world()
    masks = pack_masks(drawn_masks(sources, disjoint=True))
    assert same(stitch(base, sources, masks), stitch_twice(base, sources, masks, dict.fromkeys(sources, 0)))

def test_stitching_twice_deletes_and_does_not_average():
    base,sources = world(2)
    both = pack_masks({n:{k:torch.ones(s, dtype=torch.bool) for k,s in SHAPES.items()} for n in sources})
    assert same(body(stitch_twice(base, sources, both, dict.fromkeys(sources, 0))), base)

@pytest.mark.parametrize('n,least', [(1,1),(2,1),(3,2),(4,2)])
def test_a_shared_mask_is_what_half_of_the_members_own(n, least):
    masks = drawn_masks(NAMES[:n])
    shared = shared_masks(pack_masks(masks), [NAMES[:n]])
    for k in SHAPES:
        want = sum(m[k].int() for m in masks.values())>=least
        assert all(np.array_equal(shared[o][k], want.numpy()) for o in masks)
    assert shared.storage()['bits']==sum(-(-int(np.prod(s))//8) for s in SHAPES.values())

def test_a_cluster_counts_as_often_as_it_has_members():
    base = {'w':torch.zeros(1)}
    sources = {n:{'w':torch.tensor([v])} for n,v in zip('abc', (3.,6.,30.))}
    one = pack_masks({n:{'w':torch.ones(1, dtype=torch.bool)} for n in sources})
    assert stitch(base, sources, shared_masks(one, [['a','b'],['c']]))['w'].item()==13 # (3+6+30)/3, and not ((3+6)/2+30)/2

# ---- task vectors within masks

def test_localized_sources_are_the_base_with_what_they_own(tmp_path):
    base,sources = world()
    masks = drawn_masks(sources, keys=['a.weight','b.bias'])
    packed = pack_masks(masks)
    small = localized(base, sources, packed)
    for n,m in sources.items():
        assert torch.equal(small[n]['classifier.weight'], m['classifier.weight']) and torch.equal(small[n]['ids'], m['ids'])
        for k in SHAPES: assert torch.equal(small[n][k], torch.where(masks[n][k], m[k], base[k]) if k in masks[n] else base[k])
    files = {n:save_checkpoint(m, tmp_path/f'{n}.safetensors') for n,m in sources.items()}
    for n,f in localized(base, files, packed, tmp_path/'small').items():
        c = open_checkpoint(f)
        assert same(small[n], {k:c.read(k) for k in c})
    g = task_vector_gram(base, {n:body(m) for n,m in small.items()})
    assert np.allclose(localized_products(base, sources, packed), g, rtol=1e-5, atol=1e-6)
    cos = localized_products(base, sources, packed, cosine=True).to_numpy()
    assert np.allclose(np.diag(cos), 1) and np.allclose(cos, g/np.sqrt(np.outer(np.diag(g), np.diag(g))), rtol=1e-5, atol=1e-6)

def test_tasks_with_classifiers_of_their_own():
    base,sources = world(head=False)
    heads = {n:m|{'classifier.weight':torch.ones(i+2, 3)} for i,(n,m) in enumerate(sources.items())}
    masks = localize(base, heads, .3)
    got = stitch(base, heads, masks, head='own')
    assert same(got, stitch(base, sources, masks))
    with pytest.raises(ValueError, match='no model folder'): stitch(base, heads, masks, 'somewhere', head='own')

# ---- what is refused

def test_masks_of_other_models_are_refused(tmp_path):
    base,sources = world()
    masks = drawn_masks(sources)
    with pytest.raises(KeyError, match="no mask of 'sw-KE'"): stitch(base, sources, pack_masks({n:masks[n] for n in NAMES[:3]}))
    other = {n:m|{'a.weight':torch.zeros(5, 7, dtype=torch.bool)} for n,m in masks.items()}
    with pytest.raises(IncompatibleError, match="'a.weight'"): stitch(base, sources, pack_masks(other))
    with pytest.raises(IncompatibleError, match="'x'"): stitch(base, sources, pack_masks({n:m|{'x':torch.zeros(2)>0} for n,m in masks.items()}))
    with pytest.raises(TypeError, match='got dict'): merge_state_dicts(base, sources, 'localize_and_stitch', masks=masks)
    with pytest.raises(ValueError, match='got 5'): localize(base, sources, 5)
    with pytest.raises(TensorNamesError, match='classifier'): merge_state_dicts(base, sources, 'localize_and_stitch', keys=['classifier.weight'])

# ---- learned masks

class Line(nn.Module):
    "One layer and a classifier that stays as it is"
    def __init__(self, d=6, labels=2):
        super().__init__()
        self.layer,self.classifier = nn.Linear(d, 4),nn.Linear(4, labels)
    def forward(self, x): return SimpleNamespace(logits=self.classifier(self.layer(x).tanh()))

def task(d=6, n=64, seed=0):
    "A base, a source trained on labels that depend on the first two inputs, batches"
    torch.manual_seed(seed)
    x = torch.randn(n, d)
    y = (x[:,0]>x[:,1]).long()
    base = Line(d)
    first = {k:v.clone() for k,v in base.state_dict().items()}
    opt = torch.optim.Adam(base.layer.parameters(), .05)
    for _ in range(60):
        opt.zero_grad()
        nn.functional.cross_entropy(base(x).logits, y).backward()
        opt.step()
    batches = [dict(x=x[i:i+24], labels=y[i:i+24]) for i in range(0, n, 24)] # The last is smaller
    return first,{k:v.clone() for k,v in base.state_dict().items()},batches

def learned(**kw):
    base,source,batches = task()
    return learn_masks(Line(), base, {'a':source}, {'a':batches}, **dict(density=.1)|kw)

def test_the_gradient_of_the_scores():
    "By the formula, by autograd through σ, and by differences of the objective"
    base,source,batches = task()
    base,source = [{k:v.double() for k,v in m.items()} for m in (base,source)]
    x,y = batches[0]['x'].double(),batches[0]['labels']
    lam,s = .02,torch.randn(4, 6, generator=generator(5), dtype=torch.float64)
    tau = source['layer.weight']-base['layer.weight']
    def loss(w): return nn.functional.cross_entropy(torch.nn.functional.linear(torch.nn.functional.linear(x, w, source['layer.bias']).tanh(),
        source['classifier.weight'], source['classifier.bias']), y)
    objective = lambda s: loss(base['layer.weight']+s.sigmoid()*tau)+lam*s.sigmoid().sum()
    w = (base['layer.weight']+s.sigmoid()*tau).requires_grad_()
    g, = torch.autograd.grad(loss(w), w)
    got = score_gradient(s, g*tau, lam)
    t = s.clone().requires_grad_()
    assert torch.allclose(got, torch.autograd.grad(objective(t), t)[0], rtol=1e-12, atol=1e-15)
    for i in range(s.numel()):
        e = torch.zeros_like(s).view(-1); e[i] = 1e-5
        e = e.view_as(s)
        assert got.view(-1)[i].item()==pytest.approx(((objective(s+e)-objective(s-e))/2e-5).item(), rel=1e-6, abs=1e-9)

def test_the_learner_descends_along_that_gradient():
    "One epoch, against the step worked out with autograd over all texts at once"
    base,source,batches = task()
    x,y = (torch.cat([b[k] for b in batches]) for k in ('x','labels'))
    start = localize(base, {'a':source}, .1)['a']
    keys = ['layer.bias','layer.weight']
    s = {k:torch.where(torch.as_tensor(start[k]), 5., -5.).double().requires_grad_() for k in keys}
    tau = {k:(source[k]-base[k]).double() for k in keys}
    w = {k:base[k].double()+s[k].sigmoid()*tau[k] for k in keys}
    h = torch.nn.functional.linear(torch.nn.functional.linear(x.double(), w['layer.weight'], w['layer.bias']).tanh(),
        source['classifier.weight'].double(), source['classifier.bias'].double())
    loss = nn.functional.cross_entropy(h, y)
    g = dict(zip(keys, torch.autograd.grad(loss, [w[k] for k in keys])))
    unit = max((g[k]*tau[k]).abs().max() for k in keys)
    for lr in (30.,1000.,3000.):
        want = {k:(s[k]-lr*score_gradient(s[k], g[k]*tau[k]/unit, .003)).detach()>0 for k in keys}
        if all(torch.equal(want[k], torch.as_tensor(start[k])) for k in keys):
            with pytest.raises(RuntimeError, match='what it was before'): learned(lr=lr, epochs=1)
            continue
        m = learned(lr=lr, epochs=1)
        assert all(np.array_equal(m['a'][k], want[k].numpy()) for k in keys), lr
        assert m.log.loss.iloc[0]==pytest.approx(loss.item(), rel=1e-5)

def test_a_higher_price_makes_a_smaller_mask():
    d = [learned(lam=lam).density()['a'] for lam in (0.,.01,.03,.1,.3)]
    assert d==sorted(d, reverse=True) and d[0]>2*d[-1], d

def test_a_learned_mask_keeps_more_than_the_largest_changes():
    base,source,batches = task()
    m = learned(lam=.05)
    model = Line()
    def loss(masks):
        model.load_state_dict(stitch(base, {'a':source}, masks))
        return sum(float(nn.functional.cross_entropy(model(b['x']).logits, b['labels']).detach())*len(b['x']) for b in batches)/64
    assert m.log.loss.iloc[-1]==pytest.approx(loss(m), rel=1e-5) # The log's last row is the finished mask
    assert loss(m)<loss(localize(base, {'a':source}, m.density()['a']))

def test_polar_drives_scores_away_from_zero_and_makes_no_mask_smaller():
    both = [learned(reg=r, lam=l, lr=1000., epochs=5) for r,l in (('polar',10.),('l1',.3))]
    assert both[0].density()['a']>both[1].density()['a']
    m = learned(reg='polar', scale='published', lr=1e4)
    assert m.made['reg']=='polar' and m.made['lr']==1e4 and len(m.log)==11

def test_learning_is_deterministic_and_draws_nothing():
    torch.manual_seed(1); state = torch.get_rng_state()
    base,source,batches = task()
    torch.set_rng_state(state)
    run = lambda: learn_masks(model, base, {'a':source}, {'a':batches}, density=.1)
    model = Line()
    state = torch.get_rng_state()
    a = run(); torch.manual_seed(77); b = run()
    assert a.digest()==b.digest() and a.log.equals(b.log)
    assert not torch.equal(torch.get_rng_state(), state) # Seeded above, and
    torch.manual_seed(77); state = torch.get_rng_state(); run()
    assert torch.equal(torch.get_rng_state(), state)

def test_the_model_ends_as_the_localized_source_and_as_it_was_otherwise():
    base,source,batches = task()
    model = Line().train()
    m = learn_masks(model, base, {'a':source}, {'a':batches}, density=.1, keys=['layer.weight'])
    assert model.training and all(p.requires_grad for p in model.parameters())
    want = localized(base, {'a':source}, m)['a']
    assert all(torch.allclose(p, want[k], atol=1e-7) for k,p in model.state_dict().items())
    assert list(m.shapes)==['layer.weight'] and torch.equal(model.layer.bias, base['layer.bias'])

def test_models_with_labels_of_their_own():
    (base,a,batches),(_,b,more) = task(),task(seed=1)
    b = {k:b[k]-task(seed=1)[0][k]+base[k] for k in base}|{'classifier.weight':torch.randn(3, 4, generator=generator(0)), 'classifier.bias':torch.zeros(3)}
    models = dict(a=Line(), b=Line(labels=3))
    m = learn_masks(models, {k:v for k,v in base.items() if 'classifier' not in k}, dict(a=a, b=b), dict(a=batches, b=more), density=.1)
    assert m.names==['a','b'] and set(m.log.source)=={'a','b'} and (m.density()>0).all()

def test_learned_masks_are_saved_with_their_log(tmp_path):
    m = learned()
    again = Masks.load(m.save(tmp_path/'m'))
    assert again.digest()==m.digest() and again.made==m.made and np.allclose(again.log.select_dtypes('number'), m.log.select_dtypes('number'))

@pytest.mark.parametrize('kw,error,said', [(dict(lr=1e-6),RuntimeError,'what it was before'), (dict(lam=1e6),RuntimeError,'is empty'),
    (dict(reg='l2'),ValueError,"'l2'"), (dict(lam=-1.),ValueError,'lam=-1'), (dict(scale='published'),ValueError,'give lam')])
def test_a_learning_that_cannot_work_is_an_error(kw, error, said):
    with pytest.raises(error, match=said): learned(**kw)

def test_a_model_of_another_shape_is_an_error():
    base,source,batches = task()
    with pytest.raises(IncompatibleError, match='in the model'): learn_masks(Line(labels=3), base, {'a':source}, {'a':batches})
    more = {'extra.weight':torch.ones(2)}
    with pytest.raises(TensorNamesError, match="'extra.weight' is in a and not"): learn_masks(Line(), base|more, {'a':source|more}, {'a':batches})
