"""Where results go: what stands at an output path survives unless this package wrote it, a kill leaves something whole, two writers
take turns, a name leads nowhere else, and what is torn is no model."""
import json, os, re, signal, subprocess, sys, time
from pathlib import Path
import pytest
import merginguriel.outputs as outputs
from merginguriel.cli import main
from merginguriel.core import MerginGurielError, clear_left, drop, temporary
from merginguriel.merge import merge
from merginguriel.outputs import alone, atomic_dir, check_out, foreign, inside, list_models
from merginguriel.runner import run_template
from merginguriel.toy import toy_base, toy_sources

ROOT = Path(__file__).resolve().parent.parent


def tree(folder):
    "Everything below `folder`: links with where they lead, files with their content"
    return {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in sorted(Path(folder).rglob('*'))}


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    d = tmp_path_factory.mktemp('outputs')
    return toy_base(d/'base'), toy_sources(d/'models')


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path/'work').mkdir()
    monkeypatch.chdir(tmp_path/'work')
    return tmp_path/'work'


def run(argv, capsys):
    code = main([str(o) for o in argv])
    return code, capsys.readouterr()


def test_only_one_function_removes_anything():
    "No other place in the package names what removes a file or a tree; temporary folders of `tempfile` remove themselves"
    for p in (ROOT/'merginguriel').glob('*.py'):
        found = re.findall(r'rmtree|\.unlink\(|rmdir|removedirs|os\.remove\b|os\.unlink\b|send2trash', p.read_text())
        assert found == ([".unlink(", "rmtree"] if p.name == 'core.py' else []), p.name
    with pytest.raises(ValueError, match='only temporary folders'): drop(ROOT/'merginguriel')


# ---- replacing

PLACES = {
    'the working directory': lambda w: w, 'a folder around it': lambda w: w.parent,
    'a link to an earlier merge': lambda w: (w/'link').symlink_to(w/'earlier') or w/'link',
    'a link to nothing': lambda w: (w/'link').symlink_to(w/'gone') or w/'link',
    'a file': lambda w: (w/'file').write_text('x') and w/'file',
    'runs with a store': lambda w: [(w/'runs').mkdir(), (w/'runs/store.sqlite').write_text('precious')] and w/'runs',
    'a record and nothing of ours': lambda w: [(w/'r').mkdir(), (w/'r/merge_record.json').write_text('{}'),
        (w/'r/thesis.tex').write_text('x')] and w/'r',
    'an earlier merge with a note': lambda w: (w/'earlier/notes.md').write_text('x') and w/'earlier',
    'an earlier merge with a folder': lambda w: (w/'earlier/data').mkdir() or w/'earlier',
    'an earlier merge with a link': lambda w: (w/'earlier/link').symlink_to('/') or w/'earlier',
    'an earlier merge that was edited': lambda w: (w/'earlier/README.md').write_text('mine') and w/'earlier',
    'an earlier merge that was trained on': lambda w: retrained(w/'earlier') and w/'earlier'}
MAKERS = {'merge': 'merge {out} --base {base} --sources {models} --replace',
    'recipe': 'merge {out} --config {recipe} --replace',
    'finetune': 'finetune --base {base} --locale sq-AL --dataset toy --epochs 1 --out {out} --replace',
    'bases': 'bases fit {out} --base {base} --sources {models} --n-bases 1 --replace'}


def retrained(folder):
    b = bytearray((folder/'model.safetensors').read_bytes())
    b[-1] ^= 1
    os.utime(folder/'model.safetensors', (0, 0)) # As long as before, and small here, so the digest tells
    return (folder/'model.safetensors').write_bytes(b)


def command(maker, out, base, models, here):
    recipe = here.parent/'recipe.yml'
    recipe.write_text(f"merge_method: linear\nmodels:\n- model: {models['de-DE']}\n  parameters: {{weight: 1}}\n"
        f"- model: {models['en-US']}\n  parameters: {{weight: 1}}\nbase_model: {base}\ndtype: float32\n")
    return MAKERS[maker].format(out=out, base=base, models=models['de-DE'].parent, recipe=recipe).split()


@pytest.mark.parametrize('maker', MAKERS)
@pytest.mark.parametrize('place', PLACES)
def test_what_is_not_ours_alone_is_not_replaced(models, here, capsys, maker, place):
    base, sources = models
    merge(base, sources, here/'earlier')
    out = PLACES[place](here)
    argv = command(maker, out, base, sources, here)
    before = tree(here.parent)
    code, said = run(argv, capsys)
    assert code == 2 and tree(here.parent) == before
    assert re.search('choose|give the folder|move', said.err), said.err


