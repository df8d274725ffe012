"""What the pages of the tasks and of their arithmetic cannot show: sources that need a hub or an archive, what an interrupted
study leaves, and that no score of one encoder is taken for that of another."""
import json
import numpy as np, pandas as pd, pytest, torch
import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from merginguriel.core import IncompatibleError, MissingDataError
from merginguriel.arithmetic import Arithmetic
from merginguriel.base_model import head_keys
from merginguriel.checkpoint import open_checkpoint
from merginguriel.data import label_names
from merginguriel.evaluate import accuracy_of, predict
from merginguriel.store import Store
from merginguriel.tasks import *
from merginguriel.text_sources import *
from merginguriel.toy import toy_base


# ---- sources

def rows(n, start=0): return [dict(id=start+i, text=f'text {start+i}', label='ab'[i % 2]) for i in range(n)]

def test_a_folder_with_a_folder_for_each_task(tmp_path):
    for task in ('one', 'two'):
        (tmp_path/task).mkdir()
        for i, (s, n) in enumerate(dict(train=8, dev=4, validation=0, test=6).items()):
            if n: pd.DataFrame(rows(n, 100*i)).to_csv(tmp_path/task/f'{s}.csv', index=False)
    tasks = text_tasks(str(tmp_path), names=['two'], n_train=4)
    assert {k: {s: len(d) for s, d in v.items()} for k, v in tasks.items()} == {'two': dict(train=4, dev=4, test=6)}
    with pytest.raises(KeyError, match="no task 'three'; there are one, two"): text_tasks(str(tmp_path), names=['three'])
    with pytest.raises(ValueError, match="two sources have a task 'one'"): text_tasks(f'{tmp_path}, {tmp_path}')

@pytest.mark.parametrize('source', ['nowhere', 'hom'])
def test_an_unknown_source_is_an_error(source):
    with pytest.raises(MissingDataError, match='is not home, massive, toy, hub'): text_tasks(source)


def hub(monkeypatch, **splits):
    "Serve `splits` in place of the hub; returns what was asked for"
    asked = []
    def load(path, config, revision=None):
        asked.append((path, config, revision))
        return DatasetDict(splits)
    monkeypatch.setattr(datasets, 'load_dataset', load)
    return asked

def pairs(n, label=None, names=('entailment', 'not_entailment')):
    f = Features(dict(sentence1=Value('string'), sentence2=Value('string'), label=ClassLabel(names=list(names))))
    return Dataset.from_dict(dict(sentence1=[f'a{i}' for i in range(n)], sentence2=[f'b{i}' for i in range(n)],
        label=[i % 2 if label is None else label for i in range(n)]), features=f)

def test_hidden_test_labels_make_the_validation_split_the_test(monkeypatch):
    asked = hub(monkeypatch, train=pairs(400), validation=pairs(10), test=pairs(7, -1))
    d = text_tasks('hub:rte')['rte']
    assert asked == [('nyu-mll/glue', 'rte', None)]
    assert len(d['test']) == 10 and len(d['train'])+len(d['dev']) == 400 and 20 < len(d['dev']) < 60
    assert set(d['train']['text']) & set(d['dev']['text']) == set()
    assert label_names(d['dev']) == ['entailment', 'not_entailment'] and d['test']['text'][0] == 'a0 </s></s> b0'

def test_numbers_get_the_names_that_are_known_and_own_splits_are_kept(monkeypatch):
    plain = lambda n: Dataset.from_dict(dict(text=[f'{n} {i}' for i in range(n)], label=[i % 2 for i in range(n)]))
    hub(monkeypatch, train=plain(60), validation=plain(5), test=plain(6))
    d = hub_task('subj')
    assert {s: len(v) for s, v in d.items()} == dict(train=60, dev=5, test=6) and label_names(d['test']) == ['objective', 'subjective']
    d = hub_task('me/mine@v2|big|text|label')
    assert label_names(d['test']) == ['0', '1'] and d['test']['label'][:3] == [0, 1, 0]

def test_what_the_hub_lacks_is_said(monkeypatch):
    hub(monkeypatch, train=pairs(10), test=pairs(3, -1))
    with pytest.raises(MissingDataError, match='0 test texts with labels'): hub_task('rte')
    with pytest.raises(ValueError, match='path|configuration'): hub_task('imdb')
    def gone(*args, **kw): raise ConnectionError('offline')
    monkeypatch.setattr(datasets, 'load_dataset', gone)
    with pytest.raises(MissingDataError, match='cannot be had from the hub'): hub_task('sst2')


