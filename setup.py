"Reads the requirements from settings.ini and copies the experiment templates into the package; the rest is in pyproject.toml"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
cfg = ConfigParser(delimiters=['='])
cfg.read(root/'settings.ini')
d = cfg['DEFAULT']
extras = {k.removesuffix('_requirements'): d[k].split() for k in d if k.endswith('_requirements')}


class build_with_templates(build_py):
    "nbs/experiments/*.ipynb travel in the wheel as merginguriel/templates/"
    def run(self):
        super().run()
        if self.editable_mode: return
        dest = Path(self.build_lib)/'merginguriel/templates'
        self.mkpath(str(dest))
        for p in sorted((root/'nbs/experiments').glob('*.ipynb')): self.copy_file(str(p), str(dest/p.name))


setup(install_requires=d['requirements'].split(), extras_require=extras, cmdclass={'build_py':build_with_templates})
