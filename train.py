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
runs/<model>-<task>-<method>-s<seed>/: config.json, metrics.jsonl, adapter.safetensors (the trained
tensors of the best epoch), last.pt, predictions.tsv, scores.json, samples.txt and, for MoLEx,
routes.json and routes.png. The same command again resumes a killed run and keeps a finished one.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from data import (
    GLUE,
    Example,
    Tokenizer,
    e2e_prompt,
    encode_alpaca,
    encode_glue,
    encode_pairs,
    glue_file,
    read_alpaca,
    read_e2e,
    read_glue,
    shuffled_batches,
)
from eval import (
    Parser,
    best_epoch,
    build,
    cast_frozen,
    classify,
    command_line,
    dev_loss,
    evaluate_run,
    glue_scores,
    paired_bootstrap,
    pick_device,
    read_predictions,
    read_run,
    read_scores,
    summed_loss,
    task_head,
    trained_tensors,
    write_atomic,
    write_text,
)
from lora import load_loralib
from model import (
    InputError,
    Transformer,
    checkpoint_folder,
    fill,
    read_config,
    read_json,
    read_tensors,
)
from molex import MoLExConfig, gate_parameters

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
    tune: str = "lora"
    epochs: int = 5
    max_steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 2e-4
    weight_decay: float = 0.01
    warmup: float = 500
    clip: float = 0.0
    adam_eps: float = 1e-6
    label_smoothing: float = 0.1
    dropout: float = 0.0
    max_length: int = 512
    lora_r: int = 4
    lora_alpha: float = 32.0
    lora_dropout: float = 0.1
    gate_lr: float = 0.1
    gate_weight_decay: float = 0.01
    load_balance: float = 0.01
    beams: int = 10
    length_penalty: float = 0.9
    no_repeat_ngram: int = 4
    max_new_tokens: int = 64
    eval_batch: int = 16
    test_limit: int | None = None

    @property
    def name(self) -> str:
        """The run folder's name."""
        model = "-".join(Path(self.model).parts[-2:]).strip("/.")
        how = [self.tune] if self.tune != "lora" or not self.molex else []
        how += ["molex"] * bool(self.molex) + ["init"] * bool(self.init)
        return "-".join([model, self.task, *how, f"s{self.seed}"])

    @property
    def method(self) -> str:
        """As tables call it."""
        tune = {"lora": "LoRA", "full": "full", "bitfit": "BitFit"}[self.tune]
        return tune + " + MoLEx" * bool(self.molex)


# Table 5, a line for each of its columns. "Mixing Weights": Learn is True, Fix is False.
TABLE_5_ROWS = ("batch_size", "epochs", "lr", "max_length", "gate", "activation", "proj_dim",
                "individual_gates", "vote", "learn_alpha", "load_balance")  # fmt: skip
TABLE_5 = {
    "roberta-base": {
        "mnli": (16, 30, 5e-4, 512, "cosine", "sigmoid", 416, False, "mode", True, 0.005),
        "sst2": (16, 60, 5e-4, 512, "cosine", "softmax", 128, False, "mode", True, 0.01),
        "mrpc": (16, 30, 4e-4, 512, "linear", "softmax", None, False, "mode", True, 0.0),
        "cola": (32, 80, 4e-4, 512, "linear", "softmax", None, False, "mode", False, 0.01),
        "qnli": (32, 25, 4e-4, 512, "cosine", "softmax", 96, False, "mean", True, 0.001),
        "qqp": (16, 25, 5e-4, 512, "cosine", "sigmoid", 384, False, "mode", True, 0.001),
        "rte": (32, 80, 5e-4, 512, "linear", "softmax", None, True, "mean", False, 0.001),
        "stsb": (16, 40, 4e-4, 512, "linear", "softmax", None, True, "mean", False, 0.006),
    },
    "roberta-large": {
        "mnli": (4, 10, 3e-4, 128, "cosine", "softmax", 416, False, "mode", False, 0.0001),
        "sst2": (4, 10, 4e-4, 128, "cosine", "softmax", 64, False, "mode", False, 0.0),
        "mrpc": (4, 20, 3e-4, 512, "linear", "softmax", None, True, "mode", False, 0.0001),
        "cola": (4, 20, 2e-4, 128, "linear", "softmax", None, False, "mode", False, 0.01),
        "qnli": (4, 10, 2e-4, 512, "cosine", "softmax", 256, False, "mean", False, 0.001),
        "qqp": (4, 20, 3e-4, 512, "cosine", "sigmoid", 384, False, "mode", True, 0.001),
        "rte": (8, 20, 4e-4, 512, "linear", "softmax", None, True, "mode", False, 0.0),
        "stsb": (8, 30, 2e-4, 512, "linear", "softmax", None, True, "mode", False, 0.0),
    },
}
# What Table 5 leaves out is as in the public LoRA scripts for GLUE, and transformers' trainer.
GLUE_COMMON = dict(lora_r=8, lora_dropout=0.0, label_smoothing=0.0, warmup=0.06, weight_decay=0.1,
                   clip=1.0, adam_eps=1e-8)  # fmt: skip
