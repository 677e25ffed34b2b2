"""Fine-tune with LoRA, with or without MoLEx, and report the paper's metrics.

    python train.py                                          the embedded default, on a laptop
    python train.py --model gpt2-medium --task e2e           the paper's E2E run (Tables 2 and 6)
    python train.py --model gpt2-medium --task e2e --no-molex        its LoRA baseline
    python train.py --model gpt2-medium --task e2e --compare --seeds 0 1 2 3 4
    python train.py --model roberta-base --task rte               a cell of Table 1
    python train.py --model roberta-base --task glue --compare                all eight tasks
    python train.py --model roberta-base --task rte --init-from RUN   as in Table 9
    torchrun --nproc-per-node 4 train.py --model gpt2-medium --task e2e      data parallel

Every setting has a flag (`--help`); what is not given comes from the paper. A run is a folder,
runs/<model>-<task>-<method>-s<seed>/: config.json, origin.json (hashes of what was read, versions,
command, date), metrics.jsonl, adapter.safetensors (the trained tensors of the best epoch), last.pt,
predictions.tsv, scores.json, samples.txt, loss.png and, for MoLEx, routes.json and routes.png. The
same command again resumes a run that was killed or stopped and keeps a finished one.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from data import (
    GLUE,
    NO_TARGET,
    Example,
    Tokenizer,
    collate,
    data_files,
    is_tokenized,
    read_e2e,
    read_examples,
    shuffled_batches,
)
from eval import (
    ROWS,
    best_epoch,
    build,
    check_settings,
    dev_scores,
    evaluate_run,
    paired_bootstrap,
    plot_curves,
    read_log,
    read_predictions,
    read_run,
    read_scores,
)
from lora import load_loralib, task_head, trained_tensors
from model import Batch, Transformer, checkpoint_folder, read_config
from molex import MoLExConfig, setting
from support.cli import Parser, at_least, command_line, layer_range, pick_device
from support.files import (
    InputError,
    check,
    fill,
    locked,
    read_json,
    read_tensors,
    uninterrupted,
    write_atomic,
    write_text,
)

# ----------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """Everything needed to repeat a run. The defaults are the left column of Table 6, for GPT-2
    medium on E2E; what it leaves out is as in the public LoRA code."""

    model: str
    task: str
    data: str | None
    seed: int
    molex: MoLExConfig | None  # None: the same without MoLEx
    init: str | None = None  # a run, or a .bin file, to start from
    shape: str = ""  # the model of [models] in paper.toml that has this one's shape
    differs: dict = field(default_factory=dict)  # setting -> [ours, the preset's]
    tune: str = setting("lora", "or train every weight, or every bias", "lora", "full", "bitfit")
    epochs: int = setting(5, "passes over the training set")
    max_steps: int | None = setting(None, "stop, and end the decay, after so many optimizer steps")
    batch_size: int = setting(8, "sequences per optimizer step, over all processes")
    batch_times: int = setting(1, "such batches in a step; 8 reads Table 5's as each of 8 GPUs'")
    accumulate: int = setting(1, "micro-batches in a step, to save memory; each votes for itself")
    length_groups: int = setting(1, "batches in which like lengths are put together; 1: at random")
    lr: float = setting(2e-4, "learning rate of all but the gate, linear warm-up and decay")
    weight_decay: float = setting(0.01, "of the same, biases and norms excepted")
    warmup: float = setting(500.0, "steps until the full rate; below 1: share of all steps")
    clip: float = setting(0.0, "longest gradient, as a norm; 0: off")
    adam_eps: float = setting(1e-6, "AdamW's epsilon")
    label_smoothing: float = setting(0.1, "on the answer's tokens", below=1)
    dropout: float = setting(0.0, "of the pretrained model; GLUE: the checkpoint's own", below=1)
    max_length: int = setting(512, "tokens, prompt and answer; longer answers are cut")
    lora_r: int = setting(4, "rank of the LoRA on q and v")
    lora_alpha: float = setting(32.0, "the LoRA's update is scaled by alpha / r")
    lora_dropout: float = setting(0.1, "on the LoRA's input", below=1)
    gate_lr: float = setting(0.1, "learning rate of the gate and a learned alpha")
    gate_weight_decay: float = setting(0.01, "of the gate")
    load_balance: float = setting(0.01, "coefficient of the load-balance loss")
    beams: int = setting(10, "beam size")
    length_penalty: float = setting(0.9, "an answer's log-probability is over length ** this")
    no_repeat_ngram: int = setting(4, "no n-gram of so many tokens twice; 0: off", least=0)
    max_new_tokens: int = setting(64, "longest answer")
    beam_rule: str = setting("transformers", "whose beam search", "transformers", "lora")
    precision: str | None = setting(None, "of matrix products; on CUDA bf16", "bf16", "float32")
    compile: bool = setting(False, "torch.compile of each layer; no gain on a CPU")
    cuda_graphs: bool = setting(False, "a step in one launch, not yet run on a GPU")
    eval_batch: int = setting(16, "sequences evaluated together")
    test_limit: int | None = setting(None, "decode only so many MRs of the test set")

    @property
    def name(self) -> str:
        """The run folder's name."""
        model = "-".join(Path(self.model).parts[-2:]).strip("/.")
        tune = "" if self.tune == "lora" and self.molex else self.tune
        how = [tune, "molex" if self.molex else "", "init" if self.init else ""]
        return "-".join([model, self.task, *filter(None, how), f"s{self.seed}"])

    @property
    def method(self) -> str:
        """As tables call it."""
        tune = {"lora": "LoRA", "full": "full", "bitfit": "BitFit"}[self.tune]
        return f"{tune} + MoLEx" if self.molex else tune

    def as_json(self) -> dict:
        """As config.json has them: lists for tuples."""
        return json.loads(json.dumps(asdict(self)))


