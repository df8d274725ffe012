"""The laws of merging, for every method in the registry. A new method is covered by being registered; what does not hold for it
is declared in its `Traits`, or here with a reason."""
import inspect
import pytest
import torch
from merginguriel.checkpoint import open_checkpoint, save_checkpoint
from merginguriel.merge import merge, merge_state_dicts, methods
from merginguriel.sparse import ties
from merginguriel.task_vector import task_vector

ALL = list(methods)
SHAPES = {'b.bias':(6,), 'a.weight':(7,5), 'c.scale':(), 'd.conv':(3,2,2), 'e.empty':(0,4)}
HEAD = {'classifier.weight':(2,3)}
# Hyperparameters to try besides the defaults; a method without an entry is tested with its defaults
VARIANTS = {'task_arithmetic':[dict(scale=1.)], 'ties':[dict(density=.5, scope='tensor'), dict(density=.3, trim_rule='kth_ge', zero='official'),
    dict(density=.6, combine='sum', scale=.3), dict(combine='max'), dict(density=1)],
    'iso_cts':[dict(common=.5), dict(common=0, scale=.4)], 'wudi':[dict(ridge=0), dict(solve='adam', steps=5, lr=1e-3)], 'actmat':[dict(ridge=0)],
    'ace':[dict(heterogeneity=0, refine=.5), dict(eps=1e-2, heterogeneity=10.)]}
ADAM = {'solve':'adam'} # WUDI by iteration: its steps have one size, and it starts at the sum
CASES = [(m,hp) for m in ALL for hp in [{}, *VARIANTS.get(m, [])]]
IDS = [f"{m}-{'-'.join(map(str, hp.values())) or 'default'}" for m,hp in CASES]
cases = pytest.mark.parametrize('method,hp', CASES, ids=IDS)

def model(seed, like=None, step=1., dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    draw = lambda s: torch.randn(s, generator=g, dtype=torch.float64)
    if like is None: m = {k:draw(s) for k,s in (SHAPES|HEAD).items()}
    else: m = {k:like[k].double()+step*draw(v.shape) if v.is_floating_point() else v for k,v in like.items()}
    return {k:v.to(dtype) if v.is_floating_point() else v for k,v in m.items()} | {'ids':torch.arange(3)}

def world(n=3, dtype=torch.float32):
    base = model(0, dtype=dtype)
    sources = {k:model(i+1, base, .3, dtype) for i,k in enumerate(['sq-AL','de-DE','vi-VN','sw-KE','en-US'][:n])}
    for m in sources.values(): m['classifier.weight'] = 1+base['classifier.weight']*.01+m['classifier.weight']*.01 # One initialisation
    return base,sources,dict(zip(sources, [.5,.3,.2,.7,.1]))

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype==b[k].dtype for k in a)
def body(m): return {k:v for k,v in m.items() if v.is_floating_point() and not k.startswith('classifier')}
def close(a, b, tol=1e-6): return all(torch.allclose(a[k], b[k], rtol=tol, atol=tol) for k in body(a))

@cases
def test_zero_task_vectors_give_the_base(method, hp):
    base,sources,w = world()
    assert close(merge_state_dicts(base, {k:dict(base) for k in sources}, method, w, **hp), base)

@cases
def test_order_of_sources_is_irrelevant(method, hp):
    base,sources,w = world(5)
    a = merge_state_dicts(base, sources, method, w, **hp)
    assert same(a, merge_state_dicts(base, dict(reversed(sources.items())), method, w, **hp))
    fn = methods[method] # And the pure function, up to rounding
    taus = torch.stack([task_vector(base, m)['a.weight'] for m in sources.values()]).double()
    ws,p = torch.tensor(list(w.values()), dtype=torch.float64),torch.tensor([3,0,4,2,1])
    b = base['a.weight'].double()
    assert torch.allclose(fn(b, taus, ws, **hp), fn(b, taus[p], ws[p], **hp), rtol=1e-12, atol=1e-12)

@cases
@pytest.mark.parametrize('dtype', [torch.float32,torch.float64,torch.bfloat16,torch.float16])
def test_names_shapes_and_types_are_kept(method, hp, dtype):
    base,sources,w = world(dtype=dtype)
    m = merge_state_dicts(base, sources, method, w, **hp)
    ref = sources['de-DE']
    assert {k:(v.shape,v.dtype) for k,v in m.items()} == {k:(v.shape,v.dtype) for k,v in ref.items()}
    assert torch.equal(m['ids'], ref['ids'])

