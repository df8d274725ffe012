"""Every experiment notebook runs through plain papermill in the toy world: outside the checkout, in seconds, with rows in the
store and an answer at its end. What papermill lets pass, a mistyped name or `no` for a locale, fails before any work.

Papermill and its kernel are processes of their own as ever, but forks of one that has loaded torch and the rest (`warm.py`):
the command and its arguments are papermill's, and the kernel comes from a kernelspec. Once, both are new ones."""
import json, os, re, subprocess, sys, time
from pathlib import Path
import pandas as pd, pytest, warm
from papermill import inspect_notebook
from merginguriel.runner import last_text, template_parameters, templates
from merginguriel.store import Store

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = sorted((ROOT/'nbs/experiments').glob('*.ipynb'))
MAX_SECONDS = 20
def name(p): return p.stem
def has(path, k): return k in template_parameters(path)
def targeted(path): return ['-r', 'target', 'sq-AL'] if has(path, 'target') else []


def papermill(path, folder, *args, new=False):
    "Execute the template at `path` as the README does, in an empty folder with a cache of its own; `new` starts everything anew"
    (folder/'out').mkdir(parents=True, exist_ok=True) # papermill makes no folder
    env = dict(os.environ, MERGINGURIEL_CACHE=str(folder.parent/'cache'), PYTHONDONTWRITEBYTECODE='1', **warm.VARIABLES)
    env.pop('MPLBACKEND', None) # The kernel's own, which puts figures into the notebook
    if not new: env['JUPYTER_PATH'] = warm.kernel(folder.parent/'jupyter')
    command = [*([sys.executable] if new else warm.python()), '-m', 'papermill', str(path), 'out/done.ipynb', '--no-progress-bar']
    return subprocess.run([*command, *args], cwd=folder, env=env, capture_output=True, text=True, timeout=300)

def files(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file())
def mine(): return files(ROOT/'nbs/experiments'), sorted(p.name for p in (ROOT/'nbs').iterdir()), sorted(p.name for p in ROOT.iterdir())


@pytest.fixture(scope='session')
def done(tmp_path_factory):
    "Template -> (process, folder, seconds, CPU seconds, what was in the checkout before and after); each template runs once"
    ran = {}
    def run(path):
        if path not in ran:
            warm.python()
            folder = tmp_path_factory.mktemp(path.stem)/'work'
            before, start, used = mine(), time.time(), warm.cpu_seconds()
            r = papermill(path, folder, '-p', 'world', 'toy', '-p', 'out', 'out', *targeted(path))
            ran[path] = r, folder, time.time()-start, warm.cpu_seconds()-used, before, mine()
        return ran[path]
    return run


# ---- the toy world

def test_the_templates_are_those_that_can_be_run_by_name():
    assert {p.stem: p for p in TEMPLATES} == templates() and {'exctar', 'inctar', 'mini'} <= set(templates())

@pytest.mark.parametrize('path', TEMPLATES, ids=name)
def test_it_runs(path, done):
    r, folder, seconds, used, *_ = done(path)
    assert r.returncode == 0, r.stderr[-3000:]
    assert min(seconds, used) < MAX_SECONDS # the lesser: on a machine that does other work the clock says nothing
    assert 'unknown parameter' not in r.stderr

@pytest.mark.parametrize('path', TEMPLATES, ids=name)
def test_it_leaves_nothing_in_the_checkout(path, done):
    _, folder, _, _, before, after = done(path)
    assert before == after
    assert all(o.startswith('out/') for o in files(folder)), files(folder)

@pytest.mark.parametrize('path', TEMPLATES, ids=name)
def test_its_results_are_rows_of_the_store(path, done):
    folder = done(path)[1]
    rows = Store(folder/'out/store.sqlite', readonly=True).scores(metric='accuracy')
    assert len(rows) >= 4 and (rows.n > 0).all() and (0 <= rows.low).all() and (rows.high <= 1).all()
    assert ((rows.low <= rows.value) & (rows.value <= rows.high)).all()
    if has(path, 'target'):
        assert set(rows.locale) == {'sq-AL'} and {'own', 'uniform', 'linear', 'task_arithmetic', 'ties'} <= set(rows.name)

@pytest.mark.parametrize('path', TEMPLATES, ids=name)
def test_it_ends_with_an_answer_in_one_sentence(path, done):
    text = last_text(done(path)[1]/'out/done.ipynb')
    assert text.endswith('.') and '\n' not in text and len(text.split()) > 15
    if has(path, 'target'): assert text.startswith('sq-AL, ')

@pytest.mark.parametrize('path', TEMPLATES, ids=name)
def test_every_cell_ran_and_the_executed_copy_has_tables_and_a_figure(path, done):
    cells = json.loads((done(path)[1]/'out/done.ipynb').read_text())['cells']
    assert all(c['execution_count'] for c in cells if c['cell_type'] == 'code')
    kinds = {k for c in cells for o in c.get('outputs', []) for k in o.get('data', {})}
    assert {'text/html', 'image/png'} <= kinds

