"""A step of `adamerge` against a plain forward and backward pass of one model: CPU seconds, seconds and memory.

    python benchmarks/adamerging.py            # --naive adds the merge in the graph, where much memory is free

The models have the size of XLM-R base (278 million values, 60 labels) and random values; they are written to a temporary folder
and deleted: 1.1 GB each, so 20 sources take 23 GB of disk (--sources 5 10 takes half). A step is one batch of 16 × 32 tokens. Every
row runs in a process of its own, whose memory that is not a file (RssAnon) is sampled from outside. The first rows take turns of a
few steps, so that a busy machine slows all; then the next rows do. One thread by default: threads that wait for each other count
as CPU seconds. `--naive` adds the way AdaMerging is usually written: the merge of K models is part of the
graph of every step."""
import argparse,json,os,platform,statistics,subprocess,sys,tempfile,threading,time
from contextlib import nullcontext
from pathlib import Path
import torch
from merginguriel.checkpoint import *
from merginguriel.gradient import *

BATCH,LENGTH = 16,32


def config():
    from transformers import XLMRobertaConfig
    return XLMRobertaConfig(vocab_size=250002, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, num_labels=60,
        architectures=['XLMRobertaForSequenceClassification'])


def write_models(folder, n):
    "A base and `n` sources near it, each with noise of its own"
    from transformers import AutoModelForSequenceClassification
    with torch.device('meta'): model = AutoModelForSequenceClassification.from_config(config())
    spec = {k:(torch.float32,tuple(p.shape)) for k,p in model.named_parameters()}
    noise = torch.randn((1<<22)+12345, generator=torch.Generator().manual_seed(0))
    def draw(k, size, scale, shift): # A stretch of one long row of noise, another for each source
        start = (sum(map(ord, k))*7919+shift*104729)%12345
        return noise[start:start+(1<<22)].repeat(-(-size//(1<<22)))[:size]*scale
    for i in range(-1, n):
        d = Path(folder)/('base' if i<0 else f'm{i:02d}')
        d.mkdir()
        config().save_pretrained(d)
        with CheckpointWriter(d, spec) as w:
            for k,(_,shape) in spec.items():
                t = torch.ones(shape) if 'LayerNorm.weight' in k else draw(k, torch.Size(shape).numel(), .02, 0).reshape(shape)
                w.write(k, t if i<0 else t+draw(k, t.numel(), 5e-4, i+1).reshape(shape))


def texts():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 250002, (8,BATCH,LENGTH), generator=g)
    return [dict(input_ids=i, attention_mask=torch.ones_like(i)) for i in ids]


def entropy(logits):
    lp = logits.log_softmax(-1)
    return -(lp.exp()*lp).sum(-1).mean()


def plain(folder, turn, steps):
    "One model, all of it, as `from_pretrained` gives it"
    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained(folder/'base').eval()
    for i in range(steps+1):
        turn()
        if i==steps: return
        model.zero_grad(set_to_none=True)
        entropy(model(**texts()[i%8]).logits).backward()


def plain_sliced(folder, turn, steps):
    "The same with the word vectors of the texts only"
    model = blank_classifier(folder/'base')
    with sliced_vocabulary(model, torch.cat([b['input_ids'] for b in texts()]).flatten()):
        for i in range(steps+1):
            turn()
            if i==steps: return
            model.zero_grad(set_to_none=True)
            entropy(model(**texts()[i%8]).logits).backward()


def ours(folder, turn, steps, k, **kw):
    from merginguriel.adamerging import adamerge
    model = blank_classifier(folder/'base')
    sources = {f'm{i:02d}':folder/f'm{i:02d}' for i in range(k)}
    adamerge(model, folder/'base', sources, texts(), steps=steps, monitor=lambda model: turn() or 0., **kw)


def naive(folder, turn, steps, k):
    "Task vectors in memory, and the merge in the graph"
    from torch.func import functional_call
    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained(folder/'base').eval()
    base = {n:p.detach() for n,p in model.named_parameters()}
    taus = []
    for i in range(k):
        c = open_checkpoint(folder/f'm{i:02d}')
        taus.append({n:c.read(n)-b for n,b in base.items()})
    z = torch.zeros(k, requires_grad=True)
    opt = torch.optim.Adam([z], lr=1e-2)
    for i in range(steps+1):
        turn()
        if i==steps: return
        lam = z.softmax(0)
        merged = {n:b+sum(l*t[n] for l,t in zip(lam, taus)) for n,b in base.items()}
        opt.zero_grad()
        entropy(functional_call(model, merged, kwargs=texts()[i%8]).logits).backward()
        assert z.grad.any()
        opt.step()
        del merged


def clocks():
    "User CPU seconds, system CPU seconds, seconds"
    t = os.times()
    return [t.user,t.system,time.perf_counter()]


def child(kind, folder, steps):
    "Run one variant; at each turn say what the step took and wait"
    from merginguriel.train import quiet_transformers
    quiet_transformers()
    last = []
    def turn():
        print(json.dumps([b-a for a,b in zip(last, clocks())]) if last else 'ready', flush=True)
        if not sys.stdin.readline(): os._exit(1)
        last[:] = clocks()
    name,_,k = kind.partition(':')
    kw = dict(stream={}, memory=dict(keep='memory'), block=dict(scope='block'), bfloat16=dict(keep='memory', dtype=torch.bfloat16))
    if name in kw: ours(Path(folder), turn, steps, int(k), **kw[name])
    elif name=='naive': naive(Path(folder), turn, steps, int(k))
    else: dict(plain=plain, plain_sliced=plain_sliced)[name](Path(folder), turn, steps)


class Variant:
    "A child process and the most memory it had"
    def __init__(self, kind, folder, steps, threads):
        args = [sys.executable, __file__, '--child', kind, str(folder), str(steps), '--threads', str(threads)]
        self.p = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.anon,self.spent = 0,[]
        threading.Thread(target=self._watch, daemon=True).start()
        line = self.p.stdout.readline()
        assert line.strip()=='ready', f'{kind}: {line!r}'
    def _watch(self):
        while self.p.poll() is None:
            try:
                for line in open(f'/proc/{self.p.pid}/status'):
                    if line.startswith('RssAnon'): self.anon = max(self.anon, int(line.split()[1])*1024)
            except OSError: return
            time.sleep(.01)
    def turn(self, steps):
        "Run `steps` steps; the first, after the pause, is not counted"
        for i in range(steps):
            self.p.stdin.write('go\n')
            self.p.stdin.flush()
            spent = json.loads(self.p.stdout.readline())
            if i: self.spent.append(spent)
    def end(self):
        self.p.stdin.close()
        self.p.wait()


LABELS = dict(plain='forward + backward of one model', plain_sliced='the same, word vectors sliced', stream='adamerge, K={k}',
    memory="adamerge, K={k}, keep='memory'", bfloat16="adamerge, K={k}, keep='memory' in bfloat16", block="adamerge, K={k}, scope='block'",
    naive='merge in the graph, K={k}')


def main():
    p = argparse.ArgumentParser(description='a step of adamerge against a forward and backward pass')
    p.add_argument('--sources', type=int, nargs='+', default=[5,20], help='numbers of sources')
    p.add_argument('--turns', type=int, default=3, help='turns of each row')
    p.add_argument('--steps', type=int, default=4, help='steps in a turn; the first is not counted')
    p.add_argument('--threads', type=int, default=1, help="PyTorch's threads")
    p.add_argument('--models', help='folder for the models, kept; used as it is if it exists')
    p.add_argument('--naive', action='store_true', help='also the merge in the graph, all task vectors in memory: several times the memory')
    p.add_argument('--child', nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.child: return child(a.child[0], a.child[1], int(a.child[2]))
    k = min(a.sources)
    groups = [['plain','plain_sliced',*(f'stream:{n}' for n in a.sources)], [f'block:{k}',f'memory:{k}',f'bfloat16:{k}'], [f'naive:{k}']]
    run = {}
    with nullcontext(a.models) if a.models else tempfile.TemporaryDirectory() as d:
        Path(d).mkdir(parents=True, exist_ok=True)
        if not any(Path(d).iterdir()): write_models(d, max(a.sources))
        for kinds in groups[:2+a.naive]:
            now = {o:Variant(o, d, a.turns*a.steps, a.threads) for o in kinds}
            for _ in range(a.turns):
                for v in now.values(): v.turn(a.steps)
            for v in now.values(): v.end()
            run |= now
    user,system,wall = ({o:statistics.median(x[i] for x in v.spent) for o,v in run.items()} for i in range(3))
    cpu = {o:statistics.median(x[0]+x[1] for x in v.spent) for o,v in run.items()}
    print(f'A batch of {BATCH} × {LENGTH} tokens, {a.threads} thread(s), median of {a.turns*(a.steps-1)} steps; '
        f'Python {platform.python_version()}, PyTorch {torch.__version__.split("+")[0]}\n')
    print('| step | CPU s | user | system | s | ÷ one model | ÷ sliced | anonymous memory, GB |\n|---|---|---|---|---|---|---|---|')
    for o,v in run.items():
        name,_,n = o.partition(':')
        print(f"| {LABELS[name].format(k=n)} | {cpu[o]:.2f} | {user[o]:.2f} | {system[o]:.2f} | {wall[o]:.2f} | {cpu[o]/cpu['plain']:.2f} | "
            f"{cpu[o]/cpu['plain_sliced']:.2f} | {v.anon/1e9:.2f} |")


if __name__=='__main__': sys.exit(main())