@cases
def test_inputs_are_not_modified(method, hp):
    base,sources,w = world()
    before = [{k:v.clone() for k,v in m.items()} for m in (base,*sources.values())]
    merge_state_dicts(base, sources, method, w, **hp)
    assert all(same(a, b) for a,b in zip(before, (base,*sources.values())))
    taus,ws = torch.randn(3,4,2),torch.ones(3)
    kept = taus.clone()
    methods[method](torch.zeros(4,2), taus, ws, **hp)
    assert torch.equal(taus, kept) and torch.equal(ws, torch.ones(3))

@cases
def test_same_seed_same_result(method, hp):
    base,sources,w = world()
    assert same(*(merge_state_dicts(base, sources, method, w, seed=5, **hp) for _ in range(2)))
    torch.manual_seed(1); a = merge_state_dicts(base, sources, method, w, seed=5, **hp)
    torch.manual_seed(2); state = torch.get_rng_state()
    assert same(a, merge_state_dicts(base, sources, method, w, seed=5, **hp))
    assert torch.equal(state, torch.get_rng_state()), "a merge must not touch the global random state"
    assert methods.traits(method).deterministic == ('seed' not in inspect.signature(methods[method]).parameters)

@cases
def test_streaming_is_in_memory_is_dense(method, hp, tmp_path):
    base,sources,w = world()
    dense = merge_state_dicts(base, sources, method, w, max_elements=None, **hp)
    paths = {}
    for k,m in {'base':base, **sources}.items():
        (tmp_path/k).mkdir()
        paths[k] = save_checkpoint(dict(reversed(m.items())) if k=='sq-AL' else m, tmp_path/k).parent
    b = paths.pop('base')
    for size in (1,4,11,1<<17):
        assert same(dense, merge_state_dicts(base, sources, method, w, max_elements=size, **hp)), size
        c = open_checkpoint(merge(b, paths, tmp_path/f'out{size}', method, w, max_elements=size, **hp).path)
        assert same(dense, {k:c.read(k) for k in c}), size

@cases
def test_order_of_tensors_is_irrelevant(method, hp):
    base,sources,w = world()
    turn = lambda m: dict(reversed(m.items()))
    assert same(merge_state_dicts(base, sources, method, w, **hp),
        merge_state_dicts(turn(base), {k:turn(m) for k,m in sources.items()}, method, w, **hp))

@cases
def test_the_loop_applies_the_pure_function(method, hp):
    "To each tensor; or, where something is measured over the whole model, to the whole model as one vector"
    base,sources,w = world(dtype=torch.float64)
    got,t = merge_state_dicts(base, sources, method, w, **hp),methods.traits(method)
    fn,taus,ws = methods[method],[task_vector(base, sources[k]) for k in sorted(sources)],torch.tensor([w[k] for k in sorted(sources)], dtype=torch.float64)
    scope = hp.get('scope', getattr(inspect.signature(fn).parameters.get('scope'), 'default', 'tensor'))
    if t.deterministic and not (t.prepare and scope=='global'):
        for k in body(base):
            if base[k].numel(): assert torch.allclose(got[k], fn(base[k], torch.stack([o[k] for o in taus]), ws, **hp), rtol=1e-12, atol=1e-14), k
    elif t.deterministic:
        keys = sorted(body(base))
        flat = lambda m: torch.cat([m[k].reshape(-1) for k in keys])
        want = fn(flat(base), torch.stack([flat(o) for o in taus]), ws, **hp)
        assert torch.equal(flat(got), want)

@cases
def test_translation(method, hp):
    if not methods.traits(method).translation: pytest.skip('declared: not a function of the task vectors')
    base,sources,w = world(dtype=torch.float64)
    shift = lambda m: {k:v+2. if k in body(m) else v for k,v in m.items()}
    a = merge_state_dicts(shift(base), {k:shift(m) for k,m in sources.items()}, method, w, **hp)
    assert close(a, shift(merge_state_dicts(base, sources, method, w, **hp)), 1e-9)

@cases
def test_homogeneity(method, hp):
    if not methods.traits(method).homogeneous or hp.items()>=ADAM.items(): pytest.skip('declared: not homogeneous')
    base,sources,w = world(dtype=torch.float64)
    grow = lambda m: {k:base[k]+4*(v-base[k]) if k in body(m) else v for k,v in m.items()}
    a = merge_state_dicts(base, {k:grow(m) for k,m in sources.items()}, method, w, **hp)
    assert close(a, grow(merge_state_dicts(base, sources, method, w, **hp)), 1e-9)