GLUE_ALPHA = {"roberta-large": 16.0}  # and 8 for the base model
# Table 11 says nothing of its settings. These are Liu et al.'s (2019) and Zaken et al.'s (2021).
TUNE = {"lora": {}, "full": dict(lr=2e-5, epochs=10), "bitfit": dict(lr=1e-3)}
# Table 12 says nothing of its settings either. Table 14's counts give r; the rest is the default of
# Meta's llama-recipes, the length Alpaca's own.
ALPACA = dict(lora_r=8, lora_dropout=0.05, lr=1e-4, batch_size=4, epochs=3, weight_decay=0.0,
              warmup=0.03, label_smoothing=0.0, max_length=512, beams=1)  # fmt: skip
NANO_TASKS = ("cola", "mrpc", "stsb")  # what nano/glue has
# A small model needs larger steps, and fewer.
NANO_GLUE = dict(epochs=5, lr=3e-3, lora_alpha=32.0, batch_size=16, eval_batch=50)
NANO = {
    ("nano/gpt2", "e2e"): dict(data="nano/e2e", epochs=3, lr=1e-2, warmup=50, eval_batch=70),
    **{("nano/roberta", task): NANO_GLUE for task in GLUE},
    **{("nano/roberta", task): NANO_GLUE | dict(data="nano/glue") for task in NANO_TASKS},
}


def preset(model: str, task: str) -> dict:
    """What the paper, or the embedded default, sets for a model and a task. On GLUE, models that
    Table 5 does not have take RoBERTa-base's column."""
    if task not in GLUE:
        return (ALPACA if task == "alpaca" else {}) | NANO.get((model, task), {})
    name = Path(model).name
    column = TABLE_5.get(name, TABLE_5["roberta-base"])[task]
    table = {n: v for n, v in zip(TABLE_5_ROWS, column, strict=True) if v is not None}
    alpha = GLUE_ALPHA.get(name, 8.0)
    return table | GLUE_COMMON | dict(lora_alpha=alpha) | NANO.get((model, task), {})


HELP = {
    "tune": "what is trained: lora, full (every parameter) or bitfit (every bias)",
    "epochs": "passes over the training set",
    "max_steps": "stop after this many optimizer steps (and decay the learning rate until there)",
    "batch_size": "sequences per optimizer step, over all processes",
    "accumulate": "micro-batches that a batch is cut into, to save memory; each votes for itself",
    "lr": "learning rate of all but the gate, linear warm-up and decay",
    "weight_decay": "of the same, biases and norms excepted",
    "warmup": "steps until the full learning rate; below 1: share of all steps",
    "clip": "longest gradient, as a norm; 0: off",
    "adam_eps": "AdamW's epsilon",
    "label_smoothing": "on the answer's tokens",
    "dropout": "inside the pretrained model; GLUE: the checkpoint's own",
    "max_length": "tokens, prompt and answer; longer answers are cut",
    "lora_r": "rank of the LoRA on q and v",
    "lora_alpha": "the LoRA's update is scaled by alpha / r",
    "lora_dropout": "on the LoRA's input",
    "gate_lr": "learning rate of the gate and a learned alpha",
    "gate_weight_decay": "of the gate and a learned alpha",
    "load_balance": "coefficient of the load-balance loss",
    "beams": "beam size",
    "length_penalty": "an answer's log-probability is divided by length ** this",
    "no_repeat_ngram": "no n-gram of this size twice in an answer; 0: off",
    "max_new_tokens": "longest answer",
    "eval_batch": "sequences evaluated together",
    "test_limit": "decode only this many meaning representations of the test set",
    "gate": "linear or cosine",
    "proj_dim": "of the cosine gate",
    "activation": "of the gate: softmax or sigmoid",
    "individual_gates": "a gate and an alpha for each layer",
    "vote": "batch aggregation: mode or mean",
    "top_k": "layers chosen for each slot (K)",
    "alpha": "share of the slot's own layer; where it starts if learned",
    "learn_alpha": "learn the mixing weight",
    "gate_weight": "renormalised or prob, see molex.py",
    "route": "who decides on the layers: batch or sequence",
    "layers": "slots that mix, first-last; E2E: the first 12",
}