# ------------------------------------------------------------------------------------------- a step


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(parameters: list[Tensor], loss: Tensor) -> None:
    """Add up gradients and loss, in place and in one message: few parameters are trained."""
    if not dist.is_initialized():
        return
    parts = [p.grad for p in parameters] + [loss]
    flat = torch.cat([x.flatten() for x in parts])
    dist.all_reduce(flat)
    for x, total in zip(parts, flat.split([x.numel() for x in parts]), strict=True):
        x.copy_(total.view_as(x))


def train_step(
    model: Transformer, optimizer: Optimizer, examples: list[Example] | Batch, s: Settings
) -> Tensor:
    """One optimizer step on one batch; returns its loss (a tensor, so that nothing waits for it).

    Every process gets the whole batch and takes every n-th sequence. The loss is a mean over all
    targets of the batch, whatever the micro-batches and processes it is spread over.
    """
    if isinstance(examples, Batch):
        micros, targets = [examples], (examples.target != NO_TARGET).sum()
    else:
        (rank, processes), size = world(), -(-len(examples) // s.accumulate)
        parts = [examples[i : i + size][rank::processes] for i in range(0, len(examples), size)]
        micros, targets = [collate(part) for part in parts], sum(e.targets for e in examples)
    total = torch.zeros((), device=model.device)
    for micro in micros:
        loss = model.loss(micro, s.label_smoothing) / targets
        total += loss.detach()
        if s.molex and s.load_balance:
            loss = loss + s.load_balance * model.layers.load_balance / len(micros)
        loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sum_over_processes(parameters, total)
    if s.clip:
        torch.nn.utils.clip_grad_norm_(parameters, s.clip)
    optimizer.step()
    optimizer.zero_grad()
    return total


def make_optimizer(model: Transformer, s: Settings, steps: int) -> tuple[Optimizer, LambdaLR]:
    """AdamW; linear warm-up from zero, then linear decay to zero at `steps`, as in transformers and
    the LoRA code. Biases and norms do not decay; nor does a learned alpha, whose decay would pull
    it towards 1/2 (appendix B.1 speaks of the gates)."""
    alike = defaultdict(list)  # (learning rate, weight decay) -> parameters
    for name, p in trained_tensors(model).items():
        if name.startswith(("layers.gates.", "layers.alpha")):
            decay = 0.0 if name.startswith("layers.alpha") else s.gate_weight_decay
            alike[s.gate_lr, decay].append(p)
        else:
            alike[s.lr, s.weight_decay if p.dim() > 1 else 0.0].append(p)
    groups = [dict(params=ps, lr=lr, weight_decay=decay) for (lr, decay), ps in alike.items()]
    optimizer = AdamW(groups, eps=s.adam_eps)
    warm = s.warmup if s.warmup >= 1 else math.ceil(s.warmup * steps)
    schedule = LambdaLR(
        optimizer, lambda t: t / warm if t < warm else (steps - t) / max(1, steps - warm)
    )
    return optimizer, schedule


# ----------------------------------------------------------------------------------------- the loop

SAVE_SECONDS = 60  # within an epoch; its end is saved anyway
Splits = dict[str, list[Example]]  # name of a dev split -> its examples


def fit(
    s: Settings, folder: Path, model: Transformer, examples: list[Example], dev: Splits
) -> None:
    """The loop of `train`. Ctrl-C and SIGTERM, which come between two steps, save the state."""
    rank, lengths, batch_size = world()[0], [len(e) for e in examples], s.batch_size * s.batch_times
    per_epoch = -(-len(examples) // batch_size)
    counts = dict(train=len(examples), dev=sum(map(len, dev.values())))
    run = Progress(s, folder, model, per_epoch)
    graphed = GraphedStep(model, run.optimizer, s) if s.cuda_graphs else None
    run.resume()
    bar = tqdm(total=run.steps, initial=run.step, desc=s.name, disable=rank != 0)
    saved = started = time.perf_counter()
    try:
        for epoch in range(len(run.log), -(-run.steps // per_epoch)):
            batches = shuffled_batches(lengths, batch_size, 1000 * s.seed + epoch, s.length_groups)
            place = run.step - epoch * per_epoch
            if not place:
                run.loss_sum, run.curve = 0.0, []
            for indices in batches[place : place + run.steps - run.step]:
                batch = [examples[i] for i in indices]
                with uninterrupted():
                    loss = graphed(batch) if graphed else train_step(model, run.optimizer, batch, s)
                    run.losses.append(loss)
                    run.schedule.step()
                    run.step, place = run.step + 1, place + 1
                    bar.update()
                    if run.step % 25 == 0 or place == per_epoch or run.step == run.steps:
                        run.settle()
                        bar.set_postfix(loss=f"{run.loss_sum / place:.3f}")
                        gate = model.layers.summary() if s.molex else {}
                        run.curve.append(dict(step=run.step, loss_sum=run.loss_sum, **gate))
                    now = time.perf_counter()
                    run.seconds, started = run.seconds + now - started, now
                if rank == 0 and now - saved > SAVE_SECONDS:
                    run.save()
                    saved = now
            if rank == 0:
                found = dev_scores(model, s.task, dev, s.eval_batch)
                entry = dict(epoch=epoch + 1, step=run.step, train_loss=run.loss_sum / place)
                entry |= found | dict(seconds_per_step=run.seconds / run.step)
                entries = [*run.log, entry | dict(examples=counts, curve=run.curve)]
                if best_epoch(entries, s.task) is entries[-1]:
                    best = {n: p.detach().cpu().contiguous() for n, p in run.tensors.items()}
                    write_atomic(folder / "adapter.safetensors", lambda p, b=best: save_file(b, p))
                lines = [json.dumps(e) + "\n" for e in entries]
                write_text(folder / "metrics.jsonl", "".join(lines))
                run.log = entries  # not before: a signal until here repeats the epoch's end
                run.save()  # last: a kill before it does so too
                text = ", ".join(f"{n.replace('_', ' ')} {v:.4f}" for n, v in found.items())
                bar.write(f"epoch {epoch + 1}: train loss {entry['train_loss']:.4f}, {text}")
            started = saved = time.perf_counter()
    except KeyboardInterrupt:
        if rank == 0:
            run.save()
        raise
    finally:
        bar.close()


def train(s: Settings, folder: Path, device: torch.device, fresh: bool = False) -> None:
    """Train one run in its folder, from its beginning or from last.pt, to its end; `fresh` removes
    first what is there. Raises InputError if another process is at it, if last.pt has another
    origin, or if the loss is no longer a number; the last state stays."""
    model, tokenizer = prepare(s, device)
    examples, dev = read_data(s, tokenizer, min(s.max_length, model.config.max_positions))
    rank, processes = world()
    with locked(folder) if rank == 0 else nullcontext():
        if rank == 0 and fresh:
            removed = folder.with_name(f".{folder.name}.removed")
            shutil.rmtree(removed, ignore_errors=True)  # where a kill has left one
            folder.rename(removed)  # at once: a kill leaves the whole run or none of it
            folder.mkdir()
            shutil.rmtree(removed)
        if processes > 1:
            dist.barrier()
        fit(s, folder, model, examples, dev)


def run(s: Settings, out: Path, fresh: bool, device: torch.device) -> Path:
    """Train and evaluate one run, or what is left of it; returns its folder."""
    folder, (rank, _) = out / s.name, world()
    if os.path.exists(folder / "config.json") and not fresh:
        old = read_json(folder / "config.json")
        if changed := differences(old, s.as_json()):
            what = f"{folder} holds a run with another {', '.join(changed)}"
            raise InputError(f"{what}; pass --fresh to replace it or --out DIR to keep both")
        finished = (folder / "scores.json").exists()
        if rank == 0:
            print(f"{folder}: {'finished before, kept' if finished else 'resumed'}")
        if finished:
            with suppress(InputError), locked(folder):
                pass  # so goes the lock's file that a kill at the very end has left
            return folder
    train(s, folder, device, fresh)
    if rank == 0:
        evaluate_run(folder, device)
    return folder


# --------------------------------------------------------------------------- how far a run has come


class Progress:
    """How far a run has come, and what it trains; last.pt holds all that it takes to go on."""

    KEPT = ("step", "seconds", "log", "loss_sum", "curve")

    def __init__(self, s: Settings, folder: Path, model: Transformer, per_epoch: int) -> None:
        self.s, self.folder, self.model, self.per_epoch = s, folder, model, per_epoch
        self.steps = min(s.epochs * per_epoch, s.max_steps or s.epochs * per_epoch)
        self.optimizer, self.schedule = make_optimizer(model, s, self.steps)
        self.tensors, self.origin = trained_tensors(model), origin(s)
        self.step, self.seconds, self.loss_sum = 0, 0.0, 0.0  # the sum is of the epoch
        self.curve: list[dict] = []  # of the epoch: a point every 25 steps
        self.log: list[dict] = []  # an entry for each epoch
        self.losses: list[Tensor] = []  # of the steps since `settle`

    def settle(self) -> None:
        """Add up the losses since the last call. They, and at last the weights, must be finite."""
        broken = not torch.stack([p.isfinite().all() for p in self.tensors.values()]).all()
        recent = torch.stack(self.losses).tolist() if self.losses else []  # one transfer for all
        for n, loss in enumerate(recent, self.step - len(recent)):
            self.loss_sum += loss
            if not math.isfinite(self.loss_sum) or broken and n + 1 == self.step:
                place = f"batch {n % self.per_epoch + 1} of epoch {n // self.per_epoch + 1}"
                what = f"{self.folder}: no finite loss or weights after step {n + 1} ({place})"
                raise InputError(f"{what}; look at the data, or try --fresh with a smaller --lr")
        self.losses.clear()

    def save(self) -> None:
        self.settle()
        state = {name: getattr(self, name) for name in self.KEPT} | dict(origin=self.origin)
        state |= dict(optimizer=self.optimizer.state_dict(), schedule=self.schedule.state_dict())
        state |= dict(tensors={n: p.detach() for n, p in self.tensors.items()})
        if self.s.molex:
            state |= dict(sums=self.model.layers.sums, last=self.model.layers.last)
        state |= dict(rng=torch.get_rng_state())
        if self.model.device.type == "cuda":
            state |= dict(cuda_rng=torch.cuda.get_rng_state(self.model.device))
        write_atomic(self.folder / "last.pt", lambda path: torch.save(state, path))

    def resume(self) -> None:
        """Go on from last.pt; without one, write what the folder of a new run begins with."""
        last, config = self.folder / "last.pt", self.folder / "config.json"
        if not last.exists():  # all that the run needs has been read: from here on it is one
            if world()[0] == 0:
                write_text(self.folder / "origin.json", json.dumps(self.origin, indent=2) + "\n")
                write_text(config, json.dumps(self.origin["settings"], indent=2) + "\n")
            return
        state, now = read_tensors(last, {"tensors": (dict,), "origin": (dict,)}), self.origin
        parts = dict.fromkeys(("settings", "files", "versions"), (dict,))
        then = self.origin = check(state["origin"], parts, last)
        other = [n for part in ("settings", "files") for n in differences(then[part], now[part])]
        if other or not config.exists():
            what = f"{last} is of a run with another {', '.join(other or ['folder'])}"
            raise InputError(f"{what}; put that back or use --fresh")
        for name in self.KEPT:
            setattr(self, name, state[name])
        fill(self.tensors, state["tensors"], last)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for name in ("sums", "last") if self.s.molex else ():
            getattr(self.model.layers, name).copy_(state[name])
        if world()[0] == 0:  # the other processes go on with dropout of their own
            for n in differences(then["versions"], now["versions"]):
                was, new = then["versions"][n], now["versions"][n]
                print(f"{self.folder}: {n} was {was}, is now {new}")
            torch.set_rng_state(state["rng"])
            if self.model.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], self.model.device)


# --------------------------------------------------------------------------- what a run starts from


def prepare(s: Settings, device: torch.device) -> tuple[Transformer, Tokenizer]:
    """The model to train. The LoRA and a head start the same with and without MoLEx. Raises
    InputError if its steps cannot be CUDA graphs and are to be."""
    alone = device.type == "cuda" and s.accumulate == world()[1] == 1
    if s.cuda_graphs and not (alone and (s.molex is None or s.molex.on_device)):
        needs = "a GPU, one process, --accumulate 1, MoLEx --on-device"
        raise InputError(f"--cuda-graphs needs {needs}")
    torch.manual_seed(s.seed)
    model, tokenizer = build(asdict(s), device)
    if s.init:
        took = start_from(model, Path(s.init))
        if world()[0] == 0:
            print(f"{s.name} starts from {s.init}: {took}")
    model.cast_frozen()
    for block in model.layers.blocks if s.compile else ():
        block.compile(dynamic=True)
    torch.manual_seed(s.seed + world()[0])  # dropout
    return model.train(), tokenizer


@torch.no_grad()
def start_from(model: Transformer, path: Path) -> str:
    """Take over what a finished run has trained, but for its head (Table 9), or the LoRA of a .bin
    file; says what it took. A gate, with its alpha, is taken as a whole or, if the run has none of
    that shape, stays new. Raises InputError if the rest does not fit."""
    if path.is_file():
        load_loralib(model, path)
        return "its LoRA"
    ours = {n: p for n, p in trained_tensors(model).items() if n not in task_head(model)}
    theirs = {n: w for n, w in read_run(path)[1].items() if n in ours or not n.startswith("head.")}
    names = ours.keys() | theirs.keys()
    gate = {n for n in names if n.startswith(("layers.gates.", "layers.alpha"))}
    shapes = [{n: x.shape for n, x in side.items() if n in gate} for side in (ours, theirs)]
    new = shapes[0] != shapes[1]
    if new:
        ours, theirs = ({n: x for n, x in side.items() if n not in gate} for side in (ours, theirs))
    fill(ours, theirs, f"what {path} has trained has not the shapes of this run's LoRA: it")
    return "all but its head" + (" and its gate, for want of one of this shape" if new else "")


def read_data(s: Settings, tokenizer: Tokenizer, limit: int) -> tuple[list[Example], Splits]:
    """The training examples, and those of each dev split."""
    splits = ("train", *(GLUE[s.task].dev if s.task in GLUE else ("dev",)))
    data = {split: read_examples(tokenizer, s.task, s.data, split, limit) for split in splits}
    if s.task == "e2e":
        read_e2e(s.data, "test")  # only to be sure that it can be read
    return data.pop("train"), data


def differences(then: dict, now: dict) -> list[str]:
    """The names that have another value; "differs" follows from the other settings."""
    names = [name for name in then | now if name != "differs"]
    return [name for name in names if then.get(name) != now.get(name)]


def origin(s: Settings) -> dict:
    """What a run is made of, for origin.json and last.pt: settings, SHA-256 of the files it reads
    (not of what comes from the hub's data sets), versions, command and date."""
    home, model = Path(__file__).parent, checkpoint_folder(s.model)
    kinds = "config.json tokenizer.json vocab.json merges.txt *.safetensors* pytorch_model.bin"
    files = sorted(f for kind in kinds.split() for f in model.glob(kind))
    hashes = {}
    for path in files + data_files(s.task, s.data):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    git = ["git", "-C", home, "describe", "--always", "--dirty", "--abbrev=40"]
    known = (home / ".git").exists() and shutil.which("git")
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if known else None
    versions = dict(python=platform.python_version(), torch=str(torch.__version__), commit=commit)
    made = dict(settings=s.as_json(), files=hashes, versions=versions, command=shlex.join(sys.argv))
    made["date"] = datetime.now().astimezone().isoformat(timespec="seconds")
    return made


# -------------------------------------------------------------------------------------- CUDA graphs


class GraphedStep:
    """`train_step` as CUDA graphs, one for each shape of a batch: a step is one launch, not
    thousands. Lengths are rounded up, so that shapes are few. The first batch of a shape runs as it
    is, and what is made lazily is made; the second is captured.
    """

    def __init__(self, model: Transformer, optimizer: Optimizer, s: Settings) -> None:
        self.model, self.optimizer, self.s = model, optimizer, s
        self.device, self.steps, self.pool = model.device, {}, None

    def __call__(self, examples: list[Example]) -> Tensor:
        if not self.steps:  # a graph reads the rate from where the schedule writes it
            for group in self.optimizer.param_groups:
                rate = torch.as_tensor(group["lr"], device=self.device)
                group |= dict(capturable=self.device.type == "cuda", lr=rate)
        batch = collate(examples, multiple=16)
        shape = tuple(x.shape for x in vars(batch).values())
        if shape not in self.steps:
            self.steps[shape] = None
            return train_step(self.model, self.optimizer, batch.to(self.device), self.s)
        if self.steps[shape] is None:
            fixed = batch.to(self.device)
            self.steps[shape] = fixed, self.capture(fixed)
        fixed, replay = self.steps[shape]
        for x, new in zip(vars(fixed).values(), vars(batch).values(), strict=True):
            x.copy_(new)
        return replay()

    def capture(self, batch: Batch) -> Callable[[], Tensor]:
        """A step on what `batch` will hold, as a function that launches it."""
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool):
            loss = train_step(self.model, self.optimizer, batch, self.s)

        def replay() -> Tensor:
            graph.replay()
            return loss.clone()

        return replay


# ------------------------------------------------------------------ the paper's settings, and flags

PAPER = tomllib.loads((Path(__file__).parent / "support/paper.toml").read_text("utf-8"))
FROM_MNLI = ("mrpc", "rte", "stsb")  # the tasks that Table 9 starts from an MNLI run
HOW = ("on_device", "compile", "cuda_graphs")  # a step runs, not what it computes


def preset(shape: str, task: str) -> tuple[dict, str]:
    """What the paper, or the embedded default, sets for a model of [models] in paper.toml ("" for
    any other) and a task, less what `Settings` has; and whose these are, if another model's."""
    kind, known = "glue" if task in GLUE else task, PAPER["presets"]
    nano = known["nano"].get(shape, {}).get(kind, {})
    if kind == "glue":
        column = PAPER["table5"].get(shape, PAPER["table5"]["roberta-base"])
        place = [*GLUE].index(task)
        table = {n: row[place] if isinstance(row, list) else row for n, row in column.items()}
        other = "" if nano or shape in PAPER["table5"] else "Table 5, for RoBERTa-base"
        return table | known["glue"] | nano, other
    own = nano or shape == "gpt2-medium" or task == "alpaca"  # Alpaca's are not from the paper
    return known.get(task, {}) | nano, "" if own else "Table 6, for GPT-2 medium"


FLAGS = {f.name: f for cls in (Settings, MoLExConfig) for f in fields(cls) if f.metadata}
GATE = [f.name for f in fields(MoLExConfig)]
OWN = [name for name in FLAGS if name not in GATE]


def make_parser() -> Parser:
    """A flag for every `setting` of the two dataclasses; the result has only what is given."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", help="hub name or folder (nano/'s, with --compare)")
    task = dict(choices=["e2e", "alpaca", *GLUE, "glue"], default="e2e")
    task["type"] = lambda name: name.lower().replace("-", "")  # also SST-2
    parser.add_argument("--task", help="glue: all eight tasks in turn (e2e)", **task)
    parser.add_argument("--data", help="folder of the official files; Alpaca: JSON file (hub)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where runs go (runs)")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0], help="a run each (0)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--no-molex", action="store_true", help="LoRA (or --tune) alone")
    how.add_argument("--compare", action="store_true", help="that alone, then with MoLEx")
    start = (
        "finished run of the same model to start from: its LoRA, and a gate of the same shape; or a"
        " .bin file of the public LoRA code (made with --lora-alpha 16); with --compare, one with"
        " MoLEx and one without; with --task glue, MRPC, RTE, STS-B alone start there (Table 9)"
    )
    parser.add_argument("--init-from", nargs="+", default=[], metavar="RUN", help=start)
    parser.add_argument("--fresh", action="store_true", help="start anew over an existing run")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    for name, f in FLAGS.items():
        how = dict(type=int if f.default is None else type(f.default))
        if f.metadata["choices"]:
            how = dict(choices=f.metadata["choices"])
        elif isinstance(f.default, bool):
            how = dict(action=argparse.BooleanOptionalAction)
        elif name == "layers":
            how = dict(type=layer_range, metavar="0-11")
        flag = "--molex-layers" if name == "layers" else "--" + name.replace("_", "-")
        text = f.metadata["help"] + ("" if f.default is None else f" ({f.default})")
        parser.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, **how)
    return parser


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[Settings]]:
    """The command line, and the settings of every run it asks for, in order."""
    args = make_parser().parse_args(argv)
    decode = args.task in ("e2e", "alpaca")
    model = str(Path(args.model or ("nano/gpt2" if decode else "nano/roberta")))  # "a/" is "a"
    config = read_config(checkpoint_folder(model))
    if decode and config.family == "roberta":
        raise InputError(f"{model} is an encoder, which cannot write text; try --model gpt2-medium")
    given = {n: v for n, v in vars(args).items() if n in FLAGS}
    tasks = [*GLUE] if args.task == "glue" else [args.task]
    methods = [False] if args.no_molex else [True]
    if args.compare or (args.model is None and not args.no_molex):
        methods = [False, True]
    size = [config.family, config.n_layer, config.d_model]
    shape = next((name for name, known in PAPER["models"].items() if known == size), "")
    runs: list[Settings] = []
    for task in tasks:
        pair, theirs = [], preset(shape, task)[0]
        data = args.data or theirs.get("data")
        data_files(task, data)  # they are there, before the first run begins
        if task == "e2e":
            theirs = theirs | dict(layers=tuple(range(min(12, config.n_layer))))
        elif task in GLUE:  # the checkpoint's own, as in the public LoRA scripts
            theirs = theirs | dict(dropout=config.dropout)
        starts = args.init_from if args.task != "glue" or task in FROM_MNLI else []
        for mixes in methods:
            init, inherited = source(starts, model, mixes)
            tune = (dict(tune="lora") | inherited | given)["tune"]
            base = {n: f.default for n, f in FLAGS.items()} | theirs | PAPER["presets"][tune]
            chosen = base | inherited | given  # the precedence of all settings
            molex = MoLExConfig(**{n: chosen[n] for n in GATE})
            molex.check(config.n_layer)
            other = [n for n in OWN + GATE * mixes if chosen[n] != base[n] and n not in HOW]
            own = {n: chosen[n] for n in OWN} | dict(init=init, molex=molex if mixes else None)
            own["differs"] = {n: [chosen[n], base[n]] for n in other}
            pair.append(Settings(model=model, task=task, data=data, seed=0, shape=shape, **own))
        runs += [replace(s, seed=seed) for seed in dict.fromkeys(args.seeds) for s in pair]
    for name, value in given.items():
        limits = FLAGS[name].metadata
        number = name in OWN and type(value) in (int, float)
        if number and not limits["least"] <= value < limits["below"]:  # nor not-a-number
            raise InputError(f"--{name.replace('_', '-')} cannot be {value}")
    for s in runs:
        check_settings(s.as_json(), "command line")  # now, not when all is trained
    return args, runs


def source(paths: list[str], model: str, molex: bool) -> tuple[str | None, dict]:
    """The one of --init-from's paths that a run with or without MoLEx starts from, and the settings
    that come with it: what is trained, and the LoRA's rank and alpha. A run with MoLEx that finds
    no other may start from one without, with a new gate."""
    fits = {}
    for path in paths:
        config = {} if Path(path).is_file() else read_run(Path(path))[0]
        if config and config["model"] != model:
            raise InputError(f"--init-from {path} is a run of {config['model']}, not of {model}")
        mixes = bool(config.get("molex"))
        if mixes in fits:
            how = "with" if mixes else "without"
            raise InputError(f"--init-from {path} is a second run {how} MoLEx; give one of each")
        fits[mixes] = (path, config)
    if not fits:
        return None, {}
    if not molex and False not in fits:
        raise InputError(f"--init-from {paths[0]} has MoLEx; give a run without it as well")
    path, config = fits.get(molex) or fits[False]
    return path, {n: config[n] for n in ("tune", "lora_r", "lora_alpha") if n in config}


# ------------------------------------------------------------------------------------------ results


def paper(s: Settings) -> dict[tuple[str, str], str]:
    """What the paper reports for runs like this, by task and metric."""
    kind = "glue" if s.task in GLUE else s.task
    rows = PAPER["results"].get(kind, {}).get(s.shape, {})
    row = rows.get(f"{s.method} from MNLI" if s.init else s.method, [])
    keys = [(s.task, n) for n in ROWS[s.task]]
    if kind == "glue":
        keys = [(n, task.metric) for n, task in GLUE.items()] + [("glue", "average")]
    cells = {key: c for key, c in zip(keys, row, strict=False) if c and key[0] in (s.task, "glue")}
    count = PAPER["trainable"].get(s.shape, {}).get(s.method)
    return cells | ({(s.task, "trainable"): count} if cells and count else {})


def departures(runs: list[Settings], out: Path) -> list[str]:
    """A line for every setting in which runs beside the paper's numbers are not the paper's."""
    lines = []
    for s in runs:
        name = GLUE[s.task].folder if s.task in GLUE else s.task
        for n, pair in s.differs.items():
            ours, theirs = ("none" if value is None else value for value in pair)
            if n != "beam_rule":  # below
                lines.append(f"{name}: {n.replace('_', ' ')} {ours} (paper: {theirs})")
        if s.init:
            lines.append(f"{name}: starts from {s.init} (paper: the best MNLI run)")
        scores = read_scores(out / s.name, s.task)
        for part, count in scores.get("examples", {}).items():
            official = PAPER["examples"].get(s.task, {}).get(part, count)
            if count != official:
                lines.append(f"{name}: {count:,} {part} examples (official data: {official:,})")
        if s.task == "e2e" and s.beam_rule != "lora":
            lines.append("e2e: beam search as in transformers (paper, probably: --beam-rule lora)")
        if s.task == "e2e" and not is_tokenized(s.data):
            lines.append("e2e: the official text (paper, probably: the LoRA code's tokenized one)")
    if (seeds := len({s.seed for s in runs})) != 5:
        lines.append(f"seeds: {seeds} (paper: 5)")
    return [*dict.fromkeys(lines)]


def spread(values: list[float], factor: float, decimals: int) -> str:
    """Mean, and standard deviation (n - 1) if there are several."""
    values = [v * factor for v in values]
    text = f"{statistics.mean(values):,.{decimals}f}"
    return f"{text} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else text


def interval(values: list[float]) -> float:
    """Half the width of the 95% interval of the mean, by Student's t distribution, whose density is
    added up from 0 on until it holds half of that."""
    n, free, step = len(values), len(values) - 1, 1e-4
    scale = math.exp(math.lgamma(n / 2) - math.lgamma(free / 2)) / math.sqrt(free * math.pi)
    density = scale * (1 + np.arange(step / 2, 20, step) ** 2 / free) ** (-n / 2)
    t = step * (density.cumsum() * step).searchsorted(0.475)
    return float(t) * statistics.stdev(values) / math.sqrt(n)


def report(runs: list[Settings], out: Path) -> None:
    """One table of all runs: a column for each method and, if there are two, their difference, with
    its 95% interval over the seeds, then what the paper has. For BLEU also the p-value of a paired
    bootstrap for every seed."""
    tasks, columns = [*dict.fromkeys(s.task for s in runs)], {s.method: {} for s in runs}
    for s in sorted(runs, key=lambda s: bool(s.init)):  # the average is Table 9's, if it is that
        columns[s.method] |= paper(s)
    both = len(columns) == 2

    def line(
        key: tuple[str, str], cells: list[list[float]], name: str, factor: float, decimals: int
    ) -> str:
        text = f"{name:22}" + "".join(f"{spread(c, factor, decimals):>18}" for c in cells)
        if both:
            gains = [factor * (b - a) for a, b in zip(*cells, strict=True)]
            gain = f"{statistics.mean(gains):+,.{decimals}f}"
            gain += f" ± {interval(gains):.{decimals}f}" if len(gains) > 1 else ""
            text += f"{gain:>18}"
        return text + "".join(f"{p.get(key, ''):>14}" for p in columns.values() if p)

    head = f"\n{'':22}" + "".join(f"{method:>18}" for method in columns)
    head += f"{'difference':>18}" if both else ""
    print(head + "".join(f"{'paper: ' + m.split()[-1]:>14}" for m, p in columns.items() if p))
    results = []  # [task][method][seed], the main score
    for task in tasks:
        folders = [[out / s.name for s in runs if (s.task, s.method) == (task, m)] for m in columns]
        scores = [[read_scores(f, task) for f in group] for group in folders]
        metric, rows = next(iter(ROWS[task])), ROWS[task]
        parts = [key for key in scores[0][0] if key.startswith(metric + "_")]  # MNLI's two dev sets
        rows = rows | {key: (key.replace(metric + "_", "  "), 100, 2) for key in parts}
        if len(tasks) == 1:
            rows = {"trainable": ("trainable parameters", 1, 0)} | rows
            rows["seconds_per_step"] = ("seconds per step", 1, 3)
        for key, how in rows.items():
            cells = [[run[key] for run in group] for group in scores]
            cells = [group[:1] for group in cells] if key == "trainable" else cells
            text = line((task, key), cells, *how)
            if both and key == "bleu":
                ps = []
                for baseline, system in zip(*folders, strict=True):
                    _, outputs, references = read_predictions(baseline)
                    p = paired_bootstrap(outputs, read_predictions(system)[1], references)[1]
                    ps.append(f"{p:.3f}")
                text += f"   p = {', '.join(ps)}"
            print(text)
        results.append([[run[metric] for run in group] for group in scores])
    if len(tasks) > 1:
        methods = (zip(*cells, strict=True) for cells in zip(*results, strict=True))
        means = [[*map(statistics.mean, seeds)] for seeds in methods]
        print(line(("glue", "average"), means, "average", 100, 2))
    if both and (seeds := len({s.seed for s in runs})) > 1:
        print(f"\ndifference: paired, mean of {seeds} seeds with its 95% interval (Student's t)")
    if lines := any(columns.values()) and departures(runs, out):
        print("\nNot as in the paper:", *lines, sep="\n  ")


# ------------------------------------------------------------------------------------- command line


def main() -> None:
    args, runs = parse()
    device = pick_device(args.device)
    if "RANK" in os.environ:  # started by torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        for n in (signal.SIGINT, signal.SIGTERM) if world()[0] else ():
            signal.signal(n, signal.SIG_IGN)  # the first saves the state, after a step of all
    if world()[0] == 0 and (borrowed := preset(runs[0].shape, runs[0].task)[1]):
        print(f"{runs[0].model} is given the settings of {borrowed}: the paper has none for it")
    for s in runs:
        run(s, args.out, args.fresh, device)
    if world()[0] == 0:
        print("\n" + (args.out / runs[-1].name / "samples.txt").read_text())
        report(runs, args.out)
        for task in dict.fromkeys(s.task for s in runs) if len(runs) > 1 else ():
            logs = [(s.method, read_log(args.out / s.name, task)) for s in runs if s.task == task]
            picture = args.out / f"{runs[0].name.partition(f'-{runs[0].task}-')[0]}-{task}-loss.png"
            plot_curves(logs, task, picture)
            print(f"\nloss over steps, all runs: {picture}")
        print("\nruns:", *(str(args.out / s.name) for s in runs))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    command_line(main)