@cases
def test_copies_of_one_model(method, hp):
    convex = methods.traits(method).convex and not hp.items()>=ADAM.items() or (method=='task_arithmetic' and hp=={'scale':1.}) or \
        (method=='ties' and hp=={'density':1})
    if not convex: pytest.skip('declared: changes the length of a task vector')
    base,sources,w = world()
    one = sources['sq-AL']
    assert close(merge_state_dicts(base, {k:dict(one) for k in sources}, method, w, **hp), one)

@cases
def test_one_hot_weights_give_that_source(method, hp):
    t = methods.traits(method)
    if not (t.convex or (method=='task_arithmetic' and hp=={'scale':1.})): pytest.skip('declared: changes the length of a task vector')
    base,sources,_ = world()
    for k in sources:
        m = merge_state_dicts(base, sources, method, {o:float(o==k) for o in sources}, **hp)
        assert same(m, sources[k]) if t.coefficients else close(m, sources[k])

@cases
def test_weight_zero_is_leaving_out(method, hp):
    base,sources,w = world()
    less = {k:m for k,m in sources.items() if k!='de-DE'}
    assert same(merge_state_dicts(base, sources, method, w|{'de-DE':0}, **hp),
        merge_state_dicts(base, less, method, {k:w[k] for k in less}, **hp))

@cases
def test_scale_of_weights(method, hp):
    if not methods.traits(method).scale_free or hp.get('combine')=='sum': pytest.skip('declared: the sum of the weights matters')
    base,sources,w = world()
    assert close(merge_state_dicts(base, sources, method, w, **hp), merge_state_dicts(base, sources, method, {k:8*v for k,v in w.items()}, **hp))

@cases
def test_every_source_counts(method, hp):
    "Guards against dropping a model, above all the heaviest (finding 4)"
    base,sources,w = world(4)
    whole = merge_state_dicts(base, sources, method, w, **hp)
    for k in sources:
        less = {o:m for o,m in sources.items() if o!=k}
        m = merge_state_dicts(base, less, method, {o:w[o] for o in less}, **hp)
        assert not close(whole, m, 1e-4), k
        assert not torch.allclose(whole['classifier.weight'], m['classifier.weight'], atol=1e-6), k

@cases
def test_base_head_does_not_leak(method, hp):
    "Guards against finding 5: whatever the base's random head is, the result is the same"
    base,sources,w = world()
    out = [merge_state_dicts(base|{'classifier.weight':torch.randn(2,3, generator=torch.Generator().manual_seed(s))*9}, sources, method, w,
        head=head, **hp) for head in ('average','best') for s in (0,1)]
    assert same(out[0], out[1]) and same(out[2], out[3])
    shares = torch.tensor([w[k] for k in sources])/sum(w.values())
    want = sum(s*m['classifier.weight'] for s,m in zip(shares, sources.values()))
    assert torch.allclose(out[0]['classifier.weight'], want, atol=1e-6)
    assert torch.equal(out[2]['classifier.weight'], sources['sq-AL']['classifier.weight'])

def test_ties_equals_a_sort_with_many_equal_values():
    "Threshold ties that cross tensors and blocks, zeros and denormals"
    g = torch.Generator().manual_seed(3)
    keys = {'z':(9,2), 'b':(11,), 'a':(4,3)}
    for unit in (1., 1e-45, 2e-39):
        base = {k:torch.zeros(s) for k,s in keys.items()}
        sources = {n:{k:torch.randint(-3, 4, s, generator=g).float()*unit for k,s in keys.items()} for n in 'xyz'}
        flat = lambda m: torch.cat([m[k].reshape(-1) for k in sorted(m)])
        for density in (.02,.1,.5,.77,1.):
            for size in (1,3,1000):
                got = flat(merge_state_dicts(base, sources, 'ties', density=density, max_elements=size))
                taus = torch.stack([flat(sources[n]) for n in 'xyz'])
                n = max(1, int(taus.shape[1]*density))
                order = torch.stack([torch.tensor(sorted(range(len(t)), key=lambda i: (-abs(t[i].item()), i))) for t in taus])
                keep = torch.zeros_like(taus).scatter_(1, order[:,:n], 1.)
                assert torch.equal(got, ties(flat(base), taus*keep, torch.ones(3), density=1.)), (unit,density,size)
