"""Fine-tune with LoRA, with or without MoLEx, and report the paper's metrics.

    python train.py                                          the embedded default, on a laptop
    python train.py --model gpt2-medium --task e2e           the paper's E2E run (Tables 2 and 6)
    python train.py --model gpt2-medium --task e2e --no-molex        its LoRA baseline
    python train.py --model gpt2-medium --task e2e --compare --seeds 0 1 2 3 4
    torchrun --nproc-per-node 4 train.py --model gpt2-medium --task e2e      data parallel

Every setting has a flag (`--help`); what is not given comes from the paper. A run is a folder,
runs/<model>-<task>-<method>-s<seed>/: config.json, metrics.jsonl, adapter.safetensors (the trained
tensors of the best epoch), last.pt, predictions.tsv, scores.json, samples.txt and, for MoLEx,
routes.png. The same command again resumes a killed run and keeps a finished one.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from data import (
    Example,
    Tokenizer,
    collate,
    e2e_prompt,
    encode_pairs,
    read_e2e,
    shuffled_batches,
)
from eval import (
    Parser,
    autocast,
    build,
    cast_frozen,
    command_line,
    default_device,
    evaluate_run,
    paired_bootstrap,
    read_predictions,
    write_atomic,
    write_text,
)
from model import InputError, Transformer, checkpoint_folder, read_config
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
    molex: MoLExConfig | None  # None: LoRA alone
    epochs: int = 5
    max_steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 2e-4
    weight_decay: float = 0.01
    warmup: int = 500
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
        return f"{model}-{self.task}-{'molex' if self.molex else 'lora'}-s{self.seed}"


# Where a pair of model and task differs from the defaults of Settings and MoLExConfig.
PRESETS: dict[tuple[str, str], dict] = {
    ("nano/gpt2", "e2e"): dict(
        data="nano/e2e", epochs=3, lr=1e-2, warmup=50, eval_batch=70, layers=tuple(range(8))
    ),
}

HELP = {
    "epochs": "passes over the training set",
    "max_steps": "stop after this many optimizer steps (and decay the learning rate until there)",
    "batch_size": "sequences per optimizer step, over all processes",
    "accumulate": "micro-batches that a batch is cut into, to save memory; each votes for itself",
    "lr": "learning rate of the LoRA, linear warm-up and decay",
    "weight_decay": "of the LoRA",
    "warmup": "steps until the full learning rate",
    "label_smoothing": "on the answer's tokens",
    "dropout": "inside the pretrained model",
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
    "eval_batch": "prompts decoded together",
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


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[Settings]]:
    """The command line, and the settings of every run it asks for, in order."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", help="hub name or folder (default: nano/gpt2, and --compare)")
    parser.add_argument("--task", choices=["e2e"], default="e2e")
    parser.add_argument("--data", help="folder of the official files (default: from the hub)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where run folders go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--no-molex", action="store_true", help="LoRA alone")
    how.add_argument("--compare", action="store_true", help="LoRA alone, then LoRA + MoLEx")
    parser.add_argument("--fresh", action="store_true", help="start anew over an existing run")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    own = [f.name for f in fields(Settings) if f.name in HELP]
    gate = [f.name for f in fields(MoLExConfig)]
    for cls, names in ((Settings, own), (MoLExConfig, gate)):
        group = parser.add_argument_group(cls.__name__)
        for name in names:
            default = getattr(cls, name)
            flag = "--molex-layers" if name == "layers" else "--" + name.replace("_", "-")
            how = dict(type=int if default is None else type(default))
            if name == "layers":
                how = dict(type=layer_range, metavar="0-11")
            if isinstance(default, bool):
                how = dict(action=argparse.BooleanOptionalAction)
            text = HELP[name] + ("" if default is None else f" ({default})")
            group.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, **how)
    args = parser.parse_args(argv)

    embedded = args.model is None
    model = args.model or "nano/gpt2"
    preset = dict(PRESETS.get((model, args.task), {}))
    data = args.data or preset.pop("data", None)
    chosen = preset | {n: v for n, v in vars(args).items() if n in HELP}
    T = read_config(checkpoint_folder(model)).n_layer
    chosen.setdefault("layers", tuple(range(min(12, T))))
    molex = MoLExConfig(**{n: v for n, v in chosen.items() if n in gate})
    molex.check(T)
    rest = {n: v for n, v in chosen.items() if n in own}
    methods = [None] if args.no_molex else [molex]
    if args.compare or (embedded and not args.no_molex):
        methods = [None, molex]
    runs = [
        Settings(model=model, task=args.task, data=data, seed=seed, molex=method, **rest)
        for seed in args.seeds
        for method in methods
    ]
    for name, value in rest.items():
        least = 0 if isinstance(value, float) or name in ("warmup", "no_repeat_ngram") else 1
        if value < least or ("dropout" in name or "smooth" in name) and value >= 1:
            raise InputError(f"--{name.replace('_', '-')} cannot be {value}")
    return args, runs


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


