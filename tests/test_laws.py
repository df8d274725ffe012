"""The laws of merging, for every method in the registry. A new method is covered by being registered; what does not hold for it
is declared in its `Traits`, or here with a reason."""
import inspect, threading, time
import pytest
import torch
from merginguriel.checkpoint import open_checkpoint, save_checkpoint
from merginguriel.merge import merge, merge_state_dicts, methods
from merginguriel.sparse import ties
from merginguriel.task_vector import task_vector
from merginguriel.trials import Kept

ALL = list(methods)
SHAPES = {'b.bias':(6,), 'a.weight':(7,5), 'c.scale':(), 'layer.0.conv':(3,2,2), 'e.empty':(0,4)}
HEAD = {'classifier.weight':(2,3)}
# Hyperparameters to try besides the defaults; a method without an entry is tested with its defaults
VARIANTS = {'task_arithmetic':[dict(scale=1.)], 'ties':[dict(density=.5, scope='tensor'), dict(density=.3, trim_rule='kth_ge', zero='official'),
    dict(density=.6, combine='sum', scale=.3), dict(combine='max'), dict(density=1)],
    'slerp':[dict(of='task_vectors'), dict(of='task_vectors', scope='global', straight=1)],
    'karcher':[dict(of='task_vectors'), dict(of='task_vectors', scope='global', length='own')],
    'chain':[dict(of='task_vectors'), dict(scope='global', straight=1), dict(of='task_vectors', legacy=True)],
    'model_stock':[dict(scope='global')], 'directional_consensus':[dict(alpha=.3), dict(scope='global', alpha=.7)],
    'lines':[dict(of='ties', hp=dict(density=.5)), dict(of='karcher', hp=dict(of='task_vectors', scope='global'), alpha=.2, beta=.5)],
    'dare':[dict(drop=0), dict(drop=.5, then='ties'), dict(drop=.5, then='linear'), dict(drop=.5, rescale='l1', hp=dict(scale=1.))],
    'breadcrumbs':[dict(scope='tensor'), dict(density=.4, then='ties', hp=dict(density=.3)), dict(density=1, gamma=0)],
    'della':[dict(window=.4, then='linear'), dict(hp=dict(density=.5, combine='sum')), dict(drop=.5, window=0, then='breadcrumbs')],
    'consensus':[dict(k_min=1, lam=.2), dict(k_min=0)],
    'fisher':[dict(floor=0.), dict(normalise=True)], 'regmean':[dict(alpha=1., ridge=0.), dict(alpha=.3)],
    'iso_cts':[dict(common=.5), dict(common=0, scale=.4)], 'wudi':[dict(ridge=0), dict(solve='adam', steps=5, lr=1e-3)], 'actmat':[dict(ridge=0)],
    'localize_and_stitch':[dict(density=.3), dict(density=1, keys='all')], 'ace':[dict(heterogeneity=0, refine=.5), dict(eps=1e-2, heterogeneity=10.)]}
ADAM = {'solve':'adam'} # WUDI by iteration: its steps have one size, and it starts at the sum
AT_MOST = {'slerp':2} # Sources that a method takes, where there is a limit
STATISTICS = {'fisher':'information', 'regmean':'grams'} # Methods that need what was measured, and the argument that takes it
NAMES = ['sq-AL','de-DE','vi-VN','sw-KE','en-US']

@pytest.fixture(autouse=True)
def most(request):
    "Keeps `world` within what the tested method takes"
    world.most = AT_MOST.get(getattr(request.node, 'callspec', None) and request.node.callspec.params.get('method'), 5)