@pytest.mark.parametrize('which,stamp,touched', [('exctar', 'zero-shot', ['none']), ('inctar', 'supervised', ['target_model'])])
def test_what_was_touched_is_recorded(which, stamp, touched, done):
    folder = done(templates()[which])[1]
    c = Store(folder/'out/store.sqlite', readonly=True).configs()
    assert set(c['contract.stamp']) == {stamp} and all(o == touched for o in c['contract.touched'])

def test_exctar_never_merges_the_target(done):
    for which, inside in (('exctar', False), ('inctar', True)):
        w = Store(done(templates()[which])[1]/'out/store.sqlite', readonly=True).scores(metric='weight')
        assert ('source:sq-AL' in set(w.name)) == inside and w.value.sum() == pytest.approx(1)


def test_a_second_run_finds_what_the_first_left(done):
    "The same numbers, and no row twice"
    path = templates()['exctar']
    folder = done(path)[1]
    before = Store(folder/'out/store.sqlite').scores()
    models = files(folder/'out/models')
    r = papermill(path, folder, '-p', 'world', 'toy', '-p', 'out', 'out', *targeted(path))
    assert r.returncode == 0, r.stderr[-3000:]
    pd.testing.assert_frame_equal(before, Store(folder/'out/store.sqlite').scores())
    assert files(folder/'out/models') == models


def test_parameters_of_every_kind_arrive(tmp_path):
    texts = dict(target='vi-VN', sources='de-DE, en-US', methods='ties(density=.5)', seeds='0,1', weighting='uniform', options='epochs=1', head='best',
        store='scores.sqlite', out='out', world='toy')
    given = [o for k, v in texts.items() for o in ('-r', k, v)]
    r = papermill(templates()['exctar'], tmp_path/'work', '-p', 'k', '2', *given, new=True)
    assert r.returncode == 0, r.stderr[-3000:]
    rows = Store(tmp_path/'work/scores.sqlite', readonly=True).scores(metric='accuracy')
    assert set(rows.name) == {'own', 'uniform', 'ties(density=0.5)', 'source:de-DE', 'source:en-US'} and set(rows.seed) == {0, 1}
    assert set(rows['options.epochs']) == {1} and set(rows['head']) == {'best'} and set(rows['locale']) == {'vi-VN'}


# ---- what papermill lets pass

@pytest.mark.parametrize('path', TEMPLATES, ids=name)
def test_papermill_reads_every_parameter(path):
    "Name, default and help; a second = on a line would hide the parameter from it"
    seen = inspect_notebook(str(path))
    assert {k: v['help'] for k, v in seen.items()} == {k: v[2] for k, v in template_parameters(path).items()}

@pytest.mark.parametrize('path', TEMPLATES, ids=name)
def test_parameters_are_checked_before_anything_else(path):
    "The first code cells are the parameters, the import of the check, and the check"
    cells = [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
    assert cells[1:3] == ['from merginguriel.runner import check_namespace,passive_threads', 'check_namespace(globals())\npassive_threads()']

BAD = [(['-r', 'targt', 'cy-GB'], "unknown parameter 'targt'; did you mean 'target'?"), (['-p', 'target', 'no'], "unknown locale 'no'"),
    (['-y', 'target: no'], 'target is a str; got False'), (['-p', 'seeds', '0'], 'seeds is a str; got 0 '),
    (['-p', 'k', '2.5'], 'k is an int; got 2.5'), (['-r', 'target', 'cy'], "unknown locale 'cy'"),
    (['-r', 'methods', 'tise'], "no merge method 'tise'; did you mean ties"), (['-r', 'similarity', 'real'], 'ExcTar may not see labelled_dev')]

@pytest.mark.parametrize('args,said', BAD, ids=[' '.join(o[0]) for o in BAD])
def test_a_bad_parameter_fails_before_any_work(args, said, tmp_path):
    target = [] if any('target' in o for o in args) else ['-r', 'target', 'sq-AL'] # -r would win over -p and -y
    r = papermill(templates()['exctar'], tmp_path/'work', '-p', 'out', 'out', '-r', 'world', 'toy', *target, *args)
    last = [o for o in r.stderr.splitlines() if o.strip()][-1]
    assert r.returncode != 0 and said in last and re.match(r'(ValueError|KeyError|ContractError): ', last), r.stderr[-2000:]
    assert files(tmp_path/'work') == ['out/done.ipynb'] # the copy that shows the error, and nothing else

@pytest.mark.parametrize('path', [p for p in TEMPLATES if p.stem != 'exctar'], ids=name)
def test_a_name_that_is_no_parameter_fails_in_every_template(path, tmp_path):
    r = papermill(path, tmp_path/'work', '-r', 'wrold', 'toy')
    assert r.returncode != 0 and "unknown parameter 'wrold'; did you mean 'world'?" in r.stderr.strip().splitlines()[-1]
