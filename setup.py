"Reads the requirements from settings.ini; everything else is in pyproject.toml"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

cfg = ConfigParser(delimiters=['='])
cfg.read(Path(__file__).parent/'settings.ini')
d = cfg['DEFAULT']
extras = {k.removesuffix('_requirements'): d[k].split() for k in d if k.endswith('_requirements')}
setup(install_requires=d['requirements'].split(), extras_require=extras)
