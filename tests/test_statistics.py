"""Fisher and RegMean: per-text squares equal the plain loop, padding changes nothing, and the laws of both merges."""
import copy
import pytest
import torch
from merginguriel.base_model import add_head
from merginguriel.mini import mini_path
from merginguriel.information import *
from merginguriel.statistics import *
from merginguriel.merge import merge_state_dicts

TEXTS = ['wake me up at five am this week', 'stop', 'quiet please', 'play some jazz', 'what is the weather in rome tomorrow']
WORDS = 'roberta.embeddings.word_embeddings.weight'

@pytest.fixture(scope='module')
def mini(tmp_path_factory):
    "The mini base with a head of five labels, in float64, and its tokenizer"
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    p = add_head(mini_path(), list('abc'), tmp_path_factory.mktemp('m')/'base', seed=0)
    m = AutoModelForSequenceClassification.from_pretrained(p, dtype=torch.float64)
    with torch.no_grad(): m.classifier.out_proj.weight.mul_(3) # So that the classes differ
    return m.eval(),AutoTokenizer.from_pretrained(p)

def batch(tok, texts, side='right', extra=0):
    b = dict(tok(texts, padding=True, padding_side=side, return_tensors='pt'))
    add = lambda v,fill: torch.cat([v, torch.full((len(v),extra), fill)], 1)
    return dict(input_ids=add(b['input_ids'], tok.pad_token_id), attention_mask=add(b['attention_mask'], 0))

def squares(m, tok, pick):
    "Written out: for each text alone, Σ w·(∂ log p(c))² over the (w, c) that `pick` names"
    total = {k:torch.zeros_like(p) for k,p in m.named_parameters()}
    for i,t in enumerate(TEXTS):
        for w,c in pick(i, m(**batch(tok, [t])).logits[0].softmax(-1).detach()):
            m.zero_grad()
            m(**batch(tok, [t])).logits[0].log_softmax(-1)[c].backward()
            for k,p in m.named_parameters(): total[k] += w*p.grad**2/len(TEXTS)
    m.zero_grad()
    return total

LABELS = torch.tensor([0,1,2,1,0])
PICKS = dict(exact=lambda i,p: [(p[c],c) for c in range(len(p))], argmax=lambda i,p: [(1,int(p.argmax()))], empirical=lambda i,p: [(1,int(LABELS[i]))])

@pytest.mark.parametrize('kind', list(PICKS))
def test_fisher_is_the_mean_of_squares_of_each_text(mini, kind):
    want = squares(*mini, PICKS[kind])
    m,tok = mini
    batches = [batch(tok, TEXTS[:3])|dict(labels=LABELS[:3]), batch(tok, TEXTS[3:], extra=4)|dict(labels=LABELS[3:])]
    for kw in (dict(), dict(chunk=2), dict(parallel=False, chunk=4)):
        got = fisher_information(m, batches, kind, **kw)
        assert set(got)==set(want)
        for k in want: assert torch.allclose(got[k], want[k], rtol=1e-9, atol=1e-13), (k,kw)
    if kind!='empirical': return
    m(**batch(tok, TEXTS)).logits.log_softmax(-1)[range(len(TEXTS)),LABELS].mean().backward()
    for k,p in m.named_parameters(): assert (p.grad**2).sum()<.9*want[k].sum(), "the square of a batch's gradient, which it must not be"
    m.zero_grad()

@pytest.mark.parametrize('kind', ['signs','sample'])
def test_draws_are_right_on_average_and_follow_seed_and_text(mini, kind):
    m,tok = mini
    want = fisher_information(m, [batch(tok, TEXTS)], 'exact')
    got = fisher_information(m, [batch(tok, TEXTS)], kind, samples=100)
    for k in ('classifier.out_proj.weight','roberta.encoder.layer.0.output.dense.weight',WORDS):
        assert (got[k]-want[k]).abs().sum()/want[k].sum() < .2, k
    a = fisher_information(m, [batch(tok, TEXTS)], kind, 2)
    b = fisher_information(m, [batch(tok, [t], 'left') for t in reversed(TEXTS)], kind, 2, chunk=1)
    c = fisher_information(m, [batch(tok, TEXTS)], kind, 2, seed=1)
    state = torch.get_rng_state()
    assert all(torch.allclose(a[k], b[k], rtol=1e-9, atol=1e-13) for k in a) and not torch.allclose(a[WORDS], c[WORDS], rtol=1e-3)
    assert torch.equal(state, torch.get_rng_state())

