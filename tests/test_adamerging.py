"""AdaMerging: the gradient is exact, slicing and streaming change nothing, and what cannot learn is refused."""
import json, math
from types import SimpleNamespace
import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F
from merginguriel.adamerging import *
from merginguriel.checkpoint import open_checkpoint, save_checkpoint
from merginguriel.coefficients import *
from merginguriel.core import IncompatibleError
from merginguriel.elected import *
from merginguriel.gradient import *
from merginguriel.merge import merge, merge_state_dicts, methods
from merginguriel.task_vector import TensorNamesError, tensor_block
from merginguriel.toy import toy_base, toy_rows, toy_sources
from merginguriel.gradient import Objective

NAMES = ['de-DE','en-US','sq-AL']
WORDS = 'roberta.embeddings.word_embeddings.weight'

@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    "Paths, everything in float64 in memory, and three batches of Swahili text with padding"
    from transformers import AutoTokenizer
    d = tmp_path_factory.mktemp('toy')
    base,paths = toy_base(d/'base'),toy_sources(d/'models', NAMES, scale=.1)
    load = lambda p: {k:open_checkpoint(p).read(k).double() for k in open_checkpoint(p)}
    tok = AutoTokenizer.from_pretrained(base)
    rows = [r['text'] for r in toy_rows('sw-KE', 'dev')]
    batches = [dict(tok(rows[i:i+8], padding=True, return_tensors='pt')) for i in (0,8,16)]
    b,s = load(base),{k:load(p) for k,p in paths.items()}
    head = {k:v for k,v in s['de-DE'].items() if k.startswith('classifier')}
    b = {f'roberta.{k}':v for k,v in b.items()}|head
    return SimpleNamespace(base=base, paths=paths, b=b, s=s, batches=batches)

def model(toy, dtype=torch.float64):
    from transformers import AutoModelForSequenceClassification
    return AutoModelForSequenceClassification.from_pretrained(toy.paths['de-DE'], dtype=dtype)

def run(toy, m=None, **kw):
    kw = dict(steps=3, init=dict(zip(NAMES, [.5,.3,.2])))|kw
    return adamerge(m or model(toy), toy.b, toy.s, kw.pop('batches', toy.batches), **kw)

def entropy(logits): return -(logits.softmax(-1)*logits.log_softmax(-1)).sum(-1).mean()

def first_gradient(toy, scope, constraint, **kw):
    "The λ-gradient of the first step, (groups, K), seen where it is handed over"
    seen = []
    step = Coefficients.step
    try:
        Coefficients.step = lambda self,g: seen.append((self.value().detach(),g.clone())) or step(self, g)
        r = run(toy, scope=scope, constraint=constraint, **kw)
    finally: Coefficients.step = step
    return r,*seen[0]

def merged(toy, lam, groups, names, fixed):
    "θ(λ) in the graph of λ, written out"
    out = {}
    for k in toy.b:
        c = lam[groups.index(names[k])] if names[k] else fixed
        head = k.startswith('classifier')
        out[k] = sum(w*(toy.s[n][k] if head else toy.s[n][k]-toy.b[k]) for w,n in zip(c, NAMES)) + (0 if head else toy.b[k])
    return out

# ---- the gradient

@pytest.mark.parametrize('constraint', ['softmax','free'])
@pytest.mark.parametrize('scope', scopes)
def test_gradient_is_autograd_and_finite_differences(toy, scope, constraint):
    r,lam,g = first_gradient(toy, scope, constraint)
    name = lambda k: dict(task='all', block=tensor_block(k), tensor=k)[scope]
    head = ('all' if scope=='task' else 'head') if constraint=='softmax' else None
    names = {k:head if k.startswith('classifier') else name(k) for k in toy.b}
    groups = list(r.trajectory.group.unique())
    assert set(groups)=={n for n in names.values() if n}
    fixed,m = torch.tensor([.5,.3,.2], dtype=torch.float64),model(toy).eval()
    loss = lambda l: entropy(functional_call(m, merged(toy, l, groups, names, fixed), kwargs=toy.batches[0]).logits)
    x = lam.clone().requires_grad_()
    loss(x).backward()
    assert torch.allclose(g, x.grad, rtol=1e-9, atol=1e-12)
    at,eps = divmod(int(g.abs().argmax()), 3),1e-6
    d = torch.zeros_like(lam); d[at] = eps
    with torch.no_grad(): assert (loss(lam+d)-loss(lam-d)).item()/(2*eps) == pytest.approx(g[at].item(), rel=1e-5)

