"""A notebook imports only from lower floors or from lower numbers of its own, wherever in it the import stands, and
importing the package or a ground module loads nothing heavy, reads no file and no variable, and seeds nothing.
Each check is seen to catch a planted fault."""
import ast, json, os, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOOR = re.compile(r'(\d)_[a-z]+')
NUMBERED = re.compile(r'(\d\d)_\w+\.ipynb')
HEAVY = ['torch', 'transformers', 'datasets', 'safetensors', 'scipy', 'sklearn', 'matplotlib', 'papermill', 'ray', 'nbdev', 'IPython']


def code_cells(path):
    "Sources of the code cells, without magics"
    cells = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    return [re.sub(r'^([ \t]*)[%!].*$', r'\1pass', s, flags=re.M) for s in cells]


def default_exps(path): return re.findall(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(code_cells(path)), re.M)


def floors(folder):
    "Number -> folder of each floor; a number may be used once"
    out = {}
    for p in sorted(o for o in folder.iterdir() if o.is_dir()):
        m = FLOOR.fullmatch(p.name)
        if not m: continue
        assert int(m[1]) not in out, f'{p.name} and {out[int(m[1])].name} are the same floor'
        out[int(m[1])] = p
    return out


def modules(folder):
    """Module name -> ((floor, number), notebook), from the notebooks in the folders of the floors: the floor is the digit
    of the folder, the number that of the notebook; a number of a floor, or a module, may be used once"""
    out, seen = {}, {}
    for floor, place in floors(folder).items():
        for p in sorted(place.glob('*.ipynb')):
            nb, m = f'{place.name}/{p.name}', NUMBERED.fullmatch(p.name)
            assert m, f'{nb} has no number'
            at = floor, int(m[1])
            names = default_exps(p)
            assert len(names) == 1, f'{nb} has {len(names)} default_exp'
            assert names[0] not in out, f'{nb} and {out[names[0]][1]} export the same module'
            assert at not in seen, f'{nb} and {seen[at]} have the same number'
            out[names[0]], seen[at] = (at, nb), nb
    return out


def homeless(folder):
    "Notebooks below `folder` that export a module, or have a number, and are on no floor"
    at_home = {p for place in floors(folder).values() for p in place.glob('*.ipynb')}
    others = [p for p in sorted(folder.rglob('*.ipynb')) if p not in at_home and p.parent.name[0] != '.']
    return [str(p.relative_to(folder)) for p in others if NUMBERED.fullmatch(p.name) or default_exps(p)]


def imported(source, package='merginguriel'):
    "Modules of the package that `source` imports, at any depth: statements, `import_module`, `__import__`"
    out = set()
    def dotted(name):
        if name.startswith(package+'.'): out.add(name.split('.')[1])
    for o in ast.walk(ast.parse(source)):
        if isinstance(o, ast.Import): [dotted(a.name) for a in o.names]
        elif isinstance(o, ast.ImportFrom):
            if o.level: out |= {o.module.split('.')[0]} if o.module else {a.name for a in o.names}
            elif o.module == package: out |= {a.name for a in o.names if not a.name.startswith('__')}
            else: dotted(o.module)
        elif isinstance(o, ast.Call) and o.args and isinstance(o.args[0], ast.Constant) and isinstance(o.args[0].value, str):
            if (getattr(o.func, 'id', None) or getattr(o.func, 'attr', None)) in ('import_module', '__import__'): dotted(o.args[0].value)
    return out


def upward(folder):
    "Every import in a numbered notebook that is not from a lower floor or a lower number of its own"
    known, out = modules(folder), []
    for name, (at, nb) in known.items():
        for source in code_cells(folder/nb):
            for m in sorted(imported(source)):
                if m not in known: out.append(f'{nb} imports {m}, which no numbered notebook exports')
                elif known[m][0] >= at: out.append(f'{nb} imports {m} of {known[m][1]}')
    return sorted(set(out))


def test_imports_go_down():
    assert upward(ROOT/'nbs') == []
    assert homeless(ROOT/'nbs') == []


