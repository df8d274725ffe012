"""The audit names every planted fault, on toy models and on models of the mini base's size, and names none where there is none:
for every method of the registry, with the record that `merge` writes."""
import json, math
import pandas as pd
import pytest
import torch
from merginguriel.audit import Fault, audit, faults
from merginguriel.base_model import head_keys, match_base
from merginguriel.checkpoint import open_checkpoint, save_checkpoint
from merginguriel.core import CheckpointError, IncompatibleError, MissingDataError
from merginguriel.merge import merge, merge_state_dicts, methods
from merginguriel.mini import mini_path
from merginguriel.recovery import recover
from merginguriel.toy import toy_base, toy_sources
import test_laws

NAMES, W = ['de-DE', 'en-US', 'sq-AL'], [.5, .3, .2]


def tensors(path): c = open_checkpoint(path); return {k: c.read(k) for k in c}
def rewrite(path, change):
    t = tensors(path)
    change(t)
    save_checkpoint(t, path)
def config(path, **kw): (path/'config.json').write_text(json.dumps(json.loads((path/'config.json').read_text())|kw))
def kinds(*args, **kw): return audit(*args, **kw).kinds


class World:
    "A base, three sources in memory, and merges of them that are not made by the package"
    def __init__(self, base, sources):
        self.base, self.sources, self.g = base, sources, torch.Generator().manual_seed(5)
        self.heads = head_keys(sources['de-DE'].keys())
        self.body = [k for k, v in sources['de-DE'].items() if k not in self.heads and v.is_floating_point()]
    def mix(self, c, base=None, head=None):
        "Σ c·source + (1−Σc)·base, in float32; heads averaged"
        base, head = base or self.base, head or [o/sum(c) for o in c]
        add = lambda c, k: sum(w*self.sources[n][k].double() for n, w in zip(NAMES, c))
        return {k: (add(c, k)+(1-sum(c))*base[k].double()).float() for k in self.body} | {k: add(head, k).float() for k in self.heads}
    def noise(self, size, like=None):
        "`size` times the length of each tensor of the base in a random direction, plus the base"
        rms = lambda v: v.float().square().mean().sqrt()
        return {k: (0 if like is None else like[k].float())+size*rms(self.base[k])*torch.randn(self.base[k].shape, generator=self.g)
            for k in self.body}
    def changed(self, f, heads='de-DE'):
        "The model whose body is `f(key)` and whose head is the mean"
        return self.mix(W) | {k: f(k).float() for k in self.body}


def make_toy():
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        base = tensors(toy_base(f'{d}/base'))
        return World({f'roberta.{k}': v for k, v in base.items()}, {k: tensors(p) for k, p in toy_sources(f'{d}/sources').items()})

def make_mini():
    "Fine-tuned models of the mini base as training leaves them: few word vectors move, the rest moves by a hundredth"
    g, base = torch.Generator().manual_seed(3), tensors(mini_path())
    base = {k if k.startswith('roberta.') else f'roberta.{k}': v.float() for k, v in base.items() if v.is_floating_point()}
    shared, models = {k: torch.randn(v.shape, generator=g) for k, v in base.items()}, {}
    head = {'classifier.out_proj.weight': torch.randn(60, 64, generator=g), 'classifier.out_proj.bias': torch.zeros(60)}
    for n in NAMES:
        m = {}
        for k, v in base.items():
            t = .01*v.square().mean().sqrt()*(.6*shared[k]+.8*torch.randn(v.shape, generator=g))
            if 'word_embeddings' in k: t *= torch.rand(len(v), 1, generator=g) < .08
            m[k] = v+t
        models[n] = m | {k: v+.1*torch.randn(v.shape, generator=g) for k, v in head.items()}
    return World(base, models)


@pytest.fixture(scope='module', params=['toy', 'mini'])
def world(request): return dict(toy=make_toy, mini=make_mini)[request.param]()

@pytest.fixture(scope='module')
def toy(): return make_toy()

@pytest.fixture
def files(tmp_path):
    "Models that a test may damage"
    return toy_base(tmp_path/'base'), toy_sources(tmp_path/'sources')


# ---- what was used is recovered

