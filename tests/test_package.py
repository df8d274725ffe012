"What `pip install .` would install: the wheel, built from an sdist, holds the assets and the templates"
import shutil, subprocess, sys, tarfile, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "(names in the sdist, names in the wheel that is built from it)"
    d = tmp_path_factory.mktemp('build')
    shutil.copytree(ROOT, d/'src', symlinks=True, ignore=shutil.ignore_patterns('.git', 'runs', 'build', 'dist', '*.egg-info', '_docs', '_proc', '__pycache__'))
    r = subprocess.run([sys.executable, '-m', 'build', '--outdir', d/'dist', d/'src'], capture_output=True, text=True)
    assert r.returncode == 0, (r.stdout+r.stderr)[-3000:]
    sdist, wheel = (next((d/'dist').glob(o)) for o in ('*.tar.gz', '*.whl'))
    with tarfile.open(sdist) as t: inside = [o.split('/', 1)[1] for o in t.getnames() if '/' in o]
    return inside, zipfile.ZipFile(wheel)


def test_sdist_can_build_a_wheel(built):
    assert {'settings.ini', 'README.md', 'constraints.txt', 'LICENSE', 'nbs/experiments/exctar.ipynb'} <= set(built[0])


def test_wheel_has_modules_assets_and_templates(built):
    names = set(built[1].namelist())
    modules = {f'merginguriel/{p.name}' for p in (ROOT/'merginguriel').glob('*.py')}
    assets = {str(p.relative_to(ROOT)) for p in (ROOT/'merginguriel/assets').rglob('*') if p.is_file()}
    templates = {f'merginguriel/templates/{p.name}' for p in (ROOT/'nbs/experiments').glob('*.ipynb')}
    assert assets and templates and modules | assets | templates <= names
    assert sum(built[1].getinfo(o).file_size for o in assets) <= 12e6


def test_wheel_declares_what_settings_ini_says(built):
    meta = next(o for o in built[1].namelist() if o.endswith('METADATA'))
    text = built[1].read(meta).decode()
    assert 'Requires-Dist: papermill>=2.7' in text and 'Provides-Extra: dev' in text and 'Provides-Extra: cluster' in text
    assert 'License-Expression: Apache-2.0' in text