def test_assignment_to_data_has_no_gradient_and_ours_does_not_accept_it(toy):
    m,lam = model(toy),torch.tensor([.5,.3,.2], dtype=torch.float64, requires_grad=True)
    for k,p in m.named_parameters(): p.data = toy.b[k]+sum(w*(toy.s[n][k]-toy.b[k]) for w,n in zip(lam, NAMES))
    entropy(m(**toy.batches[0]).logits).backward()
    assert lam.grad is None
    m = model(toy)
    forward = m.forward
    m.forward = lambda **kw: SimpleNamespace(logits=forward(**kw).logits.detach())
    with pytest.raises(RuntimeError, match='the loss has no gradient'): run(toy, m)
    m.forward = lambda **kw: SimpleNamespace(logits=torch.ones(8,2, requires_grad=True))
    with pytest.raises(RuntimeError, match='no parameter has a gradient'): run(toy, m)

@pytest.mark.parametrize('kw', [{}, dict(objective='im'), dict(scope='tensor'), dict(scope='block', constraint='clamp')], ids=str)
def test_slicing_the_vocabulary_is_bit_for_bit(toy, kw):
    a,b = run(toy, steps=6, **kw),run(toy, steps=6, vocabulary='all', **kw)
    assert a.record['word_vectors'] < len(toy.b[WORDS]) and b.record['word_vectors'] is None
    assert a.trajectory.equals(b.trajectory) and a.log.equals(b.log)
    assert a.trajectory.coefficient.nunique()>3

def test_slicing_leaves_the_model_whole(toy):
    for kw in ({}, dict(vocabulary='all'), dict(keep='memory')):
        m = model(toy).train()
        whole = m.get_input_embeddings()
        flags = [p.requires_grad for p in m.parameters()]
        r = run(toy, m, scope='block', constraint='free', **kw)
        assert m.get_input_embeddings() is whole and m.training and flags==[p.requires_grad for p in m.parameters()]
        assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in m.parameters())
        want = merge_state_dicts(toy.b, toy.s, **r.recipe)
        assert all(torch.allclose(p, want[k], rtol=1e-12, atol=1e-13) for k,p in m.named_parameters())

def test_a_failed_search_puts_the_embedding_back(toy):
    m = model(toy)
    whole = m.get_input_embeddings()
    with pytest.raises(ZeroDivisionError): run(toy, m, monitor=lambda model: 1/0)
    assert m.get_input_embeddings() is whole

def test_streaming_is_memory_is_disk(toy):
    a = run(toy, steps=5)
    b = run(toy, steps=5, keep='memory')
    assert torch.allclose(*(torch.tensor(o.trajectory.coefficient.values) for o in (a,b)), rtol=1e-10)
    c = adamerge(model(toy, torch.float32), toy.base, toy.paths, toy.batches, steps=5, init=dict(zip(NAMES, [.5,.3,.2])))
    d = adamerge(blank_classifier(toy.paths['de-DE']), toy.base, toy.paths, toy.batches, steps=5, init=dict(zip(NAMES, [.5,.3,.2])))
    assert c.trajectory.equals(d.trajectory) # What the container held before does not matter
    assert torch.allclose(*(torch.tensor(o.trajectory.coefficient.values) for o in (a,c)), atol=1e-5)

def test_order_of_sources_is_irrelevant(toy):
    a = run(toy, scope='block')
    b = adamerge(model(toy), toy.b, dict(reversed(toy.s.items())), toy.batches, steps=3, init=dict(zip(NAMES, [.5,.3,.2])), scope='block')
    assert list(b.weights)==NAMES[::-1] and a.weights.equals(b.weights[NAMES])

def test_labels_and_earlier_random_numbers_are_irrelevant(toy):
    torch.manual_seed(1)
    a = run(toy)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert a.trajectory.equals(run(toy).trajectory) and torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="'labels'"): run(toy, batches=[toy.batches[0]|{'labels':torch.zeros(8)}])

# ---- constraints and objectives

