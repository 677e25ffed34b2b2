"""Fine-tune with LoRA, with or without MoLEx, and report the paper's metrics.

    python train.py                                          the embedded default, on a laptop
    python train.py --model gpt2-medium --task e2e           the paper's E2E run (Tables 2 and 6)
    python train.py --model gpt2-medium --task e2e --compare --seeds 0 1 2 3 4
    python train.py --model roberta-base --task glue --compare                all eight tasks
    python train.py --model roberta-base --task rte --init-from RUN   as in Table 9
    torchrun --nproc-per-node 4 train.py --model gpt2-medium --task e2e      data parallel

Every setting has a flag (--help) and, if it is not given, the paper's value (support/settings.py).
A run is a folder, runs/<model>-<task>-<method>-s<seed>/ (support/runs.py). The same command again
resumes a run that was stopped, and keeps a finished one.
"""

import support.interrupts  # noqa: F401  (first: the others take seconds)

# isort: split
import argparse
import math
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from data import (
    NO_TARGET,
    TASKS,
    Batch,
    Example,
    Tokenizer,
    collate,
    data_files,
    e2e_prompt,
    encode_prompt,
    read_e2e,
    read_examples,
    shuffled_batches,
)
from eval import Splits, build, dev_scores, evaluate_run, read_run
from lora import OTHER_SHAPE, adapters, task_head, trainable, trained_tensors
from model import Transformer
from molex import MoLEx, MoLExConfig
from support.adapters import read_loralib
from support.cli import command_line, pick_device
from support.cuda import GraphedStep, check_graphs
from support.files import InputError, fill, locked, signals_wait
from support.processes import is_first, say, sum_over_processes, torchrun, wait_for_all, world
from support.runs import SAVE_SECONDS, RunFolder, drop_other_gate
from support.settings import Settings, paper_settings, parse_command
from support.tables import opening, pictures, report


def train_step(
    model: Transformer, optimizer: Optimizer, examples: list[Example], s: Settings
) -> Tensor:
    """One optimizer step on a batch; returns its loss, a tensor, so that nothing waits for it.

    The batch goes through the model in `accumulate` parts, of which each of n processes takes every
    n-th sequence.
    """
    rank, processes = world()
    size = math.ceil(len(examples) / s.accumulate)
    parts = [examples[i : i + size] for i in range(0, len(examples), size)]
    micros = [collate(part[rank::processes]) for part in parts]
    return update(model, optimizer, micros, sum(e.targets for e in examples), s)


def update(
    model: Transformer, optimizer: Optimizer, micros: list[Batch], targets: float, s: Settings
) -> Tensor:
    """The loss is the mean over all `targets`, whatever the micro-batches and processes they are
    spread over; load balance is a mean over the micro-batches."""
    total = torch.zeros((), device=model.device)
    for batch in micros:
        loss = model.loss(batch, s.label_smoothing) / targets
        total += loss.detach()
        if s.molex and s.load_balance:
            loss = loss + s.load_balance * model.layers.load_balance / len(micros)
        loss.backward()  # adds to the gradient of what this process has seen
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sum_over_processes(*(p.grad for p in parameters), total)  # the gradient of the whole batch
    if s.clip:
        torch.nn.utils.clip_grad_norm_(parameters, s.clip)
    optimizer.step()
    optimizer.zero_grad()
    return total


def graphed_step(model: Transformer, optimizer: Optimizer, s: Settings) -> GraphedStep:
    """`train_step` as CUDA graphs; lengths are rounded up, so that shapes are few."""

    def step(batch: Batch) -> Tensor:
        return update(model, optimizer, [batch], (batch.target != NO_TARGET).sum(), s)

    return GraphedStep(step, partial(collate, multiple=16), optimizer, model.device)


def make_optimizer(model: Transformer, s: Settings, steps: int) -> tuple[Optimizer, LambdaLR]:
    """AdamW; the rate rises from zero for `warmup` steps, then falls to zero at `steps`, linearly.
    Biases and norms outside the gate do not decay, nor does a learned alpha: it would go to 1/2."""
    groups = defaultdict(list)  # (learning rate, weight decay) -> parameters
    for name, p in trained_tensors(model).items():
        if name.startswith("layers.alpha"):
            groups[s.gate_lr, 0.0].append(p)
        elif name.startswith("layers.gates."):
            groups[s.gate_lr, s.gate_weight_decay].append(p)
        else:
            groups[s.lr, s.weight_decay if p.dim() > 1 else 0.0].append(p)
    optimizer = AdamW(
        [dict(params=ps, lr=lr, weight_decay=decay) for (lr, decay), ps in groups.items()],
        eps=s.adam_eps,
    )
    warm = s.warm_steps(steps)

    def rate(step: int) -> float:
        if step < warm:
            return step / warm
        return (steps - step) / max(1, steps - warm)

    return optimizer, LambdaLR(optimizer, rate)


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    seconds: float = 0.0
    log: list[dict] = field(default_factory=list)  # an entry for each epoch
    loss_sum: float = 0.0  # of the epoch
    curve: list[dict] = field(default_factory=list)  # of the epoch, a point every 25 steps


