"""`import merginguriel as mu` offers the verbs of the package without loading anything heavy; a verb that has the name of its module
is both, in whatever order the two are asked for. Each order runs in a process that has imported nothing of the package."""
import subprocess, sys
import pytest, warm

VERBS = '''open_checkpoint match_base merge merge_state_dicts audit methods select_sources load_intents finetune predict accuracy
    Experiment run gains answer nxn Store report'''.split()


def says(code, python=None):
    "What `code` prints in a process of its own"
    r = subprocess.run([*(python or warm.python()), '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]
    return r.stdout


CHECKS = '''
import inspect, types, merginguriel as mu, merginguriel.merge as m
from merginguriel.merge import merge
from merginguriel import merge as again
assert isinstance(merge, types.FunctionType) and merge.__name__ == 'merge'
assert mu.merge is m is again is sys.modules['merginguriel.merge'] and isinstance(m, types.ModuleType)
assert mu.merge.merge is merge and m.merge_state_dicts is mu.merge_state_dicts
assert inspect.signature(mu.merge) == inspect.signature(merge)
try: mu.merge()
except TypeError as e: assert "merge() missing" in str(e)
print('fine')
'''
ORDERS = ['', 'import merginguriel as mu; mu.merge', 'import merginguriel.merge', 'import merginguriel.merge as m',
    'from merginguriel.merge import merge', 'from merginguriel.merge import *', 'from merginguriel import merge',
    'from merginguriel import merge_state_dicts', 'import merginguriel.audit; from merginguriel import audit', 'from merginguriel import *',
    'import merginguriel.localize', 'import merginguriel.gains; from merginguriel import gains; assert callable(gains)', 'import merginguriel as mu; mu.audit; mu.methods["ties"]',
    'import merginguriel as mu; mu.merge; from merginguriel.merge import merge; import importlib; importlib.reload(mu.merge)']

@pytest.mark.parametrize('first', ORDERS)
def test_a_verb_and_its_module_in_every_order(first):
    assert says(f'import sys\n{first}\n{CHECKS}') == 'fine\n'


def test_a_verb_with_the_name_of_a_module_is_in_that_module():
    "Otherwise importing the module would put it in the place of another function"
    from pathlib import Path
    from merginguriel.front import _verbs
    modules = {p.stem for p in (Path(__file__).parent.parent/'merginguriel').glob('*.py')}
    assert [o for o, (where, _, _) in _verbs.items() if o in modules and where != o] == []


def test_a_call_reaches_the_function():
    code = '''
import merginguriel as mu, torch
base = {'a.weight': torch.zeros(2)}
sources = {'x': {'a.weight': torch.tensor([1., 2.])}, 'y': {'a.weight': torch.tensor([3., 6.])}}
merged = mu.merge_state_dicts(base, sources, 'linear', {'x': .75, 'y': .25})
print(merged['a.weight'].tolist())
print(type(mu.audit(merged, base, sources)).__name__)
try: mu.report('no store')
except Exception as e: print(type(e).__name__ != 'TypeError' or 'callable' not in str(e))
'''
    assert says(code).splitlines() == ['[1.5, 3.0]', 'AuditReport', 'True']


def test_every_verb_is_there_and_the_import_is_light():
    code = f'''
import sys, time
start = time.process_time()
import merginguriel as mu
took = time.process_time()-start
heavy = {{'torch', 'numpy', 'pandas', 'fastcore', 'transformers'}} & set(sys.modules)
assert not heavy, heavy
assert set({VERBS}) <= set(dir(mu)) and set({VERBS}) <= set(mu.__all__)
assert not heavy & set(sys.modules) # Nor does listing them load anything
for o in mu.__all__: assert callable(getattr(mu, o)) or o == 'methods', o
from merginguriel import Experiment, Store
assert Experiment is mu.Experiment is sys.modules['merginguriel.experiment'].Experiment
assert 'torch' in sys.modules
print(took)
'''
    assert float(says(code, [sys.executable])) < .3


def test_what_is_not_there_says_so():
    code = '''
import merginguriel as mu
try: mu.murge
except AttributeError as e: print(e)
try: from merginguriel import murge
except ImportError as e: print(e)
from merginguriel import sparse # A module that is no verb
print(sparse.__name__, callable(sparse))
'''
    assert says(code).splitlines()[0] == "module 'merginguriel' has no attribute 'murge'"
    assert says(code).splitlines()[1].startswith("cannot import name 'murge' from 'merginguriel'")
    assert says(code).splitlines()[2] == 'merginguriel.sparse False'


def test_help_is_a_page_and_shows_the_comments():
    code = '''
import inspect, pydoc, merginguriel as mu
page = pydoc.render_doc(mu, renderer=pydoc.plaintext)
for o in mu.__all__: assert page.count(f'\\n      {o} ') == 1, o
from fastcore.docments import docments
assert '    hp: Hyperparameters of the method\\n' in mu.merge.__doc__ # fastcore takes this comment for that of the result
for o in ['merge', 'finetune', 'audit', 'select_sources', 'Experiment', 'report']:
    page = ' '.join(pydoc.render_doc(getattr(mu, o), renderer=pydoc.plaintext).split())
    f = getattr(mu, o)
    comments = docments(f._function() if o in ('merge', 'audit', 'report') else f)
    assert len(comments) > 2
    for name, comment in comments.items():
        if comment and name != 'return': assert f'{name}: ' + ' '.join(comment.split()) in page, (o, name)
print(len(page) > 100)
'''
    assert says(code) == 'True\n'


def test_the_door_is_what_the_notebook_says():
    "nbdev-export writes modules; of `__init__` it writes the version alone"
    from pathlib import Path
    text = (Path(__file__).parent.parent/'merginguriel/__init__.py').read_text()
    assert text.startswith('__version__ = "') and text.rstrip().endswith('front.open_door(__name__)') and len(text.splitlines()) < 10
