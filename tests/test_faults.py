"""Workers, kernels and drivers that are killed, full disks, torn files, two drivers on one store: after each fault every finished
score is there once, the rest is done when the sweep is started again, and no half-written file is taken for a whole one.

The jobs are functions of a file that each test has beside its runs. The file `armed` arms a fault, and the run that meets it removes it."""
import contextlib, json, os, signal, sqlite3, subprocess, sys, textwrap, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import nbformat, pytest
from merginguriel.core import MerginGurielError
from merginguriel.runner import plan, run_all
from merginguriel.store import Store

ROOT = Path(__file__).resolve().parent.parent
JOBS = '''
import json, os, signal, time
from pathlib import Path
from merginguriel.grids import job

def once(path):
    "True for one caller, however many processes ask"
    try: os.unlink(path)
    except FileNotFoundError: return False
    return True

def score(i, more=0.): return [dict(name='m', locale='sq-AL', split='dev', metric='value', value=float(i)+more)]

@job
def plain(i:int, seconds:float=0.):
    time.sleep(seconds)
    return score(i)

@job
def dies(i:int, out='runs'):
    "The run 3 kills its process, once"
    if i==3 and once('armed'): os.kill(os.getpid(), signal.SIGKILL)
    return score(i)

@job
def poison(i:int):
    "The run 3 kills its process, always"
    if i==3: os.kill(os.getpid(), signal.SIGKILL)
    return score(i)

@job
def flaky(i:int, kind:str='io'):
    "The run 3 fails, once"
    if i==3 and once('armed'): raise dict(io=OSError(5, 'Input/output error'), code=ZeroDivisionError('no'))[kind]
    return score(i)

@job
def hangs(i:int):
    if i==3 and once('armed'): time.sleep(600)
    return score(i)

@job
def full(i:int, out='runs'):
    "A file of a megabyte, which does not fit while the limit is on"
    import resource
    from merginguriel.core import atomic_write
    if os.path.exists('armed'): resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
    with atomic_write(Path(out)/f'{i}.bin', 'wb') as f: f.write(bytes(1_000_000))
    return score(i)

@job
def merged(i:int, out='runs'):
    "Merge checkpoints of which the process dies while it writes, once"
    from merginguriel.checkpoint import open_checkpoint
    from merginguriel.merge import merge
    import merginguriel.core as core
    path = Path(out)/f'merged-{i}'
    if i==3 and os.path.exists('armed'):
        sync = os.fsync
        def fsync(fd): # The first flush of the checkpoint: its file is there, and not yet under its name
            if once('armed'): os.kill(os.getpid(), signal.SIGKILL)
            sync(fd)
        os.fsync = fsync
    if not (path/'merge_record.json').exists(): merge('base', {o:f'models/{o}' for o in ('de-DE','en-US')}, path)
    return score(i, len(open_checkpoint(path).digest()))

@job
def answers(model:str, out='runs'):
    "A number that depends on every logit of a model, by way of the bank"
    from merginguriel.data import load_intents
    from merginguriel.evaluate import banked
    p = banked(model, dict(dev=load_intents('toy', 'sq-AL', 'dev')), Path(out)/'bank')['dev']
    return [dict(name='m', locale='sq-AL', split='dev', metric='value', value=float(abs(p.logits).sum()))]

@job
def opens(model:str):
    "How many tensors a checkpoint has"
    from merginguriel.checkpoint import open_checkpoint
    c = open_checkpoint(model)
    return [dict(name=model, locale='sq-AL', split='dev', metric='value', value=float(sum(c.read(k).numel() for k in c)))]
'''
CELLS = '''
import os, signal
from pathlib import Path
from merginguriel.store import Store

Path('kernels').mkdir(exist_ok=True)
(Path('kernels')/str(os.getpid())).touch()
Store(store).record(dict(i=i, world='notebook'), [dict(name='m', locale='sq-AL', split='dev', metric='value', value=float(i))])

if i==1 and Path('armed').exists():
    Path('armed').unlink()
    {fault}

print('done', i)'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path/'faultjobs.py').write_text(JOBS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv('MERGINGURIEL_CACHE', str(tmp_path/'cache'))
    monkeypatch.delitem(sys.modules, 'faultjobs', raising=False)
    return tmp_path


def grid(job, n=8, **params): return dict(job=f'faultjobs:{job}', parameters=dict(i=list(range(n))) | params)

def lay_out(g): return plan(g, 'out')

def sweep(g, **kw): return run_all(lay_out(g), progress=False, **dict(workers=2) | kw)

def driver(g, **kw):
    "A driver of its own, which a test can kill; one that was started in the background would ignore SIGINT"
    code = f'import signal\nfrom merginguriel.runner import *\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nif __name__=="__main__": run_all(plan({g!r}, "out"), progress=False, **{dict(workers=2)|kw!r})'
    return subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True)

def rows(path='out/store.sqlite', **filter): return Store(path).scores(metric='value', **filter)

def finished(path='out/store.sqlite'): return len(rows(path)) if Path(path).exists() else 0

def wait(until, seconds=60):
    end = time.monotonic()+seconds
    while not until():
        assert time.monotonic() < end, 'nothing happened'
        time.sleep(.01)

def alive(process):
    "Running, and no zombie that nobody has waited for"
    import psutil
    with contextlib.suppress(psutil.NoSuchProcess): return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False

def whole(expected, path='out/store.sqlite'):
    "Every score once, the store sound, nothing claimed, no temporary file, and nothing left to do"
    assert sorted(rows(path).value) == sorted(expected)
    con = sqlite3.connect(path)
    try: assert con.execute('pragma integrity_check').fetchall() == [('ok',)] and con.execute('pragma foreign_key_check').fetchall() == []
    finally: con.close()
    assert len(Store(path).scores(name='run', metric='seconds')) == len(expected)
    assert list(Path(f'{path}.claims').iterdir()) == []
    assert not list(Path('out').rglob('*.failed.json')) and not list(Path('out').rglob('*.running.ipynb'))


# ---- workers

def test_a_worker_that_is_killed_costs_nothing_but_time(here):
    Path('armed').touch()
    t = sweep(grid('dies'))
    assert set(t.state) == {'finished'} and not Path('armed').exists()
    whole(range(8))

def test_workers_killed_from_outside(here):
    "One after the other while the sweep runs, as the system does when memory runs out"
    import psutil
    p = driver(grid('plain', 12, seconds=.1))
    killed = set()
    def kill_three():
        for o in psutil.Process(p.pid).children():
            with contextlib.suppress(psutil.Error):
                if 'spawn_main' in ' '.join(o.cmdline()) and o.pid not in killed and len(killed) < 3 and finished() > 2*len(killed):
                    o.kill()
                    killed.add(o.pid)
        return p.poll() is not None
    wait(kill_three)
    assert p.wait() == 0 and len(killed) == 3
    whole(range(12))

def test_a_run_that_always_kills_its_process_fails_alone(here):
    t = sweep(grid('poison'))
    bad = t[t.state == 'failed']
    assert list(bad.i) == [3] and 'SIGKILL' in bad.reason.iloc[0]
    assert sorted(rows().value) == [0, 1, 2, 4, 5, 6, 7]

def test_an_io_error_is_tried_again_and_an_error_of_the_code_is_not(here):
    Path('armed').touch()
    assert set(sweep(grid('flaky')).state) == {'finished'}
    Path('armed').touch()
    t = sweep(grid('flaky', kind='code'))
    assert t.reason.dropna().tolist() == ['ZeroDivisionError: no']
    assert sweep(grid('flaky', kind='code')).state.tolist().count('failed') == 1 # not again unless asked for
    assert set(sweep(grid('flaky', kind='code'), retry=True).state) == {'finished'}
    whole([*range(8)]*2)

def test_a_run_that_hangs_is_ended(here):
    Path('armed').touch()
    t = sweep(grid('hangs', 5), timeout=3)
    assert t[t.state == 'failed'].i.tolist() == [3] and 'no answer in 3 s' in t.reason.dropna().iloc[0]
    sweep(grid('hangs', 5), retry=True, timeout=60)
    whole(range(5))


# ---- the driver

def test_a_driver_that_is_killed_leaves_nothing_behind(here):
    import psutil
    g = grid('plain', 12, seconds=.2)
    p = driver(g)
    wait(lambda: finished() >= 3)
    workers = psutil.Process(p.pid).children(recursive=True)
    p.kill()
    p.wait()
    wait(lambda: not any(map(alive, workers)), 10) # they end with their driver
    before = finished()
    assert 3 <= before < 12
    kept = rows().created.tolist()
    t = sweep(g)
    assert set(t.state) == {'finished'} and rows().created.tolist()[:before] == kept # not done again
    whole(range(12))

@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_driver_that_is_interrupted(here, sig):
    g = grid('plain', 12, seconds=.2)
    p = driver(g)
    wait(lambda: finished() >= 2)
    p.send_signal(sig)
    p.wait(timeout=20)
    assert p.returncode != 0 and 2 <= finished() < 12
    sweep(g)
    whole(range(12))

def test_a_driver_killed_in_the_middle_of_a_store_write(here):
    code = f"""
        import os, signal
        from merginguriel.runner import *
        from merginguriel.store import Store
        put,seen = Store._put,[]
        def dying(self, con, h, row, *args):
            put(self, con, h, row, *args)
            seen.append(row[0])
            if seen.count('m')==3 and row[0]=='run': os.kill(os.getpid(), signal.SIGKILL) # a score is in, its run is not yet
        Store._put = dying
        if __name__=='__main__': run_all(plan({grid('plain')!r}, 'out'), workers=1, progress=False)"""
    p = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True)
    assert p.returncode == -signal.SIGKILL, p.stderr
    assert finished() == 2
    sweep(grid('plain'))
    whole(range(8))

def test_two_drivers_share_the_work(here):
    g = grid('plain', 16, seconds=.1)
    Store('out/store.sqlite')
    a, b = driver(g), driver(g)
    assert (a.wait(), b.wait()) == (0, 0)
    whole(range(16)) # a run that both did would be refused, since its costs differ

def test_a_driver_takes_over_what_another_had_claimed(here):
    g = grid('plain', 6, seconds=.3)
    a = driver(g, workers=1)
    wait(lambda: list(Path('out/store.sqlite.claims').glob('*')) if Path('out').exists() else False)
    assert 'running' in set(lay_out(g).table().state)
    b = driver(g, workers=1)
    time.sleep(.5)
    a.kill()
    a.wait()
    assert b.wait() == 0
    whole(range(6))


# ---- files

@pytest.fixture
def models(here):
    from merginguriel.toy import toy_base, toy_sources
    toy_base(here/'base')
    toy_sources(here/'models')
    return here/'models'

def test_a_worker_killed_in_the_middle_of_a_checkpoint_write(models):
    Path('armed').touch()
    t = sweep(grid('merged', 4), workers=1)
    assert set(t.state) == {'finished'} and not Path('armed').exists()
    torn = [o for o in Path('out').glob('.merged-3.*')]
    assert not torn and sorted(o.name for o in Path('out').glob('merged-*')) == [f'merged-{i}' for i in range(4)]
    assert len(set(rows().value-rows().i)) == 1

@pytest.mark.parametrize('torn', ['cut', 'zeros'])
def test_a_corrupt_checkpoint_in_the_grid_fails_alone(models, torn):
    names = [str(o) for o in sorted(Path('models').iterdir())[:3]]
    file = Path(names[1])/'model.safetensors'
    good = file.read_bytes()
    file.write_bytes(good[:len(good)//2] if torn == 'cut' else bytes(len(good)))
    g = dict(job='faultjobs:opens', parameters=dict(model=names))
    t = sweep(g, workers=1)
    assert t.state.tolist() == ['finished', 'failed', 'finished'] and 'CheckpointError' in t.reason.iloc[1] and names[1] in t.reason.iloc[1]
    file.write_bytes(good)
    t = sweep(g, workers=1, retry=True)
    assert set(t.state) == {'finished'} and len(rows()) == 3

def test_a_disk_that_is_full_while_a_run_writes(here):
    Path('armed').touch()
    t = sweep(grid('full', 3), retries=1)
    assert set(t.state) == {'failed'} and all('File too large' in o for o in t.reason)
    assert not list(Path('out').glob('*.bin')) and not list(Path('out').glob('.*.tmp')) # no part of a file
    Path('armed').unlink()
    sweep(grid('full', 3), retry=True)
    assert [o.stat().st_size for o in Path('out').glob('*.bin')] == [1_000_000]*3
    whole(range(3))

def test_a_disk_that_is_full_while_the_store_grows(here):
    "The driver stops: what it would compute it could not keep"
    limit = Store('out/store.sqlite').path.stat().st_size+6*4096
    code = f"""
        import resource, signal
        from merginguriel.runner import *
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if __name__=='__main__':
            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
            run_all(plan({grid('plain', 60)!r}, 'out'), workers=1, progress=False)"""
    p = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True)
    assert p.returncode == 1 and 'StoreError' in p.stderr.splitlines()[-1], p.stderr[-2000:]
    before = finished()
    assert 0 < before < 60
    sweep(grid('plain', 60))
    whole(range(60))

def test_a_store_that_is_locked_for_a_while(here):
    "A reader never holds a sweep up, a writer only while it writes"
    g = grid('plain', 4)
    Store('out/store.sqlite').record(dict(x=1), [dict(name='x', locale='x', split='x', metric='x', value=1)])
    reader = sqlite3.connect('out/store.sqlite', isolation_level=None)
    reader.execute('begin')
    reader.execute('select * from scores').fetchall()
    sweep(g)
    reader.execute('rollback')
    reader.close()
    whole(range(4))
    writer = sqlite3.connect('out/store.sqlite', isolation_level=None)
    writer.execute('begin immediate')
    p = driver(grid('plain', 6))
    time.sleep(2)
    assert finished() == 4
    writer.execute('rollback')
    writer.close()
    assert p.wait() == 0
    whole(range(6))

def test_a_driver_killed_in_the_middle_of_a_failure_record(here):
    "Half a record is not read as one: the run is still to be done"
    code = f"""
        import json, os, signal
        from merginguriel.runner import *
        def dying(o, f, **kw):
            f.write(json.dumps(o)[:20])
            f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        json.dump = dying
        if __name__=='__main__': run_all(plan({grid('poison', 4)!r}, 'out'), workers=1, retries=0, progress=False)"""
    p = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True)
    assert p.returncode == -signal.SIGKILL, p.stderr
    assert len(list(Path('out/sweep').iterdir())) == 1 and lay_out(grid('poison', 4)).table().state.tolist() == ['finished']*3+['pending']
    t = sweep(grid('poison', 4))
    assert t.state.tolist() == ['finished']*3+['failed'] and sorted(rows().value) == [0, 1, 2]

def test_a_bank_that_is_torn_is_not_read(models):
    "The run that needs it says which file it is"
    names = [str(o) for o in sorted(Path('models').iterdir())[:2]]
    g = dict(job='faultjobs:answers', parameters=dict(model=names))
    sweep(g, workers=1)
    before = sorted(rows().value)
    Path('out/store.sqlite').unlink()
    file = sorted(o for o in Path('out/bank').rglob('*') if o.is_file())[0]
    file.write_bytes(file.read_bytes()[:-200])
    t = sweep(g, workers=1)
    bad = t[t.state == 'failed']
    assert len(bad) == 1 and 'CheckpointError' in bad.reason.iloc[0] and file.name in bad.reason.iloc[0]
    file.unlink()
    assert set(sweep(g, workers=1, retry=True).state) == {'finished'}
    assert sorted(rows().value) == before


# ---- notebooks

def notebook(fault='pass'):
    "A template that records a score, notes its kernel, and meets a fault in the run 1"
    cells = [nbformat.v4.new_code_cell('i: int = 0 # Number\nstore: str = "" # Store', metadata=dict(tags=['parameters']))]
    cells += [nbformat.v4.new_code_cell(o) for o in CELLS.format(fault=fault).strip().split('\n\n')]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), 'toy.ipynb')
    return dict(template='toy.ipynb', parameters=dict(i=[0, 1]))

def test_a_kernel_that_is_killed_mid_cell(here):
    g = notebook('os.kill(os.getpid(), signal.SIGKILL)')
    Path('armed').touch()
    t = sweep(g, workers=1)
    assert set(t.state) == {'finished'} and len(list(Path('kernels').iterdir())) == 3 # one more than runs
    assert sorted(o.name for o in Path('out/sweep').iterdir()) == sorted(f'{h}.ipynb' for h in t.index)
    whole(range(2))

def test_an_io_error_inside_a_notebook_is_tried_again(here):
    g = notebook("raise OSError(28, 'No space left on device')")
    Path('armed').touch()
    assert set(sweep(g, workers=1).state) == {'finished'}
    whole(range(2))

def test_a_driver_that_is_killed_while_a_kernel_works(here):
    import psutil
    g = notebook('import time; time.sleep(600)')
    Path('armed').touch()
    p = driver(g, workers=1)
    wait(lambda: Path('kernels').exists() and not Path('armed').exists())
    p.kill()
    p.wait()
    wait(lambda: not any(psutil.pid_exists(int(o.name)) for o in Path('kernels').iterdir()), 20)
    assert finished() == 1 # the score that the second run had recorded by then went with it
    sweep(g, workers=1)
    whole(range(2))

def test_a_changed_cell_is_a_new_run_and_a_changed_sentence_is_not(here):
    g = notebook()
    first = list(lay_out(g).runs)
    nb = nbformat.read('toy.ipynb', 4)
    nb.cells.append(nbformat.v4.new_markdown_cell('A sentence'))
    nbformat.write(nb, 'toy.ipynb')
    assert list(lay_out(g).runs) == first
    nb.cells.append(nbformat.v4.new_code_cell('1+1'))
    nbformat.write(nb, 'toy.ipynb')
    assert not set(lay_out(g).runs) & set(first)


# ---- Ray

@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    "Two nodes of one core each, on this machine"
    from ray.cluster_utils import Cluster
    folder = tmp_path_factory.mktemp('cluster')
    (folder/'faultjobs.py').write_text(JOBS)
    with pytest.MonkeyPatch.context() as env:
        env.setenv('PYTHONPATH', os.pathsep.join([str(folder), str(ROOT)]))
        for attempt in range(3): # Ray gives its own processes 15 s to start, which is little on a machine that does much else
            c = Cluster()
            try:
                c.add_node(num_cpus=1, include_dashboard=False)
                second = c.add_node(num_cpus=1)
                break
            except Exception as e:
                c.shutdown()
                if attempt == 2: pytest.skip(f'Ray did not start on this machine: {e}')
        yield c, second
        c.shutdown()

def on_ray(g, cluster, **kw): return run_all(lay_out(g), 'ray', address=cluster[0].address, progress=False, **kw)

def test_the_same_plan_on_a_cluster(here, cluster):
    "What processes have done is not done again, and a worker that is killed costs nothing but time"
    sweep(grid('dies', 3))
    kept = rows().created.tolist()
    Path('armed').touch()
    assert set(on_ray(grid('dies'), cluster).state) == {'finished'} and not Path('armed').exists()
    assert rows().created.tolist()[:3] == kept
    whole(range(8))

def test_a_run_that_always_kills_its_process_fails_alone_on_a_cluster(here, cluster):
    t = on_ray(grid('poison', 5), cluster)
    assert t[t.state == 'failed'].i.tolist() == [3] and 'WorkerDied' in t.reason.dropna().iloc[0]

def test_a_cluster_that_loses_a_node(here, cluster):
    g = grid('plain', 16, seconds=.2)
    with ThreadPoolExecutor(1) as ex:
        done = ex.submit(on_ray, g, cluster)
        wait(lambda: finished() >= 4)
        cluster[0].remove_node(cluster[1], allow_graceful=False)
        assert set(done.result(timeout=120).state) == {'finished'}
    whole(range(16))

def test_ray_is_named_where_it_is_missing(here, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(MerginGurielError, match=r"pip install 'merginguriel\[cluster\]'"): run_all(lay_out(grid('plain', 1)), 'ray')

def test_a_cluster_that_does_not_answer_is_named(here, monkeypatch):
    ray = pytest.importorskip('ray')
    def refuse(**kw): raise ConnectionError(f"Failed to connect to Ray cluster at {kw['address']}")
    monkeypatch.setattr(ray, 'init', refuse)
    with pytest.raises(MerginGurielError, match='10.0.0.1:6379.*same RAY_AUTH_TOKEN'):
        run_all(lay_out(grid('plain', 1)), 'ray', address='10.0.0.1:6379')


# ---- all at once

def test_a_short_soak(here, monkeypatch, capsys):
    "The benchmark of 500 runs, with 40"
    monkeypatch.syspath_prepend(str(ROOT/'benchmarks'))
    import soak
    monkeypatch.setattr(sys, 'argv', ['soak.py', '--runs', '40', '--gap', '4', '--seed', '1'])
    assert soak.main() == 0
    assert 'every score is there, once' in capsys.readouterr().out
