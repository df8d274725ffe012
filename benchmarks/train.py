"""CPU seconds of `finetune`'s loop against `transformers.Trainer`: the same model, texts, options and number of steps.

    python benchmarks/train.py
    python benchmarks/train.py --base e5-massive --dataset massive --locale en-US --texts 2000 --threads 2

All start from the mini base with the head of seed 0 and train one epoch on the texts of one locale of the embedded set, in
batches of similar length, with the same AdamW, schedule, dropout and frozen word vectors. `Trainer` runs twice: with its own
grouping by length, and with `finetune`'s batches, which have less padding. Only the training is timed: model, tokens and
imports are ready before. They take turns, so that a busy machine slows all.

With another base than mini, what is measured is whole processes, each with an epoch of its own, from its start to its end: CPU seconds
of all threads and peak memory, as the system counts them. `finetune` runs as the base recommends and in float32; `Trainer` runs in
float32 on batches of similar length with the word vectors frozen, and as it comes, in random order with every weight trained."""
import argparse,os,platform,statistics,subprocess,sys,tempfile,time
from pathlib import Path
import numpy as np
import torch
from merginguriel.base_model import *
from merginguriel.data import *
from merginguriel.mini import *
from merginguriel.classifier import *
from merginguriel.options import *
from merginguriel.train import *
from merginguriel.train import _epoch,_optimiser,_Texts


def measured(f):
    "(CPU seconds, seconds) of `f()`"
    wall,cpu = time.perf_counter(),time.process_time()
    f()
    return time.process_time()-cpu,time.perf_counter()-wall


def finetune_loop(start, ids, labels, o, steps):
    "One epoch of `finetune`'s loop, ready to run"
    model,tok = load_classifier(start, o.dropout)
    opt,schedule = _optimiser(model, o, steps)
    lengths,count = np.array([len(i) for i in ids]),[]
    t = Training(model, opt, schedule, epochs=1, steps=steps, seed=0, key="", state_file=Path())
    x = _Texts(ids, torch.tensor(labels), tok.pad_token_id)
    def run():
        batches = bucketed_batches(lengths, o.batch_size, seed=0)
        _epoch(t, x, o, batches, lambda: count.append(1))
        assert len(count)==steps
    return run


def trainer(start, ids, labels, o, steps, folder, same_batches):
    "One epoch of `transformers.Trainer` with the same options, ready to run"
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding,PrinterCallback,Trainer,TrainingArguments
    model,tok = load_classifier(start, o.dropout)
    opt,schedule = _optimiser(model, o, steps)
    args = TrainingArguments(output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=o.batch_size,
        max_grad_norm=o.clip, train_sampling_strategy='group_by_length', save_strategy='no', logging_strategy='no',
        report_to='none', disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, seed=0)
    t = Trainer(model=model, args=args, train_dataset=[dict(input_ids=i, labels=l) for i,l in zip(ids,labels)],
        data_collator=DataCollatorWithPadding(tok), optimizers=(opt,schedule))
    t.remove_callback(PrinterCallback)
    if same_batches:
        batches = bucketed_batches(np.array([len(i) for i in ids]), o.batch_size, seed=0)
        t.get_train_dataloader = lambda: DataLoader(t.train_dataset, batch_sampler=[b.tolist() for b in batches],
            collate_fn=t.data_collator)
    def run():
        t.train()
        assert t.state.global_step==steps
    return run


def one_process(kind, a, folder):
    "Train one epoch, `kind` being a row of the table; this process does nothing else"
    torch.set_num_threads(a.threads)
    data = load_intents(a.dataset, a.locale, 'train')
    if a.texts: data = subsample(data, a.texts)
    base = base_folder(a.base)
    if kind.startswith('finetune'):
        return finetune(base, data, Path(folder)/'out', dtype='fp32' if 'float32' in kind else None, batch_size=a.batch_size, epochs=1)
    from transformers import DataCollatorWithPadding,PrinterCallback,Trainer,TrainingArguments
    start = add_head(base, label_names(data), seed=0)
    o = train_options(start, batch_size=a.batch_size, epochs=1)
    model,tok = load_classifier(start, o.dropout)
    ids = tok(list(data['text']), truncation=True, max_length=o.max_length)['input_ids']
    frozen = 'frozen' in kind
    if frozen: model.get_input_embeddings().weight.requires_grad_(False)
    args = TrainingArguments(output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=o.batch_size, learning_rate=o.lr,
        max_grad_norm=o.clip, train_sampling_strategy='group_by_length' if frozen else 'random', save_strategy='no', seed=0,
        logging_strategy='no', report_to='none', disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, warmup_steps=o.warmup)
    t = Trainer(model=model, args=args, train_dataset=[dict(input_ids=i, labels=l) for i,l in zip(ids,data['label'][:])],
        data_collator=DataCollatorWithPadding(tok))
    t.remove_callback(PrinterCallback)
    t.train()
    t.save_model(str(Path(folder)/'out'))