def layer_range(text: str) -> tuple[int, ...]:
    """ "0-11" -> (0, 1, ..., 11)."""
    first, dash, last = text.partition("-")
    slots = tuple(range(int(first), int(last if dash else first) + 1))
    if not slots:
        raise argparse.ArgumentTypeError(f"{text!r} holds no layer; write it as 0-11")
    return slots


OWN = [f.name for f in fields(Settings) if f.name in HELP]
GATE = [f.name for f in fields(MoLExConfig)]


def make_parser() -> Parser:
    """A flag for every field of the two dataclasses that HELP explains; what is not given is left
    out of the result."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", help="hub name or folder (default: nano/gpt2, for GLUE"
                        " nano/roberta, and --compare)")  # fmt: skip
    parser.add_argument("--task", choices=["e2e", "alpaca", *GLUE, "glue"], default="e2e",
                        help="glue: all eight tasks in turn (e2e)")  # fmt: skip
    parser.add_argument("--data", help="folder of the official files, for Alpaca a JSON or JSONL"
                        " file (default: from the hub)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where run folders go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--no-molex", action="store_true", help="LoRA (or --tune) alone")
    how.add_argument("--compare", action="store_true", help="that alone, then with MoLEx")
    parser.add_argument("--init-from", nargs="+", default=[], metavar="RUN",
                        help="finished run of the same model whose LoRA, gate and alpha to start"
                        " from, or a .bin LoRA of the public LoRA code (made with --lora-alpha 16);"
                        " with --compare, a run with MoLEx and one without")  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="start anew over an existing run")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    for cls, names in ((Settings, OWN), (MoLExConfig, GATE)):
        group = parser.add_argument_group(cls.__name__)
        for name in names:
            default = getattr(cls, name)
            flag = "--molex-layers" if name == "layers" else "--" + name.replace("_", "-")
            how = dict(type=int if default is None else type(default))
            if name == "tune":
                how = dict(choices=[*TUNE])
            if name == "layers":
                how = dict(type=layer_range, metavar="0-11")
            if isinstance(default, bool):
                how = dict(action=argparse.BooleanOptionalAction)
            text = HELP[name] + ("" if default is None else f" ({default})")
            group.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, **how)
    return parser


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[Settings]]:
    """The command line, and the settings of every run it asks for, in order."""
    args = make_parser().parse_args(argv)
    decode = args.task in ("e2e", "alpaca")
    model = args.model or ("nano/gpt2" if decode else "nano/roberta")
    config = read_config(checkpoint_folder(model))
    if decode and config.family == "roberta":
        raise InputError(f"{model} is an encoder, which cannot write text; take a decoder such as"
                         " gpt2-medium, or a task of GLUE")  # fmt: skip
    given = {n: v for n, v in vars(args).items() if n in HELP}
    tasks = [*GLUE] if args.task == "glue" else [args.task]
    methods = [False] if args.no_molex else [True]
    if args.compare or (args.model is None and not args.no_molex):
        methods = [False, True]
    runs: list[Settings] = []
    for task in tasks:
        pair = []
        for mixes in methods:
            init, inherited = source(args.init_from, model, mixes)
            tune = TUNE[given.get("tune", inherited.get("tune", "lora"))]
            chosen = preset(model, task) | tune | inherited | given
            data = args.data or chosen.get("data")
            if data is not None and task in GLUE:
                for split in ("train", *GLUE[task].dev):
                    glue_file(data, task, split)  # before the first run begins
            if task in GLUE:  # the checkpoint's own, as in the public LoRA scripts
                chosen.setdefault("dropout", config.dropout)
            if task == "e2e":
                chosen.setdefault("layers", tuple(range(min(12, config.n_layer))))
            molex = MoLExConfig(**{n: v for n, v in chosen.items() if n in GATE})
            molex.check(config.n_layer)
            rest = {n: v for n, v in chosen.items() if n in OWN}
            pair.append(Settings(model=model, task=task, data=data, seed=0, init=init,
                                 molex=molex if mixes else None, **rest))  # fmt: skip
        runs += [replace(s, seed=seed) for seed in args.seeds for s in pair]
    for name, value in given.items():
        if name in OWN and name != "tune":
            least = 0 if isinstance(value, float) or name == "no_repeat_ngram" else 1
            if value < least or ("dropout" in name or "smooth" in name) and value >= 1:
                raise InputError(f"--{name.replace('_', '-')} cannot be {value}")
    return args, runs


def source(paths: list[str], model: str, molex: bool) -> tuple[str | None, dict]:
    """The one of --init-from's paths that a run with or without MoLEx starts from, and the settings
    that come with it: the shapes of its LoRA and its gate. A run with MoLEx that finds no other may
    start from one without, with a new gate."""
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
    settings = {n: config[n] for n in ("tune", "lora_r", "lora_alpha") if n in config}
    if gate := config.get("molex"):
        settings |= gate | dict(layers=gate["layers"] and tuple(gate["layers"]))
    return path, settings


# --------------------------------------------------------------------------------- data parallelism


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


# ----------------------------------------------------------------------------------------- training

SAVE_SECONDS = 60  # within an epoch; its end is saved anyway


def dev_scores(model: Transformer, dev: dict[str, list[Example]], s: Settings) -> dict[str, float]:
    """What an epoch is judged by: the task's metric in GLUE, otherwise the loss."""
    if s.task in GLUE:
        found = {split: classify(model, examples, s.eval_batch) for split, examples in dev.items()}
        return glue_scores(s.task, found, dev)
    return {"dev_loss": dev_loss(model, dev["dev"], s.eval_batch)}