def close(report, table, tol=1e-6):
    "Whether the coefficients of all blocks and the body are those of a list, or of a dictionary of lists by block"
    got = report.coefficients
    return all(abs(got.loc[b, k]-(table[b] if isinstance(table, dict) else table)[i]) <= tol
        for b in (table if isinstance(table, dict) else got.index) for i, k in enumerate(NAMES))

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('k', [1, 2, 3])
def test_linear_and_task_arithmetic(files, tmp_path, seed, k):
    base, sources = files[0], dict(list(files[1].items())[:k])
    w = torch.rand(k, generator=torch.Generator().manual_seed(seed)).add(.05).tolist()
    for method, hp, want in (('linear', {}, [o/sum(w) for o in w]), ('task_arithmetic', dict(scale=.7), [.7*o for o in w])):
        out = merge(base, sources, tmp_path/f'{method}{seed}', method, w, **hp).path
        r = audit(out, base, sources)
        assert r.coefficients.sub(want).abs().to_numpy().max() < 1e-6 and r.kinds == [] and r.facts['residual'] < 1e-8
        assert f'the coefficients are what was meant, {method} by its record' in r.notes
        assert r.expected.to_list() == pytest.approx(want)

def test_tables_of_coefficients(files, tmp_path):
    "AdaMerging's, by block and by tensor"
    base, sources = files
    g = torch.Generator().manual_seed(1)
    draw = lambda: dict(zip(NAMES, torch.rand(3, generator=g).tolist()))
    keys = [k for k in tensors(sources['de-DE']) if k.startswith('roberta.')]
    rows = {'embeddings': draw(), 'layer.0': draw()}
    table = {k: rows['embeddings' if 'embeddings' in k else 'layer.0'] for k in keys}|{'*': draw()}
    out = merge(base, sources, tmp_path/'blocks', 'adamerging', table=table).path
    r = audit(out, base, sources)
    assert close(r, {b: list(c.values()) for b, c in rows.items()}) and r.kinds == [] and (r.facts['level'], r.facts['exact']) == ('block', True)
    table = {k: draw() for k in keys}|{'*': draw()}
    out = merge(base, sources, tmp_path/'tensors', 'adamerging', table=table).path
    r = audit(out, base, sources)
    assert r.kinds == [] and (r.facts['level'], r.facts['exact']) == ('tensor', True)
    fits = recover(out, base, sources).tensors
    assert all(abs(fits[k].coef-list(table[k].values())).max() < 1e-4 for k in keys if fits[k].lengths.all())
    record = json.loads((out/'merge_record.json').read_text())
    swapped = {k: dict(zip(NAMES, [v['en-US'], v['de-DE'], v['sq-AL']])) for k, v in record['hyperparameters']['table'].items()}
    (out/'merge_record.json').write_text(json.dumps(record|{'hyperparameters': dict(table=swapped)}))
    assert audit(out, base, sources).kinds # Which is not the table it was merged by

def test_a_source_without_a_part_gets_0(world):
    r = audit(world.mix([.6, .4, 0]), world.base, world.sources)
    assert abs(r.table.loc['body', 'sq-AL']) < 1e-6 and r.kinds == ['missing'] and 'sq-AL' in r.warnings[0].text
    assert kinds(world.mix([.6, .4, 0]), world.base, world.sources, weights=[.6, .4, 0]) == []

def test_the_order_of_sources_is_irrelevant(world):
    for m, w in ((world.mix(W), W), (world.mix([.15, .25, .6]), W), (world.mix([.3, .5, .2]), W)):
        weights = dict(zip(NAMES, w))
        a = audit(m, world.base, world.sources, weights=weights)
        for order in (NAMES[::-1], [NAMES[1], NAMES[2], NAMES[0]]):
            b = audit(m, world.base, {k: world.sources[k] for k in order}, weights={k: weights[k] for k in order})
            assert (a.table-b.table[a.table.columns]).abs().max(axis=None) < 1e-9 and a.kinds == b.kinds

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_rounding_is_no_fault(world, dtype):
    low = lambda m: {k: v.to(dtype) if v.is_floating_point() else v for k, v in m.items()}
    name = str(dtype).removeprefix('torch.')
    r = audit(low(world.mix(W)), world.base, world.sources, weights=W)
    assert r.kinds == [] and any(f'up to rounding to {name}' in o for o in r.notes) and r.facts['residual'] < 2*r.facts['rounding']
    base, sources = low(world.base), {k: low(v) for k, v in world.sources.items()} # And where everything was rounded before
    r = audit(low(world.mix(W, base)), base, {k: low(v) for k, v in world.sources.items()}, weights=W)
    assert r.kinds == []
    assert kinds(low(world.mix([.3, .5, .2])), base, sources, weights=W) == ['swapped']
    assert kinds(low(world.mix([0, .6, .4])), base, sources, weights=W) == ['missing']