@pytest.mark.parametrize('constraint', list(constraints))
@pytest.mark.parametrize('scope', scopes)
def test_invariants_at_each_step(toy, constraint, scope):
    r = run(toy, scope=scope, constraint=constraint, steps=12, objective='im')
    v = r.trajectory.pivot_table(index=['step','group'], columns='source', values='coefficient', observed=True)
    if constraint in convex_constraints: assert (v>=0).all(axis=None) and ((v.sum(axis=1)-1).abs()<1e-12).all()
    if constraint=='clamp': assert ((v>=0)&(v<=1)).all(axis=None)
    assert len(r.log)==12 and r.log.loss.le(r.log.entropy+1e-12).all() and r.log.entropy.between(0, math.log(2)).all()
    assert (r.histograms.sum(axis=1)==8).all()
    json.dumps([r.record,r.recipe])

def test_convex_head_and_fixed_head(toy):
    init,heads = dict(zip(NAMES, [.5,.3,.2])),[k for k in toy.b if k.startswith('classifier')]
    for constraint in constraints:
        r = run(toy, constraint=constraint, eps=0, init=init)
        learned = constraint in convex_constraints
        rows = r.coefficients.loc[heads]
        assert ((rows.sum(axis=1)-1).abs()<1e-9).all()
        assert learned == (not all(abs(rows[n]-init[n]).max()<1e-9 for n in NAMES))
        got = merge_state_dicts(toy.b, toy.s, **r.recipe)
        for k in heads: assert torch.allclose(got[k], sum(rows.loc[k,n]*toy.s[n][k] for n in NAMES), atol=1e-12)

def test_anchor_gate_and_sharpness_change_the_search(toy):
    plain = run(toy, steps=20)
    held = run(toy, steps=20, anchor=10.)
    move = lambda r: (r.weights-r.trajectory[r.trajectory.step==0].set_index('source').coefficient).abs().max()
    assert move(held)<move(plain)
    sharp = run(toy, steps=20, sharpness=.05)
    assert not sharp.weights.equals(plain.weights) and sharp.log.loss.iloc[0]==plain.log.loss.iloc[0]
    with pytest.raises(RuntimeError, match='gate'): run(toy, gate=True) # No text is certain enough
    sure = {k:{n:v*(3 if 'out_proj' in n else 1) for n,v in m.items()} for k,m in toy.s.items()}
    loose,gated = (adamerge(model(toy), toy.b, sure, toy.batches, gate=o, steps=20) for o in (False,True))
    assert 0<gated.log.kept.min()<=gated.log.kept.max()<=8 and not gated.weights.equals(loose.weights)

def test_soft_labels_recover_the_mixture(toy):
    "Targets from a known mixture: the coefficients approach it"
    lam = dict(zip(NAMES, [.1,.8,.1]))
    m = model(toy).eval()
    with torch.no_grad():
        want = merge_state_dicts(toy.b, toy.s, 'linear', lam)
        b = [o|{'targets':functional_call(m, want, kwargs=o).logits.softmax(-1)} for o in toy.batches]
    r = run(toy, batches=b, objective='soft_labels', steps=200, lr=.05, init=None)
    assert (r.weights-[lam[k] for k in r.weights.index]).abs().max()<.1, r.weights
    with pytest.raises(ValueError, match="'targets'"): run(toy, objective='soft_labels')

def test_information_maximisation_is_at_most_the_entropy():
    g = torch.Generator().manual_seed(0)
    for scale in (.1,1,10):
        z = torch.randn(7,5, generator=g, dtype=torch.float64)*scale
        h,im = Objective()(z)[0],Objective('im')(z)[0]
        assert im<=h+1e-12 and im<=1e-12 # Minus the mutual information of text and answer

def test_passes_and_temper(toy):
    r = run(toy, passes=2)
    assert r.record['steps']==6 and r.record['batches']==3 and len(r.log)==6
    assert start_coefficients('ab', [.96,.04], temper=.5, eps=0).round(12).tolist() == pytest.approx([.8304,.1695], abs=1e-3)

