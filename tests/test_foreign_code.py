"""Nothing that takes a model runs Python that lies beside it, asks for permission, or reads an answer from a pipe. A checkpoint whose
code would leave a mark is given to every such entry, once for each class that `auto_map` can name."""
import inspect, json, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from merginguriel.cli import main
from merginguriel.core import IncompatibleError
from merginguriel.toy import toy_base, toy_sources

ROOT = Path(__file__).resolve().parent.parent
CLASSES = dict(AutoConfig='config.json', AutoModel='config.json', AutoModelForSequenceClassification='config.json',
    AutoTokenizer='tokenizer_config.json', AutoImageProcessor='preprocessor_config.json')


def poison(folder, kind, mark, model_type=None):
    "Let `folder` name code for `kind` that writes the file `mark` when it is imported"
    (folder/'mine.py').write_text(f"open({str(mark)!r}, 'w').close()\nclass Mine: pass\n")
    p = folder/CLASSES[kind]
    said = json.loads(p.read_text()) if p.exists() else {}
    value = ['mine.Mine', 'mine.Mine'] if kind == 'AutoTokenizer' else 'mine.Mine'
    said['auto_map'] = {kind: value}
    if model_type: said['model_type'] = model_type
    p.write_text(json.dumps(said))
    return folder


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    d = tmp_path_factory.mktemp('code')
    return d, toy_base(d/'base'), toy_sources(d/'models')


def evil_copy(source, d, kind, model_type=None):
    return poison(Path(shutil.copytree(source, d/'evil')), kind, d/'mark', model_type)


COMMANDS = {
    'finetune': 'finetune --base {evil} --locale sq-AL --dataset toy --out {d}/out --epochs 1',
    'evaluate': 'evaluate {evil} --locale sq-AL --dataset toy',
    'nxn': 'nxn sq-AL={evil} --dataset toy --out {d}/m.csv --bank {d}/bank',
    'match-base': 'match-base {evil} {model} --out {d}/out',
    'match-base reference': 'match-base {base} {evil} --out {d}/out',
    'merge source': 'merge {d}/out --base {base} --sources de-DE={evil},en-US={model}',
    'merge base': 'merge {d}/out --base {evil} --sources de-DE={model},en-US={model}',
    'audit': 'audit {evil} --base {base} --sources de-DE={model},en-US={model}',
    'bases': 'bases fit {d}/out --base {evil} --sources de-DE={model},en-US={model} --n-bases 1',
    'compat': 'compat --models-dir {d} --pretrained {evil} --output-dir {d}/out --dataset toy --metric cka',
    'run': 'run exctar --target sq-AL --dataset toy --candidates de-DE,en-US --k 1 --base {evil} --out {d}/runs',
}
LOADS = {'finetune', 'evaluate', 'nxn', 'match-base', 'run'} # These read the folder with transformers, so they must refuse it


@pytest.mark.parametrize('command,kind', [(c, k) for c in COMMANDS for k in CLASSES if k != 'AutoImageProcessor'
    and (c, k) not in [('run', o) for o in list(CLASSES)[1:]]]) # One kernel is enough
def test_no_command_runs_it(world, tmp_path, monkeypatch, capsys, command, kind):
    d, base, models = world
    whole = command in ('evaluate', 'nxn', 'match-base reference', 'merge source', 'audit')
    evil = evil_copy(models['de-DE'] if whole else base, tmp_path, kind, 'mine' if kind == 'AutoConfig' else None)
    argv = COMMANDS[command].format(evil=evil, d=tmp_path, base=base, model=models['en-US']).split()
    asked = []
    monkeypatch.setattr('builtins.input', lambda *a: asked.append(a) or 'y')
    monkeypatch.chdir(tmp_path)
    code, said = main(argv), capsys.readouterr().err.strip()
    assert not asked and not (tmp_path/'mark').exists()
    if command not in LOADS: return
    assert code == 2 and CLASSES[kind] in said.splitlines()[-1] and 'never run' in said


def test_a_piped_yes_is_not_read(world, tmp_path):
    d, base, models = world
    evil = evil_copy(models['de-DE'], tmp_path, 'AutoConfig', 'mine')
    code = f"from merginguriel.cli import main; raise SystemExit(main(['evaluate', {str(evil)!r}, '--locale=sq-AL', '--dataset=toy']))"
    r = subprocess.run([sys.executable, '-c', code], input='y\n'*20, capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 2 and 'never run' in r.stderr and not (tmp_path/'mark').exists()
    assert 'y/N' not in r.stdout+r.stderr


def entries(d, base, models):
    "Name -> a call of a public function on a folder"
    import torch
    from merginguriel import adapter, base_model, evaluate, gradient, images, loading, pictures, train
    from merginguriel.data import load_intents
    text = load_intents('toy', 'sq-AL', 'dev')
    return dict(
        load_classifier=train.load_classifier, refuse_code=loading.refuse_code, blank_classifier=gradient.blank_classifier,
        add_head=lambda p: base_model.add_head(p, ['a', 'b'], out=d/'o1'),
        match_base=lambda p: base_model.match_base(p, models['en-US'], out=d/'o2'),
        predict=lambda p: evaluate.predict(p, text), finetune=lambda p: train.finetune(p, text, d/'o3', epochs=1),
        nxn=lambda p: evaluate.nxn({'sq-AL': p}, {'sq-AL': text}, d/'bank'),
        image_classifier=lambda p: images.image_classifier(p),
        hub_task=lambda p: pictures.hub_task('x', str(d), p),
        **{f'from_folder {k}': lambda p, k=k: loading.from_folder(k, p) for k in CLASSES})


@pytest.mark.parametrize('kind', list(CLASSES))
def test_no_function_runs_it(world, tmp_path, monkeypatch, kind):
    d, base, models = world
    asked = []
    monkeypatch.setattr('builtins.input', lambda *a: asked.append(a) or 'y')
    calls = entries(tmp_path, base, models)
    for name, call in calls.items():
        evil = evil_copy(models['de-DE'], tmp_path, kind)
        with pytest.raises(IncompatibleError, match=CLASSES[kind].replace('.', r'\.')) as e: call(evil)
        assert 'never run' in str(e.value) and not asked and not (tmp_path/'mark').exists(), name
        shutil.rmtree(evil)


def test_everything_is_loaded_in_one_place():
    "transformers' own doors are opened by `merginguriel.loading` alone, and pickles never without `weights_only`"
    found = {p.name: p.read_text() for p in (ROOT/'merginguriel').glob('*.py')}
    assert {n for n, s in found.items() if re.search(r'\.from_pretrained\(|\bAuto\w+\.from_config\(', s)} == {'loading.py'}
    for n, s in found.items():
        for o in re.finditer(r'torch\.load\((.*)\)', s): assert 'weights_only=True' in o[1], (n, o[0])
    assert inspect.getsource(__import__('merginguriel.loading').loading.from_folder).count('trust_remote_code=False') == 1