def needed(method, sources, folder):
    "The sources that `method` takes, and what the laws know that it needs besides: statistics, as files"
    most, statistics = (getattr(test_laws, o, {}) for o in ('AT_MOST', 'STATISTICS'))
    sources = dict(list(sources.items())[:most.get(method, 3)])
    return sources, test_laws.given(method, {k: tensors(p) for k, p in sources.items()}, folder) if method in statistics else {}

@pytest.mark.parametrize('method,hp', test_laws.CASES, ids=test_laws.IDS)
def test_no_fault_where_there_is_none(files, tmp_path, method, hp):
    "Every registered method, with its record; a random drop may be said to inflate, which it does"
    base, (sources, more) = files[0], needed(method, files[1], tmp_path)
    t = methods.traits(method)
    for w in (None, W[:len(sources)]):
        out = merge(base, sources, tmp_path/f'out{w is None}', method, w, **hp|more).path
        r = audit(out, base, sources, digests=True)
        assert set(r.kinds) <= (set() if t.deterministic else {'inflated'}), r
        if t.coefficients is None: assert r.facts['level'] or any(f'it is {method} by its record' in o for o in r.notes)


# ---- coefficients

COEFFICIENTS = [('heaviest dropped', [0, .6, .4], W, 'missing', 'de-DE, the heaviest, has a coefficient of 0, and the others share its weight'),
    ('two dropped', [0, 0, 1], W, 'missing', 'de-DE, the heaviest, and en-US have a coefficient of 0, and the others'), ('lightest dropped', [.625, .375, 0], W, 'missing', 'sq-AL has a coefficient of 0, and the others share its weight'),
    ('SLERP chain', [.15, .25, .6], W, 'reversed', 'Each step of a chain'), ('accumulated', [.075, .125, .8], W, 'reversed', 'Each step of a chain'),
    ('two swapped', [.3, .5, .2], W, 'swapped', "de-DE and en-US have each other's coefficient"),
    ('list reversed', [.2, .3, .5], W, 'swapped', "de-DE and sq-AL have"), ('all moved', [.3, .2, .5], W, 'swapped', 'de-DE, en-US, sq-AL have'),
    ('ignored', [1/3]*3, W, 'equal', 'All sources have the same coefficient'), ('halved', [.25, .15, .1], W, 'scaled', '0.500 times what was meant, and 0.500 is base'),
    ('subtracted', [-.5, -.3, -.2], W, 'negated', 'subtracted'), ('target as base', [.4, .3, .3], [.3]*3, 'wrong base', 'as if it had been the base'),
    ('otherwise', [.6, .3, .1], W, 'coefficients', 'de-DE 0.600 for 0.500')]

@pytest.mark.parametrize('made,meant,kind,said', [o[1:] for o in COEFFICIENTS], ids=[o[0] for o in COEFFICIENTS])
def test_coefficients_that_were_not_meant(world, made, meant, kind, said):
    r = audit(world.mix(made, head=[1/3]*3 if sum(made) < 0 else None), world.base, world.sources, weights=meant)
    assert kind in r.kinds[:1] and said in r.warnings[0].text and faults[kind] in r.warnings[0].text, r

def test_the_heaviest_is_missed_without_weights(world):
    r = audit(world.mix([0, .6, .4]), world.base, world.sources)
    assert r.kinds == ['missing'] and r.warnings[0].text.startswith('de-DE has a coefficient of 0.000')

def test_a_chain_of_four_and_a_list_reversed():
    g = torch.Generator().manual_seed(0)
    base = {'encoder.layer.0.w': torch.randn(4000, generator=g)}
    models = {k: {'encoder.layer.0.w': base['encoder.layer.0.w']+.05*torch.randn(4000, generator=g)} for k in 'abcd'}
    mixed = lambda c: {'encoder.layer.0.w': sum(w*m['encoder.layer.0.w'] for w, m in zip(c, models.values()))}
    r = audit(mixed([.1, .2, .3, .4]), base, models, weights=[.4, .3, .2, .1])
    assert r.kinds == ['reversed'] and 'in reverse order' in r.warnings[0].text

