"""Reports read a store and nothing else. The numbers here are counted by hand from stores of a few items; what is on the page
of the notebook is not repeated."""
import csv, io, re
import numpy as np, pandas as pd, pytest
from merginguriel.core import MissingDataError
from merginguriel.report import as_text, comparison, diff, report_tables, stored_accuracies, stored_gains, stored_recipes, stored_series
from merginguriel.store import Store

TARGETS = ['sq-AL', 'sw-KE', 'cy-GB', 'vi-VN', 'th-TH', 'hi-IN']

def score(name, target, bits, ids=None, **more):
    c = np.array(list(bits)) == '1'
    return dict(name=name, locale=target, split='test', metric='accuracy', value=c.mean(), correct=c, ids=ids or list(range(len(c)))) | more

def weight(target, **w):
    return [dict(name=f"source:{k.replace('_', '-')}", locale=target, split='test', metric='weight', value=v) for k, v in w.items()]

def config(target, seed=0, **more): return dict(target=target, seed=seed, k=2, dataset='massive', methods=['linear', 'ties'], contract=dict(mode='ExcTar')) | more

@pytest.fixture
def store(tmp_path):
    "Six targets, two seeds: linear beats ties by one item of four everywhere but in hi-IN, where they are equal"
    s = Store(tmp_path/'store.sqlite')
    for t in TARGETS:
        for seed in (0, 1):
            rows = [score('linear', t, '1110'), score('ties', t, '1110' if t == 'hi-IN' else '1100'), score('own', t, '1111'), score('uniform', t, '1110'),
                score('source:en-US', t, '1000'), score('source:de-DE', t, '0110' if seed else '0111'), score('source:fr-FR', t, '1111')]
            s.record(config(t, seed), rows + weight(t, en_US=.5, de_DE=.5))
    return s


def test_a_recipe_is_what_runs_share_apart_from_target_and_seed(store):
    rows = stored_accuracies(store)
    assert rows.recipe.nunique() == 1 and len(rows) == 6*2*7
    r = stored_recipes(store, rows).iloc[0]
    assert (r.what, r.targets, r.seeds, r.merges, r.scores) == ('ExcTar, massive, k=2', 6, 2, 2, 84)

def test_a_recipe_has_the_same_name_beside_others(store):
    "Fields that only other runs have, and null, do not change it"
    name = stored_accuracies(store).recipe[0]
    store.record(config('sq-AL', 5, k=2.5, quirk='x', compatibility=None), [score('linear', 'sq-AL', '10')])
    store.record(config('sq-AL', 5, compatibility=None), [score('linear', 'sq-AL', '10')])
    rows = stored_accuracies(store)
    assert rows.recipe[0] == name and rows.recipe.nunique() == 2 and (rows.recipe == name).sum() == 85

def test_baselines_are_those_of_the_run_itself(store):
    """The best source is the best that was merged, by seed: de-DE with 3 of 4 in seed 0 and 2 of 4 in seed 1, so linear gains (0 + .25)/2;
    the best other model is fr-FR, which was not merged, and the mean source has (.25 + .75)/2 and (.25 + .5)/2"""
    g = stored_gains(store, stored_accuracies(store), ['best_source', 'best_zero_shot', 'mean_source', 'own'], ['linear']).set_index('b')
    for b, gain in dict(best_source=.125, best_zero_shot=-.25, mean_source=.3125, own=-.25).items(): assert g.gain[b].tolist() == [gain]*6

def test_a_table_names_the_runs_of_each_number(store):
    t = report_tables(store)
    whole = set(t['runs'].hash)
    assert len(whole) == 12
    for k in ('accuracies', 'gains'):
        runs = [o.split() for o in t[k].runs]
        assert all(len(o) == 2 for o in runs) and {store.find(h) for o in runs for h in o} == whole
    row = t['accuracies'].query('target == "cy-GB" and name == "linear"').iloc[0]
    assert {store.config(store.find(h))['seed'] for h in row.runs.split()} == {0, 1} and row.accuracy == .75

def test_means_win_rates_and_ranks_over_targets(store):
    "ties: five losses of one item in four, one tie; the exact signed-rank and sign tests of five signs give 2/2**5"
    t = report_tables(store)
    m = t['means'].set_index(['a', 'b']).loc[('ties', 'uniform')]
    assert m.gain == pytest.approx(-5/24) and (m.wins, m.ties, m.losses, m.rate) == (0, 1, 5, 0)
    assert m.p == pytest.approx(2/2**5) and m.sign_p == pytest.approx(2/2**5) and m.rate_high == pytest.approx(1-.025**.2)
    r = t['ranks'].set_index('name')['rank'] # linear and uniform always share 2.5, with ties in hi-IN 3
    assert r.to_dict() == pytest.approx(dict(own=1, linear=(5*2.5+3)/6, uniform=(5*2.5+3)/6, ties=(5*4+3)/6))

def test_a_score_without_items_has_an_accuracy_and_no_gain(tmp_path):
    s = Store(tmp_path/'s.sqlite')
    s.record(config('sq-AL'), [dict(name=n, locale='sq-AL', split='test', metric='accuracy', value=v) for n, v in (('linear', .6), ('own', .7))])
    t = report_tables(s)
    assert list(t) == ['recipes', 'accuracies', 'runs'] and t['accuracies'].accuracy.tolist() == [.7, .6]
    assert t['accuracies'].low.isna().all() # nothing says of how many items