def test_monitor(toy):
    seen = []
    def monitor(m):
        with torch.no_grad(): seen.append(m(**toy.batches[2]).logits.sum().item())
        return seen[-1]
    r = run(toy, steps=4, monitor=monitor, monitor_every=2)
    assert r.log.monitor.dropna().tolist()==seen and list(r.log.monitor.dropna().index)==[0,2,4]
    new = dict(input_ids=torch.tensor([[0,5,2]]), attention_mask=torch.ones(1,3))
    with pytest.raises(IndexError, match='token 5'): run(toy, monitor=lambda m: m(**new).logits.sum().item())

# ---- the final merge

def test_one_hot_is_the_target_bit_for_bit(toy):
    keys = list(toy.s['sq-AL'])
    one = {n:float(n=='sq-AL') for n in NAMES}
    for table in ({'*':one}, {k:one for k in keys}):
        m = merge_state_dicts(toy.b, toy.s, 'adamerging', table=table)
        assert all(torch.equal(m[k], toy.s['sq-AL'][k]) for k in keys)
    pair = {k:toy.s[k] for k in ('de-DE','sq-AL')}
    r = adamerge(model(toy), toy.b, pair, toy.batches, constraint='simplex', lr=10., steps=1)
    assert sorted(r.weights)==[0,1]
    m,n = merge_state_dicts(toy.b, pair, **r.recipe),r.weights.idxmax()
    assert all(torch.equal(m[k], pair[n][k]) for k in keys)

def test_a_table_is_streamed_recorded_and_checked(toy, tmp_path):
    r = adamerge(model(toy, torch.float32), toy.base, toy.paths, toy.batches, steps=5, scope='tensor', constraint='free', lr=.1)
    report = merge(toy.base, toy.paths, tmp_path/'a', max_elements=7, **r.recipe)
    whole = merge_state_dicts(toy.base, toy.paths, max_elements=None, **r.recipe)
    c = open_checkpoint(tmp_path/'a')
    assert all(torch.equal(c.read(k), whole[k]) for k in c)
    assert report.record['coefficients'] is None and report.record['hyperparameters']['table']==r.recipe['table']
    k = 'roberta.encoder.layer.0.output.dense.weight'
    tau = lambda n: open_checkpoint(toy.paths[n]).read(k).double()-toy.b[k].float().double()
    want = toy.b[k]+sum(r.coefficients.loc[k,n]*tau(n) for n in NAMES)
    assert torch.allclose(whole[k].double(), want, atol=1e-6)
    table = r.recipe['table']
    turned = {k:dict(reversed(v.items())) for k,v in reversed(table.items())}
    again = merge_state_dicts(toy.base, dict(reversed(toy.paths.items())), **r.recipe|{'table':turned})
    assert all(torch.equal(again[k], whole[k]) for k in whole)
    less = {k:v for k,v in table.items() if 'bias' not in k}
    with pytest.raises(ValueError, match='no row for'): merge(toy.base, toy.paths, tmp_path/'b', **r.recipe|{'table':less})
    bad = table|{'classifier.dense.bias':dict(zip(NAMES, [1.5,-.5,0]))}
    with pytest.raises(ValueError, match='heads needs coefficients of 0 or more'): merge(toy.base, toy.paths, tmp_path/'b', **r.recipe|{'table':bad})
    bad = table|{WORDS:dict(zip(NAMES, [math.nan,0,0]))}
    with pytest.raises(ValueError, match='finite'): merge(toy.base, toy.paths, tmp_path/'b', **r.recipe|{'table':bad})
    assert not (tmp_path/'b').exists()

def test_elected_sources(toy, tmp_path):
    "Each keeps its own large values that have the elected sign; their sum over the number that agree is TIES"
    e = elected_sources(toy.base, toy.paths, tmp_path/'e', density=.3)
    assert list(e)==NAMES
    ties = merge_state_dicts(toy.base, toy.paths, 'ties', density=.3)
    read = lambda p,k: open_checkpoint(p).read(k)
    for k in ties:
        if k.startswith('classifier'):
            assert all(torch.equal(read(e[n], k), read(toy.paths[n], k)) for n in NAMES)
            continue
        b = toy.b[k].float()
        kept = torch.stack([read(e[n], k)-b for n in NAMES])
        assert all(torch.equal(v, torch.where(v!=0, read(toy.paths[n], k)-b, 0)) for v,n in zip(kept, NAMES))
        assert torch.allclose(b+kept.sum(0)/(kept!=0).sum(0).clamp(min=1), ties[k], atol=1e-6)
    r = adamerge(model(toy, torch.float32), toy.base, e, toy.batches, steps=12, constraint='clamp')
    merge(toy.base, e, tmp_path/'out', **r.recipe)
    with pytest.raises(ValueError, match='density'): elected_sources(toy.base, toy.paths, tmp_path/'f', density=20)
    assert not (tmp_path/'f').exists() or not list((tmp_path/'f').iterdir())

