"Paired tests against enumeration, against naive resampling, and against simulated truth"
from itertools import product
from math import comb

import numpy as np, pandas as pd, pytest
from scipy import stats

from merginguriel.significance import *

def pair(n, n10, n01, rng=None):
    a,b = np.ones(n,bool),np.ones(n,bool)
    b[:n10] = False
    a[n10:n10+n01] = False
    o = np.arange(n) if rng is None else rng.permutation(n)
    return a[o],b[o]

@pytest.mark.parametrize('n10,n01', [(0,0),(1,0),(0,6),(3,3),(4,1),(2,9),(10,3)])
def test_mcnemar_by_enumeration(n10, n01):
    "All 2^m ways in which m fair coins fall: how many are at least as uneven"
    m = n10+n01
    p = sum(abs(2*sum(o)-m)>=abs(n10-n01) for o in product((0,1), repeat=m))/2**m
    r = mcnemar(*pair(40, n10, n01))
    assert (r.n, r.n10, r.n01)==(40, n10, n01) and r.diff==(n10-n01)/40
    assert r.p==pytest.approx(p, abs=1e-12)
    tie = comb(m, n10)/2**m*(1 if n10==n01 else 2) # mid-p: half of the observed outcomes; never above 1
    assert r.p_mid==pytest.approx(1 if n10==n01 else p-tie/2, abs=1e-12)

def test_mcnemar_is_antisymmetric_and_blind_to_order():
    rng = np.random.default_rng(0)
    a,b = pair(200, 30, 12, rng)
    r,s = mcnemar(a, b),mcnemar(b, a)
    assert (r.p,r.diff)==(s.p,-s.diff)
    ids = pd.Index([f'u{i}' for i in range(200)])
    sa,sb = pd.Series(a,ids),pd.Series(b,ids).sample(frac=1, random_state=1)
    assert mcnemar(sa, sb)==r
    assert mcnemar(sa, sb.set_axis(ids))!=r # the wrong answer differs: pairing by position would show

def test_mcnemar_keeps_its_level():
    "Two equally good models: at most 5 % of tests may be significant"
    rng = np.random.default_rng(0)
    m = rng.binomial(500, .1, 4000)
    p = {(k,h):McNemar(500, int(k-h), int(h)).p for k,h in set(zip(m, rng.binomial(m, .5)))}
    rng = np.random.default_rng(0)
    m = rng.binomial(500, .1, 4000)
    assert np.mean([p[o]<.05 for o in zip(m, rng.binomial(m, .5))])<.05+.01

def test_detectable_effect_has_its_power():
    n,disc = 2974,.1
    d = minimum_detectable_effect(n, disc, power=.8)
    rng = np.random.default_rng(0)
    c = rng.multinomial(n, [(disc+d)/2,(disc-d)/2,1-disc], 20000)
    found = abs(c[:,0]-c[:,1])>1.959964*np.sqrt(c[:,0]+c[:,1])
    assert abs(found.mean()-.8)<.015
    assert minimum_detectable_effect(n, disc, alpha=.01)>minimum_detectable_effect(n, disc)
    assert minimum_detectable_effect(4*n, disc)==pytest.approx(minimum_detectable_effect(n, disc)/2)

@pytest.mark.parametrize('power', [None,.5,.8,.95])
@pytest.mark.parametrize('n,disc', [(100,.3),(2974,.05),(50000,.9)])
def test_detectable_effect_solves_its_equation(n, disc, power):
    d = minimum_detectable_effect(n, disc, alpha=.02, power=power)
    za,zb = stats.norm.isf(.01),stats.norm.ppf(power or .5)
    assert d*n**.5==pytest.approx(za*disc**.5+zb*(disc-d*d)**.5)

# ---- bootstrap

def naive(A, B, draws, seed):
    rng = np.random.default_rng(seed)
    d = A.mean(0)-B.mean(0)
    return np.array([d[rng.integers(0, len(d), len(d))].mean() for _ in range(draws)])

@pytest.mark.parametrize('ra,rb', [(1,1),(3,3),(3,1),(2,5)])
def test_bootstrap_is_the_naive_one(ra, rb):
    rng = np.random.default_rng(ra*10+rb)
    hard = rng.random(300)
    A,B = (rng.random((r,300))<hard*s for r,s in ((ra,1.),(rb,.9)))
    r,x = paired_bootstrap(A, B, n=20000),naive(A, B, 20000, 1)
    assert r.diff==pytest.approx(A.mean()-B.mean(), abs=1e-12)
    assert [r.low,r.high]==pytest.approx(np.quantile(x, [.025,.975]), abs=.1*x.std())
    assert r.p==pytest.approx(2*min((x<=1e-12).mean(), (x>=-1e-12).mean()), abs=.02)