def slerp(a, b, t):
    "Spherical interpolation of two models, tensor by tensor"
    out = {}
    for k in a:
        x, y = a[k].double().flatten(), b[k].double().flatten()
        angle = math.acos(min(1., float(x@y/(x.norm()*y.norm()).clamp(min=1e-300))))
        p, q = (math.sin((1-t)*angle)/math.sin(angle), math.sin(t*angle)/math.sin(angle)) if angle > 1e-6 else (1-t, t)
        out[k] = (p*x+q*y).view(a[k].shape).float()
    return out

def test_a_real_chain_of_slerps_from_the_wrong_end(world):
    "[.5, .3, .2] is meant; each step takes t = old/(old + new), as the published pipeline did"
    s = [{k: world.sources[n][k] for k in world.body} for n in NAMES]
    m = slerp(slerp(s[0], s[1], .5/.8), s[2], .3/.5)|{k: v for k, v in world.mix(W).items() if k in world.heads}
    r = audit(m, world.base, world.sources, weights=W)
    assert r.kinds == ['reversed'] and r.coefficients.loc['body'].to_list() == pytest.approx([.15, .25, .6], abs=.02) and r.facts['level'] == 'models'
    right = slerp(slerp(s[0], s[1], .3/.8), s[2], .2)|{k: v for k, v in world.mix(W).items() if k in world.heads}
    r = audit(right, world.base, world.sources, weights=W)
    assert r.kinds == [] and r.facts['level'] == 'models' and any('as SLERP makes it' in o for o in r.notes)

def test_blocks_with_a_fault_of_their_own(toy):
    m = toy.mix(W)|{k: v for k, v in toy.mix([.3, .5, .2]).items() if '.layer.0.' in k}
    r = audit(m, toy.base, toy.sources, weights=W)
    assert r.kinds == ['swapped'] and 'each other\'s coefficient in layer.0 (' in r.warnings[0].text

def test_weights(toy):
    for w in ([5, 3, 2], dict(zip(NAMES, [5, 3, 2])), pd.Series([3, 2, 5], ['en-US', 'sq-AL', 'de-DE'])): # Divided by their sum
        r = audit(toy.mix(W), toy.base, toy.sources, weights=w)
        assert r.kinds == [] and r.expected.to_list() == pytest.approx(W)
    assert audit(toy.mix([.3]*3), toy.base, toy.sources, weights=[.3]*3).expected.to_list() == [.3]*3
    for bad in ([1, 2], [0, 0, 0], [1, 1, math.nan], {'de-DE': 1}, dict(zip(NAMES+['x'], [1]*4))):
        with pytest.raises(ValueError, match='one finite number for each of de-DE, en-US, sq-AL'): audit(toy.mix(W), toy.base, toy.sources, weights=bad)

def test_sources_that_cannot_be_told_apart(world):
    r = audit(world.mix(W), world.base, world.sources|{'copy': world.sources['de-DE']})
    assert r.kinds == ['collinear'] and 'de-DE, copy' in r.warnings[0].text and 'known, 0.500' in r.warnings[0].text
    assert r.table.loc['body', 'sum'] == pytest.approx(1) and r.table.loc['body', 'sq-AL'] == pytest.approx(.2, abs=1e-5)
    assert 'collinear' not in kinds(world.mix([.8, 0, 0]), world.base, {'de-DE': world.sources['de-DE']})

def test_sources_that_rounding_hides_from_each_other(toy):
    "A source and its neighbour at a hundredth of a task vector: told apart in float32, not in bfloat16"
    near = {k: v+2e-4*torch.randn(v.shape, generator=toy.g) for k, v in toy.sources['de-DE'].items()}
    sources = toy.sources|{'near': near}
    r = audit(toy.mix(W), toy.base, sources)
    assert r.kinds == ['missing'] and 'near' in r.warnings[0].text and 1e3 < r.facts['condition'] < 1e6
    r = audit({k: v.bfloat16() for k, v in toy.mix(W).items()}, toy.base, sources)
    assert r.kinds[0] == 'collinear' and 'de-DE, near' in r.warnings[0].text and r.facts['condition'] is None


# ---- the base

def test_merged_with_an_unrelated_base(world):
    for c in ([.3]*3, [.2, .1, .1], [.5, .5, .4]):
        m = world.mix(c, world.noise(1.))
        assert kinds(m, world.base, world.sources, weights=c)[0] == kinds(m, world.base, world.sources)[0] == 'wrong base'