def answer_loss(model: Transformer, examples: list[Example], smoothing: float) -> Tensor:
    """Summed cross-entropy of the answers' tokens; logits are computed for those alone."""
    device = model.embed.weight.device
    batch = collate(examples).to(device)
    with autocast(device):
        h = model.hidden(batch.ids, batch.mask, batch.prompt).flatten(0, 1)[batch.where]
        logits = model.logits(h)
    return F.cross_entropy(logits.float(), batch.target, label_smoothing=smoothing, reduction="sum")


@torch.no_grad()
def dev_loss(model: Transformer, examples: list[Example], batch_size: int) -> float:
    """Mean loss of an answer's token in nats, without label smoothing."""
    model.eval()
    order = sorted(examples, key=len)
    total = sum(
        answer_loss(model, order[i : i + batch_size], 0.0)
        for i in tqdm(range(0, len(order), batch_size), "  dev", leave=False)
    )
    model.train()
    return total.item() / sum(len(e.answer) for e in examples)


def train_step(
    model: Transformer, optimizer: torch.optim.Optimizer, examples: list[Example], s: Settings
) -> Tensor:
    """One optimizer step on one batch; returns its loss (a tensor, so that nothing waits for it).

    Every process gets the whole batch and takes every n-th sequence. The loss is a mean over all
    target tokens of the batch, whatever the micro-batches and processes it is spread over.
    """
    rank, processes = world()
    size = -(-len(examples) // s.accumulate)
    micros = [examples[i : i + size] for i in range(0, len(examples), size)]
    tokens = sum(len(e.answer) for e in examples)
    total = torch.zeros((), device=model.embed.weight.device)
    for micro in micros:
        loss = answer_loss(model, micro[rank::processes], s.label_smoothing) / tokens
        total += loss.detach()
        if s.molex and s.load_balance:
            loss = loss + s.load_balance * model.layers.load_balance / len(micros)
        loss.backward()
    sum_over_processes([p for group in optimizer.param_groups for p in group["params"]], total)
    optimizer.step()
    optimizer.zero_grad()
    return total


def trained_tensors(model: Transformer) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def prepare(s: Settings, device: torch.device) -> tuple[Transformer, Tokenizer]:
    """The model to train. The LoRA starts the same with and without MoLEx."""
    torch.manual_seed(s.seed)
    model, tokenizer = build(asdict(s), device)
    cast_frozen(model)
    torch.manual_seed(s.seed + world()[0])  # dropout
    return model.train(), tokenizer


def make_optimizer(
    model: Transformer, s: Settings, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with a group for the gate; linear warm-up, then linear decay to zero at `steps`."""
    gate = gate_parameters(model)
    others = [p for p in trained_tensors(model).values() if all(p is not g for g in gate)]
    groups = [dict(params=others, lr=s.lr, weight_decay=s.weight_decay)]
    if gate:
        groups.append(dict(params=gate, lr=s.gate_lr, weight_decay=s.gate_weight_decay))
    optimizer = torch.optim.AdamW(groups, eps=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min((t + 1) / max(1, s.warmup), (steps - t) / max(1, steps - s.warmup)),
    )
    return optimizer, schedule


def train(s: Settings, folder: Path, device: torch.device) -> None:
    """Train one run in its folder, from its beginning or from last.pt, to its end."""
    pairs = {
        split: [(e2e_prompt(mr), ref) for mr, ref in read_e2e(s.data, split)]
        for split in ("train", "dev", "test")  # the test set only to be sure that it is there
    }
    model, tokenizer = prepare(s, device)
    limit = min(s.max_length, model.config.max_positions)
    examples, dev = (encode_pairs(tokenizer, pairs[split], limit) for split in ("train", "dev"))
    lengths = [len(e) for e in examples]
    per_epoch = -(-len(examples) // s.batch_size)
    steps = min(s.epochs * per_epoch, s.max_steps or s.epochs * per_epoch)
    optimizer, schedule = make_optimizer(model, s, steps)
    tensors, (rank, _) = trained_tensors(model), world()

    step, seconds, log, loss_sum = 0, 0.0, [], torch.zeros((), device=device)
    last = folder / "last.pt"
    if last.exists():
        state = torch.load(last, weights_only=True, map_location="cpu")
        with torch.no_grad():
            for n, p in tensors.items():
                p.copy_(state["tensors"][n])
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
            entry = dict(epoch=epoch + 1, step=step, train_loss=train_loss,
                         dev_loss=dev_loss(model, dev, s.eval_batch),
                         seconds_per_step=seconds / step)  # fmt: skip
            log.append(entry)
            if entry["dev_loss"] == min(e["dev_loss"] for e in log):
                best = {n: p.detach().cpu().contiguous() for n, p in tensors.items()}
                write_atomic(folder / "adapter.safetensors", lambda p, b=best: save_file(b, p))
            write_text(folder / "metrics.jsonl", "".join(json.dumps(e) + "\n" for e in log))
            save()  # last: a kill before it repeats the epoch's end and writes the others again
            bar.write("epoch {epoch}: train loss {train_loss:.4f}, dev loss {dev_loss:.4f}".format(
                **entry))  # fmt: skip
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
        old = json.loads((folder / "config.json").read_text())
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

ROWS = {  # key in scores.json -> (name, factor, decimals)
    "trainable": ("trainable parameters", 1, 0),
    "bleu": ("BLEU", 100, 2),
    "nist": ("NIST", 1, 3),
    "meteor": ("METEOR", 100, 2),
    "rouge_l": ("ROUGE-L", 100, 2),
    "cider": ("CIDEr", 1, 3),
    "dev_loss": ("best dev loss", 1, 4),
    "seconds_per_step": ("seconds per step", 1, 3),
}


def spread(values: list[float], factor: float, decimals: int) -> str:
    """Mean, and standard deviation (n - 1) if there are several."""
    values = [v * factor for v in values]
    text = f"{statistics.mean(values):,.{decimals}f}"
    return f"{text} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else text


def report(folders: dict[str, list[Path]]) -> None:
    """One table of all runs, a column for each method, as in the paper's Table 2; with two methods
    their difference and, for BLEU, the p-value of a paired bootstrap for every seed."""
    scores = {
        method: [json.loads((f / "scores.json").read_text()) for f in runs]
        for method, runs in folders.items()
    }
    both = len(scores) == 2
    print(f"\n{'':22}" + "".join(f"{m:>20}" for m in scores) + ("difference".rjust(14) * both))
    for key, (name, factor, decimals) in ROWS.items():
        columns = [[run[key] for run in runs] for runs in scores.values()]
        line = f"{name:22}" + "".join(f"{spread(c, factor, decimals):>20}" for c in columns)
        if both:
            gain = factor * (statistics.mean(columns[1]) - statistics.mean(columns[0]))
            line += f"{gain:>+14,.{decimals}f}"
        if both and key == "bleu":
            ps = []
            for baseline, system in zip(*folders.values(), strict=True):
                _, outputs, references = read_predictions(baseline)
                p = paired_bootstrap(outputs, read_predictions(system)[1], references)[1]
                ps.append(f"{p:.3f}")
            line += f"   p = {', '.join(ps)}"
        print(line)


def main() -> None:
    args, runs = parse()
    try:
        device = torch.empty(0, device=args.device or default_device()).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {args.device} cannot be used here: {reason}") from error
    if "RANK" in os.environ:  # started by torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    folders: dict[str, list[Path]] = {}
    for s in runs:
        folder = run(s, args.out, args.fresh, device)
        folders.setdefault("LoRA + MoLEx" if s.molex else "LoRA", []).append(folder)
    if world()[0] == 0:
        print("\n" + (folder / "samples.txt").read_text())
        report(folders)
        print("\nruns:", *(str(f) for group in folders.values() for f in group))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    command_line(main)
