"""Every command runs on toy models, its help is the comments beside the parameters and loads nothing heavy, and what is wrong
with what was typed is one line on stderr and exit code 2."""
import importlib, inspect, json, os, re, signal, subprocess, sys, time
from pathlib import Path
import pandas as pd, pytest, torch, warm
from fastcore.docments import docments
from merginguriel import __version__
from merginguriel.cli import commands, main, parser
from merginguriel.runner import template_parameters, templates
from merginguriel.store import Store
from merginguriel.toy import toy_base, toy_sources

ROOT = Path(__file__).resolve().parent.parent
LISTED = ['demo', 'run', 'templates', 'finetune', 'evaluate', 'nxn', 'finetune-all', 'select', 'merge', 'audit', 'match-base', 'bases', 'compat', 'sweep', 'report', 'diff', 'import-legacy']


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    "Help is broken at hyphens too, so that no line may be full"
    monkeypatch.setenv('COLUMNS', '10000')


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    "A toy base and three toy classifiers"
    out = tmp_path_factory.mktemp('toy')
    toy_base(out/'base')
    toy_sources(out/'models')
    return out


@pytest.fixture
def here(toy, tmp_path, tmp_path_factory, monkeypatch):
    "An empty folder with the toy models in it, a cache of its own, and kernels that have loaded torch"
    for o in ('base', 'models'): (tmp_path/o).symlink_to(toy/o)
    monkeypatch.setenv('MERGINGURIEL_CACHE', str(tmp_path/'cache'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('JUPYTER_PATH', warm.kernel(tmp_path_factory.mktemp('jupyter')))
    monkeypatch.delenv('MERGINGURIEL_TRACEBACK', raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(text, capfd):
    "Exit code, stdout and stderr of a command line"
    code = main(text.split())
    return code, *capfd.readouterr()


def error(text, capfd):
    "The one line on stderr of a command line that must fail"
    code, out, err = typed(text, capfd)
    assert code == 2 and err.count('\n') == 1 and err.startswith(f'merginguriel {text.split()[0]}: '), (code, out, err)
    return err


def program(*args, **env):
    "The console script's own call, in another process"
    code = 'import sys; from merginguriel.cli import main; sys.argv[0]="merginguriel"; sys.exit(main())'
    return subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, timeout=120, env=os.environ|env)


# ---- help

def test_the_commands_are_those_that_exist(capfd):
    assert list(commands) == LISTED
    code, out, _ = typed('--help', capfd)
    assert code == 0
    assert [re.match(r' {2}(\S+) ', o)[1] for o in out.splitlines() if o.startswith('  ')] == LISTED
    for f in commands.values(): assert f.__doc__ in out
    assert main([]) == 2
    assert typed('--version', capfd)[1].endswith(__version__+'\n')


def squeezed(text): return ' '.join(text.split())

@pytest.mark.parametrize('name', LISTED)
def test_help_is_the_comments(name, capfd):
    code, out, err = typed(f'{name} --help', capfd)
    assert code == 0 and err == '' and '--traceback' in out
    for k, o in docments(commands[name], full=True, returns=False).items():
        if o.kind != inspect.Parameter.VAR_KEYWORD: assert o.docment and squeezed(o.docment) in squeezed(out), k


BORROWED = [('finetune', 'train.TrainOptions', 'epochs lr head_lr anchor batch_size warmup patience'),
    ('finetune', 'train.finetune', 'seed dtype'), ('finetune-all', 'experiment.Experiment', 'base dataset halves n_train'), ('finetune', 'data.load_intents', 'locale'),
    ('evaluate', 'evaluate.predict', 'batch_size max_length'), ('nxn', 'evaluate.nxn', 'split'),
    ('select', 'experiment.Experiment', 'target k include_target weighting'), ('select', 'selection.SelectionOptions', 'temperature'),
    ('merge', 'merge.merge', 'method head seed replace'), ('audit', 'audit.audit', 'exclude digests'), ('match-base', 'base_model.match_base', 'out seed new_head'),
    ('sweep', 'runner.run_all', 'executor workers retry retries timeout limit num_gpus'), ('sweep', 'runner.plan', 'out store'),
    ('compat', 'compute_compatibility_matrix.compute_compatibility_matrix', 'models_dir pretrained metric seed layer estimator n')]

@pytest.mark.parametrize('name,place,params', BORROWED)
def test_help_is_the_comments_of_the_function_that_does_the_work(name, place, params, capfd):
    "As `docments` reads them from the imported function, with its types and defaults"
    module, f = place.split('.')
    docs = docments(getattr(importlib.import_module(f'merginguriel.{module}'), f), full=True, returns=False)
    out = squeezed(typed(f'{name} --help', capfd)[1])
    known = {a.dest: a for a in parser(name)._actions}
    for k in params.split():
        assert squeezed(docs[k].docment.replace('None:', 'not given:')) in out and f"--{k.replace('_', '-')}" in out
        assert known[k].required == (docs[k].default is inspect.Parameter.empty)
        if place != 'train.TrainOptions' and not known[k].required: assert known[k].default == docs[k].default
        if docs[k].anno in (int, float): assert known[k].type == docs[k].anno


@pytest.mark.parametrize('name', sorted(templates()))
def test_help_of_a_template_is_its_parameters_cell(name, capfd):
    out = squeezed(typed(f'run {name} --help', capfd)[1])
    for k, (kind, default, comment) in template_parameters(name).items():
        assert f"--{k.replace('_', '-')}" in out
        if k != 'out': assert squeezed(comment) in out

def test_run_help_lists_the_templates(capfd):
    out = typed('run --help', capfd)[1]
    assert squeezed('Templates: '+', '.join(templates())) in squeezed(out)
    assert [o.split()[0] for o in typed('templates', capfd)[1].splitlines()] == list(templates())


def test_help_is_light():
    "Nothing that takes seconds to import, for any command"
    code = f"""
import sys
from merginguriel.cli import main
for o in {LISTED!r} + ['run exctar']: assert main([*o.split(), '--help'])==0
print(*[o for o in ('torch','transformers','datasets','pandas','scipy','sklearn','matplotlib','papermill') if o in sys.modules], file=sys.stderr)
"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert r.returncode == 0 and r.stderr.strip() == '', r.stderr


# ---- each command

def test_finetune_evaluate_and_nxn(here, capfd):
    code, out, _ = typed('finetune --locale sq-AL --out mine/sq-AL --base base --dataset toy --epochs 2 --lr .02', capfd)
    record = json.loads((here/'mine/sq-AL/training_record.json').read_text())
    assert code == 0 and (record['options']['epochs'], record['options']['lr'], record['options']['batch_size']) == (2, .02, 16)
    assert f"dev accuracy {record['history'][record['best_epoch']-1]['dev_accuracy']:.4f} in epoch {record['best_epoch']} of 2" in out

    code, out, _ = typed('evaluate mine/sq-AL --locale sq-AL --dataset toy --split dev', capfd)
    value = float(re.fullmatch(r'sq-AL dev: accuracy (\S+) \[\S+, \S+\] \(n=48\)\n', out)[1])
    assert code == 0 and value == pytest.approx(record['history'][record['best_epoch']-1]['dev_accuracy'], abs=1e-4)

    assert typed('nxn sq-AL=mine/sq-AL,en-US=models/en-US --dataset toy --out nxn.csv --locales sq-AL,vi-VN --bank bank', capfd)[0] == 0
    m = pd.read_csv('nxn.csv', index_col=0)
    assert (m.index.name, list(m.index), list(m)) == ('source', ['sq-AL', 'en-US'], ['sq-AL', 'vi-VN'])
    assert m.loc['sq-AL', 'sq-AL'] == pytest.approx(value, abs=1e-4)


def test_finetune_all(here, capfd, monkeypatch):
    "Seed by seed, in the order given; an experiment finds what was trained, and a second call trains nothing"
    text = 'finetune-all --locales sq-AL,en-US --seeds 0,1 --halves --base toy --dataset toy --epochs 1'
    assert 'say where the models go' in error(text, capfd)
    monkeypatch.setenv('MERGINGURIEL_MODELS', str(here/'kept'))
    code, out, _ = typed(text, capfd)
    assert code == 0
    said = [re.match(r'(\S+), seed (\d): dev accuracy [\d.]+ in epoch 1 of 1, [\d.]+ minutes in fp32 on cpu; (\d) of 4, about \d+ minutes left', o)
        for o in out.splitlines()]
    assert [o.groups() for o in said] == [('sq-AL','0','1'), ('en-US','0','2'), ('sq-AL','1','3'), ('en-US','1','4')]
    from merginguriel.experiment import Experiment
    e = Experiment('sw-KE', dataset='toy', base='toy', seed=1, halves=True, options=dict(epochs=1))
    path = e.train('en-US', here/'runs')
    assert path.parent == here/'kept' and not (here/'runs').exists()
    record = json.loads((path/'training_record.json').read_text())
    assert set(map(int, record['ids'].split())) == set(e.dataset_of('en-US', 'train')['id'][:])
    before = {p: p.stat().st_mtime_ns for p in (here/'kept').glob('*/model.safetensors')}
    assert typed(text, capfd)[0] == 0 and len(before) == 4
    assert before == {p: p.stat().st_mtime_ns for p in (here/'kept').glob('*/model.safetensors')}
    assert 'did you mean' in error(text.replace('en-US', 'en-SU'), capfd)


def test_finetune_all_goes_on_where_it_was_killed(here, capfd):
    "Killed in the middle of a model, and refused while another process trains"
    args = 'finetune-all --models kept --locales sq-AL,en-US --base toy --dataset toy --epochs 40'.split()
    code = 'import sys; from merginguriel.cli import main; sys.exit(main(sys.argv[1:]))'
    p = subprocess.Popen([sys.executable, '-c', code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.time()+60
        while not list((here/'kept').glob('.en-US*.state')) and p.poll() is None and time.time() < until: time.sleep(.005)
        busy = error(' '.join(args), capfd)
    finally:
        p.kill()
        p.communicate()
    assert p.returncode == -signal.SIGKILL and 'another process is training into kept' in busy
    first = next((here/'kept').glob('sq-AL*/model.safetensors'))
    before, state = first.stat().st_mtime_ns, next((here/'kept').glob('.en-US*.state'))
    done = len(torch.load(state, weights_only=True)['history'])
    code, out, _ = typed(' '.join(args), capfd)
    assert code == 0 and first.stat().st_mtime_ns == before and not state.exists() and 1 <= done < 40
    assert out.count('\n') == 2 and len(list((here/'kept').glob('*/training_record.json'))) == 2


def test_finetune_on_the_shipped_base(here, capfd):
    "`mini` is the default, with the options it recommends where none is given"
    texts = [(f'{a} {b}', b) for b in ('lights', 'music') for a in 'please now my the'.split()]
    for split in ('train', 'dev'):
        Path('data').mkdir(exist_ok=True)
        pd.DataFrame([(t, l) for t, l in texts], columns=['text', 'label']).to_csv(f'data/{split}.csv', index=False)
    assert typed('finetune --locale cy-GB --out m --dataset data --epochs 1', capfd)[0] == 0
    o = json.loads(Path('m/training_record.json').read_text())['options']
    assert (o['epochs'], o['lr'], o['head_lr']) == (1, 1e-3, 2e-3)


def write_nxn(split='dev'):
    head = 'source' if split == 'dev' else f'source ({split})'
    Path('nxn.csv').write_text(f'{head},sq-AL,en-US\nen-US,.6,.9\nsq-AL,.8,.5\nde-DE,.3,.7\nvi-VN,.1,.2\n')

def weights(out): return {k: float(v) for k, v in re.findall(r'^(\w\w-\w\w) +([\d.]+) ', out, re.M)}

def test_select(here, capfd):
    code, out, _ = typed('select --target cy-GB --k 3 --candidates en-US,de-DE,fr-FR,ja-JP --weighting uniform', capfd)
    assert code == 0 and weights(out) == {'de-DE': .3333, 'en-US': .3333, 'fr-FR': .3333}
    assert 'ExcTar, zero-shot; touched of cy-GB: none' in out
    write_nxn()
    code, out, _ = typed('select --target sq-AL --k 2 --similarity real --nxn nxn.csv --include-target --target-weight .1', capfd)
    assert code == 0 and weights(out) == {'en-US': .6, 'de-DE': .3, 'sq-AL': .1} # the target's column: .6 and .3
    assert 'IncTar, supervised; touched of sq-AL: labelled_dev, target_model' in out

def test_select_keeps_the_contract(here, capfd):
    write_nxn()
    assert 'ExcTar may not see labelled_dev' in error('select --target sq-AL --k 2 --similarity real --nxn nxn.csv', capfd)
    write_nxn('test')
    assert 'IncTar may not see labelled_test' in error('select --target sq-AL --k 2 --similarity real --nxn nxn.csv --include-target', capfd)
    code, out, _ = typed('select --target sq-AL --k 2 --similarity real --nxn nxn.csv --oracle', capfd)
    assert code == 0 and weights(out) == {'en-US': .6667, 'de-DE': .3333} and 'ExcTar, oracle; touched of sq-AL: labelled_test' in out

def test_a_matrix_of_test_accuracies_says_so(here, capfd):
    assert typed('nxn models --dataset toy --out nxn.csv --locales sq-AL --split test --bank bank', capfd)[0] == 0
    assert pd.read_csv('nxn.csv', index_col=0).index.name == 'source (test)'


def test_merge(here, capfd):
    code, out, _ = typed('merge merged --base base --sources models --method ties --hp density=.1 --weights de-DE=.2,en-US=.5,sq-AL=.3', capfd)
    r = json.loads((here/'merged/merge_record.json').read_text())
    cost, said = out.split('\n', 1)
    assert code == 0 and said.startswith('ties of 3 sources, head average\n') and 'written to merged' in out
    assert cost.startswith('ties: reads ') and 'in 3 passes, writes ' in cost and cost.endswith(' CPU seconds')
    assert r['hyperparameters']['density'] == .1 and {o['name']: o['weight'] for o in r['sources']} == {'de-DE': .2, 'en-US': .5, 'sq-AL': .3}
    code, out, _ = typed('merge two --base base --sources en-US=models/en-US,de-DE=models/de-DE --weights .25,.75 --head best', capfd)
    r = json.loads((here/'two/merge_record.json').read_text())
    assert code == 0 and (r['method'], r['head']['source'], [o['weight'] for o in r['sources']]) == ('linear', 'de-DE', [.25, .75])

def test_merge_from_a_recipe(here, capfd):
    models = ''.join(f'  - {{model: models/{k}, parameters: {{weight: {w}}}}}\n' for k, w in [('de-DE', .2), ('en-US', .5), ('sq-AL', .3)])
    (here/'r.yaml').write_text(f'merge_method: ties\nbase_model: base\nparameters: {{density: 0.1}}\nmodels:\n{models}')
    code, out, _ = typed('merge merged --config r.yaml --head best', capfd)
    r = json.loads((here/'merged/merge_record.json').read_text())
    assert code == 0 and 'note: mergekit merges the classifier head' in out and 'ties of 3 sources, head best\n' in out
    assert out.startswith('r.yaml: reads ') and 'CPU seconds' in out.splitlines()[0]
    assert (r['hyperparameters']['scope'], r['recipe']['merge_method'], r['head']['source']) == ('tensor', 'ties', 'en-US')
    for more, said in [('--base base', 'leave out --base'), ('--method ties --hp density=.1', 'leave out --hp, --method')]:
        assert said in error(f'merge again --config r.yaml {more}', capfd)
    assert not (here/'again').exists()


def test_merge_of_adapters(here, capfd):
    from merginguriel.base_model import head_keys, model_labels
    from merginguriel.checkpoint import open_checkpoint, save_checkpoint
    c, q = open_checkpoint(here/'models/de-DE'), 'roberta.encoder.layer.0.attention.self.query'
    for i, k in enumerate(('one', 'two')):
        (here/'adapters'/k).mkdir(parents=True)
        (here/'adapters'/k/'adapter_config.json').write_text(json.dumps(dict(peft_type='LORA', r=1, lora_alpha=i+1)))
        factors = {f'{q}.lora_A.weight': c.read(f'{q}.weight')[:1], f'{q}.lora_B.weight': c.read(f'{q}.weight')[:, :1]}
        t = factors | {o: c.read(o) for o in head_keys(c)}
        save_checkpoint({f'base_model.model.{o}': v for o, v in t.items()}, here/'adapters'/k/'adapter_model.safetensors')
    code, out, _ = typed('merge merged --base base --sources adapters --labels lights,music', capfd)
    assert code == 0 and '\nlinear of 2 sources' in out and model_labels(here/'merged') == ['lights', 'music']
    delta = open_checkpoint(here/'merged').read(f'{q}.weight')-open_checkpoint(here/'base').read(f'{q[8:]}.weight')
    want = 1.5*factors[f'{q}.lora_B.weight']@factors[f'{q}.lora_A.weight'] # Scales 1 and 2
    assert (delta-want).abs().max() < 1e-5


def test_audit(here, capfd):
    "0 where nothing is wrong, 1 where something is, and the report as JSON"
    assert typed('merge merged --base base --sources models --weights .5,.3,.2', capfd)[0] == 0
    code, out, err = typed('audit merged --base base --sources models --digests --json r.json', capfd)
    assert code == 0 and err == '' and 'the coefficients are what was meant, linear by its record' in out
    r = json.loads(Path('r.json').read_text())
    assert r['warnings'] == [] and r['table']['body']['de-DE'] == pytest.approx(.5) and r['head']['status'] == 'average'
    pairs = '--sources de-DE=models/de-DE,en-US=models/en-US,sq-AL=models/sq-AL'
    code, out, err = typed(f'audit merged --base base {pairs} --weights .3,.5,.2 --json r.json', capfd)
    assert code == 1 and err == '' and "warning, swapped: de-DE and en-US have each other's coefficient" in out
    assert [o['kind'] for o in json.loads(Path('r.json').read_text())['warnings']] == ['swapped']
    code, out, _ = typed(f'audit merged --base models/de-DE {pairs} --exclude embeddings', capfd)
    assert code == 1 and 'embeddings' not in out and 'warning, wrong base: de-DE is the base' in out
    r = program('audit', 'merged', '--base', 'base', '--sources', 'models', '--weights', '.2,.3,.5')
    assert r.returncode == 1 and r.stderr == '' and 'swapped' in r.stdout

def test_match_base(here, capfd):
    code, out, _ = typed('match-base base models/sq-AL --out matched', capfd)
    assert code == 0 and out.startswith('matched\ndrawn from the seed: classifier.dense.bias,')
    assert (here/'matched/model.safetensors').is_file()


def test_bases(here, capfd):
    "Fit, look at, make models from, and extend by a task"
    code, out, err = typed('bases fit kept --base base --sources de-DE=models/de-DE,en-US=models/en-US --n-bases 1 --kind pca', capfd)
    assert code == 0 and err == '' and 'Bases(1 pca and the mean for 2 tasks)' in out and 'lost: 0.0000' in out
    assert typed('bases show kept', capfd)[1] == out
    for o in ('expand kept --task de-DE --out a', 'add-tasks kept --tasks de-DE=.5,en-US=.5 --out b', 'add-tasks kept --scale .5 --out c',
        'negate kept --task en-US --scale .1 --out d', 'add-bases kept --scale .3 --out e', 'add-tasks kept --tasks de-DE,en-US --scale .5 --out f'):
        assert typed(f'bases {o}', capfd)[:2] == (0, f'written to {o[-1]}\n')
    from merginguriel.checkpoint import open_checkpoint
    mean = [open_checkpoint(f'models/{o}').read('classifier.dense.weight') for o in ('de-DE','en-US')]
    for o in 'bcf': assert abs(open_checkpoint(o).read('classifier.dense.weight')-sum(mean)/2).max() < 1e-6
    code, out, _ = typed('bases add kept --name sq-AL --source models/sq-AL --out more', capfd)
    assert code == 0 and 'for 3 tasks' in typed('bases show more', capfd)[1]
    line = 'bases fit two --base base --sources models --n-bases 2 --kind cluster --hp by=linkage,inner=ties,density=.5'
    assert typed(line, capfd)[0] == 0 and 'Bases(2 cluster for 3 tasks)' in typed('bases show two', capfd)[1]


@pytest.mark.parametrize('action,function,params', [('fit', 'fit_bases', 'n_bases kind seed head exclude'), ('expand', 'expand', 'task'),
    ('add-tasks', 'add_tasks', 'scale head'), ('add-bases', 'add_bases', 'scale outer head'), ('negate', 'negate', 'task scale head'),
    ('add', 'add', 'name source threshold')])
def test_help_of_an_action_of_bases_is_the_comments_of_its_function(action, function, params, capfd):
    from merginguriel import bases
    docs = docments(getattr(bases.Bases, function, None) or bases.fit_bases, full=True, returns=False)
    out = squeezed(typed(f'bases {action} --help', capfd)[1])
    for k in params.split(): assert f"--{k.replace('_', '-')}" in out and squeezed(docs[k].docment.replace('None:', 'not given:')) in out


def test_run_demo_and_report(here, capfd):
    "The main job on toy data: from one line typed to the sentence, and its rows to a table"
    code, out, _ = typed('run exctar --target sq-AL --world toy --k 1 --methods linear --out r', capfd)
    assert code == 0 and out.startswith('executed notebook: r/sq-AL-toy-exctar.ipynb\n') and Path('r/sq-AL-toy-exctar.ipynb').is_file()
    assert 'sq-AL, ExcTar (parallel base; touched: base: parallel text of the target): linear of ' in out
    code, out, _ = typed('demo --target sq-AL --world toy --out r', capfd)
    assert code == 0 and 'sq-AL, ExcTar (parallel base; touched: base: parallel text of the target): linear of ' in out
    code, out, err = typed('report --store r/store.sqlite --target sq-AL', capfd)
    assert code == 0 and out.count('| ExcTar, zero-shot, toy, toy, uriel, proportional, k=') == 2
    own = re.findall(r'^\| (\w+) \| sq-AL \| test \| own \| baseline \| (\S+) \| (\S+) \| (\S+) \| 1 \| 0.000 \| 96 \| (\w{8}) \|$', out, re.M)
    assert len(own) == 2 and own[0][1:4] == own[1][1:4] and own[0][2] < own[0][1] < own[0][3]
    assert 'holds no accuracy of de-DE' in error('report --store r/store.sqlite --target de-DE', capfd)
    one = typed(f'report --store r/store.sqlite --recipe {own[0][0]}', capfd)[1]
    assert own[0][4] in one and own[1][4] not in one and own[1][0] not in one
    code, out, _ = typed(f'report --store r/store.sqlite --recipe {own[0][0]} --format csv --out tables', capfd)
    assert code == 0 and out == 'recipes, accuracies, gains, means, runs written to tables\n' # Ranks are over targets
    assert Path('tables/accuracies.csv').read_text().startswith('recipe,target,split,name,kind,accuracy,')
    assert "format is 'markdown', 'latex' or 'csv'; got 'html'" in error('report --store r/store.sqlite --format html', capfd)
    a, b = (o[4] for o in own)
    code, out, _ = typed(f'diff {a}/linear {b}/linear --store r/store.sqlite', capfd)
    assert code == 0 and out.startswith('| field | a | b |') and f'{a} and {b} differ in ' in out and 'k (' in out and 'the same 96 items' in out
    assert f'run {a} has no \'tise\'' in error(f'diff {a}/tise {b} --store r/store.sqlite', capfd)


def test_import_legacy(tmp_path, monkeypatch, capfd):
    "A results folder and what is refused: one line for all of it, and nothing written"
    monkeypatch.chdir(tmp_path)
    for n, right in (('baseline_sq-AL_xlm-roberta-base', 86), ('merging_ties_URIEL_sq-AL_xlm-roberta-base_5lang_ExcTar', 66)):
        Path(f'study/results/{n}').mkdir(parents=True)
        Path(f'study/results/{n}/results.json').write_text(json.dumps(dict(performance=dict(accuracy=right/100, correct_predictions=right, total_predictions=100))))
    code, out, _ = typed('import-legacy study --store s.sqlite', capfd)
    assert code == 0 and out.endswith('2 scores of 2 runs recorded in s.sqlite; 0 left out, as the table says\n')
    out = typed('report --store s.sqlite', capfd)[1]
    assert '| ties | merge | 0.660 | 0.563 | 0.745 | 1 | 0.000 | 100 |' in out # Wilson's interval of 66 in 100 is [.5626, .7454]
    Path('study/results/ties_5lang_sq-AL').mkdir()
    Path('study/results/ties_5lang_sq-AL/results.json').write_text('{}')
    assert '1 things in study are ambiguous, and nothing was imported: - results/ties_5lang_sq-AL/results.json: the name is none of' in error('import-legacy study --store t.sqlite', capfd)
    assert 'absent has no results.json' in error('import-legacy absent --store t.sqlite', capfd)


def test_report_averages_seeds(here, capfd):
    from merginguriel.store import Store
    o = dict(name='own', locale='cy-GB', split='test', metric='accuracy', n=10, low=.1, high=.9)
    for seed, value in ((0, .4), (1, .6)): Store('s.sqlite').record(dict(dataset='x', k=2, seed=seed, methods=['ties']), [o|dict(value=value)])
    Store('s.sqlite').record(dict(dataset='y', k=2, seed=0, methods=['ties']), [o|dict(value=.1)])
    out = typed('report --store s.sqlite', capfd)[1]
    assert '| own | baseline | 0.500 | 0.237 | 0.763 | 2 | 0.200 | 10 |' in out # 5 of 10: Wilson's interval is [.2366, .7634]
    assert '| x, k=2 | 1 | 2 | 0 | 2 |' in out and '| y, k=2 | 1 | 1 | 0 | 1 |' in out # targets, seeds, merges, scores


# ---- what is wrong with what was typed

ERRORS = [('frobnicate', 'no such command'), ('reprot', 'did you mean report?'), ('run', 'required: template'),
    ('run extcar', "unknown template 'extcar'; the templates are adamerging, bases, bases_text, bases_vision"), ('run none.ipynb', 'there is no notebook none.ipynb'),
    ('run exctar --targt cy-GB', 'unknown option --targt; did you mean --target?'), ('run exctar --n_tran 3', 'did you mean --n-train?'),
    ('run exctar --k three', "argument --k: invalid int value: 'three'"), ('run --target cy-GB exctar', 'unknown option --target'),
    ('finetune --out m', 'required: --locale'), ('finetune --locale cy-GB --out m --epoch 1', 'did you mean --epochs?'),
    ('finetune --locale xx-XX --out m --dataset toy --base base', "got 'xx-XX'"),
    ('finetune --locale sq-AL --out models --dataset toy --base base', 'models is a link to'),
    ('finetune --locale sq-AL --out m --dataset toy --base base --epochs 0', 'epochs is out of range'),
    ('finetune --locale sq-AL --out m --dataset toy --base absent/base', 'absent/base'),
    ('evaluate models/sq-AL --locale sq-AL --dataset nothing', "'nothing' is neither 'home'"), ('evaluate absent/m --locale sq-AL --dataset toy', 'absent/m'),
    ('evaluate models/sq-AL --locale sq-AL --dataset toy --split all', "the splits are"), ('evaluate models/sq-AL --locale cy-GB', 'label sets differ'),
    ('nxn base --out n.csv --dataset toy', 'base has no folder with a config.json'), ('nxn en-US= --out n.csv', 'name=value'),
    ('nxn a=b,a=c --out n.csv', 'a name twice'), ('nxn no=models/sq-AL --out n.csv --dataset toy', "'no'"),
    ('select --target cy --k 3', 'did you mean cy-GB'), ('select --target cy-GB --k 100', 'k=100, but 48 candidates'),
    ('select --target cy-GB --similarity typology', "similarity is 'uriel' or 'real'"), ('select --target cy-GB --similarity real', '--nxn'),
    ('select --target cy-GB --similarity real --nxn absent.csv --oracle', 'No such file or directory: absent.csv'),
    ('select --target cy-GB --features vibes', 'unknown feature set'), ('select --target cy-GB --legacy rows', 'legacy is some of'),
    ('select --target cy-GB --candidates en-US,zz-ZZ --k 1', "unknown locale 'zz-ZZ'"), ('select --target cy-GB --target-weight .5', 'include_target'),
    ('merge m --base base --sources models --method tise', "no merge method 'tise'; did you mean ties"),
    ('merge m --base base --sources models --method ties --hp density=20', 'got 20'), ('merge m --base base --sources models --hp densty=.1', 'densty'),
    ('merge m --base base --sources models --weights .5,.5', '2 weights for 3 sources'), ('merge m --base base --sources models --weights a,b,c', "'a'"),
    ('merge m --base base --sources models --weights nan,1,1', 'the weight of de-DE is nan'), ('merge models --base base --sources models', 'another folder'),
    ('merge m --base base --sources models --head mean', 'head is one of'), ('merge m --base base --sources en-US=absent', 'absent'),
    ('merge m --base base', 'needs --sources, or --config'), ('merge m --config absent.yaml', 'No such file or directory: absent.yaml'),
    ('audit models/sq-AL --sources models', 'required: --base'), ('audit absent --base base --sources models', 'no checkpoint at absent'),
    ('audit models/sq-AL --base base --sources models --weights .5,.5', 'one finite number for each of de-DE, en-US, sq-AL'),
    ('audit models/sq-AL --base base --sources models --digests', 'which the merged model does not have'),
    ('audit models/sq-AL --base base --sources models --exclude .', 'leaves none'), ('audit m --base base --source models', 'did you mean --sources?'),
    ('sweep absent.yaml', 'No such file or directory: absent.yaml'), ('sweep base/config.json', "unknown name"),
    ('sweep absent.yaml --executer ray', 'did you mean --executor?'), ('match-base base absent/m', 'absent/m'), ('bases shrink kept', 'the actions of bases are fit, show'), ('bases show absent', 'absent'),
    ('bases fit kept --base base --sources models --n-bases 4', 'from 1 to 3'), ('bases fit kept --base base --sources models --kind nmf', 'kind is one of'),
    ('bases fit kept --base base --sources models --n-bases 2 --hp step=3', "unexpected keyword argument 'step'"),
    ('bases fit kept --sources models --n-bases 2', 'required: --base'), ('bases expand kept --task x', 'required: --out'), ('report', 'no store at runs/store.sqlite'), ('report --store models', 'models is a folder'),
    ('report --store models/sq-AL/config.json', 'is not an SQLite file'), ('templates x', 'unrecognized arguments: x')]

@pytest.mark.parametrize('text,said', ERRORS, ids=[o[0] for o in ERRORS])
def test_what_is_wrong_is_one_line(text, said, here, capfd):
    before = sorted(p for p in here.iterdir() if p.name != 'cache')
    assert said in error(text, capfd)
    assert sorted(p for p in here.iterdir() if p.name != 'cache') == before, 'something was left'


def test_a_sweep_is_planned_done_and_continued(here, capfd, monkeypatch):
    "One of three runs fails, until what it needs is there and it is asked for again"
    (here/'clijobs.py').write_text('from pathlib import Path\nfrom merginguriel.grids import job\n@job\ndef square(x:int):\n'
        '    if x==3: Path("needed").read_text()\n'
        '    return [dict(name="m", locale="sq-AL", split="dev", metric="value", value=float(x*x))]\n')
    (here/'grid.yaml').write_text('job: clijobs:square\nparameters: {x: [1, 2, 3]}\n')
    monkeypatch.syspath_prepend(str(here))
    code, out, _ = typed('sweep grid.yaml --plan --workers 1', capfd)
    assert code == 0 and '3 runs, 3 pending' in out and '0.2 minutes with 1 worker' in out and not (here/'runs').exists()
    code, out, _ = typed('sweep grid.yaml --workers 1', capfd)
    assert code == 1 and '3 runs, 2 finished, 1 failed' in out and out.splitlines()[-1].endswith("No such file or directory: 'needed'")
    code, again, _ = typed('sweep grid.yaml --status', capfd)
    assert code == 1 and again.splitlines()[-1] == out.splitlines()[-1] and out.splitlines()[-1].startswith('failed ')
    (here/'needed').touch()
    assert typed('sweep grid.yaml --workers 1', capfd)[0] == 1
    code, out, _ = typed('sweep grid.yaml --workers 1 --retry', capfd)
    assert code == 0 and out.splitlines()[-1].endswith('3 runs, 3 finished')
    assert sorted(Store('runs/store.sqlite').scores(name='m').value) == [1, 4, 9]


def test_options_are_not_abbreviated_and_may_have_underscores(here, capfd):
    assert 'did you mean --target?' in error('select --targ cy-GB', capfd)
    code, out, _ = typed('select --target sq-AL --k 1 --candidates en-US --include_target --target_weight=.25', capfd)
    assert code == 0 and weights(out) == {'en-US': .75, 'sq-AL': .25}


def test_a_failing_template_says_where_it_stopped(here, capfd):
    e = error('run exctar --target xx-XX --world toy --out r', capfd)
    assert "ValueError: unknown locale 'xx-XX'" in e and 'of r/xx-XX-toy-exctar.failed.ipynb, which is executed up to there' in e
    cells = json.loads(Path('r/xx-XX-toy-exctar.failed.ipynb').read_text())['cells']
    assert any(o['output_type'] == 'error' for c in cells for o in c.get('outputs', []))


def test_the_traceback_is_shown_when_asked_for(here, capfd, monkeypatch):
    with pytest.raises(ValueError, match='unknown locale'): main(['select', '--target', 'cy', '--traceback'])
    monkeypatch.setenv('MERGINGURIEL_TRACEBACK', '1')
    with pytest.raises(ValueError, match='unknown locale'): main(['select', '--target', 'cy'])


def test_the_program(here):
    "Exit codes and streams as a shell sees them"
    r = program('select', '--target', 'cy-GB', '--k', '2')
    assert r.returncode == 0 and r.stderr == '' and 'touched of cy-GB: none' in r.stdout
    r = program('select', '--target', 'cy-GB', '--k', '0')
    assert r.returncode == 2 and r.stdout == '' and r.stderr.startswith('merginguriel select: k is the number of other sources') and r.stderr.count('\n') == 1
    r = program('select', '--target', 'cy', MERGINGURIEL_TRACEBACK='1')
    assert r.returncode == 1 and 'Traceback' in r.stderr


def test_the_script_is_declared():
    import tomllib
    scripts = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['scripts']
    assert scripts == {'merginguriel': 'merginguriel.cli:main'}