@pytest.mark.parametrize('maker', MAKERS)
def test_an_earlier_result_is_replaced_when_asked(models, here, capsys, maker):
    base, sources = models
    merge(base, {'en-US': sources['en-US']}, here/'earlier')
    argv = command(maker, here/'earlier', base, sources, here)
    before = tree(here)
    code, said = run([o for o in argv if o != '--replace'], capsys)
    assert code == 2 and tree(here) == before and 'replace=True (--replace)' in said.err
    code, said = run(argv, capsys)
    assert code == 0, said.err
    assert tree(here) != before and foreign(here/'earlier') is None
    assert [p.name for p in here.iterdir()] == ['earlier']


def test_a_mount_point_is_not_replaced(monkeypatch, tmp_path):
    (tmp_path/'m').mkdir()
    monkeypatch.setattr(os.path, 'ismount', lambda p: Path(p) == tmp_path/'m')
    with pytest.raises(FileExistsError, match='mount point'): check_out(tmp_path/'m', True)


def test_folders_of_earlier_versions_are_known(models, tmp_path):
    base, sources = models
    merge(base, sources, tmp_path/'old')
    (tmp_path/'old'/outputs.record_name).unlink() # Version 0.1 left no list
    merge(base, {'en-US': sources['en-US']}, tmp_path/'old', replace=True)
    (tmp_path/'old'/outputs.record_name).unlink()
    (tmp_path/'old/figure.svg').write_text('x')
    with pytest.raises(FileExistsError, match='figure.svg'): merge(base, sources, tmp_path/'old', replace=True)


@pytest.mark.parametrize('argv', ['nxn {models} --dataset toy --out {f}', 'audit {merged} --base {base} --sources {models} --json {f}',
    'report --out {f.parent} --format csv --store {store}', 'compat --models-dir {models} --pretrained {base} --output-dir {f.parent} '
    '--metric task_vector_cosine'])
def test_a_file_of_the_user_stays(models, here, capsys, argv):
    from merginguriel.store import Store
    base, sources = models
    merged = merge(base, sources, here/'merged').path
    row = dict(locale='sq-AL', split='test', name='linear', metric='accuracy', value=.5, n=4)
    Store(here/'s.sqlite').record(dict(target='sq-AL', method='linear'), [row])
    (here/'t').mkdir()
    def call(f):
        return run(argv.format(f=f, models=sources['de-DE'].parent, merged=merged, base=base, store=here/'s.sqlite').split(), capsys)
    assert call(here/'t/new.csv')[0] in (0, 1)
    made = [p for p in (here/'t').iterdir() if p.suffix in ('.csv', '.json')]
    assert made and call(here/'t/new.csv')[0] in (0, 1) # As we wrote it, so it may be written again
    for p in made: p.write_text('my own figures')
    before = tree(here)
    code, said = call(here/'t/new.csv')
    assert code == 2 and 'not as merginguriel wrote it' in said.err and tree(here) == before


# ---- killed

KILL = """
import os, signal, sys
from pathlib import Path
import merginguriel.outputs as o, merginguriel.core as c
from merginguriel.merge import merge
at, n = int(sys.argv[1]), 0
def hook(event, args):
    global n
    if event in ('os.rename', 'os.mkdir', 'open', 'os.remove', 'os.rmdir', 'shutil.rmtree', 'os.chmod', 'ctypes.call_function') \\
            and any(str(a).find('earlier') >= 0 for a in args):
        n += 1
        if n == at: os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
base, models, out = sys.argv[2:5]
if sys.argv[5] == 'plain': o._exchange = lambda a, b: False
merge(base, {'en-US': models+'/en-US', 'de-DE': models+'/de-DE'}, out, replace=True)
print(n)
"""


def whole(folder, old, new):
    "Which of the two merges is in `folder`"
    files = tree(folder)
    return [k for k, o in dict(old=old, new=new).items() if all(files.get(f) == v for f, v in o.items() if f in KEEP)]

KEEP = ('model.safetensors', 'config.json', 'tokenizer.json')