def test_merged_with_a_related_base(world):
    "As far from the base as the sources are; with the coefficients that were meant it is told from other methods"
    base = world.noise(.01 if 'roberta.encoder.layer.1.output.dense.weight' in world.base else .03, world.base)
    assert kinds(world.mix([.2]*3, base), world.base, world.sources, weights=[.2]*3) == ['wrong base']
    assert kinds(world.mix([.2]*3, base), world.base, world.sources)[0] in ('wrong base', 'unexplained')
    assert kinds(world.mix(W, base), world.base, world.sources, weights=W) == [] # The base plays no part

def test_audited_with_a_base_that_is_not_theirs(world):
    other, near = world.noise(1.), world.noise(.3, world.base)
    for base in (other, near):
        r = audit(world.mix(W), base, world.sources, weights=W)
        assert r.kinds == ['wrong base'] and 'sum to 1 and hold with any base' in r.warnings[0].text and close(r, W, 1e-4)
        r = audit(world.mix([.3]*3), base, world.sources)
        assert r.kinds[0] == 'wrong base' and 'not to be trusted' in r.warnings[0].text

def test_audited_with_a_source_as_base(world):
    r = audit(world.mix(W), world.sources['de-DE'], world.sources)
    assert r.kinds == ['wrong base'] and 'de-DE is the base, value for value' in r.warnings[0].text and 'it has 0.500' in r.warnings[0].text

def test_ties_that_took_a_source_as_base(world):
    base = world.sources['de-DE']
    rest = {k: v for k, v in world.sources.items() if k != 'de-DE'}
    r = audit(merge_state_dicts(base, rest, 'ties', density=.05), world.base, world.sources)
    assert r.kinds[0] in ('wrong base', 'missing') and 'de-DE' in r.warnings[0].text

def test_the_record_names_a_source_as_base(files, tmp_path):
    base, sources = files
    out = merge(sources['de-DE'], sources, tmp_path/'out', 'ties').path
    r = audit(out, base, sources)
    assert 'wrong base' in r.kinds and 'By its record de-DE was the base' in next(o.text for o in r.warnings if o.kind == 'wrong base')

def test_weights_that_do_not_sum_to_1(world):
    r = audit(world.mix([.5, .4, .3], {k: 0*v for k, v in world.base.items()}), world.base, world.sources)
    assert r.kinds == ['not normalised'] and 'de-DE 0.500, en-US 0.400, sq-AL 0.300 and 0.000 of the base, together 1.200' in r.warnings[0].text
    r = audit(world.changed(lambda k: world.mix(W)[k].double()-world.base[k].double()), world.base, world.sources)
    assert r.kinds == ['not normalised'] and 'and -1.000 of the base' in r.warnings[0].text

def test_the_base_in_place_of_the_merge(world):
    assert kinds(world.changed(lambda k: world.base[k]), world.base, world.sources) == ['unmoved']

def test_blocks_that_were_passed_over(world):
    m = world.mix(W)|{k: world.base[k].float() for k in world.body if 'embeddings' in k}
    r = audit(m, world.base, world.sources, weights=W)
    assert 'left out' in r.kinds and "embeddings is the base's" in r.warnings[r.kinds.index('left out')].text
    assert kinds(m, world.base, world.sources, weights=W, exclude='embeddings') == []


# ---- length, and what is left

def dare(world, p):
    "Sources whose task vectors lost `p` of their values, the rest divided by 1 − p"
    drop = lambda m, k: world.base[k].float()+(m[k].float()-world.base[k].float())*(torch.rand(m[k].shape, generator=world.g) >= p)/(1-p)
    return {n: m|{k: drop(m, k) for k in world.body} for n, m in world.sources.items()}

def full(world): return world.base|{k: world.sources['de-DE'][k] for k in world.heads}

def test_dare_and_ties_inflate(world):
    r = audit(merge_state_dicts(full(world), dare(world, .9), 'ties'), world.base, world.sources)
    assert r.kinds == ['inflated'] and r.facts['inflation'] > 5 and r.facts['ratio'] > 5 and r.facts['residual'] > .5 and r.facts['density'] < .35
    assert any('% of the values that sources changed are the base\'s' in o for o in r.notes)