SAID = [(0, 'train', 'alarm_set', 'wake me at [time : five]'), (1, 'train', 'alarm_remove', 'no alarm'), (2, 'train', 'news_query', 'news of [date : today]'),
    (3, 'dev', 'alarm_set', 'alarm [date : today] [time : now]'), (4, 'dev', 'alarm_remove', 'off'), (5, 'test', 'alarm_set', 'at [time : six]'),
    (6, 'test', 'news_query', 'news'), (7, 'test', 'alarm_remove', 'stop [time : it]')]

def massive(folder, annotated):
    keys = ('id', 'partition', 'intent', 'annot_utt')
    with open(folder/'en-US.jsonl', 'w') as f:
        for row in SAID:
            d = dict(zip(keys, row), locale='en-US', utt=row[3].translate(str.maketrans('', '', '[]:')))
            f.write(json.dumps(d if annotated else {k: v for k, v in d.items() if k != 'annot_utt'})+'\n')

def test_tasks_of_massive_keep_its_partitions_and_slots_make_tasks(tmp_path, monkeypatch):
    massive(tmp_path, True)
    monkeypatch.setenv('MERGINGURIEL_MASSIVE', str(tmp_path))
    tasks = text_tasks('massive', slots=['time'])
    assert list(tasks) == ['alarm', 'about_news', 'scenario', 'names_time']
    assert {s: list(d['id']) for s, d in tasks['alarm'].items()} == dict(train=[0, 1], dev=[3, 4], test=[5, 7])
    test = tasks['names_time']['test']
    assert dict(zip(test['id'], (label_names(test)[i] for i in test['label']))) == {5: 'time', 6: 'no_time', 7: 'time'}
    with pytest.raises(ValueError, match="no utterance names a slot 'place'; there are date, time"): massive_tasks(slots=['place'])

def test_slots_need_annotations(tmp_path, monkeypatch):
    massive(tmp_path, False)
    monkeypatch.setenv('MERGINGURIEL_MASSIVE', str(tmp_path))
    with pytest.raises(MissingDataError, match='annot_utt'): massive_tasks(slots=['time'])


def test_shots_are_balanced_and_drawn_twice_only_where_they_must():
    d = toy_tasks()['please']['train']
    few = min(np.bincount(d['label']))
    for shots in (few, few+200): # the second: some twice
        s = few_shot(d, shots)
        assert list(np.bincount(s['label'])) == [shots]*2 and len(set(s['id'])) == len(s)
        rare = int(np.argmin(np.bincount(d['label'])))
        texts = [t for t, l in zip(s['text'], s['label']) if l == rare]
        assert set(texts) == {t for t, l in zip(d['text'], d['label']) if l == rare}
    assert list(few_shot(d, 5, 0)['text']) == list(few_shot(d, 5, 0)['text']) != list(few_shot(d, 5, 1)['text'])
    with pytest.raises(ValueError, match='got 0'): few_shot(d, 0)


# ---- models and scores

@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
    "Three toy tasks, their models, and where they are"
    out = tmp_path_factory.mktemp('tasks')
    tasks = text_tasks('toy', names=['topic', 'please', 'now'])
    return tasks, fit_tasks(tasks, out, 'toy', epochs=2), out

def encoder(folder):
    c = open_checkpoint(folder)
    return {k: c.read(k) for k in c if k not in head_keys(c)}

def test_labels_that_look_alike_make_no_classifier(tmp_path):
    with pytest.raises(ValueError, match='cannot tell two of these labels apart'): name_head(toy_base(tmp_path/'base'), ['unheard', 'unseen'], tmp_path/'x')
    assert not (tmp_path/'x').exists()

def test_joint_classifiers_are_trained_and_another_seed_is_another_model(fitted, tmp_path):
    tasks = {'topic': fitted[0]['topic']}
    a, b, c = (fit_tasks(tasks, tmp_path, 'toy', seed, head=head, epochs=1)['topic'] for seed, head in ((0, 'joint'), (1, 'joint'), (0, 'names')))
    assert len({open_checkpoint(o).digest() for o in (a, b, c)}) == 3
    with pytest.raises(ValueError, match="head is 'names' or 'joint'"): fit_tasks(tasks, tmp_path, 'toy', head='name')