def test_bootstrap_interval_covers():
    "Of 400 test sets drawn from a known world, about 95 % of the intervals contain the true difference"
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(400):
        n10,n01,_ = rng.multinomial(400, [.1,.06,.84])
        r = paired_bootstrap(*pair(400, n10, n01), n=1000, seed=i)
        hits += r.low<=.04<=r.high
    assert .92<hits/400<.98

def test_runs_that_agree_add_nothing_and_pooling_is_too_narrow():
    a,b = pair(500, 60, 40)
    one,three = paired_bootstrap(a, b),paired_bootstrap([pd.Series(a)]*3, [pd.Series(b)]*3)
    assert (one.low,one.high)==(three.low,three.high)
    pooled = paired_bootstrap(np.tile(a,3), np.tile(b,3))
    assert pooled.high-pooled.low==pytest.approx((one.high-one.low)/3**.5, rel=.08)

def test_runs_are_aligned_each_by_id():
    rng = np.random.default_rng(0)
    A,B = rng.random((3,80))<.7,rng.random((3,80))<.6
    mix = [[pd.Series(r).sample(frac=1, random_state=10*j+i) for i,r in enumerate(X)] for j,X in enumerate((A,B))]
    mix[0][0] = pd.Series(A[0])
    assert paired_bootstrap(*mix)==paired_bootstrap(A, B)

def test_bootstrap_memory_and_time_do_not_grow_with_the_items():
    import time,tracemalloc
    a,b = pair(1_000_000, 30_000, 29_000)
    tracemalloc.start()
    t = time.perf_counter()
    r = paired_bootstrap(a, b)
    t,peak = time.perf_counter()-t,tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert r.low<.001<r.high and peak<100e6 and t<5 # resampling items would take 10,000 x 1,000,000 draws

# ---- correction

def brute_holm(p):
    o = np.argsort(p)
    return np.array([min(1, max((len(p)-k)*p[j] for k,j in enumerate(o) if p[j]<=v)) for v in p])

@pytest.mark.parametrize('seed', range(5))
def test_corrections(seed):
    p = np.random.default_rng(seed).random(20)**3
    p[3] = p[4] # a tie
    assert holm(p)==pytest.approx(brute_holm(p))
    assert benjamini_hochberg(p)==pytest.approx(stats.false_discovery_control(p))
    assert (holm(p)>=benjamini_hochberg(p)-1e-12).all() and (benjamini_hochberg(p)>=p-1e-12).all()
    s = pd.Series(p, index=[f'l{i}' for i in range(20)], name='p').sample(frac=1, random_state=seed)
    assert holm(s).sort_index().equals(pd.Series(holm(p), index=[f'l{i}' for i in range(20)], name='p').sort_index())

def test_holm_bounds_false_claims():
    rng = np.random.default_rng(0)
    any_false = [(holm(rng.random(49))<=.05).any() for _ in range(2000)]
    uncorrected = [(rng.random(49)<=.05).any() for _ in range(2000)]
    assert np.mean(any_false)<.065 and np.mean(uncorrected)>.9

def test_compare_rows_do_not_depend_on_their_neighbours():
    a,b = {},{}
    for i,(x,y) in enumerate([(90,30),(60,39),(20,70),(15,15)]): a[f'l{i}'],b[f'l{i}'] = pair(1000, x, y)
    df = compare(a, b)
    one = compare({'l1':a['l1']}, {'l1':b['l1']})
    same = ['n','diff','low','high','discordance','detectable','p']
    assert df.loc[['l1'],same].equals(one[same])
    assert df.verdict['l1']=='no difference shown' and one.verdict['l1']=='better' # p = .044: alone it would do
    back = compare(b, a)
    assert back.verdict.tolist()==['worse','no difference shown','better','no difference shown'] and (back['diff']==-df['diff']).all()

def test_plot_leaves_no_style_behind():
    import matplotlib
    matplotlib.use('agg')
    from matplotlib import pyplot as plt
    before = dict(matplotlib.rcParams)
    a,b = {'x':pair(1000, 90, 30)[0],'y':np.ones(9,bool)},{'x':pair(1000, 90, 30)[1],'y':np.ones(9,bool)}
    ax = plot_differences(compare(a, b)) # one locale has no discordant item, hence no band
    assert [o.get_text() for o in ax.get_yticklabels()]==['y','x'] and ax.get_xlabel().endswith('(points)')
    assert dict(matplotlib.rcParams)==before
    plt.close('all')