def test_dare_alone_inflates_less(world):
    m = merge_state_dicts(full(world), dare(world, .9), 'linear')
    r = audit(m, world.base, world.sources)
    assert r.kinds == ['inflated'] and 1.5 < r.facts['inflation'] < 4
    assert kinds(merge_state_dicts(full(world), dare(world, .3), 'linear'), world.base, world.sources) == []

def test_ties_alone_is_a_fact(world):
    for density in (.05, .2, 1.):
        r = audit(merge_state_dicts(full(world), world.sources, 'ties', density=density), world.base, world.sources)
        assert r.kinds == [] and r.facts['level'] is None and any('TIES, DARE, Fisher and masks look like this' in o for o in r.notes)

def test_a_merge_that_collapsed(world):
    r = audit(world.mix([.02]*3), world.base, world.sources)
    assert 'collapsed' in r.kinds and r.facts['ratio'] == pytest.approx(.06, abs=1e-3)
    assert kinds(world.mix([.02]*3), world.base, world.sources, weights=[.02]*3) == []

def spectral(world):
    "The mean of the task vectors with all singular values made equal"
    def f(k):
        t = sum(m[k].double()-world.base[k].double() for m in world.sources.values())/3
        if t.dim() != 2 or 'embeddings' in k: return world.base[k]+t
        u, s, v = torch.linalg.svd(t, full_matrices=False)
        return world.base[k]+u@v*s.mean()
    return world.changed(f)

def test_dense_and_not_linear(toy):
    r = audit(spectral(toy), toy.base, toy.sources)
    assert r.kinds == ['unexplained'] and 'RegMean, spectral methods and weak DARE look like this' in r.warnings[0].text


# ---- the record

def test_a_record_that_does_not_match(files, tmp_path):
    base, sources = files
    out = merge(base, sources, tmp_path/'out', 'linear', W).path
    t = tensors(merge(base, sources, tmp_path/'swapped', 'linear', [.3, .5, .2]).path)
    save_checkpoint(t, out)
    assert kinds(out, base, sources) == ['swapped']
    save_checkpoint(tensors(merge(base, sources, tmp_path/'ties', 'ties').path), out)
    r = audit(out, base, sources)
    assert 'not its record' in r.kinds and 'though it is linear by its record' in r.warnings[0].text

def test_sources_that_are_not_given_or_are_others(files, tmp_path):
    base, sources = files
    out = merge(base, sources, tmp_path/'out', 'linear', W).path
    r = audit(out, base, {k: sources[k] for k in NAMES[:2]})
    assert r.kinds[0] == 'sources' and 'also has sq-AL' in r.warnings[0].text
    exchanged = {'de-DE': sources['en-US'], 'en-US': sources['de-DE'], 'sq-AL': sources['sq-AL']}
    assert kinds(out, base, exchanged) == ['swapped']
    r = audit(out, base, exchanged, digests=True)
    assert r.kinds[:2] == ['files', 'files'] and 'de-DE is not the file' in r.warnings[0].text
    rewrite(base, lambda t: t['encoder.layer.0.output.dense.bias'].add_(1e-3))
    assert kinds(out, base, sources, digests=True) == ['wrong base']

def test_records_that_cannot_be_read(files, tmp_path):
    base, sources = files
    out = merge(base, sources, tmp_path/'out', 'linear', W).path
    for text in ('{', '{"method": "linear"}', '{"method": "linear", "sources": [1]}'):
        (out/'merge_record.json').write_text(text)
        with pytest.raises(CheckpointError): audit(out, base, sources)
    (out/'merge_record.json').unlink()
    assert kinds(out, base, sources) == []
    with pytest.raises(MissingDataError, match='digests'): audit(out, base, sources, digests=True)


# ---- the head

def test_head_lost(world):
    m = {k: v for k, v in world.mix(W).items() if k not in world.heads}
    r = audit(m, world.base, world.sources, weights=W)
    assert r.kinds == ['head lost'] and r.head['status'] == 'lost' and 'instead' not in r.warnings[0].text
    r = audit(m|{'lm_head.bias': torch.zeros(9)}, world.base, world.sources, weights=W)
    assert r.kinds == ['head lost'] and 'the head of a language model instead (lm_head.bias)' in r.warnings[0].text
    r = audit({k.removeprefix('roberta.'): v for k, v in m.items()}, world.base, world.sources, weights=W) # A bare encoder
    assert r.kinds == ['head lost'] and close(r, W, 1e-5)

