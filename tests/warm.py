"""A Python that has loaded torch and the rest before it is asked for anything: `[*warm.python(), '-c', code]` in place of
`[sys.executable, '-c', code]`.

Loading torch, transformers and pandas takes seconds, and each notebook and each kernel needs a process of its own. Here one
process loads them once (`serve`), and forks itself for each request before it has started a thread. What runs in the fork is
alone: its folder, variables, arguments, files, modules, random state and memory are its own and go with it. The command that
a test starts is a small client (`main`): it hands over its folder, its variables and its three standard files, waits, and ends
as the fork ended. It starts a new Python instead where there is no such process, or where a variable that the libraries read
while they are loaded has another value there. A client that is killed takes its fork along.
"""
import atexit, json, os, select, signal, socket, sys, threading, time

SOCKET = 'WARM_PYTHON' # The variable that names the socket of the process
# Read while a library is loaded: a request that says otherwise is answered by a new Python
AT_IMPORT = ('OMP_', 'MKL_', 'OPENBLAS_', 'HF_', 'TRANSFORMERS_', 'TORCH_', 'CUDA_', 'ATEN_', 'LD_', 'XDG_', 'HOME',
    'TMPDIR', 'PYTHONPATH', 'PYTHONHASHSEED', 'PYTHONWARNINGS', 'PYTHONOPTIMIZE', 'VIRTUAL_ENV', 'IPYTHON')
# What the tests give to every notebook and kernel
VARIABLES = dict(TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
LIBRARIES = '''numpy pandas pyarrow.parquet scipy.stats scipy.cluster.hierarchy scipy.optimize sklearn.linear_model
    sklearn.decomposition torch torch._dynamo safetensors.torch tokenizers transformers
    transformers.models.xlm_roberta.modeling_xlm_roberta transformers.models.auto.modeling_auto
    transformers.models.auto.tokenization_auto datasets matplotlib.pyplot nbformat nbclient fastcore.test
    nbdev.test nbdev.showdoc ipykernel.kernelapp papermill.cli ipywidgets psutil concurrent.futures.process
    multiprocessing.spawn'''.split()


def read_at_import(env): return {k: v for k, v in env.items() if k.startswith(AT_IMPORT)}


# ---- the client

def main(args):
    "Have `args` run in a fork of the warm process, with what this process has been given; end as it ends"
    request = dict(args=args, cwd=os.getcwd(), env=dict(os.environ))
    try: answer = ask(os.environ[SOCKET], request, forward)
    except (KeyError, ConnectionError, FileNotFoundError): answer = 'cold'
    if answer == 'cold': os.execv(sys.executable, [sys.executable, *args])
    if answer is None: sys.exit('the warm Python has ended before its fork')
    if answer >= 0: os._exit(answer)
    if -answer != signal.SIGKILL: signal.signal(-answer, signal.SIG_DFL)
    os.kill(os.getpid(), -answer)


def forward(pid):
    "Hand on to the fork what interrupts or ends this process"
    for o in (signal.SIGINT, signal.SIGTERM): signal.signal(o, lambda number, _: os.kill(pid, number))


def ask(path, request, started=None):
    """Send `request` and the three standard files to the socket at `path`; the answer, which is None if there was none. `started`
    is told the process id of a fork before it"""
    data = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(path)
        socket.send_fds(s, [len(data).to_bytes(8, 'big')], [0, 1, 2])
        s.sendall(data)
        with s.makefile() as f:
            if started:
                first = json.loads(f.readline() or 'null')
                if not isinstance(first, dict): return first
                started(first['pid'])
            return json.loads(f.readline() or 'null')


# ---- the fork

def become(args, cwd, env):
    "Make this fork what a new Python would be that is given `args` in the folder `cwd` with the variables `env`"
    import matplotlib, numpy, torch, types
    kernel = args[:2] == ['-m', 'ipykernel_launcher']
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if 'JPY_PARENT_PID' in env: os.environ['JPY_PARENT_PID'] = str(os.getppid()) # A kernel ends with its parent
    sys.dont_write_bytecode = bool(env.get('PYTHONDONTWRITEBYTECODE'))
    numpy.random.seed() # From the system, as in a new process; random does so by itself
    torch.seed()
    # These look at their surroundings while they are loaded
    backend = env.get('MPLBACKEND') or ('module://matplotlib_inline.backend_inline' if kernel else None)
    if backend: matplotlib.rcParams['backend'] = backend
    for o in ('tqdm.auto', 'matplotlib_inline.backend_inline'): sys.modules.pop(o, None)
    sys.modules['__main__'] = types.ModuleType('__main__')
    sys.modules['__main__'].__builtins__ = __builtins__


def execute(args):
    "Run `-c code` or `-m module` with its arguments, as Python does"
    import runpy
    kind, what, *rest = args
    sys.path[0] = '' if kind == '-c' else os.getcwd()
    sys.argv = [kind, *rest]
    if kind == '-c': exec(compile(what, '<string>', 'exec'), sys.modules['__main__'].__dict__)
    else: runpy.run_module(what, run_name='__main__', alter_sys=True)


def live(request):
    "The life of a fork, which ends here, and not where it was forked"
    import traceback
    code = 0
    try:
        become(**request)
        execute(request['args'])
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        if code and not isinstance(e.code, int): print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for o in (sys.stdout, sys.stderr):
        try: o.flush()
        except (OSError, ValueError): pass
    os._exit(code & 255)


# ---- the warm process

def receive(connection):
    "A request and the three files that come with it"
    head, files, *_ = socket.recv_fds(connection, 8, 3)
    n = int.from_bytes(head, 'big')
    data = b''
    while len(data) < n:
        part = connection.recv(n-len(data))
        if not part: break
        data += part
    return json.loads(data or 'null'), files


def tell(connection, answer):
    try: connection.sendall(json.dumps(answer).encode()+b'\n')
    except OSError: pass # The client has ended


def reply(connection, answer):
    tell(connection, answer)
    connection.close()


def fork(request, files, close):
    "A fork that runs `request` with these standard files; what the warm process has open is closed in it"
    pid = os.fork()
    if pid: return pid
    for i, o in enumerate(files): os.dup2(o, i)
    for o in files: os.close(o)
    for o in close: o.close()
    live(request)


def used():
    "CPU seconds of all forks that have ended, and of the processes that they started"
    import resource
    u = resource.getrusage(resource.RUSAGE_CHILDREN)
    return u.ru_utime+u.ru_stime


def threads():
    "Names of the threads of this process beside its first; the one of the allocator jemalloc stops and starts around a fork"
    folder = '/proc/self/task'
    if not os.path.exists(folder): return [o.name for o in threading.enumerate()][1:]
    names = []
    for o in os.listdir(folder):
        with open(f'{folder}/{o}/comm') as f: names.append(f.read().strip())
    return [o for o in names[1:] if o != 'jemalloc_bg_thd']


def load():
    "Load the libraries; a fork of a process with threads could wait for one that it does not have"
    import gc, importlib
    for o in LIBRARIES: importlib.import_module(o)
    if threads(): sys.exit(f'the libraries started the threads {threads()}; such a process is not forked')
    gc.collect()
    gc.freeze()


def serve(path):
    "Load the libraries, then fork for each request that comes in at the socket `path`, until standard input ends"
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)
    mine = read_at_import(os.environ)
    load()
    waiting = {} # The pid of each fork -> the connection to its client
    while True:
        ready = select.select([0, server, *waiting.values()], [], [], .01 if waiting else None)[0]
        if 0 in ready: break
        for pid, connection in [*waiting.items()]:
            if connection in ready: os.kill(pid, signal.SIGKILL) # The client has ended
            ended, status = os.waitpid(pid, 0 if connection in ready else os.WNOHANG)
            if ended: reply(waiting.pop(pid), os.waitstatus_to_exitcode(status))
        if server not in ready: continue
        connection = server.accept()[0]
        request, files = receive(connection)
        if request == 'used': reply(connection, used())
        elif request is None: connection.close()
        elif read_at_import(request['env']) != mine: reply(connection, 'cold')
        else:
            pid = fork(request, files, [server, connection, *waiting.values()])
            waiting[pid] = connection
            tell(connection, dict(pid=pid))
        for o in files: os.close(o)
    for pid in waiting: os.kill(pid, signal.SIGKILL)


