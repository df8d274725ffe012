"README.md is what `jupyter nbconvert --config nbs/_readme.py` makes of nbs/index.ipynb, and its commands are the ones that run"
import subprocess, sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_readme_is_made_from_the_index(tmp_path):
    cmd = [sys.executable, '-m', 'nbconvert', '--config', str(ROOT/'nbs/_readme.py'), f'--FilesWriter.build_directory={tmp_path}']
    subprocess.run(cmd, check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path/'README.md').read_text() == (ROOT/'README.md').read_text(), 'run: jupyter nbconvert --config nbs/_readme.py'


def test_index_is_short_and_its_links_exist():
    import re
    text = (ROOT/'README.md').read_text()
    assert len(text.split()) <= 600
    links = re.findall(r'\]\((?!https?:|#)([^)]+)\)', text)
    assert links and all((ROOT/o).exists() for o in links), links


def test_ci_finds_the_test_command():
    lines = [o for o in (ROOT/'README.md').read_text().splitlines() if o.startswith('pip install') and '&& pytest' in o]
    assert lines == ["pip install -c constraints.txt -e '.[dev]' && pytest -q -n 2"]