kinds = ['finetune', 'finetune, float32', 'Trainer, float32, words frozen, by length', 'Trainer, float32']

def whole_processes(a):
    "Every row in a process of its own, in turns"
    add_head(base_folder(a.base), label_names(load_intents(a.dataset, a.locale, 'test')), seed=0) # Made once, before
    spent = {k:[] for k in kinds}
    for _ in range(a.repetitions):
        for k in kinds:
            with tempfile.TemporaryDirectory() as d:
                began,env = time.perf_counter(),os.environ|dict(OMP_NUM_THREADS=str(a.threads), OMP_WAIT_POLICY='PASSIVE')
                p = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], '--one', k, '--folder', d], env=env)
                status,usage = os.wait4(p.pid, 0)[1:]
                if status: raise SystemExit(f'{k} failed')
                spent[k].append((usage.ru_utime+usage.ru_stime, time.perf_counter()-began, usage.ru_maxrss/1024))
    median = {k:[statistics.median(o) for o in zip(*v)] for k,v in spent.items()}
    print(f'{a.base}, {a.texts or "all"} texts of {a.locale}, one epoch in batches of {a.batch_size}, {a.threads} thread(s), median of '
        f'{a.repetitions}; Python {platform.python_version()}, PyTorch {torch.__version__.split("+")[0]}; bfloat16 on this CPU: '
        f'{has_bf16("cpu")}\n')
    print("| whole process | CPU s | s | peak MB | its CPU s ÷ finetune's | in each turn |\n|---|---|---|---|---|---|")
    for k in kinds:
        turns = ', '.join(f'{y[0]/x[0]:.2f}' for x,y in zip(spent['finetune'], spent[k]))
        cpu,wall,mb = median[k]
        print(f"| {k} | {cpu:.1f} | {wall:.1f} | {mb:.0f} | {cpu/median['finetune'][0]:.2f} | {turns} |")


def main():
    p = argparse.ArgumentParser(description="finetune's loop against transformers.Trainer")
    p.add_argument('--locale', default='cy-GB', help='locale of the embedded set')
    p.add_argument('--batch_size', type=int, default=32, help='texts in a step')
    p.add_argument('--repetitions', type=int, default=3, help='turns of each')
    p.add_argument('--threads', type=int, default=1, help="PyTorch's threads")
    p.add_argument('--base', default='mini', help='mini, or a base that is measured by whole processes')
    p.add_argument('--dataset', default='home', help='of whole processes: home, massive or a path')
    p.add_argument('--texts', type=int, default=0, help='of whole processes: training texts; 0: all')
    p.add_argument('--one', default='', help=argparse.SUPPRESS)
    p.add_argument('--folder', default='', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one: return one_process(a.one, a, a.folder) and None
    if a.base!='mini': return whole_processes(a)
    torch.set_num_threads(a.threads)
    data = load_intents('home', a.locale, 'train')
    with tempfile.TemporaryDirectory() as d:
        start = add_head(mini_path(), label_names(data), out=Path(d)/'start', seed=0)
        o = train_options(start, batch_size=a.batch_size)
        _,tok = load_classifier(start)
        ids = tok(list(data['text']), truncation=True, max_length=o.max_length)['input_ids']
        steps = -(-len(ids)//o.batch_size)
        common = start,ids,list(data['label']),o,steps
        make = {'finetune': lambda: finetune_loop(*common),
            'Trainer': lambda: trainer(*common, Path(d)/'trainer', False),
            "Trainer, finetune's batches": lambda: trainer(*common, Path(d)/'trainer', True)}
        for f in make.values(): f()() # Not counted: the first run of each loads and compiles
        spent = {k:[] for k in make}
        for _ in range(a.repetitions):
            for k,f in make.items(): spent[k].append(measured(f()))
    cpu,wall = ({k:statistics.median(o[i] for o in v) for k,v in spent.items()} for i in (0,1))
    print(f'{len(ids)} texts of {a.locale}, {steps} steps of {a.batch_size}, {a.threads} thread(s), median of {a.repetitions}; '
        f'Python {platform.python_version()}, PyTorch {torch.__version__.split("+")[0]}\n')
    print("| loop | CPU s | s | CPU ms a step | finetune's CPU s ÷ its | in each turn |\n|---|---|---|---|---|---|")
    for k in make:
        turns = ', '.join(f'{x[0]/y[0]:.2f}' for x,y in zip(spent['finetune'], spent[k]))
        print(f"| {k} | {cpu[k]:.2f} | {wall[k]:.2f} | {1000*cpu[k]/steps:.1f} | {cpu['finetune']/cpu[k]:.2f} | {turns} |")


if __name__=='__main__': sys.exit(main())
