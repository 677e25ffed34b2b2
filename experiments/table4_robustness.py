"""Robustness to noise on the input (section 4.1, Table 4).

The paper evaluates RoBERTa-base, fine-tuned on QNLI and on SST-2, with "random noise" added to the
input. Accuracy: QNLI 63.1 with LoRA and 64.0 with MoLEx, SST-2 69.3 and 70.9; without noise it is
93.2 and 93.2, 95.0 and 95.4 (Table 1). It does not say what noise, where, or how much.

Here the noise is Gaussian, on the output of the token embedding. An embedding e of D numbers gets
e + size * |e| / sqrt(D) * g with g ~ N(0, I): noise about as long as size * |e|. As the paper's
size is not known, this gives a table and a curve over sizes. The line of it on which LoRA comes
down to the paper's accuracy is the one to compare with.

    python experiments/table4_robustness.py            small: nano/roberta learns CoLA first
    python experiments/table4_robustness.py runs/roberta-base-{qnli,sst2}-*            in full

In full it takes finished runs of train.py, with and without MoLEx, of any seeds and tasks.

Where the paper is silent:

- Position embeddings get no noise. RoBERTa normalises their sum with the noisy embedding.
- A noise seed gives LoRA and MoLEx the same g on the same batches, at every size: differences
  between the methods, and along the curve, are not those of the draw.
- The gate reads noisy states, so routes may change too. They are voted for in batches of the run's
  own evaluation: size 0 gives the run's own score.
- ± is the standard deviation over the noise seeds and runs of a method. What the paper's is over we
  do not know; all four are those of Table 1, without noise.
- Every task is scored by accuracy, CoLA too.
"""

import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import GLUE, Example, encode_glue, read_glue
from eval import accuracy, classify, load_run, read_run
from experiments.small import finished_runs, runs_parser
from model import Transformer
from support import settings
from support.cli import at_least, command_line, pick_device, progress_bar
from support.files import InputError, make_folder, write_atomic
from support.tables import spread

PAPER = settings.PAPER["table4"]
SMALL = "--model nano/roberta --task cola --compare --epochs 2"
BATCHES = ("model", "data", "max_length", "eval_batch", "dev_limit")  # on what batches depend

Scores = dict[float, list[float]]  # size -> accuracies


def noisy_accuracy(
    model: Transformer, dev: list[list[Example]], batch_size: int, size: float, seed: int
) -> float:
    """Accuracy over all splits of `dev` together, under noise of that size. Noise is drawn on the
    CPU, so that it is the same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def add_noise(module: nn.Module, inputs: tuple, e: Tensor) -> Tensor:  # (B, N, D)
        g = torch.randn(e.shape, generator=generator).to(e)
        return e + size * e.norm(dim=-1, keepdim=True) / math.sqrt(e.shape[-1]) * g

    handle = model.embed.register_forward_hook(add_noise)
    found = [answer for split in dev for answer in classify(model, split, batch_size)]
    handle.remove()
    return accuracy(found, [e.label for split in dev for e in split])


def robustness(folder: Path, sizes: list[float], seeds: int, device: torch.device) -> Scores:
    """A run's accuracies under noise: for each size, one for each seed."""
    model, tokenizer, config = load_run(folder, device)
    model.cast_frozen()
    task, limit = config.task, min(config.max_length, model.config.max_positions)
    dev = []
    for split in GLUE[task].dev:
        rows = read_glue(config.data, task, split)[: config.dev_limit]
        dev.append(encode_glue(tokenizer, rows, limit))
    found = defaultdict(list)
    for size, seed in progress_bar(
        [(a, b) for a in sizes for b in range(seeds)], folder.name, leave=False
    ):
        found[size].append(noisy_accuracy(model, dev, config.eval_batch, size, seed))
    return found


def print_table(task: str, methods: dict[str, Scores]) -> None:
    """A line for each size, a column for each method; the paper's below."""
    print(f"\n{GLUE[task].folder + ' accuracy, %':24}" + "".join(f"{m:>16}" for m in methods))
    for size in next(iter(methods.values())):
        cells = [spread(scores[size], 100, 1) for scores in methods.values()]
        print(f"noise {size:<18g}" + "".join(f"{cell:>16}" for cell in cells))
    if task in PAPER:
        cells = [PAPER[task].get(method, "") for method in methods]
        print(f"{'paper, size unknown':24}" + "".join(f"{cell:>16}" for cell in cells))


def plot(results: dict[str, dict[str, Scores]], path: Path) -> None:
    """The same as curves: a panel for each task, a line for each method, error bars of one standard
    deviation."""
    from matplotlib.figure import Figure  # slow to import

    wide = len(results)
    figure = Figure(figsize=(4.5 * wide, 3.2), layout="constrained")
    axes = figure.subplots(1, wide, squeeze=False)
    for panel, (task, methods) in zip(axes[0], results.items(), strict=True):
        for method, scores in methods.items():
            spread = [100 * stdev(v) if len(v) > 1 else 0 for v in scores.values()]
            middle = [100 * mean(v) for v in scores.values()]
            panel.errorbar([*scores], middle, spread, marker="o", capsize=2, label=method)
        panel.set(title=GLUE[task].folder, ylabel="accuracy, %")
        panel.set(xlabel="length of the noise / length of the embedding")
        panel.legend()
    make_folder(path.parent)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def main() -> None:
    about = "Table 4: accuracy of runs under noise on the input embeddings"
    what = "finished runs (default: train nano/roberta on CoLA)"
    parser = runs_parser(about, what, "runs/table4", draws=True)
    sizes, what = [0, 0.25, 0.5, 0.75, 1, 1.5], "of the noise, relative to the embedding (0 to 1.5)"
    parser.add_argument("--sizes", type=float, nargs="+", default=sizes, help=what)
    parser.add_argument(
        "--noise-seeds", type=at_least(1), default=3, help="draws for each size (3)"
    )
    args = parser.parse_args()
    if not all(0 <= size < math.inf for size in args.sizes):
        raise InputError("--sizes are numbers, none below 0")
    device, first = pick_device(args.device), {}
    configs = {folder: read_run(folder)[0] for folder in finished_runs(args, SMALL)}
    for folder, config in configs.items():
        task = config.task
        if task not in GLUE or not GLUE[task].labels:
            raise InputError(f"{folder} is a run on {task}, which has no accuracy")
        like = first.setdefault(task, config)
        if other := [name for name in BATCHES if getattr(config, name) != getattr(like, name)]:
            what = f"{folder} has another {', '.join(other)} than the run on {task} before it"
            raise InputError(f"{what}, so the noise would differ; give it alone")

    results: dict[str, dict[str, Scores]] = {}
    for folder, config in configs.items():
        method = config.method
        scores = results.setdefault(config.task, {}).setdefault(method, defaultdict(list))
        for size, found in robustness(folder, sorted(args.sizes), args.noise_seeds, device).items():
            scores[size] += found
    for task in dict.fromkeys([*results, *PAPER]):
        print_table(task, results.get(task) or {method: {} for method in PAPER[task]})
    plot(results, args.out / "robustness.png")
    print(f"\nthe same as curves: {args.out / 'robustness.png'}")


if __name__ == "__main__":
    command_line(main)