def model(seed, like=None, step=1., dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    draw = lambda s: torch.randn(s, generator=g, dtype=torch.float64)
    if like is None: m = {k:draw(s) for k,s in (SHAPES|HEAD).items()}
    else: m = {k:like[k].double()+step*draw(v.shape) if v.is_floating_point() else v for k,v in like.items()}
    return {k:v.to(dtype) if v.is_floating_point() else v for k,v in m.items()} | {'ids':torch.arange(3)}

def world(n=3, dtype=torch.float32):
    base = model(0, dtype=dtype)
    sources = {k:model(i+1, base, .3, dtype) for i,k in enumerate(NAMES[:min(n, world.most)])}
    for m in sources.values(): m['classifier.weight'] = 1+base['classifier.weight']*.01+m['classifier.weight']*.01 # One initialisation
    return base,sources,dict(zip(sources, [.5,.3,.2,.7,.1]))

def measures_the_model(method, hp):
    "Whether something is measured over the whole model, by the method or by what it does `then`"
    ps = {k:p.default for k,p in inspect.signature(methods[method]).parameters.items()}|hp
    if 'then' in ps: return measures_the_model(ps['then'], ps['hp'] or {})
    return bool(methods.traits(method).prepare) and ps.get('scope', 'global' if method in ('lines','fisher','localize_and_stitch') else 'tensor')=='global'

def given(method, models, folder=None):
    "What `method` cannot do without: made-up statistics of `models`, name -> tensors; as files if there is a `folder`"
    if method not in STATISTICS: return {}
    out = {}
    for i,(n,m) in enumerate(sorted(models.items())):
        g = torch.Generator().manual_seed(50+i)
        draw = lambda *s: torch.rand(s, generator=g, dtype=torch.float64)
        floats = {k:v for k,v in sorted(m.items()) if v.is_floating_point()}
        if method=='fisher': out[n] = {k:.1+draw(*v.shape) for k,v in floats.items()}
        else: out[n] = {k:(x := draw(3*v.shape[1], v.shape[1])).T@x for k,v in floats.items() if v.dim()==2}
        if folder: out[n] = str(save_checkpoint(out[n], folder/f'{method}-{n}.safetensors'))
    return {STATISTICS[method]:out}

def pure(method, hp, key, names):
    "Arguments of the pure function for one tensor: what the loop looks up is handed in"
    found = [hp[STATISTICS[method]][n].get(key) for n in names] if method in STATISTICS else [None]
    return hp if found[0] is None else hp|dict(measured=torch.stack(found))

CASES = [(m,given(m, dict.fromkeys(NAMES, model(0)))|hp) for m in ALL for hp in [{}, *VARIANTS.get(m, [])]]
IDS = [f"{m}-{'-'.join(str(v) for v in hp.values() if not isinstance(v, dict)) or 'default'}" for m,hp in CASES]
cases = pytest.mark.parametrize('method,hp', CASES, ids=IDS)

def cases_where(declared):
    "The cases for which `declared`, told a case's traits, method and hyperparameters, says that the law holds"
    chosen = [(o,i) for o,i in zip(CASES, IDS) if declared(methods.traits(o[0]), *o)]
    assert chosen
    return pytest.mark.parametrize('method,hp', [o for o,_ in chosen], ids=[i for _,i in chosen])

def takes_then(method): return 'then' in inspect.signature(methods[method]).parameters
def adam(hp): return hp.items()>=ADAM.items()
def whole_change(t, method, hp): return t.convex or (method=='task_arithmetic' and hp=={'scale':1.})

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
    ws,p = torch.tensor(list(w.values()), dtype=torch.float64),[o for o in (3,0,4,2,1) if o<len(sources)]
    b,names = base['a.weight'].double(),list(sources)
    # A method that is told the names of the sources, as the key of its draws, is told them in the order of their task vectors
    named = lambda ks: pure(method, hp, 'a.weight', ks)|(dict(names=ks) if 'names' in methods.traits(method).given else {})
    assert torch.allclose(fn(b, taus, ws, **named(names)), fn(b, taus[p], ws[p], **named([names[i] for i in p])), rtol=1e-12, atol=1e-12)

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
    taus,ws = torch.randn(len(sources),4,2),torch.ones(len(sources))
    kept = taus.clone()
    methods[method](torch.zeros(4,2), taus, ws, **hp)
    assert torch.equal(taus, kept) and torch.equal(ws, torch.ones(len(sources)))

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
    b,files = paths.pop('base'),given(method, dict.fromkeys(NAMES, model(0)), tmp_path)
    for size in (1,4,11,1<<17):
        assert same(dense, merge_state_dicts(base, sources, method, w, max_elements=size, **hp)), size
        c = open_checkpoint(merge(b, paths, tmp_path/f'out{size}', method, w, max_elements=size, **hp|files).path)
        assert same(dense, {k:c.read(k) for k in c}), size

@cases
def test_threads_do_not_meet(method, hp, monkeypatch):
    "Tensors of one shape in eight threads, which are switched at every line of the method's module, against one block after the other"
    from merginguriel import merge as module
    w = dict(zip(NAMES[:world.most], [.5,.3,.2,.7,.1]))
    g = torch.Generator().manual_seed(9)
    draw = lambda: {f'layer.{i}.weight':torch.randn(4, 5, generator=g) for i in range(6)}
    base = draw()
    sources = {k:{n:base[n]+.3*v for n,v in draw().items()} for k in w}
    run = lambda: merge_state_dicts(base, sources, method, w, max_elements=10, **hp|given(method, sources))
    with monkeypatch.context() as m:
        m.setattr(module, 'overlapped', map)
        want = run()
    overlapped,file = module.overlapped,inspect.getfile(methods[method])
    def slow(frame, event, arg):
        if frame.f_code.co_filename!=file: return None
        if event=='line': time.sleep(1e-5)
        return slow
    monkeypatch.setattr(module, 'overlapped', lambda f, items: overlapped(f, items, 8))
    threading.settrace(slow)
    try: assert same(want, run())
    finally: threading.settrace(None)

@cases
def test_order_of_tensors_is_irrelevant(method, hp):
    base,sources,w = world()
    turn = lambda m: dict(reversed(m.items()))
    assert same(merge_state_dicts(base, sources, method, w, **hp),
        merge_state_dicts(turn(base), {k:turn(m) for k,m in sources.items()}, method, w, **hp))

# What drops by row and then measures the model is under the test of `then`
@cases_where(lambda t,method,hp: not (takes_then(method) and measures_the_model(method, hp)))
def test_the_loop_applies_the_pure_function(method, hp):
    "To each tensor; or, where something is measured over the whole model, to the whole model as one vector"
    base,sources,w = world(dtype=torch.float64)
    got,t = merge_state_dicts(base, sources, method, w, **hp),methods.traits(method)
    fn,names = methods[method],sorted(sources)
    taus,ws = [task_vector(base, sources[k]) for k in names],torch.tensor([w[k] for k in names], dtype=torch.float64)
    whole = measures_the_model(method, hp)
    if t.deterministic and not whole:
        for k in body(base):
            o = pure(method, hp, k, names)
            if base[k].numel(): assert torch.allclose(got[k], fn(base[k], torch.stack([o[k] for o in taus]), ws, **o), rtol=1e-12, atol=1e-14), k
    elif t.deterministic:
        keys = sorted(body(base))
        flat = lambda m: torch.cat([m[k].reshape(-1) for k in keys])
        seen = dict(measured=torch.stack([flat(hp['information'][k]) for k in names])) if method=='fisher' else {}
        want = fn(flat(base), torch.stack([flat(o) for o in taus]), ws, **hp, **seen)
        sums = 'coefs' in t.given or method in ('lines','fisher') # Float64 sums over the model, whose order may differ; thresholds may not
        assert torch.allclose(flat(got), want, rtol=1e-12, atol=1e-12) if sums else torch.equal(flat(got), want)

@cases
def test_what_no_source_changed_is_passed_over_without_a_trace(method, hp, monkeypatch):
    base,sources,w = world()
    for m in sources.values():
        m['a.weight'][2:] = base['a.weight'][2:] # Whole blocks of 5 values
        for k in ('layer.0.conv','c.scale'): m[k] = base[k].clone()
    skipping = merge_state_dicts(base, sources, method, w, max_elements=5, **hp)
    for module in ('sparse','drop','spectral'): monkeypatch.setattr(f'merginguriel.{module}.no_change', lambda taus: not taus.numel())
    assert same(skipping, merge_state_dicts(base, sources, method, w, max_elements=5, **hp))

@cases
def test_what_is_kept_changes_no_later_merge(method, hp):
    base,sources,w = world()
    kept,other = Kept(),dict(zip(reversed(w), w.values()))
    fewer = dict(list(sources.items())[:2])
    merges = [(sources,w,hp), (sources,other,hp), (fewer,{k:w[k] for k in fewer},hp), (sources,w,hp)]
    if 'density' in hp: merges.append((sources,w,hp|dict(density=.8)))
    for s,v,h in merges:
        assert same(merge_state_dicts(base, s, method, v, keep=kept, **h), merge_state_dicts(base, s, method, v, **h))

@cases_where(lambda t,method,hp: t.translation) # Others are no functions of the task vectors
def test_translation(method, hp):
    base,sources,w = world(dtype=torch.float64)
    shift = lambda m: {k:v+2. if k in body(m) else v for k,v in m.items()}
    a = merge_state_dicts(shift(base), {k:shift(m) for k,m in sources.items()}, method, w, **hp)
    assert close(a, shift(merge_state_dicts(base, sources, method, w, **hp)), 1e-9)

@cases_where(lambda t,method,hp: t.homogeneous and not adam(hp))
def test_homogeneity(method, hp):
    base,sources,w = world(dtype=torch.float64)
    grow = lambda m: {k:base[k]+4*(v-base[k]) if k in body(m) else v for k,v in m.items()}
    a = merge_state_dicts(base, {k:grow(m) for k,m in sources.items()}, method, w, **hp)
    assert close(a, grow(merge_state_dicts(base, sources, method, w, **hp)), 1e-9)

# Others change the length of a task vector
@cases_where(lambda t,method,hp: whole_change(t, method, hp) and not adam(hp)
    or method in ('ties','localize_and_stitch') and hp.get('density')==1)
def test_copies_of_one_model(method, hp):
    base,sources,w = world()
    one = sources['sq-AL']
    assert close(merge_state_dicts(base, {k:dict(one) for k in sources}, method, w, **hp), one)

@cases_where(whole_change) # Others change the length of a task vector
def test_one_hot_weights_give_that_source(method, hp):
    t = methods.traits(method)
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

@cases_where(lambda t,method,hp: t.scale_free and hp.get('combine')!='sum') # For others the sum of the weights matters
def test_scale_of_weights(method, hp):
    base,sources,w = world()
    assert close(merge_state_dicts(base, sources, method, w, **hp), merge_state_dicts(base, sources, method, {k:8*v for k,v in w.items()}, **hp))

@cases
def test_every_source_counts(method, hp):
    "Guards against dropping a model, above all the heaviest (finding 4)"
    base,sources,w = world(4)
    agree = lambda m: m|{k:v+.2 for k,v in body(m).items()} # A direction in common, without which Model Stock gives the base
    sources = {k:agree(m) for k,m in sources.items()}
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

# ---- the geometry of spheres

SPHERES = [('slerp',{}), ('slerp',dict(straight=1)), ('karcher',{}), ('karcher',dict(length='own')), ('chain',dict(straight=1))]
spheres = pytest.mark.parametrize('method,hp', SPHERES, ids=[f"{m}-{'-'.join(map(str, hp.values())) or 'default'}" for m,hp in SPHERES])

def points(seed, n, d=6, step=1.):
    "Base, task vectors and weights, float64; the models lie within a cone that `step` widens"
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    return draw(d),draw(d)+step*draw(n, d),draw(n).exp()

@pytest.mark.parametrize('step', [1.,.1,1e-3])
def test_karcher_of_two_is_slerp(step):
    for seed in range(20):
        base,taus,w = points(seed, 2, step=step)
        for of in ('models','task_vectors'):
            want = methods['slerp'](base, taus, w, of=of, straight=1)
            assert torch.allclose(methods['karcher'](base, taus, w, of=of, length='own'), want, atol=1e-9)
        unit = taus/taus.norm(dim=1, keepdim=True) # Of one length they agree whichever length is kept
        want = methods['slerp'](base, unit, w, of='task_vectors', straight=1)
        assert torch.allclose(methods['karcher'](base, unit, w, of='task_vectors'), want, atol=1e-9)

def test_karcher_balances_the_ways_to_the_sources():
    "The definition: the weighted sum of the logarithms is 0, here in the space itself and not in coefficients"
    for n in (2,3,7,20):
        base,taus,w = points(n, n, 9)
        units = (base+taus)/(base+taus).norm(dim=1, keepdim=True)
        m = methods['karcher'](base, taus, w)
        assert torch.allclose(m.norm(), (w/w.sum())@(base+taus).norm(dim=1), rtol=1e-12)
        x = m/m.norm()
        across = units-(units@x)[:,None]*x
        logs = torch.atan2(across.norm(dim=1), units@x)[:,None]*across/across.norm(dim=1, keepdim=True)
        assert (w@logs).norm() < 1e-8*w.sum()

@spheres
def test_what_turns_the_models_turns_the_merge(method, hp):
    for seed in range(5):
        base,taus,w = points(seed, AT_MOST.get(method, 4))
        q = torch.linalg.qr(points(seed+50, 6)[1])[0]
        for of in ('models','task_vectors'):
            a = methods[method](base@q, taus@q, w, of=of, **hp)
            assert torch.allclose(a, methods[method](base, taus, w, of=of, **hp)@q, atol=1e-9)

@pytest.mark.parametrize('method', ['model_stock','directional_consensus'])
def test_what_turns_the_task_vectors_turns_the_merge(method):
    base,taus,w = points(1, 4)
    q = torch.linalg.qr(points(2, 6)[1])[0]
    assert torch.allclose(methods[method](base@q, taus@q, w), methods[method](base, taus, w)@q, atol=1e-12)

def test_length_is_between_those_of_the_sources():
    "Of `karcher` always; of `slerp`, which keeps the sources' own lengths, where the angle is not obtuse"
    for seed in range(30):
        for n,step in [(2,.3),(2,3.),(5,1.)]:
            base,taus,w = points(seed, n, step=step)
            low,high = (base+taus).norm(dim=1).aminmax()
            assert low-1e-9 <= methods['karcher'](base, taus, w).norm() <= high+1e-9
            if n==2 and (base+taus[0])@(base+taus[1])>=0:
                assert low-1e-9 <= methods['slerp'](base, taus, w, straight=1).norm() <= high+1e-9

@spheres
def test_spheres_around_the_base(method, hp):
    "What is declared for models does hold for task vectors: shifts, and multiples"
    base,taus,w = points(3, AT_MOST.get(method, 4))
    fn = lambda b,t: methods[method](b, t, w, of='task_vectors', **hp)
    assert torch.allclose(fn(base+7, taus), fn(base, taus)+7, atol=1e-9)
    assert torch.allclose(fn(base, 5*taus)-base, 5*(fn(base, taus)-base), atol=1e-9)
    assert torch.allclose(methods[method](3*base, 3*taus, w, **hp), 3*methods[method](base, taus, w, **hp), atol=1e-9)

def test_chain_keeps_the_weights_of_near_models():
    w,order = torch.tensor([.2,.5,.3], dtype=torch.float64),[1,2,0]
    base,taus,_ = points(4, 3, 50)
    for straight in (.9995,1):
        near = lambda **hp: methods['chain'](base, 1e-4*taus, w, straight=straight, **hp)-base
        assert torch.allclose(near(), 1e-4*w@taus, atol=1e-7)
        wrong = torch.tensor([.6,.15,.25], dtype=torch.float64)
        assert torch.allclose(near(legacy=True), 1e-4*wrong@taus, atol=1e-7)

def test_streamed_products_equal_dense_ones():
    "In a tensor of several blocks, and where models are near: cosine .9999"
    g = torch.Generator().manual_seed(5)
    base = torch.randn(900, 700, generator=g)
    sources = {k:{'w':base+.01*(1+torch.randn(900, 700, generator=g))} for k in 'ab'}
    a,b = (m['w'].double() for m in sources.values())
    cos = lambda a,b: (a*b).sum()/(a*a).sum().sqrt()/(b*b).sum().sqrt()
    m = merge_state_dicts({'w':base}, sources, 'slerp', straight=1)['w']
    assert torch.allclose(m.double(), (a+b)/(2*((1+cos(a, b))/2).sqrt()), rtol=1e-6, atol=1e-6) # sin(Ω/2)/sin Ω = 1/(2·cos(Ω/2))
    m,t = merge_state_dicts({'w':base}, sources, 'model_stock')['w'],base.double()
    c = cos(a-t, b-t)
    assert .4<c<.6 and torch.allclose(m.double(), t+2*c/(1+c)*((a+b)/2-t), rtol=1e-6, atol=1e-6)

@pytest.mark.parametrize('method', [m for m in ALL if m!='lines'])
def test_lines_is_the_inner_method_at_one(method):
    "Whatever is registered, with what its own `prepare` measures, in blocks of one row and as a whole"
    base,sources,w = world()
    hp = given(method, sources)|({} if methods.traits(method).deterministic else dict(seed=0))
    want = merge_state_dicts(base, sources, method, w, **hp)
    for size in (1,None): assert close(merge_state_dicts(base, sources, 'lines', w, of=method, hp=hp, alpha=1, beta=0, max_elements=size), want, 1e-5)
    twice = merge_state_dicts(base, sources, 'lines', w, of=method, hp=hp, alpha=1, beta=1)
    assert close({k:base[k]+(twice[k]-base[k])/2 for k in body(base)}, want, 1e-5)

def test_lines_grows_with_the_layer():
    keys = {'embeddings.w':0,'layer.0.w':0,'layer.1.w':1,'layer.2.w':2,'layer.10.w':3,'norm.w':3}
    base = {k:torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i,k in enumerate(keys)}
    sources = {n:{k:v+torch.randn(4, 3, generator=torch.Generator().manual_seed(10*i+j)) for j,(k,v) in enumerate(base.items())}
        for i,n in enumerate('abc', 1)}
    mean = merge_state_dicts(base, sources, 'linear')
    got = merge_state_dicts(base, sources, 'lines', of='task_arithmetic', alpha=.5, beta=.9)
    for k,l in keys.items(): assert torch.allclose(got[k]-base[k], (.5+.9*l/3)*.9*(mean[k]-base[k]), atol=1e-5), k
    for of,hp in [('task_arithmetic',{}), ('task_arithmetic',dict(scale=.07)), ('ties',{})]:
        got = merge_state_dicts(base, sources, 'lines', of=of, hp=hp, beta=0)
        size = lambda m: sum(float((m[k]-base[k]).abs().sum()) for k in keys)
        assert abs(size(got)-size(mean)) < 1e-4*size(mean), "without `beta` it is as long as the mean, whatever the inner scale"
DROPS = [(m,hp) for m in ALL if 'then' in inspect.signature(methods[m]).parameters for hp in [{}, *VARIANTS.get(m, [])]]
INNER = [('task_arithmetic',{}), ('linear',{}), ('ties',dict(density=.4)), ('ties',dict(density=1)), ('ties',dict(density=.6, zero='official')),
    ('consensus',{}), ('breadcrumbs',dict(scope='tensor', density=.5))]

@pytest.mark.parametrize('method,hp', DROPS, ids=[f"{m}-{'-'.join(map(str, hp.values())) or 'default'}" for m,hp in DROPS])
@pytest.mark.parametrize('then,inner', INNER, ids=[f"{m}-{'-'.join(map(str, hp.values()))}" for m,hp in INNER])
def test_then_merges_what_dropping_left(method, hp, then, inner):
    "The inner method measures and merges the dropped task vectors, as if they had been the sources"
    _,sources,w = world()
    zero = {k:torch.zeros_like(v) for k,v in sources['sq-AL'].items()} # So that models are their task vectors, without rounding
    hp = {k:v for k,v in hp.items() if k not in ('then','hp')}
    one = dict(then='task_arithmetic', hp=dict(scale=1.))
    left = {k:merge_state_dicts(zero, {k:m}, method, {k:1.}, seed=3, **hp, **one) for k,m in sources.items()}
    for size in (1,1<<17):
        got = merge_state_dicts(zero, sources, method, w, seed=3, max_elements=size, **hp, then=then, hp=inner)
        want = body(merge_state_dicts(zero, left, then, w, **inner))
        exact = methods.traits(then).coefficients is None # The loop adds these in float64
        assert same(body(got), want) if exact else close(got, want)

def from_the_loop(method, t): return method in STATISTICS or bool(t.given) and not t.prepare # Coefficients, or what was measured

@pytest.mark.parametrize('method', [o for o in ALL if not from_the_loop(o, methods.traits(o))])
def test_dropping_nothing_is_the_inner_method(method):
    "To the bit, for the pure functions"
    base,sources,w = world(4)
    taus,ws = torch.stack([task_vector(base, m)['a.weight'] for m in sources.values()]),torch.tensor(list(w.values()))
    want = methods[method](base['a.weight'], taus, ws)
    inner = {} if methods.traits(method).deterministic else dict(seed=0) # Else the inner method gets a seed of its own
    nothing = dict(dare=dict(drop=0), della=dict(drop=0, window=0), breadcrumbs=dict(density=1, gamma=0))
    for m,hp in nothing.items():
        if not (m=='della' and method=='ties'): # There ties does not trim
            assert torch.equal(methods[m](base['a.weight'], taus, ws, then=method, hp=inner, **hp), want), m
    assert torch.equal(methods['della'](base['a.weight'], taus, ws, 0, 0, 'ties', dict(density=.2)), methods['ties'](base['a.weight'], taus, ws))

@pytest.mark.parametrize('method,hp', [('dare',dict(drop=.9)), ('dare',dict(drop=.5)), ('della',dict(drop=.6, window=.4))])
def test_dropping_at_random_is_unbiased(method, hp):
    "The mean over seeds is task arithmetic, within five standard errors at every value"
    base,sources,w = world()
    n,inner = 400,dict(then='task_arithmetic', hp=dict(scale=1.))
    runs = [body(merge_state_dicts(base, sources, method, w, seed=s, **hp, **inner)) for s in range(n)]
    want = merge_state_dicts(base, sources, 'task_arithmetic', w, scale=1.)
    for k,v in body(want).items():
        x = torch.stack([r[k] for r in runs]).double()
        if v.numel(): assert ((x.mean(0)-v).abs()<=5*x.std(0)/n**.5+1e-6).all(), k
