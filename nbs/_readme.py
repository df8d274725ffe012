"nbconvert configuration that makes README.md from nbs/index.ipynb: `jupyter nbconvert --config nbs/_readme.py`"
import re
from pathlib import Path
from nbconvert.preprocessors import Preprocessor

root = Path(__file__).parent.parent


class Readme(Preprocessor):
    "Links that are relative to nbs/ become relative to the repository; code cells are for the site"
    def preprocess(self, nb, resources):
        nb.cells = [c for c in nb.cells if c.cell_type == 'markdown']
        for c in nb.cells: c.source = re.sub(r'\]\((?!https?:|#|mailto:)(\./)?', '](nbs/', c.source)
        return nb, resources


c = get_config()  # noqa: F821  nbconvert defines it
c.NbConvertApp.notebooks = [str(root/'nbs/index.ipynb')]
c.NbConvertApp.export_format = 'markdown'
c.NbConvertApp.output_base = 'README'
c.FilesWriter.build_directory = str(root)
c.MarkdownExporter.preprocessors = [Readme]