def test_there_are_floors():
    known = modules(ROOT/'nbs')
    assert {'core', 'locales', 'store', 'significance'} <= set(known)
    assert sorted(floors(ROOT/'nbs')) == list(range(8)) == sorted({at[0] for at, _ in known.values()})
    assert imported('\n'.join(code_cells(ROOT/'nbs'/known['store'][1]))) == {'core'}


def test_every_module_has_its_notebook():
    known = modules(ROOT/'nbs')
    found = {p.stem for p in (ROOT/'merginguriel').glob('*.py')}
    assert found-{'__init__', '_modidx'} == set(known)


def write(folder, name, *cells):
    (folder/name).parent.mkdir(exist_ok=True)
    nb = dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[
        dict(cell_type='code', id=f'c{i}', source=s, metadata={}, outputs=[], execution_count=None) for i, s in enumerate(cells)])
    (folder/name).write_text(json.dumps(nb))


@pytest.mark.parametrize('statement', ['from merginguriel.high import *', 'import merginguriel.high as h', 'from merginguriel import high',
    'def f():\n    if 1:\n        from merginguriel.high import x', 'class A:\n    def f(self):\n        import os, merginguriel.high',
    'from .high import x', 'import importlib\nimportlib.import_module("merginguriel.high")', '__import__("merginguriel.high.x")',
    '#| hide\n%time 1\nfrom merginguriel.high import x'])
def test_an_upward_import_is_reported(tmp_path, statement):
    write(tmp_path, 'index.ipynb', 'from merginguriel.high import *')
    write(tmp_path, '2_walls/10_low.ipynb', '#| default_exp low', 'import math', statement)
    # a higher number of the same floor, and a lower number of a higher floor
    for high in ('2_walls/20_high.ipynb', '3_roof/05_high.ipynb'):
        write(tmp_path, high, '#| default_exp high', 'from merginguriel.low import *')
        assert upward(tmp_path) == [f'2_walls/10_low.ipynb imports high of {high}']
        (tmp_path/high).unlink()
    write(tmp_path, '1_ground/90_high.ipynb', '#| default_exp high')
    assert upward(tmp_path) == []


def test_other_bad_imports_are_reported(tmp_path):
    low = '2_walls/10_low.ipynb'
    write(tmp_path, low, '#| default_exp low', 'from merginguriel.low import x', 'from merginguriel.gone import x')
    gone = f'{low} imports gone, which no numbered notebook exports'
    assert upward(tmp_path) == [gone, f'{low} imports low of {low}']
    write(tmp_path, '3_roof/10_also.ipynb', '#| default_exp also')
    assert {k: at for k, (at, _) in modules(tmp_path).items()} == dict(low=(2, 10), also=(3, 10))
    write(tmp_path, '2_walls/10_also.ipynb', '#| default_exp other')
    with pytest.raises(AssertionError, match='same number'): modules(tmp_path)
    (tmp_path/'2_walls/10_also.ipynb').unlink()
    write(tmp_path, '3_roof/11_again.ipynb', '#| default_exp low')
    with pytest.raises(AssertionError, match='same module'): modules(tmp_path)
    write(tmp_path, '3_roof/11_again.ipynb', '#| hide')
    with pytest.raises(AssertionError, match='0 default_exp'): modules(tmp_path)
    (tmp_path/'3_roof/11_again.ipynb').unlink()
    write(tmp_path, '3_roof/again.ipynb', '#| default_exp again')
    with pytest.raises(AssertionError, match='has no number'): modules(tmp_path)
    (tmp_path/'3_roof/again.ipynb').rename(tmp_path/'3_roof/12_again.ipynb')
    assert homeless(tmp_path) == []
    write(tmp_path, '10_stray.ipynb', 'import math')
    write(tmp_path, 'tutorials/stray.ipynb', '#| default_exp stray')
    write(tmp_path, 'tutorials/first.ipynb', 'import math')
    assert homeless(tmp_path) == ['10_stray.ipynb', 'tutorials/stray.ipynb']
    (tmp_path/'3_cellar').mkdir()
    with pytest.raises(AssertionError, match='same floor'): modules(tmp_path)


# ---- what importing does