def fit(
    s: Settings, folder: Path, model: Transformer, examples: list[Example], dev: Splits
) -> None:
    """Train to the end, from the start or from where the run was stopped."""
    # 1) What is trained, and how far it has come.
    first = is_first()
    run = RunFolder(folder, TASKS[s.task].metric)
    lengths = [len(e) for e in examples]
    counts = dict(train=len(examples), dev=sum(len(split) for split in dev.values()))
    per_epoch = math.ceil(len(examples) / s.batch_size)
    steps = min(s.epochs * per_epoch, s.max_steps or math.inf)
    optimizer, schedule = make_optimizer(model, s, steps)
    at = Progress()
    tensors = {name: p.detach() for name, p in trained_tensors(model).items()}
    state = dict(progress=vars(at), optimizer=optimizer, schedule=schedule, tensors=tensors)
    if s.molex:
        state["routes"] = model.layers.routes.training_state()
    run.start(s, data_files(s.task, s.data), state, model)
    say(opening(s, folder, model, trainable(model), counts, (at.step, steps)))
    graphed = graphed_step(model, optimizer, s) if s.cuda_graphs else None

    with tqdm(total=steps, initial=at.step, desc=s.name, disable=None if first else True) as bar:
        for epoch in range(len(at.log), math.ceil(steps / per_epoch)):
            done = at.step - epoch * per_epoch  # batches of this epoch, if the run goes on in it
            if done == 0:
                at.loss_sum, at.curve = 0.0, []
            seed = 1000 * s.seed + epoch
            batches = shuffled_batches(lengths, s.batch_size, seed, s.length_groups)
            losses, saved = [], time.perf_counter()
            with signals_wait(first) as signals:  # Ctrl-C waits for the end of a step
                for indices in batches[done : done + steps - at.step]:
                    # 2) A step.
                    started = time.perf_counter()
                    batch = [examples[i] for i in indices]
                    loss = graphed(batch) if graphed else train_step(model, optimizer, batch, s)
                    losses.append(loss)
                    schedule.step()
                    at.step += 1
                    bar.update()
                    # 3) Now and then the CPU waits for the losses, for a point of the curve.
                    last = at.step == steps or at.step % per_epoch == 0
                    stop = bool(signals)  # read once: it decides on two things
                    save = last or stop or started - saved > SAVE_SECONDS
                    point = last or at.step % 25 == 0
                    if point or save:
                        add_losses(at, losses, model, per_epoch, run.path)
                    if point:
                        at.curve.append(curve_point(at, model))
                        bar.set_postfix(loss=f"{at.loss_sum / (at.step - epoch * per_epoch):.3f}")
                    at.seconds += time.perf_counter() - started
                    # 4) The state is saved before the dev set is scored: a kill repeats no step.
                    if save and first:
                        run.save(state, model.device)
                        saved = time.perf_counter()
                    if stop:
                        break
            if first:
                train_loss = at.loss_sum / (at.step - epoch * per_epoch)
                entry = dict(epoch=epoch + 1, step=at.step, train_loss=train_loss, examples=counts)
                end_epoch(s, run, model, dev, at, entry)
                run.save(state, model.device)


def curve_point(at: Progress, model: Transformer) -> dict[str, float]:
    """What loss.png shows of this step: the epoch's losses so far, and what the gate did."""
    point = dict(step=at.step, loss_sum=at.loss_sum)
    if isinstance(model.layers, MoLEx):
        point.update(model.layers.routes.summary())
        point["alpha"] = model.layers.mean_alpha()
    return point


def add_losses(
    at: Progress, losses: list[Tensor], model: Transformer, per_epoch: int, folder: Path
) -> None:
    """Add the last steps' losses to the epoch's. Raises InputError if they, or the weights, are
    not finite; the last state stays."""
    tensors = trained_tensors(model).values()
    finite = torch.stack([p.isfinite().all() for p in tensors]).all()  # one transfer for all
    values = torch.stack(losses).tolist()
    for step, loss in enumerate(values, start=at.step - len(values) + 1):
        at.loss_sum += loss
        if not math.isfinite(at.loss_sum) or (step == at.step and not finite):
            place = f"batch {(step - 1) % per_epoch + 1} of epoch {(step - 1) // per_epoch + 1}"
            what = f"{folder}: no finite loss or weights after step {step} ({place})"
            raise InputError(f"{what}; look at the data, or try --fresh with a smaller --lr")
    losses.clear()


def end_epoch(
    s: Settings, run: RunFolder, model: Transformer, dev: Splits, at: Progress, entry: dict
) -> None:
    """Score the dev set, note it in the log, and keep the weights if no epoch was better."""
    scores = dev_scores(model, s.task, dev, s.eval_batch)
    at.log.append(dict(entry, **scores, seconds_per_step=at.seconds / at.step, curve=at.curve))
    run.write_log(at.log, trained_tensors(model))
    text = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in scores.items())
    tqdm.write(f"{s.name}, epoch {entry['epoch']}: train loss {entry['train_loss']:.4f}, {text}")


