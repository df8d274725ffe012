"""Configuration files hold values only, and every key is a parameter of the template or the job they are for."""
from pathlib import Path
import pytest, yaml
from merginguriel.experiment import experiments
from merginguriel.runner import check_parameters, plan, template_parameters
from merginguriel.weightings import weighting_recipes

ROOT = Path(__file__).resolve().parent.parent
FILES = {'compatibility.yaml': 'compatibility'} # File -> template
GRIDS = {'sweep.yaml': 360} # File of a sweep -> runs

def test_every_file_is_for_a_template(): assert {p.name for p in (ROOT/'configs').iterdir()} == set(FILES) | set(GRIDS)

@pytest.mark.parametrize('file,template', FILES.items(), ids=FILES)
def test_keys_are_parameters_with_values_of_their_type(file, template):
    params = yaml.safe_load((ROOT/'configs'/file).read_text(encoding='utf-8'))
    check_parameters(template, params)
    with pytest.raises(ValueError, match='unknown parameter'): check_parameters(template, params | dict(num_languages=5))
    assert f'papermill nbs/experiments/{template}.ipynb' in (ROOT/'configs'/file).read_text(encoding='utf-8')

@pytest.mark.parametrize('file,runs', GRIDS.items(), ids=GRIDS)
def test_a_grid_is_laid_out_in_full(file, runs, tmp_path):
    p = plan(ROOT/'configs'/file, tmp_path)
    assert len(p.runs) == runs and p.notices == [] and f'merginguriel sweep configs/{file}' in (ROOT/'configs'/file).read_text(encoding='utf-8')

def test_the_ablation_is_one_that_can_run():
    o = {k: v[1] for k, v in template_parameters('compatibility').items()} | yaml.safe_load((ROOT/'configs/compatibility.yaml').read_text())
    assert {'similarity', 'uniform', 'tv', 'tv shuffled', 'cka', 'cka shuffled'} <= set(weighting_recipes(o['measures'], o['shuffles']))
    for target in o['targets'].split(','):
        e, = experiments('0', '', o['method'], '', candidates=o['candidates'], target=target, k=o['k'], similarity=o['similarity'],
            include_target=o['include_target'], weighting=o['weighting'])
        assert e.config()['contract']['touched'] == ['none'] and target in e.candidates and set(o['pair_targets'].split(',')) <= set(o['targets'].split(','))