PROBE = """
import importlib, json, os, random, sys, time, traceback
package, preload, names = sys.argv[1], sys.argv[2].split(), sys.argv[3:]
for o in preload: importlib.import_module(o) # what these read is theirs
opened, read, on = [], [], False
def hook(event, args):
    if on and event == 'open' and isinstance(args[0], (str, bytes)):
        p = os.fsdecode(args[0])
        if not p.endswith(('.py', '.pyc', '.so')): opened.append(p)
sys.addaudithook(hook)
get = os._Environ.__getitem__
def spy(self, key):
    files = [f.filename.replace(os.sep, '/') for f in traceback.extract_stack(limit=6)]
    if on and any('/'+package+'/' in f for f in files): read.append(key)
    return get(self, key)
os._Environ.__getitem__ = spy
def drawn(): return hash(random.getstate()) + (hash(sys.modules['numpy'].random.get_state()[1].tobytes()) if 'numpy' in sys.modules else 0)
before, start, on = drawn(), time.perf_counter(), True
for o in names: importlib.import_module(o)
took, on = time.perf_counter()-start, False
loaded = sorted({o.split('.')[0] for o in sys.modules})
print(json.dumps(dict(opened=opened, read=read, took=took, seeded=drawn() != before, modules=loaded)))
"""


def probe(*names, preload='', cwd=ROOT):
    "What importing `names` in a fresh process opened, read, loaded and seeded"
    env = dict(os.environ, PYTHONDONTWRITEBYTECODE='1', PYTHONPATH=str(cwd))
    args = [sys.executable, '-c', PROBE, names[0].split('.')[0], preload, *names]
    r = subprocess.run(args, cwd=cwd, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return json.loads(r.stdout.splitlines()[-1])


def test_import_of_the_package():
    r = probe('merginguriel')
    assert not {*HEAVY, 'numpy', 'pandas'} & set(r['modules'])
    assert (r['opened'], r['read'], r['seeded']) == ([], [], False)
    assert r['took'] < 1


GROUND = [m for m, ((floor, _), _) in modules(ROOT/'nbs').items() if floor == 0]
# on other floors, and as light as the ground
LIGHT = 'factorization clustering validation masks workers grids store'.split()

def test_import_of_the_ground_and_of_the_store():
    assert {'core', 'locales', 'toy', 'significance'} <= set(GROUND)
    r = probe(*[f'merginguriel.{m}' for m in (*GROUND, *LIGHT)], preload='numpy pandas')
    assert not set(HEAVY) & set(r['modules'])
    assert (r['opened'], r['read'], r['seeded']) == ([], [], False)


def test_import_of_all_modules_seeds_and_reads_nothing_of_ours():
    "Upper modules may load torch, whose own files are its business; data, settings and seeds are ours"
    r = probe(*[f'merginguriel.{m}' for m in modules(ROOT/'nbs')], preload='numpy pandas torch')
    assert not {'transformers', 'datasets', 'matplotlib', 'ray'} & set(r['modules'])
    assert (r['read'], r['seeded']) == ([], False)
    data = ('.json', '.csv', '.parquet', '.npz', '.safetensors')
    assert [p for p in r['opened'] if p.endswith(data) or (str(ROOT) in p and 'site-packages' not in p)] == []


def test_what_an_import_does_is_reported(tmp_path):
    (tmp_path/'pack').mkdir()
    (tmp_path/'pack'/'__init__.py').write_text('')
    (tmp_path/'pack'/'data.csv').write_text('a,b')
    (tmp_path/'pack'/'bad.py').write_text('import os, random, sklearn\nfrom pathlib import Path\n'
        'Path(__file__).with_name("data.csv").read_text()\n'
        'os.environ.get("PATH")\nrandom.seed(0)')
    (tmp_path/'pack'/'good.py').write_text('import os, random\ndef f(): return os.environ["PATH"], open("data.csv"), random.seed(0)')
    r = probe('pack.bad', cwd=tmp_path)
    assert 'sklearn' in r['modules'] and r['seeded'] and 'PATH' in r['read'] and str(tmp_path/'pack'/'data.csv') in r['opened']
    r = probe('pack.good', cwd=tmp_path)
    assert (r['opened'], r['read'], r['seeded']) == ([], [], False) and not set(HEAVY) & set(r['modules'])
