"""Every notebook of `nbs/` runs from top to bottom (its examples are its tests), each in a process of its own: a fork of one that
has loaded torch and the rest already (`warm.py`)"""
import os, subprocess, sys
from pathlib import Path
import pytest, warm

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb')
    if not any(part.startswith(('.', '_')) for part in p.relative_to(ROOT).parts) and p.parent.name != 'experiments')
CODE = "import sys; from nbdev.test import test_nb; ok,_ = test_nb(sys.argv[1], skip_flags=['notest','gpu','slow']); sys.exit(not ok)"


def run_notebook(path, python=None):
    "Run one notebook as `nbdev-test` does; return its exit code and what it printed"
    command = [*(python or warm.python()), '-c', CODE, str(path)]
    env = dict(os.environ, MPLBACKEND='agg', **warm.VARIABLES)
    r = subprocess.run(command, cwd=path.parent, env=env, capture_output=True, text=True, timeout=600)
    return r.returncode, r.stdout+r.stderr


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/'nbs')))
def test_notebook(path):
    code, out = run_notebook(path)
    assert code == 0, out[-6000:]


@pytest.mark.parametrize('python', [warm.python, lambda: [sys.executable]], ids=['warm', 'new'])
def test_a_failing_notebook_is_reported(tmp_path, python):
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('assert 1 == 2, "planted"')])
    nbformat.write(nb, tmp_path/'bad.ipynb')
    code, out = run_notebook(tmp_path/'bad.ipynb', python())
    assert code != 0 and 'planted' in out
