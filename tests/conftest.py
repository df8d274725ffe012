"""Tests run in two processes (`pytest -n 2`). What shares a costly fixture stays in one of them: a file, or in `test_templates` what
looks at the run of one template. Notebooks and laws are dealt out one by one."""
import os
import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1') # Two processes on two cores


def group(item):
    file, params = item.path.stem, getattr(item, 'callspec', None) and item.callspec.params
    if file in ('test_laws', 'test_notebooks'): return None
    if file != 'test_templates': return file
    name = params['path'].stem if params and 'path' in params else 'exctar'
    return 'exctar' if name == 'inctar' else name # Some tests compare the two


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for o in items:
        if group(o): o.add_marker(pytest.mark.xdist_group(group(o)))