def test_a_merge_with_the_architecture_of_a_masked_language_model(files, tmp_path):
    "What a merge with the hub's own base leaves: the class of the base, and no classifier"
    from transformers import AutoConfig, AutoModelForMaskedLM
    base, sources = files
    lm = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(base))
    out = merge(base, sources, tmp_path/'out', 'linear', W).path
    def filled(t, name):
        lost = lm.load_state_dict({k: v for k, v in t.items() if not k.startswith('classifier')}, strict=False)
        assert not lost.unexpected_keys and all('lm_head' in k for k in lost.missing_keys)
        lm.save_pretrained(tmp_path/name)
        return tmp_path/name
    r = audit(filled(tensors(out), 'merged'), base, sources, weights=W)
    assert r.kinds == ['head lost'] and 'instead (lm_head.' in r.warnings[0].text and close(r, W)
    lm_base = filled({f'roberta.{k}': v for k, v in tensors(base).items()}, 'base_lm')
    assert audit(out, lm_base, sources).kinds == [] # As a base it does no harm

def test_the_head_is_one_source_s(world):
    m = world.mix(W)|{k: world.sources['en-US'][k] for k in world.heads}
    r = audit(m, world.base, world.sources, weights=W)
    assert r.kinds == [] and r.head['status'] == 'source' and r.head['equals'] == ['en-US'] and 'its head is that of en-US' in r.notes

def test_the_head_is_drawn_anew(world):
    m = world.mix(W)|{k: torch.randn(world.sources['de-DE'][k].shape, generator=world.g) for k in world.heads}
    r = audit(m, world.base, world.sources, weights=W)
    assert r.kinds == ['head foreign'] and r.head['status'] == 'foreign'
    m = world.mix(W)|{k: v[:1] for k, v in world.mix(W).items() if k in world.heads}
    r = audit(m, world.base, world.sources, weights=W)
    assert r.kinds[0] == 'head foreign' and 'has another shape in it' in r.warnings[0].text

def test_the_head_of_the_base_leaks(world):
    drawn = {k: torch.randn(world.sources['de-DE'][k].shape, generator=world.g) for k in world.heads}
    m = world.mix([.3]*3)
    leaky = m|{k: .9*m[k]+.1*drawn[k] for k in world.heads}
    r = audit(leaky, world.base|drawn, world.sources, weights=[.3]*3)
    assert r.kinds == ['head leak'] and r.head['base'] == pytest.approx(.1, abs=1e-5) and "0.100 of the base's" in r.warnings[0].text
    r = audit(m|drawn, world.base|drawn, world.sources, weights=[.3]*3)
    assert r.head['status'] == 'base' and r.kinds == ['head']

def test_heads_that_are_averaged_otherwise(world):
    r = audit(world.mix(W, head=[.2, .3, .5]), world.base, world.sources, weights=W)
    assert r.kinds == ['head'] and "de-DE and sq-AL have each other's" in r.warnings[0].text
    r = audit(world.mix(W, head=[.5, .5, .2]), world.base, world.sources, weights=W)
    assert r.kinds == ['head'] and 'sum to 1.200' in r.warnings[0].text

def test_heads_of_different_initialisations(tmp_path):
    base, sources = toy_base(tmp_path/'base'), toy_sources(tmp_path/'sources', shared_head=False)
    out = merge(base, sources, tmp_path/'out', 'linear', allow_mixed_heads=True).path
    r = audit(out, base, sources)
    assert r.kinds == ['heads apart'] and r.head['cosine'] < .5

@pytest.mark.parametrize('policy', ['average', 'best', 'base'])
def test_the_policy_of_the_record(files, tmp_path, policy):
    base, sources = files
    base = match_base(base, sources['de-DE'], out=tmp_path/'matched')
    out = merge(base, sources, tmp_path/'out', 'linear', W, head=policy).path
    r = audit(out, base, sources)
    assert r.kinds == [] and r.head['status'] == dict(average='average', best='source', base='base')[policy]
    if policy == 'average':
        rewrite(out, lambda t: t.update({k: v for k, v in tensors(sources['de-DE']).items() if k.startswith('classifier')}))
        assert kinds(out, base, sources) == ['head']