def test_the_model_is_left_as_it_was(mini):
    m,tok = mini
    words,before = m.get_input_embeddings(),{k:v.clone() for k,v in m.state_dict().items()}
    m.train()
    fisher_information(m, [batch(tok, TEXTS)], 'argmax'), activation_grams(m, [batch(tok, TEXTS)])
    assert m.training and m.get_input_embeddings() is words and m.config._attn_implementation=='sdpa'
    m.eval()
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())
    for bad in (dict(kind='true'), dict(samples=0), dict(chunk=0), dict(kind='empirical')):
        with pytest.raises(ValueError): fisher_information(m, [batch(tok, TEXTS)], **bad)

def test_padding_does_not_change_grams(mini):
    m,tok = mini
    want = activation_grams(m, [batch(tok, [t]) for t in TEXTS])
    for extra in (0,5):
        got = activation_grams(m, [batch(tok, TEXTS[:3], extra=extra), batch(tok, TEXTS[3:], extra=extra)])
        for k in want: assert torch.allclose(got[k], want[k], rtol=1e-9, atol=1e-12), k
    assert set(want)=={k for k,p in m.named_parameters() if p.dim()==2 and 'embeddings' not in k}
    for k,g in want.items():
        assert torch.equal(g, g.T) and torch.linalg.eigvalsh(g).min()>=-1e-10*g.trace(), k
    longer = activation_grams(m, [batch(tok, [t]) for t in TEXTS*2])
    assert all(torch.allclose(longer[k], want[k], rtol=1e-9, atol=1e-12) for k in want), "a mean, whatever the number of texts"

# ---- laws of the merges

@pytest.fixture
def parts():
    g = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(s, generator=g, dtype=torch.float64)
    x = draw(3,20,4)
    return draw(5,4),draw(3,5,4),torch.tensor([.5,.2,.9]),draw(3,5,4)**2,x.transpose(1, 2)@x

def test_a_common_scale_changes_nothing(parts):
    base,taus,w,f,g = parts
    for c in (1e-8,3.,1e9):
        assert torch.allclose(regmean(base, taus, w, measured=c*g), regmean(base, taus, w, measured=g), rtol=1e-9)
        assert torch.allclose(fisher(base, taus, w, measured=c*f, floor=0), fisher(base, taus, w, measured=f, floor=0), rtol=1e-12)
        each = torch.tensor([1.,c,1/c]).reshape(3,1,1) # And with normalise, no scale does
        assert torch.allclose(fisher(base, taus, w, measured=each*f, floor=0, normalise=True), fisher(base, taus, w, measured=f, floor=0, normalise=True))
    assert not torch.allclose(fisher(base, taus, w, measured=1e-8*f), fisher(base, taus, w, measured=f)), "the floor has a unit"

def test_fisher_lies_between_the_sources(parts):
    base,taus,w,f,_ = parts
    for hp in (dict(), dict(floor=0), dict(normalise=True), dict(floor=1e9)):
        m = fisher(base, taus, w, measured=f, **hp)-base
        assert (m>=taus.amin(0)-1e-12).all() and (m<=taus.amax(0)+1e-12).all()
    even = torch.full_like(f, 7.)
    assert torch.allclose(fisher(base, taus, w, measured=even), fisher(base, taus, w, {})), "equal information: the weighted mean"

