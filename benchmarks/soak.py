"""Does a sweep lose or repeat a run while its processes are killed at random?

    python benchmarks/soak.py                  # 500 runs, two minutes or three
    python benchmarks/soak.py --runs 40        # as the tests do

The runs are a job of some milliseconds, done by a driver of its own with two workers. After every few scores a worker is killed, or the
driver, always with SIGKILL; when the driver is dead another goes on. At the end the store must hold every score, once."""
import argparse,random,subprocess,sys,tempfile,time
from collections import Counter
from contextlib import suppress
from pathlib import Path
import psutil
from merginguriel.runner import job,plan,run_all
from merginguriel.store import Store

@job
def score(i:int, pause:float=.02):
    time.sleep(pause)
    return [dict(name='toy', locale='sq-AL', split='dev', metric='value', value=i/7)]

def laid_out(runs, out): return plan(dict(job='soak:score', parameters=dict(i=list(range(runs)))), out)
def drive(runs, out): run_all(laid_out(runs, out), workers=2, retries=10, progress=False)

def finished(store): return len(Store(store).scores(metric='value')) if store.exists() else 0

def victim(driver, rng):
    "The driver once in five times, otherwise one of its workers"
    workers = [o for o in psutil.Process(driver.pid).children() if 'spawn_main' in ' '.join(o.cmdline())]
    return ('driver', psutil.Process(driver.pid)) if rng.random()<.2 or not workers else ('worker', rng.choice(workers))

def soak(runs, out, gap, seed):
    "Until a driver ends by itself; how many were started, and what was killed"
    rng,n,store = random.Random(seed),Counter(),Path(out)/'store.sqlite'
    code = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import soak; soak.drive({runs}, {str(out)!r})'
    while True:
        driver = subprocess.Popen([sys.executable, '-c', code])
        n['drivers started'] += 1
        until = finished(store)+rng.randint(1, 2*gap)
        while driver.poll() is None:
            time.sleep(.05)
            if finished(store)<until: continue
            with suppress(psutil.Error):
                kind,process = victim(driver, rng)
                process.kill()
                n[f'{kind}s killed'] += 1
            until = finished(store)+rng.randint(1, 2*gap)
        if driver.returncode==0: return n

def main():
    p = argparse.ArgumentParser(description='a sweep whose processes are killed')
    p.add_argument('--runs', type=int, default=500, help='number of runs')
    p.add_argument('--gap', type=int, default=10, help='scores between two kills, on average')
    p.add_argument('--seed', type=int, default=0, help='seed of what is killed, and when')
    a = p.parse_args()
    sys.path.insert(0, str(Path(__file__).parent)) # Where the job is
    with tempfile.TemporaryDirectory() as out:
        start = time.time()
        n = soak(a.runs, out, a.gap, a.seed)
        d = Store(Path(out)/'store.sqlite').scores(metric='value')
        states = laid_out(a.runs, out).table().state.value_counts().to_dict()
        print('| runs | rows | different runs among them | drivers started | drivers killed | workers killed | s |\n|---|---|---|---|---|---|---|')
        print(f"| {a.runs} | {len(d)} | {d.hash.nunique()} | {n['drivers started']} | {n['drivers killed']} | {n['workers killed']} "
            f"| {time.time()-start:.0f} |")
        right = len(d)==d.hash.nunique()==a.runs and states==dict(finished=a.runs) and sorted(d.value)==[i/7 for i in range(a.runs)]
        print('every score is there, once' if right else f'scores were lost or repeated: {states}')
        return int(not right)


if __name__=='__main__': sys.exit(main())