def test_labels(files, tmp_path):
    base, sources = files
    def turn(t):
        for k in ('classifier.out_proj.weight', 'classifier.out_proj.bias'): t[k] = t[k].flip(0)
    rewrite(sources['en-US'], turn)
    config(sources['en-US'], id2label={'0': 'music', '1': 'lights'})
    out = merge(base, sources, tmp_path/'out', 'linear', W).path
    assert kinds(out, base, sources) == [] # Aligned by name
    config(out, id2label={'0': 'LABEL_0', '1': 'LABEL_1'})
    assert kinds(out, base, {k: sources[k] for k in NAMES})[0] == 'labels'
    config(out, id2label={'0': 'lights', '1': 'songs'})
    r = audit(out, base, sources)
    assert r.kinds[0] == 'labels' and 'songs' in r.warnings[0].text


# ---- models that do not fit

def test_tensors_that_are_missing_extra_or_of_another_shape(toy):
    m, k = toy.mix(W), 'roberta.encoder.layer.0.output.dense.weight'
    r = audit({n: v for n, v in m.items() if n != k}, toy.base, toy.sources, weights=W)
    assert r.kinds == ['tensors'] and f"the merged model lacks 1 tensor, e.g. '{k}', which de-DE has" in r.warnings[0].text and close(r, W)
    r = audit(m|{k: m[k][:3]}, toy.base, toy.sources, weights=W)
    assert r.kinds == ['tensors'] and 'has in another shape' in r.warnings[0].text and close(r, W)
    assert kinds(m|{'extra': torch.ones(3), 'ids': torch.arange(3)}, toy.base, toy.sources, weights=W) == []
    less = toy.sources|{'en-US': {n: v for n, v in toy.sources['en-US'].items() if n != k}}
    assert kinds(m, toy.base, less, weights=W) == ['tensors']
    assert kinds(m, {n: v for n, v in toy.base.items() if n != k}, toy.sources, weights=W) == ['tensors']

def test_what_is_an_error(toy, files):
    base, sources = files
    k = 'roberta.encoder.layer.0.output.dense.weight'
    with pytest.raises(CheckpointError, match='of the merged model. are NaN'): audit(toy.mix(W)|{k: toy.base[k]*math.nan}, toy.base, toy.sources)
    with pytest.raises(MissingDataError): audit('absent/folder', base, sources)
    with pytest.raises(ValueError, match='at least one'): audit(toy.mix(W), toy.base, {})
    with pytest.raises(IncompatibleError, match='nothing can be compared'): audit({'x': torch.ones(2)}, toy.base, toy.sources)
    with pytest.raises(ValueError, match='leaves none'): audit(toy.mix(W), toy.base, toy.sources, exclude='.')
    (sources['en-US']/'model.safetensors').write_bytes(b'not a model')
    with pytest.raises(CheckpointError): audit(toy.mix(W), base, sources)


# ---- the report

def test_the_report_is_readable_and_plain(toy):
    r = audit(toy.mix([.3, .5, .2]), toy.base, toy.sources, weights=W)
    text = repr(r)
    assert text.splitlines()[0].split() == [*NAMES, 'sum', 'residual', 'norm'] and 'warning, swapped: de-DE and en-US' in text
    assert '<table' in r._repr_html_() and 'en-US have each other&#x27;s' in r._repr_html_()
    d = json.loads(json.dumps(r.to_dict(), allow_nan=False))
    assert d['warnings'][0]['kind'] == 'swapped' and d['table']['body']['en-US'] == pytest.approx(.5) and d['expected'] == dict(zip(NAMES, W))
    assert list(r.table.index) == ['embeddings', 'layer.0', 'body', 'head'] and list(r.coefficients) == NAMES
    assert all(isinstance(o, Fault) and o.kind in faults for o in r.warnings)
    json.dumps(audit(toy.changed(lambda k: toy.base[k]), toy.base, toy.sources).to_dict(), allow_nan=False)

def test_the_function_is_not_hidden_by_the_module():
    import merginguriel.audit as module
    import merginguriel.merge as m
    assert m.audit is audit is module.audit and callable(audit)

def test_every_value_is_read_once(files, tmp_path, monkeypatch):
    from merginguriel.checkpoint import Checkpoint
    base, sources = files
    out, seen = merge(base, sources, tmp_path/'out', 'linear', W).path, []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, 'read', lambda self, k, rows=None, **kw: seen.append((str(self.path), k, str(rows))) or read(self, k, rows, **kw))
    audit(out, base, sources)
    assert len(seen) == len(set(seen)) and len({p for p, _, _ in seen}) == 5
