"""CPU seconds of `finetune`'s loop against `transformers.Trainer`: the same model, texts, options and number of steps.

    python benchmarks/train.py

All start from the mini base with the head of seed 0 and train one epoch on the texts of one locale of the embedded set, in
batches of similar length, with the same AdamW, schedule, dropout and frozen word vectors. `Trainer` runs twice: with its own
grouping by length, and with `finetune`'s batches, which have less padding. Only the training is timed: model, tokens and
imports are ready before. They take turns, so that a busy machine slows all."""
import argparse,platform,statistics,sys,tempfile,time
from pathlib import Path
import numpy as np
import torch
from merginguriel.base_model import *
from merginguriel.data import *
from merginguriel.mini import *
from merginguriel.train import *
from merginguriel.train import _epoch,_optimiser


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
    y = torch.tensor(labels)
    def run():
        batches = bucketed_batches(lengths, o.batch_size, seed=0)
        _epoch(model, opt, schedule, batches, ids, y, o, tok.pad_token_id, 'cpu', False, {}, lambda: count.append(1))
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


def main():
    p = argparse.ArgumentParser(description="finetune's loop against transformers.Trainer")
    p.add_argument('--locale', default='cy-GB', help='locale of the embedded set')
    p.add_argument('--batch_size', type=int, default=32, help='texts in a step')
    p.add_argument('--repetitions', type=int, default=3, help='turns of each')
    p.add_argument('--threads', type=int, default=1, help="PyTorch's threads")
    a = p.parse_args()
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