# ---- for the tests

started = [] # The warm process of this process, once there is one

def start():
    "Start the warm process, which ends with this one"
    import subprocess, tempfile
    path = os.path.join(tempfile.mkdtemp(prefix='warm-'), 'socket')
    env = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND'} | VARIABLES
    started.append(subprocess.Popen([sys.executable, __file__, 'serve', path], stdin=subprocess.PIPE, env=env))
    while not os.path.exists(path) and started[0].poll() is None: time.sleep(.01)
    os.environ[SOCKET] = path


def python():
    "The command that is a warm Python; an ordinary one where processes do not fork"
    if not hasattr(os, 'fork'): return [sys.executable]
    if not started: start()
    return [sys.executable, '-I', '-S', __file__]


def kernel(folder):
    "A Jupyter folder below `folder` in which the kernel python3 is a fork of the warm Python; all else is as ipykernel says"
    from ipykernel.kernelspec import get_kernel_dict
    spec = get_kernel_dict()
    where = folder/'kernels/python3'
    where.mkdir(parents=True, exist_ok=True)
    (where/'kernel.json').write_text(json.dumps(spec | dict(argv=[*python(), *spec['argv'][1:]])))
    return str(folder)


def cpu_seconds():
    "CPU seconds of all processes that this one has started and that have ended, warm ones among them"
    import resource
    u = resource.getrusage(resource.RUSAGE_CHILDREN)
    return u.ru_utime + u.ru_stime + (ask(os.environ[SOCKET], 'used') if started else 0)


if __name__ == '__main__': serve(sys.argv[2]) if sys.argv[1] == 'serve' else main(sys.argv[1:])