def test_regmean_is_the_least_squares_solution(parts):
    base,taus,w,_,g = parts
    ft = base+taus
    got = regmean(base, taus, w, measured=g, alpha=1, ridge=0)
    slope = sum(a*(got-t)@o for a,t,o in zip(w.double(), ft, g))
    assert slope.abs().max()<1e-10
    turn = torch.linalg.qr(torch.randn(4,4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    turned = regmean(base@turn, taus@turn, w, measured=turn.T@g@turn, alpha=1, ridge=0)
    assert torch.allclose(turned, got@turn), "inputs in other coordinates: the same layer in those"
    assert torch.allclose(regmean(base, taus, w, measured=torch.stack([g[0]]*3)), regmean(base, taus, w, {})), "equal inputs: the weighted mean"
    assert torch.allclose(regmean(base, taus, w, measured=0*g), regmean(base, taus, w, {})), "no inputs: the weighted mean"

def test_without_inputs_in_a_direction_the_weighted_mean_is_left(parts):
    base,taus,w,_,g = parts
    g = g.clone(); g[:,2] = 0; g[:,:,2] = 0
    got = regmean(base, taus, w, measured=g)
    assert torch.allclose(got[:,2], regmean(base, taus, w, {})[:,2], rtol=1e-9)
    keep = [0,1,3]
    assert torch.allclose(got[:,keep], regmean(base[:,keep], taus[:,:,keep], w, measured=g[:,keep][:,:,keep]), rtol=1e-4)
    with pytest.raises(ValueError, match='larger ridge'): regmean(base, taus, w, measured=g, ridge=0)

def test_statistics_of_other_models_are_refused(parts):
    base,taus,w,f,g = parts
    models = {k:{'a':base+t, 'b':t[0]} for k,t in zip('xyz', taus)}
    zero = {'a':base, 'b':base[0]}
    ok = {k:{'a':o} for k,o in zip('xyz', g)}
    assert torch.allclose(merge_state_dicts(zero, models, 'regmean', w.tolist(), grams=ok)['b'], zero['b']+regmean(zero['b'], taus[:,0]-zero['b'], w, {})-zero['b'])
    for grams,words in ((None, 'activation_grams'), ({'x':ok['x']}, 'no statistics of y, z'), (ok|{'y':{}}, "the statistics of y lack 'a'"),
            (ok|{'z':{'a':torch.eye(3)}}, 'measure the models that are merged'), ({k:{'c':g[0]} for k in 'xyz'}, "none of the models' tensors")):
        with pytest.raises((ValueError,KeyError), match=words): merge_state_dicts(zero, models, 'regmean', grams=grams)
    with pytest.raises(ValueError, match='the tensor'):
        merge_state_dicts(zero, models, 'fisher', information={k:{'a':torch.ones(5,3)} for k in 'xyz'})

# ---- RegMean++

def sources_of(m, names='xyz'):
    "Models around `m` with one head"
    out = {}
    for i,n in enumerate(names):
        g = torch.Generator().manual_seed(i)
        out[n] = {k:v if k.startswith('classifier') else v+.1*torch.randn(v.shape, generator=g, dtype=v.dtype) for k,v in m.state_dict().items()}
    return out

def test_regmean_plus_is_the_same_without_replaying(mini):
    "Each layer measured on a whole model whose lower layers are merged, run from the first token on"
    m,tok = mini
    base,sources,w = m.state_dict(),sources_of(m),{'x':.5,'y':.2,'z':.3}
    texts = {k:[batch(tok, TEXTS[i:i+2]), batch(tok, TEXTS[i+2:i+5])] for i,k in enumerate(sources)}
    work,got = copy.deepcopy(m),{k:{} for k in sources}
    for k,g in regmean_plus_grams(work, base, sources, texts, weights=w): got[k].update(g)
    want,mean = {k:{} for k in sources},merge_state_dicts(base, sources, 'linear', w)
    now,run = dict(mean),copy.deepcopy(m)
    for layer in ('roberta.encoder.layer.0.','roberta.encoder.layer.1.'):
        for k in sources:
            run.load_state_dict(now|{o:v for o,v in sources[k].items() if o.startswith(layer)})
            want[k] |= {o:v for o,v in activation_grams(run, texts[k]).items() if o.startswith(layer)}
        merged = merge_state_dicts(base, sources, 'regmean', w, grams=want)
        now |= {o:v for o,v in merged.items() if o.startswith(layer)}
    for k in sources:
        assert set(got[k])==set(want[k])
        for o in want[k]: assert torch.allclose(got[k][o], want[k][o], rtol=1e-8, atol=1e-10), (k,o)
    final = merge_state_dicts(base, sources, 'regmean', w, grams=got)
    assert all(torch.allclose(v, final[k]) for k,v in work.state_dict().items() if not k.startswith('classifier'))
    plain = {k:activation_grams(m_, texts[k]) for k,m_ in ((k,copy.deepcopy(m)) for k in sources) if m_.load_state_dict(sources[k])}
    o = 'roberta.encoder.layer.1.output.dense.weight'
    assert not torch.allclose(plain['x'][o], got['x'][o], rtol=1e-3), "not what RegMean measures"
    assert all('forward' not in l.__dict__ for l in numbered_layers(work).values())

def test_regmean_plus_of_copies_is_that_model(mini):
    m,tok = mini
    base = {k:v+.1 if v.is_floating_point() else v for k,v in m.state_dict().items()}
    copies = {k:m.state_dict() for k in 'xy'}
    grams = dict(regmean_plus_grams(copy.deepcopy(m), base, copies, {k:[batch(tok, TEXTS)] for k in copies}))
    out = merge_state_dicts(base, copies, 'regmean', grams={k:grams[k] for k in copies})
    assert all(torch.allclose(out[k], v, atol=1e-9) for k,v in m.state_dict().items())