# ---- what is refused

@pytest.mark.parametrize('kw,words', [(dict(scope='layer'),'scope is one of'), (dict(constraint='none'),'constraint is one of'),
    (dict(objective='accuracy'),'objective is one of'), (dict(steps=0),'steps is out of range'), (dict(lr=-1.),'lr is out of range'),
    (dict(keep='gpu'),"'gpu'"), (dict(init=[1,2]),'2 weights for 3'), (dict(init={'de-DE':1}),'no weight for'), (dict(temper=0),'temper'),
    (dict(batches=[]),'no batches'), (dict(batches=[dict(input_ids=torch.zeros(1,2).long())]),'attention_mask'),
    (dict(prior=[1,1]),'prior belongs'), (dict(batches=[dict(input_ids=torch.tensor([[9999]]), attention_mask=torch.ones(1,1))]),'9999'),
    (dict(anchor=-1.),'anchor is out'), (dict(vocabulary='some'),'vocabulary is')], ids=str)
def test_bad_arguments(toy, kw, words):
    with pytest.raises(ValueError, match=words): run(toy, **kw)

def test_models_that_do_not_fit(toy):
    with pytest.raises(TypeError, match='pass a list'): run(toy, batches=iter(toy.batches))
    with pytest.raises(ValueError, match='one source'): adamerge(model(toy), toy.b, {'sq-AL':toy.s['sq-AL']}, toy.batches)
    adamerge(model(toy), toy.b, {'sq-AL':toy.s['sq-AL']}, toy.batches, constraint='clamp', steps=2)
    m = model(toy); m.more = torch.nn.Linear(2, 2)
    with pytest.raises(TensorNamesError, match="in no source, e.g. 'more"): run(toy, m)
    m = model(toy); m.classifier = torch.nn.Linear(2, 2)
    with pytest.raises(TensorNamesError, match='classifier.dense'): run(toy, m)
    m = model(toy); m.config.id2label = {0:'music', 1:'lights'}
    with pytest.raises(IncompatibleError, match='labels'): adamerge(m, toy.base, toy.paths, toy.batches)
    with pytest.raises(ValueError, match='difference'): adamerge(model(toy), None, toy.s, toy.batches)
    same = {k:toy.s['sq-AL'] for k in 'ab'}
    with pytest.raises(RuntimeError, match='copies of each other'): adamerge(model(toy), toy.b, same, toy.batches)
    three = same|{'c':toy.s['en-US']}
    r = adamerge(model(toy), toy.b, three, toy.batches, steps=30)
    assert r.weights['a']==pytest.approx(r.weights['b'], abs=1e-9) and abs(r.weights['c']-1/3)>1e-3
    broken = toy.s|{'sq-AL':toy.s['sq-AL']|{'roberta.encoder.layer.0.output.dense.bias':torch.full((16,), math.nan)}}
    with pytest.raises(ValueError, match='loss is nan'): adamerge(model(toy), toy.b, broken, toy.batches)

def test_an_embedding_that_is_shared_is_not_sliced():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words,self.out = torch.nn.Embedding(5, 3),torch.nn.Linear(3, 5, bias=False)
            self.out.weight = self.words.weight
        def get_input_embeddings(self): return self.words
    with sliced_vocabulary(Tied(), torch.tensor([1,2])) as cut: assert cut is None

def test_a_tied_tensor_has_the_coefficients_of_its_other_name(toy):
    plan = SimpleNamespace(body=['a','b'], heads=[], labels=None, first='x', sources={'x':SimpleNamespace(shape=lambda k: (2,2))})
    m = torch.nn.Module(); m.a = m.b = torch.nn.Parameter(torch.zeros(2,2))
    from merginguriel.adamerging import _parameters
    groups = dict(a='a', b='b')
    assert list(_parameters(m, plan, groups))==['a'] and groups==dict(a='a', b='a')