def train_step(
    model: Transformer, optimizer: torch.optim.Optimizer, examples: list[Example], s: Settings
) -> Tensor:
    """One optimizer step on one batch; returns its loss (a tensor, so that nothing waits for it).

    Every process gets the whole batch and takes every n-th sequence. The loss is a mean over all
    targets of the batch, whatever the micro-batches and processes it is spread over.
    """
    rank, processes = world()
    size = -(-len(examples) // s.accumulate)
    micros = [examples[i : i + size] for i in range(0, len(examples), size)]
    targets = sum(e.targets for e in examples)
    total = torch.zeros((), device=model.embed.weight.device)
    for micro in micros:
        loss = summed_loss(model, micro[rank::processes], s.label_smoothing) / targets
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


@torch.no_grad()
def start_from(model: Transformer, path: Path) -> None:
    """Take over what a finished run has trained, but for its head (Table 9), or the LoRA of a .bin
    file. Raises InputError if it does not fit."""
    if path.is_file():
        return load_loralib(model, path)
    _, theirs = read_run(path)
    ours, heads, gate = trained_tensors(model), task_head(model), gate_parameters(model)
    ours = {n: p for n, p in ours.items() if n not in heads}
    theirs = {n: w for n, w in theirs.items() if n in ours or not n.startswith("head.")}
    if not any(n.startswith(("layers.gates", "layers.alpha")) for n in theirs):
        ours = {n: p for n, p in ours.items() if all(p is not g for g in gate)}  # a new gate
    fill(
        ours, theirs, f"what {path} has trained has not the shapes of this run's LoRA and gate: it"
    )


def prepare(s: Settings, device: torch.device) -> tuple[Transformer, Tokenizer]:
    """The model to train. The LoRA and a head start the same with and without MoLEx."""
    torch.manual_seed(s.seed)
    model, tokenizer = build(asdict(s), device)
    if s.init:
        start_from(model, Path(s.init))
    cast_frozen(model)
    torch.manual_seed(s.seed + world()[0])  # dropout
    return model.train(), tokenizer


def make_optimizer(
    model: Transformer, s: Settings, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with a group for the gate; linear warm-up, then linear decay to zero at `steps`. Biases
    and norms do not decay."""
    gate = gate_parameters(model)
    others = [p for p in trained_tensors(model).values() if all(p is not g for g in gate)]
    groups = [
        dict(params=[p for p in others if p.dim() > 1], lr=s.lr, weight_decay=s.weight_decay),
        dict(params=[p for p in others if p.dim() < 2], lr=s.lr, weight_decay=0.0),
        dict(params=gate, lr=s.gate_lr, weight_decay=s.gate_weight_decay),
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], eps=s.adam_eps)
    warm = s.warmup if s.warmup >= 1 else math.ceil(s.warmup * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / max(1, warm), (steps - t) / max(1, steps - warm))
    )
    return optimizer, schedule


def read_data(
    s: Settings, tokenizer: Tokenizer, limit: int
) -> tuple[list[Example], dict[str, list[Example]]]:
    """The training examples, and those of each dev split."""
    if s.task in GLUE:
        rows = {split: read_glue(s.data, s.task, split) for split in ("train", *GLUE[s.task].dev)}
        data = {split: encode_glue(tokenizer, rows[split], limit) for split in rows}
        return data.pop("train"), data
    if s.task == "alpaca":
        data = {
            n: encode_alpaca(tokenizer, read_alpaca(s.data, n), limit) for n in ("train", "dev")
        }
        return data.pop("train"), data
    pairs = {
        split: [(e2e_prompt(mr), ref) for mr, ref in read_e2e(s.data, split)]
        for split in ("train", "dev", "test")  # the test set only to be sure that it is there
    }
    train, dev = (encode_pairs(tokenizer, pairs[split], limit) for split in ("train", "dev"))
    return train, {"dev": dev}


def train(s: Settings, folder: Path, device: torch.device) -> None:
    """Train one run in its folder, from its beginning or from last.pt, to its end."""
    model, tokenizer = prepare(s, device)
    limit = min(s.max_length, model.config.max_positions)
    examples, dev = read_data(s, tokenizer, limit)
    lengths = [len(e) for e in examples]
    per_epoch = -(-len(examples) // s.batch_size)
    steps = min(s.epochs * per_epoch, s.max_steps or s.epochs * per_epoch)
    optimizer, schedule = make_optimizer(model, s, steps)
    tensors, (rank, _) = trained_tensors(model), world()

    step, seconds, log, loss_sum = 0, 0.0, [], torch.zeros((), device=device)
    last = folder / "last.pt"
    if last.exists():
        state = read_tensors(last, {"tensors": (dict,)})
        fill(tensors, state["tensors"], last)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step, seconds, log = state["step"], state["seconds"], state["log"]
        loss_sum.fill_(state["loss_sum"])
        if rank == 0:  # the other processes go on with dropout of their own
            torch.set_rng_state(state["rng"])
            if device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], device)
    elif rank == 0:  # all that the run needs has been read: from here on there is a folder
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.json", json.dumps(asdict(s), indent=2) + "\n")

    def save() -> None:
        state = dict(
            tensors={n: p.detach() for n, p in tensors.items()}, optimizer=optimizer.state_dict(),
            schedule=schedule.state_dict(), step=step, seconds=seconds, log=log,
            loss_sum=loss_sum.item(), rng=torch.get_rng_state(),
            cuda_rng=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        )  # fmt: skip
        write_atomic(last, lambda path: torch.save(state, path))

    bar = tqdm(total=steps, initial=step, desc=s.name, disable=rank != 0)
    saved = started = time.perf_counter()
    while step < steps:
        epoch, place = divmod(step, per_epoch)
        batches = shuffled_batches(lengths, s.batch_size, seed=1000 * s.seed + epoch)
        for batch in batches[place : place + steps - step]:
            loss_sum += train_step(model, optimizer, [examples[i] for i in batch], s)
            schedule.step()
            step += 1
            bar.update()
            place += 1
            if step % 25 == 0:
                bar.set_postfix(loss=f"{loss_sum.item() / place:.3f}")
            now = time.perf_counter()
            if rank == 0 and now - saved > SAVE_SECONDS and place < len(batches) and step < steps:
                seconds, started, saved = seconds + now - started, now, now
                save()
        train_loss = loss_sum.item() / place
        loss_sum.zero_()
        if rank == 0:
            seconds += time.perf_counter() - started
            dev_result = dev_scores(model, dev, s)
            entry = dict(epoch=epoch + 1, step=step, train_loss=train_loss, **dev_result,
                         seconds_per_step=seconds / step)  # fmt: skip
            log.append(entry)
            if entry is best_epoch(log, s.task):
                best = {n: p.detach().cpu().contiguous() for n, p in tensors.items()}
                write_atomic(folder / "adapter.safetensors", lambda p, b=best: save_file(b, p))
            write_text(folder / "metrics.jsonl", "".join(json.dumps(e) + "\n" for e in log))
            save()  # last: a kill before it repeats the epoch's end and writes the others again
            found = ", ".join(f"{n.replace('_', ' ')} {v:.4f}" for n, v in dev_result.items())
            bar.write(f"epoch {epoch + 1}: train loss {train_loss:.4f}, {found}")
            started = saved = time.perf_counter()
    bar.close()


def run(s: Settings, out: Path, fresh: bool, device: torch.device) -> Path:
    """Train and evaluate one run, or what is left of it; returns its folder."""
    folder, (rank, processes) = out / s.name, world()
    if rank == 0 and fresh and folder.exists():
        shutil.rmtree(folder)
    if processes > 1:
        dist.barrier()
    if (folder / "config.json").exists():
        old = read_json(folder / "config.json")
        new = json.loads(json.dumps(asdict(s)))  # tuples become lists there
        if changed := [n for n in new if old.get(n) != new[n]]:
            raise InputError(
                f"{folder} holds a run with another {', '.join(changed)}; pass --fresh to replace"
                " it or --out DIR to keep both"
            )
        finished = (folder / "scores.json").exists()
        if rank == 0:
            print(f"{folder}: {'finished before, kept' if finished else 'resumed'}")
        if finished:
            return folder
    if processes > 1:
        dist.barrier()  # nobody writes before everybody has looked
    train(s, folder, device)
    if rank == 0:
        evaluate_run(folder, device)
    return folder


# ------------------------------------------------------------------------------------------ results

TRAINABLE = {"trainable": ("trainable parameters", 1, 0)}  # key -> (name, factor, decimals)
SECONDS = {"seconds_per_step": ("seconds per step", 1, 3)}
E2E_ROWS = {
    "bleu": ("BLEU", 100, 2),
    "nist": ("NIST", 1, 3),
    "meteor": ("METEOR", 100, 2),
    "rouge_l": ("ROUGE-L", 100, 2),
    "cider": ("CIDEr", 1, 3),
    "dev_loss": ("best dev loss", 1, 4),
}
ALPACA_ROWS = {
    "train_ppl": ("train perplexity", 1, 3),
    "dev_ppl": ("dev perplexity", 1, 3),
}
# Tables 1, 9 (from an MNLI run), 11 (full), 2, 12: (model, data, tune, from a run, MoLEx) -> what
# the paper has, for GLUE in the order of Table 1 and the average, otherwise in that of the rows.
PAPER = {
    ("roberta-base", "glue", "lora", False, False):
        "87.5 ± .2|95.0 ± .1|88.7 ± .3|62.8 ± 1.0|93.2 ± .2|90.8 ± .0|76.9 ± 1.1|90.8 ± .2|85.7",
    ("roberta-base", "glue", "lora", False, True):
        "87.7 ± .2|95.4 ± .2|89.8 ± .2|64.8 ± .5|93.2 ± .2|91.0 ± .0|77.3 ± 1.3|91.0 ± .2|86.3",
    ("roberta-large", "glue", "lora", False, False):
        "90.7 ± .1|96.3 ± .2|90.9 ± .4|67.8 ± 1.7|94.8 ± .3|91.5 ± .1|86.5 ± .9|91.9 ± .1|88.8",
    ("roberta-large", "glue", "lora", False, True):
        "90.9 ± .1|96.4 ± .2|91.4 ± .7|68.2 ± .2|94.8 ± .0|91.6 ± .1|87.1 ± .9|92.0 ± .2|89.1",
    ("roberta-base", "glue", "lora", True, False): "||89.7 ± .6||||86.8 ± .2|91.3 ± .1|87.1",
    ("roberta-base", "glue", "lora", True, True): "||91.1 ± .6||||86.8 ± .2|91.3 ± .0|87.6",
    ("roberta-base", "glue", "full", False, False): "87.7|95.0|88.7|62.6|92.9|91.8|80.1|90.9|86.2",
    ("roberta-base", "glue", "full", False, True): "87.8|95.1|89.5|63.3|93.1|91.8|80.9|91.1|86.6",
    ("gpt2-medium", "e2e", "lora", False, False):
        "70.0 ± .5|8.77 ± .05|46.8 ± .2|71.6 ± .3|2.52 ± .01",
    ("gpt2-medium", "e2e", "lora", False, True):
        "70.7 ± .4|8.87 ± .03|46.5 ± .09|71.8 ± .1|2.52 ± .01",
    ("Llama-3.2-1B", "alpaca", "lora", False, False): "4.18|4.11",
    ("Llama-3.2-1B", "alpaca", "lora", False, True): "4.05|4.02",
}  # fmt: skip


def paper(s: Settings) -> dict[tuple[str, str], str]:
    """What the paper reports for runs like this, by task and metric."""
    data = "glue" if s.task in GLUE else s.task
    row = PAPER.get((Path(s.model).name, data, s.tune, bool(s.init), bool(s.molex)), "")
    if data == "glue":
        keys = [*((task, GLUE[task].metric) for task in GLUE), ("glue", "average")]
    else:
        keys = [(s.task, key) for key in (ALPACA_ROWS if s.task == "alpaca" else E2E_ROWS)]
    return {key: cell for key, cell in zip(keys, row.split("|"), strict=False) if cell}


def spread(values: list[float], factor: float, decimals: int) -> str:
    """Mean, and standard deviation (n - 1) if there are several."""
    values = [v * factor for v in values]
    text = f"{statistics.mean(values):,.{decimals}f}"
    return f"{text} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else text


def report(runs: list[Settings], out: Path) -> None:
    """One table of all runs: a column for each method and, if there are two, their difference, then
    what the paper has. For BLEU also the p-value of a paired bootstrap for every seed."""
    tasks, columns = [*dict.fromkeys(s.task for s in runs)], {s.method: paper(s) for s in runs}
    both = len(columns) == 2

    def line(
        key: tuple[str, str], cells: list[list[float]], name: str, factor: float, decimals: int
    ) -> str:
        text = f"{name:22}" + "".join(f"{spread(c, factor, decimals):>18}" for c in cells)
        if both:
            gain = factor * (statistics.mean(cells[1]) - statistics.mean(cells[0]))
            text += f"{gain:>+12,.{decimals}f}"
        return text + "".join(f"{p.get(key, ''):>14}" for p in columns.values() if p)

    head = f"\n{'':22}" + "".join(f"{method:>18}" for method in columns)
    head += "difference".rjust(12) * both
    print(head + "".join(f"{'paper: ' + m.split()[-1]:>14}" for m, p in columns.items() if p))
    results = []  # [task][method][seed], the main score
    for task in tasks:
        folders = [[out / s.name for s in runs if (s.task, s.method) == (task, m)] for m in columns]
        scores = [[read_scores(f, task) for f in group] for group in folders]
        rows, metric = (ALPACA_ROWS, "dev_ppl") if task == "alpaca" else (E2E_ROWS, "bleu")
        if task in GLUE:
            name, metric = GLUE[task].folder, GLUE[task].metric
            parts = [key for key in scores[0][0] if key.startswith(metric + "_")]
            rows = {metric: (f"{name} {metric}", 100, 2)}
            rows |= {key: (key.replace(metric + "_", "  "), 100, 2) for key in parts}
        if len(tasks) == 1:
            rows = TRAINABLE | rows | SECONDS
        for key, how in rows.items():
            text = line((task, key), [[run[key] for run in group] for group in scores], *how)
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
        means = [[statistics.mean(v) for v in zip(*cells, strict=True)]
                 for cells in zip(*results, strict=True)]  # fmt: skip
        print(line(("glue", "average"), means, "average", 100, 2))


def main() -> None:
    args, runs = parse()
    device = pick_device(args.device)
    if "RANK" in os.environ:  # started by torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    for s in runs:
        run(s, args.out, args.fresh, device)
    if world()[0] == 0:
        print("\n" + (args.out / runs[-1].name / "samples.txt").read_text())
        report(runs, args.out)
        print("\nruns:", *(str(args.out / s.name) for s in runs))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    command_line(main)