def prepare(s: Settings, device: torch.device) -> tuple[Transformer, Tokenizer]:
    """The model to train. LoRA and head start the same with and without MoLEx. Raises InputError
    if its steps are to be CUDA graphs and cannot."""
    if s.cuda_graphs:
        check_graphs(s, device)
    torch.manual_seed(s.seed)
    model, tokenizer = build(s, device)
    if s.init:
        say(f"{s.name} starts from {s.init}: {start_from(model, Path(s.init))}")
    balance_alone = s.molex and s.molex.top_k == 1 and s.molex.gate_weight == "renormalised"
    if balance_alone and not s.load_balance:
        say(f"{s.name}: without load balance nothing teaches the gate, which stays as drawn")
    model.cast_frozen()
    torch.manual_seed(s.seed + world()[0])  # dropout
    return model.train(), tokenizer


@torch.no_grad()
def start_from(model: Transformer, path: Path) -> str:
    """Take over what a finished run has trained, except its head (Table 9), or the LoRA of a .bin
    file; says what it took: a gate of the same shape, too, and alpha if both runs learn it."""
    if path.is_file():
        tensors = read_loralib(path, model.config.family)
        fill(adapters(model), tensors, f"{path} {OTHER_SHAPE}")
        return "its LoRA"
    head = task_head(model)
    ours = {n: p for n, p in trained_tensors(model).items() if n not in head}
    theirs = {n: w for n, w in read_run(path)[1].items() if n in ours or not n.startswith("head.")}
    left_out = drop_other_gate(ours, theirs)
    fill(ours, theirs, f"what {path} has trained has not the shapes of this run's LoRA: it")
    return "all but its head" + left_out


def read_data(s: Settings, tokenizer: Tokenizer, positions: int) -> tuple[list[Example], Splits]:
    """The training examples, and those of each dev split, for a model of so many positions. Raises
    InputError, before anything is trained, if the test set cannot be decoded after it."""
    splits = {}
    for split in ("train", *TASKS[s.task].dev):
        examples = read_examples(tokenizer, s.task, s.data, split, min(s.max_length, positions))
        splits[split] = examples[: s.train_limit if split == "train" else s.dev_limit]
    if s.task == "e2e":
        mrs = {}

        def fits(mr: str) -> None:
            mrs[mr] = len(encode_prompt(tokenizer, e2e_prompt(mr))) + s.max_new_tokens - 1
            if mrs[mr] > positions and len(mrs) <= (s.test_limit or len(mrs)):
                what = f"the MR and --max-new-tokens {s.max_new_tokens} make {mrs[mr]} tokens"
                raise InputError(f"{what}, but the model has {positions} positions; shorten either")

        read_e2e(s.data, "test", fits)
    return splits.pop("train"), splits


def train(s: Settings, folder: Path, device: torch.device, fresh: bool = False) -> None:
    """Train one run in its folder, from its beginning or from last.pt, to its end; `fresh` removes
    first what is there. Raises InputError if another process is at it."""
    first = is_first()
    with locked(folder) if first else nullcontext():
        model, tokenizer = prepare(s, device)
        examples, dev = read_data(s, tokenizer, model.config.max_positions)
        if first and fresh:
            RunFolder(folder).remove()
        wait_for_all()
        fit(s, folder, model, examples, dev)


def run(s: Settings, out: Path, fresh: bool, device: torch.device) -> Path:
    """Train and evaluate one run, or what is left of it; returns its folder."""
    folder = out / s.name
    if (folder / "config.json").exists() and not fresh:
        finished = RunFolder(folder).finished(s, data_files(s.task, s.data))
        say(f"{folder}: {'finished before, kept' if finished else 'resumed'}")
        if finished:
            return folder
    train(s, folder, device, fresh)
    if is_first():
        evaluate_run(folder, device)
    return folder


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[Settings]]:
    """The command line, and the settings of every run it asks for, in order. Raises InputError."""
    args, runs = parse_command(MoLExConfig, TASKS, argv)
    for s in runs:
        data_files(s.task, s.data)  # all are there, before the first run begins
    return args, runs


def main() -> None:
    args, runs = parse()
    borrowed = paper_settings(runs[0].shape, runs[0].task)[1]
    with torchrun(pick_device(args.device)) as device:
        if borrowed:
            say(f"{args.model} is given the settings of {borrowed}: the paper has no such run")
        for s in runs:
            run(s, args.out, args.fresh, device)
        if is_first():
            RunFolder(args.out / runs[-1].name).print_samples()
            report(runs, args.out, TASKS)
            if len(runs) > 1:
                pictures(runs, args.out, TASKS)
            print("\nruns:", *(str(args.out / s.name) for s in runs))


if __name__ == "__main__":
    command_line(main, "the same command, without --fresh, goes on with what was begun")
