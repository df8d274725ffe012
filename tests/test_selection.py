"""Laws of source selection on random matrices, URIEL against independent numbers, and the wall between modes."""
import json,os,subprocess,sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from merginguriel.core import ContractError,MissingDataError
from merginguriel.locales import study_locales
from merginguriel.card import base_seen
from merginguriel.mini import mini_path
from merginguriel.selection import TARGET_INFO,base_touches,check_contract,select_sources,sinkhorn,touched_by
from merginguriel.similarity import (feature_sets,observed_features,real_similarity,register_similarity,similarities,
    uriel_similarity)
import merginguriel.similarity as similarity_module

names = ['af-ZA','cy-GB','el-GR','it-IT','ro-RO','sq-AL','sw-KE','th-TH']
modes = [(include,weighting) for include in (False,True) for weighting in ('uniform','proportional','softmax')]

def random_similarity(seed, ties=False):
    x = np.random.default_rng(seed).random((len(names),len(names)))
    return pd.DataFrame(x.round(1) if ties else x, names, names).rename_axis(index='source', columns='target')

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('ties', [False,True])
@pytest.mark.parametrize('include,weighting', modes)
def test_exactly_k_and_weights_sum_to_one(seed, ties, include, weighting):
    s = random_similarity(seed, ties)+.01
    for k in range(1, len(names)):
        w = select_sources('sq-AL', s, k, include_target=include, weighting=weighting)
        assert len(w)==k+include and w.index.is_unique
        assert ('sq-AL' in w.index)==include
        assert abs(w.sum()-1)<1e-12 and (w>=0).all()
        assert (np.diff(w)<1e-12).all()

@pytest.mark.parametrize('seed', range(10))
def test_raising_a_score_never_lowers_its_rank(seed):
    s = random_similarity(seed, ties=True)+.01
    def place(m, o): return list(select_sources('sq-AL', m, len(names)-1).index).index(o)
    for o in names:
        if o=='sq-AL': continue
        for step in (.05,.1,.5):
            raised = s.copy()
            raised.loc[o,'sq-AL'] += step
            assert place(raised,o)<=place(s,o)

@pytest.mark.parametrize('seed', range(5))
def test_order_of_the_matrix_does_not_matter(seed):
    s,rng = random_similarity(seed, ties=True)+.01,np.random.default_rng(seed)
    shuffled = s.loc[rng.permutation(names),rng.permutation(names)]
    a,b = (select_sources('cy-GB', m, 4, include_target=True) for m in (s,shuffled))
    pd.testing.assert_series_equal(a, b)

def test_the_transpose_is_another_question():
    s = random_similarity(0)
    flipped = s.T.rename_axis(index='source', columns='target')
    assert any(list(select_sources(t,s,3).index)!=list(select_sources(t,flipped,3).index) for t in names)
    for t in names:
        pd.testing.assert_series_equal(select_sources(t,s,3,legacy='row'), select_sources(t,flipped,3))
    with pytest.raises(ValueError, match="named 'source'"): select_sources('sq-AL', s.T, 3)
    with pytest.raises(ValueError, match='cannot tell'): real_similarity(s.rename_axis(index=None, columns=None))

def test_the_targets_own_score_and_row_are_not_read():
    s = random_similarity(0)
    t = s.copy()
    t.loc['sq-AL'] = np.nan
    pd.testing.assert_series_equal(select_sources('sq-AL',s,3), select_sources('sq-AL',t,3))
    pd.testing.assert_series_equal(select_sources('sq-AL',s,3), select_sources('sq-AL',s.drop('sq-AL'),3))

def test_one_hot_and_leave_out():
    s = random_similarity(1)
    w = select_sources('sq-AL', s, 3, include_target=True, target_weight=1)
    assert w.index[0]=='sq-AL' and w.iloc[0]==1 and (w.iloc[1:]==0).all() and len(w)==4
    w = select_sources('sq-AL', s, 3, include_target=True, target_weight=0).drop('sq-AL')
    pd.testing.assert_series_equal(w, select_sources('sq-AL',s,3))

def test_nan_is_unknown_not_zero():
    s = random_similarity(2)
    s.loc['th-TH','sq-AL'] = np.nan
    with pytest.raises(ValueError, match='from th-TH'): select_sources('sq-AL', s, 1)
    with pytest.raises(ValueError, match='6 candidates.*1 more have no score.*th-TH'): select_sources('sq-AL', s, 7)
    assert len(select_sources('sq-AL', s, 6, candidates=[o for o in names if o!='th-TH']))==6

def test_inputs_are_left_alone():
    s = random_similarity(3)
    before = s.copy()
    for legacy in ((),('row',),('sinkhorn','row')): select_sources('sq-AL', s, 2, legacy=legacy)
    real_similarity(s)
    pd.testing.assert_frame_equal(s, before)

def test_sinkhorn_balances_columns():
    m = sinkhorn(random_similarity(4)+.1, top=len(names), iterations=50)
    np.testing.assert_allclose(m.sum(0), 1, atol=1e-8)
    np.testing.assert_allclose(m.sum(1), 1, atol=1e-6)

def test_uriel_needs_no_lang2vec_import():
    code = "import sys; from merginguriel.similarity import uriel_similarity; uriel_similarity(['sq-AL','sw-KE']); " \
        "assert not {'lang2vec','pkg_resources','scipy','matplotlib','torch'} & set(sys.modules)"
    subprocess.run([sys.executable,'-c',code], check=True)

