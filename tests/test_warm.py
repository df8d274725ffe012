"A process that comes warm is one of its own: it ends, prints, is interrupted and remembers as a new Python does"
import os, signal, subprocess, sys, time
import pytest, warm


def both(code, *args, **kw):
    "What a warm and a new Python do with `code`: exit code, stdout, last line of stderr"
    env = dict(os.environ, MPLBACKEND='agg', **warm.VARIABLES) | kw.pop('env', {})
    for command in (warm.python(), [sys.executable]):
        r = subprocess.run([*command, '-c', code, *args], env=env, capture_output=True, text=True, **kw)
        yield r.returncode, r.stdout, r.stderr.strip().splitlines()[-1:]


@pytest.mark.parametrize('code', ['import sys; print(sys.argv, __name__, sys.path[0])', 'import sys; sys.exit("bad")',
    'import sys; sys.exit(3)', 'import sys; sys.exit(True)', '1/0', 'import os; os._exit(4)', 'import os; os.kill(os.getpid(), 15)',
    'import os; os.kill(os.getpid(), 9)', 'import atexit; atexit.register(print, "last"); print("first")', 'import sys; print(sys.stdin.read())',
    'import threading, time; threading.Thread(target=lambda: (time.sleep(.1), print("late"))).start()', 'import os; print(os.getcwd())',
    'import os; print(os.environ.get("PLANTED"), os.environ.get("MPLBACKEND"))',
    'import matplotlib.pyplot as plt; print(plt.get_backend(), plt.get_fignums())', 'import sys; print("merginguriel" in sys.modules)'])
def test_as_a_new_python(code, tmp_path):
    a, b = both(code, 'x', cwd=tmp_path, input='typed', env=dict(PLANTED='yes'))
    assert a == b


def test_a_fork_leaves_nothing_behind(tmp_path):
    code = '''
import os, random, sys, matplotlib.pyplot as plt, numpy, torch
print(getattr(torch, 'planted', 0), os.environ.get('PLANTED'), plt.get_fignums(), os.getcwd())
print(random.random(), numpy.random.rand(), torch.rand(1).item(), torch.initial_seed())
torch.planted = 1; os.environ['PLANTED'] = '1'; plt.figure(); os.chdir('/'); random.seed(0); numpy.random.seed(0); torch.manual_seed(5)
'''
    run = lambda: subprocess.run([*warm.python(), '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    a, b = run(), run()
    assert a[0] == b[0] == f'0 None [] {tmp_path}'
    assert not {*a[1].split()} & {*b[1].split()} # Drawn anew from the system


def test_it_is_a_fork_unless_a_library_would_have_been_loaded_otherwise():
    loaded = 'import sys; print(len(sys.modules) > 1000)'
    run = lambda **kw: subprocess.run([*warm.python(), '-c', loaded], env=dict(os.environ, **warm.VARIABLES) | kw, capture_output=True, text=True).stdout
    assert run() == 'True\n' and run(OMP_NUM_THREADS='2') == 'False\n' and run(**{warm.SOCKET: '/nowhere'}) == 'False\n'


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_the_fork(number):
    "An interrupt can be caught there; who kills the client kills the fork"
    code = '''
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler) # Ignored where a shell started the tests in the background
try:
    print(os.getpid(), flush=True)
    time.sleep(60)
except KeyboardInterrupt: print("interrupted", flush=True); raise SystemExit(7)
'''
    p = subprocess.Popen([*warm.python(), '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    fork = int(p.stdout.readline())
    assert fork != p.pid
    p.send_signal(number)
    out, err = p.communicate(timeout=60)
    assert (p.returncode, out, err) == {signal.SIGINT: (7, 'interrupted\n', '')}.get(number, (-number, '', ''))
    for _ in range(500):
        try: os.kill(fork, 0)
        except ProcessLookupError: break
        time.sleep(.02)
    else: raise AssertionError('the fork lives on')


def test_what_forks_used_is_counted():
    before = warm.cpu_seconds()
    subprocess.run([*warm.python(), '-c', 'import time\nwhile time.process_time() < 1: pass'], check=True)
    assert 1 <= warm.cpu_seconds()-before < 5