def test_no_score_of_one_encoder_is_taken_for_that_of_another(fitted):
    tasks, models, _ = fitted
    s, states = TextScores(models, tasks), {k: encoder(v) for k, v in models.items()}
    want = {k: list(predict(models[k], tasks[k]['dev']).correct) for k in models}
    for order in (list(models), list(models)[::-1]):
        for k in order:
            for other in models: s(states[k], other, 'test')
            assert list(s(states[k], k, 'dev').correct) == want[k]

def test_a_text_of_several_tasks_is_run_once(fitted, monkeypatch):
    tasks, models, _ = fitted
    s, ran = TextScores(models, tasks), []
    forward = type(s.model.base_model).forward
    monkeypatch.setattr(type(s.model.base_model), 'forward', lambda self, *a, **kw: (ran.append(len(kw['input_ids'])), forward(self, *a, **kw))[1])
    state = encoder(models['topic'])
    for k in tasks: s(state, k, 'test')
    assert sum(ran) == len(set(tasks['topic']['test']['text'])) # the tasks have the same sentences

def test_models_and_tasks_that_do_not_belong_together(fitted):
    tasks, models, _ = fitted
    with pytest.raises(IncompatibleError, match='has the labels'): TextScores({'topic': models['please']}, {'topic': tasks['topic']})


# ---- a study that was interrupted

class Stopped(Exception): pass

def study(store, calls=10**9, **about):
    models = {t: {'w': torch.tensor(v)} for t, v in dict(a=[1., .2, 0], b=[0, 1., .2], c=[.2, 0, 1.]).items()}
    left = [calls]
    def score(state, task, split):
        left[0] -= 1
        if left[0] < 0: raise Stopped
        return accuracy_of(pd.Series(np.arange(200) < round(200*(.9-.6*min(1, abs(1-state['w']['abc'.index(task)].item()))))))
    s = Arithmetic({'w': torch.zeros(3)}, models, score, store, head='bases', **about)
    return s, lambda: calls-left[0]

def everything(s):
    return [s.additions([2], dict(svd=('tasks',), random_cluster=('bases',)), draws=2), s.retained([1], ['svd', 'cluster']),
        s.forgetting(tasks=['a']), s.stitched(2, [.4, 1.]), s.cluster_means(2), s.held_out(2), s.online(1, start=2)]

def test_an_interrupted_study_goes_on_where_it_stopped(tmp_path):
    s, used = study(tmp_path/'whole.sqlite')
    want, total = everything(s), used()
    done = 0
    for stop in (1, total//3, total//2):
        s, used = study(tmp_path/'parts.sqlite', stop)
        with pytest.raises(Stopped): everything(s)
        done += stop
    s, used = study(tmp_path/'parts.sqlite')
    for a, b in zip(everything(s), want): pd.testing.assert_frame_equal(a, b)
    assert used() <= total-done+3*4 # at most the scores of the one model that was under way are lost each time
    again, used = study(tmp_path/'parts.sqlite')
    for a, b in zip(everything(again), want): pd.testing.assert_frame_equal(a, b)
    assert used() == 0

def test_scores_of_other_data_or_models_are_not_taken(tmp_path):
    for about in (dict(data='x'), dict(data='y')):
        s, used = study(tmp_path/'s.sqlite', **about)
        s.own('test')
        assert used() == 3
    assert set(Store(tmp_path/'s.sqlite').configs().data) == {'x', 'y'}

def test_test_data_is_read_at_the_chosen_scale_only(tmp_path):
    s, _ = study(tmp_path/'s.sqlite')
    r = s.add(dict(operation='add', kind='all'), s.whole.add_tasks)
    d = Store(tmp_path/'s.sqlite').scores(operation='add')
    assert set(d.scale[d.split == 'test']) == set(r.scale) and len(set(d.scale[d.split == 'dev'])) == 20 # 0 is the base's score

def test_one_task_cannot_be_forgotten_alone(tmp_path):
    s = Arithmetic({'w': torch.zeros(2)}, {'a': {'w': torch.ones(2)}}, None, tmp_path/'s.sqlite', head='bases')
    with pytest.raises(ValueError, match='another task as control'): s.forgetting()