def test_uriel_numbers():
    "Three values of lang2vec's own output, rescaled to (c+1)/2 as published"
    u = uriel_similarity()
    for a,b,v in (('af-ZA','am-ET',.810565),('af-ZA','nl-NL',.94249254),('km-KH','ta-IN',.60505253)):
        assert abs((u.loc[a,b]+1)/2-v)<1e-6
    assert list(u.index)==study_locales and (u.to_numpy()==u.to_numpy().T).all() and (np.diag(u)==1).all()
    assert u.dtypes.eq(np.float64).all()

@pytest.mark.skipif(not os.environ.get('MERGINGURIEL_REFERENCE'),
    reason='MERGINGURIEL_REFERENCE names no folder with the published matrices')
def test_uriel_reference():
    ref = pd.read_csv(Path(os.environ['MERGINGURIEL_REFERENCE'])/'uriel_syntax_knn_cosine.csv', index_col=0)
    assert np.abs((uriel_similarity(list(ref.index))+1).to_numpy()/2-ref.to_numpy()).max()<1e-6

@pytest.mark.parametrize('features', [f for f in feature_sets if f!='fam'])
def test_every_feature_set(features):
    try: u = uriel_similarity(features=features)
    except ValueError as e: # a database that does not cover the study says whom it lacks
        assert 'knows nothing about' in str(e) and not features.endswith(('_knn','geo'))
        lacking = str(e).split('about ')[1].split(';')[0].split(', ')
        left = [o for o in study_locales if o not in lacking]
        if not left: return
        u = uriel_similarity(left, features)
    x = u.to_numpy()
    assert ((np.nan_to_num(x)>=-1) & (np.nan_to_num(x)<=1)).all()
    if features.endswith(('_knn','geo')): assert not np.isnan(x).any()

def test_observed_counts_do_not_exceed_the_total():
    for kind,total in (('syntax',103),('phonology',28),('inventory',158)):
        o = observed_features(kind=kind)
        assert (o.total==total).all() and o.observed.between(0,total).all() and (o.imputed==(o.observed==0)).all()

def test_missing_package(monkeypatch):
    def gone(name): raise similarity_module.PackageNotFoundError(name)
    monkeypatch.setattr(similarity_module, 'distribution', gone)
    with pytest.raises(MissingDataError, match='pip install lang2vec'): similarity_module._uriel_file('features.npz')

def test_contract_table():
    forbidden = {False: {'labelled_dev','target_model','labelled_test'}, True: {'labelled_test'}}
    for include in (False,True):
        for o in TARGET_INFO:
            if o in forbidden[include]:
                with pytest.raises(ContractError): check_contract(include, [o])
                assert check_contract(include, [o], oracle=True)['stamp']=='oracle'
            else:
                r = check_contract(include, [o])
                assert r['stamp']!='oracle' and r['mode']==('IncTar' if include else 'ExcTar')
                assert json.loads(json.dumps(r))==r

def test_parallel_text_is_said():
    assert check_contract(False, ['unlabelled_train','parallel_text'])['stamp']=='parallel'
    assert check_contract(True, ['unlabelled_train','parallel_text'])['stamp']=='supervised'
    assert check_contract(False, ['unlabelled_test','parallel_text'])['stamp']=='transductive'

@pytest.mark.parametrize('target,words,stamp', [('sq-AL', ['base: parallel text of the target'], 'parallel base'),
    ('sv-SE', ['base: never read the language'], 'zero-shot'), ('zh-CN', ['base: never read the language'], 'zero-shot'),
    ('he-IL', ['base: never read the language'], 'zero-shot')])
def test_what_the_shipped_base_has_read(target, words, stamp):
    touched = base_touches(base_seen(mini_path()), target)
    assert touched==words and check_contract(False, touched)['stamp']==stamp
    assert check_contract(False, {*touched,'unlabelled_dev'})['stamp']=='unsupervised'

def test_a_base_of_ordinary_text_touches_nothing_of_a_language_it_reads():
    web = dict(locales=[], parallel=False, languages=['no','sv'], corpora=['CC-100'])
    assert [base_touches(web,o) for o in ('sv-SE','nb-NO','cy-GB')]==[[],[],['base: never read the language']]
    assert base_touches(None,'cy-GB')==[]

def test_contract_of_real_selection():
    s = real_similarity(random_similarity(5))
    with pytest.raises(ContractError): check_contract(False, touched_by(s))
    assert check_contract(True, touched_by(s))['touched']==['labelled_dev','target_model']
    assert check_contract(False, touched_by(uriel_similarity()))['stamp']=='zero-shot'

def test_exctar_never_merges_the_target():
    w = select_sources('sq-AL', random_similarity(6), 3, include_target=True)
    for oracle in (False,True):
        with pytest.raises(ContractError): check_contract(False, [], oracle=oracle, target='sq-AL', sources=w.index)


def test_a_registered_similarity_says_what_it_touches():
    "A similarity of one's own is chosen by name, and `touched_by` knows it without being changed"
    @register_similarity('test of registering', touches='unlabelled_{split}')
    def made(names):
        m = pd.DataFrame(np.eye(len(names)), list(names), list(names))
        m.attrs = dict(similarity='test of registering')
        return m.rename_axis(index='source', columns='target')
    try:
        m = similarities['test of registering'](['sq-AL','sw-KE','cy-GB'])
        assert touched_by(m) == touched_by('test of registering') == ['unlabelled_dev']
        assert list(select_sources('sq-AL', m, 1, weighting='uniform').index) == ['cy-GB']
        def other(names): pass
        other.__module__ = 'elsewhere'
        with pytest.raises(ValueError, match='already'): register_similarity('test of registering', 'none')(other)
    finally: del similarities['test of registering']
    with pytest.raises(KeyError, match='did you mean uriel'): similarities['uril']
    assert {'uriel','real'} <= set(similarities)