@pytest.mark.parametrize('how', ['exchange', 'plain'])
def test_a_kill_at_any_point_leaves_one_whole(models, tmp_path, how):
    base, sources = models
    args = [str(base), str(sources['de-DE'].parent)]
    def go(at, out):
        return subprocess.run([sys.executable, '-c', KILL, str(at), *args, str(out), how], capture_output=True, text=True)
    merge(base, {'de-DE': sources['de-DE']}, tmp_path/'earlier')
    old = tree(tmp_path/'earlier')
    n = int(go(0, tmp_path/'earlier').stdout)
    new = tree(tmp_path/'earlier')
    assert old['model.safetensors'] != new['model.safetensors'] and n > 10
    for at in sorted({1, 2, n//4, n//3, n//2, 2*n//3, n-4, n-3, n-2, n-1, n}):
        d = tmp_path/f'{how}{at}'
        d.mkdir()
        merge(base, {'de-DE': sources['de-DE']}, d/'earlier')
        assert go(at, d/'earlier').returncode == -signal.SIGKILL
        places = [p for p in d.iterdir() if p.is_dir() and whole(p, old, new)]
        assert d/'earlier' in places or (how == 'plain' and places), f'{at} of {n}: {sorted(p.name for p in d.iterdir())}'
        assert list(list_models(d)) in (['earlier'], [])
        merge(base, {k: sources[k] for k in ('en-US', 'de-DE')}, d/'earlier', replace=True) # The next run clears and goes on
        assert [p.name for p in d.iterdir()] == ['earlier'] and whole(d/'earlier', old, new) == ['new']


def test_what_was_left_is_said_and_removed(models, tmp_path, capsys):
    base, sources = models
    tmp, fd = temporary(tmp_path/'merged', folder=True)
    (tmp/'model.safetensors').write_bytes(bytes(2_000_000))
    (tmp_path/'.merged.mine.tmp').mkdir() # Not a name that this package makes
    os.close(fd)
    assert list_models(tmp_path) == {}
    merge(base, sources, tmp_path/'merged')
    assert f'removed {tmp}, 2.0 MB that an interrupted run had left' in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.merged.mine.tmp', 'merged']
    assert clear_left(tmp_path/'merged') == []


# ---- several at once

def python(code, *args):
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdin=-1, stdout=-1, stderr=-1, text=True)

WAITS = """
import sys, merginguriel.merge as m
write = m.write_card
def wait(*args, **kwargs):
    print('in', flush=True)
    sys.stdin.readline()
    write(*args, **kwargs)
m.write_card = wait
"""
MERGE = "r = m.merge(sys.argv[1], {'en-US': sys.argv[2]+'/en-US', 'de-DE': sys.argv[2]+'/de-DE'}, sys.argv[3])\nprint(r.path)"


@pytest.mark.parametrize('end', ['finishes', 'is killed'])
def test_the_second_waits_and_takes_what_the_first_made(models, tmp_path, end):
    base, sources = models
    args = (base, sources['de-DE'].parent, tmp_path/'out')
    first = python(WAITS+MERGE, *args)
    assert first.stdout.readline() == 'in\n'
    second = python('import sys, merginguriel.merge as m\n'+MERGE, *args)
    assert 'another run is writing it; waiting' in second.stderr.readline()
    if end == 'is killed': first.kill()
    else: first.communicate('go\n')
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0 and out.strip() == str(tmp_path/'out'), err
    assert ('removed' in err) == (end == 'is killed')
    assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_the_second_is_told_when_the_first_made_something_else(models, tmp_path):
    base, sources = models
    first = python(WAITS+MERGE, base, sources['de-DE'].parent, tmp_path/'out')
    assert first.stdout.readline() == 'in\n'
    second = python("import sys, merginguriel.merge as m\nm.merge(sys.argv[1], {'en-US': sys.argv[2]}, sys.argv[3])", base,
        sources['en-US'], tmp_path/'out')
    assert 'waiting' in second.stderr.readline()
    first.communicate('go\n')
    said = second.communicate()[1].strip().splitlines()[-1]
    assert 'holds an earlier result; choose another folder' in said and 'remove' not in said


TRAIN = """
import sys
from merginguriel.data import load_intents
from merginguriel.train import finetune
d = load_intents('toy', 'sq-AL', 'train')
print('in', flush=True)
finetune(sys.argv[1], d, sys.argv[2], dev=load_intents('toy', 'sq-AL', 'dev'), epochs=int(sys.argv[3]))
"""


def test_two_trainings_into_one_folder_are_one(models, tmp_path):
    runs = [python(TRAIN, models[0], tmp_path/'m', 40) for _ in range(2)]
    said = [p.communicate(timeout=300) for p in runs]
    assert [p.returncode for p in runs] == [0, 0], said
    err = ''.join(e for _, e in said)
    assert err.count('waiting for it to end') == err.count('took the model that the other run made') <= 1
    assert [p.name for p in tmp_path.iterdir()] == ['m']


def test_no_error_says_to_remove_a_folder():
    said = '\n'.join(p.read_text() for p in (ROOT/'merginguriel').glob('*.py'))
    assert 'remove it first' not in said


def test_a_lock_is_for_one_thread_at_a_time(tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    inside_now, most = [], []
    def work(_):
        with alone(tmp_path/'x'):
            inside_now.append(1)
            most.append(len(inside_now))
            time.sleep(.01)
            inside_now.pop()
    with ThreadPoolExecutor(4) as ex: list(ex.map(work, range(8)))
    assert most == [1]*8


# ---- names and pages

EVIL = ['../../evil', '/evil', 'x/../../evil', '..', 'a\\b', '.hidden', 'x\x00y', 'n'*300]


@pytest.mark.parametrize('name', EVIL)
def test_a_target_leads_nowhere(here, capsys, name):
    before = tree(here.parent)
    code, said = run(['run', 'exctar', '--target', name, '--world', 'toy', '--out', here/'runs'], capsys)
    assert code == 2 and 'becomes part of a file name' in said.err
    assert tree(here.parent) == before


def test_a_target_in_python_leads_nowhere(tmp_path):
    from merginguriel.experiment import Experiment
    rows = [f'{o},{s},wake me up {i},alarm_set' for o in ('../evil', 'en-US') for s in ('train', 'dev', 'test') for i in range(4)]
    (tmp_path/'data.csv').write_text('\n'.join(['locale,split,text,label', *rows]))
    with pytest.raises(ValueError): Experiment('../evil', dataset=str(tmp_path/'data.csv'), base='toy', sources=('en-US',)).check()
    with pytest.raises(ValueError, match='part of a file name'): inside(tmp_path, 'models', '../evil-123')


@pytest.mark.parametrize('name', EVIL)
def test_sources_lead_nowhere(models, tmp_path, name):
    from merginguriel.adamerging import elected_sources
    from merginguriel.iterative import iterate
    from merginguriel.data import load_intents
    base, sources = models
    before = tree(tmp_path)
    with pytest.raises(ValueError, match='part of a file name'):
        elected_sources(base, {name: sources['en-US'], 'de-DE': sources['de-DE']}, tmp_path/'elected')
    texts = load_intents('toy', 'en-US', 'train')
    with pytest.raises(ValueError, match='part of a file name'):
        iterate(base, {name: texts, 'de-DE': texts}, tmp_path/'cycles', rounds=1, epochs=1)
    assert {k for k in tree(tmp_path) if 'evil' in k} == set() and {k for k in before} <= set(tree(tmp_path))


def template(folder, last):
    import nbformat
    from nbformat import v4
    nb = v4.new_notebook(cells=[v4.new_code_cell('k: int = 3 # Sources', metadata=dict(tags=['parameters'])), v4.new_code_cell(last)])
    nbformat.write(nb, folder/'page.ipynb')
    return folder/'page.ipynb'


def test_a_page_belongs_to_its_configuration(tmp_path):
    t, out = template(tmp_path, 'print(12//k)'), tmp_path/'runs'
    first = run_template(t, out, progress=False)
    kept = first.read_bytes()
    other = run_template(t, out, progress=False, k=4)
    with pytest.raises(MerginGurielError, match=r'page\.failed\.ipynb, which is executed up to there'):
        run_template(t, out, progress=False, k=0)
    assert first.name == 'page.ipynb' and other.name.startswith('page-') and first.read_bytes() == kept
    template(tmp_path, 'print(12//k, undefined)')
    with pytest.raises(MerginGurielError, match='NameError'): run_template(t, out, progress=False) # The good page stays
    assert first.read_bytes() == kept
    template(tmp_path, 'print(12//k)')
    assert run_template(t, out, progress=False) == first # Its own configuration takes its place again
    names = sorted(p.name for p in out.iterdir())
    assert len(names) == 3 and sum('.failed' in o for o in names) == 1 and not any(o.startswith('.') for o in names)
