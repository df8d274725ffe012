"""Tests run in two processes (`pytest -n 2`). What shares a costly fixture stays in one of them: a file, or in `test_templates` what
looks at the run of one template. Notebooks and laws are dealt out one by one."""
import os, re
from pathlib import Path
import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1') # Two processes on two cores
TEMPLATES = {p.stem for p in (Path(__file__).parent.parent/'nbs/experiments').glob('*.ipynb')}


def together(nodeid):
    "What the test shares with others: all tests of one answer run in one process, one after the other"
    file, test = nodeid.split('::', 1)
    if file.endswith(('test_laws.py', 'test_notebooks.py')): return nodeid
    if not file.endswith('test_templates.py'): return file
    name = re.search(r'\[(\w+)', test)
    return name[1] if name and name[1] in TEMPLATES-{'inctar'} else 'exctar' # Some tests compare exctar and inctar


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling
    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid): return together(nodeid)
    return Together(config, log)