def test_what_is_not_there_is_said(store):
    with pytest.raises(MissingDataError, match='holds no accuracy of de-DE'): report_tables(store, locale='de-DE')
    with pytest.raises(MissingDataError, match='holds no accuracy of 12345678'): report_tables(store, '12345678')
    with pytest.raises(ValueError, match="there is no 'tiess'; there are own, best_zero_shot"): stored_gains(store, stored_accuracies(store), ['own'], ['tiess'])
    with pytest.raises(ValueError, match='linear has no accuracy'):
        comparison(pd.DataFrame(dict(name=['linear'], kind='merge', seed=0, accuracy=[np.nan], n=4)))

def test_series_are_of_recipes_that_differ_in_one_field(store):
    store.record(config('sq-AL', k=3), [score('linear', 'sq-AL', '10')])
    store.record(config('sq-AL', k=5, dataset='home'), [score('linear', 'sq-AL', '10')])
    series = stored_series(store, stored_accuracies(store))
    assert [list(o) for o in series] == [[2, 3]] and len(series[0][2]) == 84

def test_items_of_one_template_are_resampled_together(tmp_path):
    "Ids of the embedded set name their template; eight items of one template are one observation, which has no spread"
    s = Store(tmp_path/'s.sqlite')
    def fill(dataset):
        h = s.record(dict(dataset=dataset, methods=['linear']), [score(n, 'cy-GB', b, [f'a-{i}' for i in range(8)]) for n, b in (('linear', '11110000'), ('own', '11000000'))])
        return diff(s, f'{h}/linear', f'{h}/own').scores.iloc[0]
    assert (fill('home').low, fill('home').high) == (.25, .25) and fill('massive').low < .25 < fill('massive').high


# ---- formats

def test_formats_hold_the_same_table(store):
    t = report_tables(store)['means']
    back = pd.read_csv(io.StringIO(as_text(t, 'csv')))
    assert np.array_equal(back.gain, t.gain) and back.a.tolist() == t.a.tolist()
    md = [[o.strip() for o in line.strip('|').split('|')] for line in as_text(t).splitlines()]
    assert {len(o) for o in md} == {t.shape[1]} and md[0] == list(t) and len(md) == 2+len(t)
    tex = as_text(t, 'latex')
    body = tex[tex.index('\\midrule'):tex.index('\\bottomrule')].splitlines()[1:]
    assert len(body) == len(t) and all(o.count('&') == t.shape[1]-1 for o in body) and 'best\\_source' in tex

@pytest.mark.parametrize('value,said', [(0., '0.000'), (.5, '0.500'), (-.1234, '-0.123'), (.0004, '4e-04'), (np.nan, ''), (None, ''), (3, '3'), ('a|b', 'a\\|b')])
def test_a_cell(value, said): assert as_text(pd.DataFrame(dict(x=[value]), dtype=object)).splitlines()[2] == f'| {said} |'


# ---- why two numbers differ

def test_diff_of_fields_items_and_chance(tmp_path):
    "Twelve items only the first has right of 20: the exact test gives 2/2**12"
    s = Store(tmp_path/'s.sqlite')
    a = s.record(config('sq-AL', nested=dict(x=1)), [score('linear', 'sq-AL', '1'*16+'0'*4)])
    b = s.record(config('sq-AL', 3, extra=True), [score('linear', 'sq-AL', '1'*4+'0'*16)])
    d = diff(s, a[:7], b)
    assert d.fields.values.tolist() == [['nested.x', 1, '(absent)'], ['seed', 0, 3], ['extra', '(absent)', True]]
    row = d.scores.iloc[0]
    assert (row['diff'], row.only_a, row.only_b, row['same']) == (.6, 12, 0, 'all') and row.p == pytest.approx(2/2**12)
    assert 'more than chance in the items gives' in d.words and 'seed (0 and 3)' in d.words and str(d).endswith(d.words)

def test_diff_of_two_locales_pairs_what_answers_the_same_ids(tmp_path):
    s = Store(tmp_path/'s.sqlite')
    a, b = (s.record(config(t), [score('linear', t, bits, ids)]) for t, bits, ids in (('sq-AL', '110', [1, 2, 3]), ('sw-KE', '001', [3, 4, 5])))
    row = diff(s, a, b).scores.iloc[0]
    assert (row.locale, row['items'], row['same'], row['diff']) == ('sq-AL sw-KE', 1, 'of 3 and 3', 0)
    c = s.record(config('th-TH'), [score('linear', 'th-TH', '01', [8, 9])])
    assert 'They share no test item' in diff(s, a, c).words

def test_hashes_that_name_no_run_or_several(store):
    h = store.configs().index
    first = next(o for o in '0123456789abcdef' if sum(k.startswith(o) for k in h) > 1)
    with pytest.raises(KeyError, match=f"runs begin with '{first}'"): diff(store, first, h[0])
    with pytest.raises(KeyError, match="begins with 'nothing'"): diff(store, h[0], 'nothing')
    with pytest.raises(KeyError, match="has no 'dare'; it has linear, ties"): diff(store, f'{h[0]}/dare', h[1])
    assert re.match(r'Both are of run', diff(store, f'{h[0]}/linear', f'{h[0]}/own').words)
