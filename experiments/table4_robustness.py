"""Robustness to noise on the input (section 4.1, Table 4).

The paper evaluates RoBERTa-base, fine-tuned on QNLI and on SST-2, with "random noise" added to the
input. Accuracy: QNLI 63.1 with LoRA, 64.0 with MoLEx (93.2 and 93.2 without noise, Table 1); SST-2
69.3 and 70.9 (95.0 and 95.4). It does not say what noise, where, or how much.

Here the noise is Gaussian, on the output of the token embedding. A token with embedding e gets
e + size * |e| / sqrt(D) * g with g ~ N(0, I): noise about as long as size * |e|. One size is one
number that nobody else can check, so this gives a table and a curve over sizes. Where a column of
it meets the paper's accuracy is the size that the paper may have used.

    python experiments/table4_robustness.py            small: nano/roberta learns CoLA first
    python experiments/table4_robustness.py runs/roberta-base-{qnli,sst2}-*            in full

In full it takes finished runs of train.py, with and without MoLEx, of any seeds and tasks.

Where the paper is silent:

- Position embeddings stay clean. RoBERTa's normalisation after the embeddings follows the noise.
- Each noise seed gives LoRA and MoLEx the same g on the same batches, and all sizes the same g, so
  that differences between methods, and along the curve, are not those of the draw.
- Nothing is trained anew, and the gate reads the noisy states: routes may change too. They are
  voted for by batches of the size of the run's own evaluation, so size 0 gives the run's own score.
- ± is the standard deviation over all noise seeds of all runs of a method. What the paper's is over
  it does not say; its four are those of Table 1, without noise.
- Every task is scored by accuracy, CoLA too.
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean, pstdev

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # noqa: E402
from data import GLUE, Example, encode_glue, read_glue  # noqa: E402
from eval import (  # noqa: E402
    Parser,
    accuracy,
    cast_frozen,
    classify,
    command_line,
    default_device,
    load_run,
    read_run,
)
from model import InputError, Transformer  # noqa: E402

PAPER = {"qnli": {"LoRA": "63.1 ± .2", "LoRA + MoLEx": "64.0 ± .2"},
         "sst2": {"LoRA": "69.3 ± .1", "LoRA + MoLEx": "70.9 ± .2"}}  # fmt: skip
SMALL = ["--model", "nano/roberta", "--data", "nano/glue", "--task", "cola", "--compare",
         "--lr", "5e-3", "--epochs", "3"]  # fmt: skip
SHARED = ("model", "data", "max_length", "eval_batch")  # what makes the same noise comparable

Scores = dict[float, list[float]]  # size -> accuracies


def noise(size: float, seed: int) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    """A forward hook for the token embedding: (B, N, D) -> (B, N, D). It draws on the CPU, so that
    every device gets the same noise."""
    generator = torch.Generator().manual_seed(seed)

    def add(module: nn.Module, inputs: tuple, e: Tensor) -> Tensor:
        g = torch.randn(e.shape, generator=generator).to(e)
        return e + size * e.norm(dim=-1, keepdim=True) / math.sqrt(e.shape[-1]) * g

    return add


def noisy_accuracy(
    model: Transformer, dev: list[list[Example]], batch: int, size: float, seed: int
) -> float:
    """Accuracy over all splits of `dev` together under noise of that size."""
    handle = model.embed.register_forward_hook(noise(size, seed))
    try:
        found = [answer for examples in dev for answer in classify(model, examples, batch)]
    finally:
        handle.remove()
    return accuracy(found, [e.label for examples in dev for e in examples])


def robustness(folder: Path, sizes: list[float], seeds: int, device: torch.device) -> Scores:
    """A run's accuracies for each size, one for each noise seed."""
    model, tokenizer, config = load_run(folder, device)
    cast_frozen(model)
    task, limit = config["task"], min(config["max_length"], model.config.max_positions)
    rows = [read_glue(config["data"], task, split) for split in GLUE[task].dev]
    dev = [encode_glue(tokenizer, some, limit) for some in rows]
    tests = [(size, seed) for size in sizes for seed in range(seeds)]
    found = defaultdict(list)
    for size, seed in tqdm(tests, str(folder), leave=False):
        found[size].append(noisy_accuracy(model, dev, config["eval_batch"], size, seed))
    return found


def plot(results: dict[str, dict[str, Scores]], path: Path) -> None:
    """Accuracy over size of noise: a panel for each task, a line for each method, its band one
    standard deviation."""
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(4 * len(results), 3), squeeze=False)
    for panel, (task, methods) in zip(axes[0], results.items(), strict=True):
        for method, scores in methods.items():
            middle = [100 * mean(v) for v in scores.values()]
            spread = [100 * pstdev(v) for v in scores.values()]
            (line,) = panel.plot([*scores], middle, marker="o", markersize=3, label=method)
            low, high = ([m + k * s for m, s in zip(middle, spread)] for k in (-1, 1))
            panel.fill_between([*scores], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        panel.set(title=GLUE[task].folder, xlabel="noise / norm of the embedding")
        panel.set(ylabel="accuracy, %")
        panel.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def check(folder: Path, config: dict, first: dict) -> None:
    """Raise InputError unless the run classifies, and is evaluated like the first on its task."""
    if config["task"] not in GLUE or not GLUE[config["task"]].labels:
        raise InputError(f"{folder} is a run on {config['task']}, which has no accuracy")
    if differing := [name for name in SHARED if config[name] != first[name]]:
        raise InputError(f"{folder} and the run on {config['task']} before it have another"
                         f" {', '.join(differing)}; their noise would not be the same")  # fmt: skip


def print_table(task: str, methods: dict[str, Scores]) -> None:
    """A line for each size, a column for each method; the paper's below."""
    both = len(methods) == 2
    print(f"\n{GLUE[task].folder + ' accuracy, %':24}" + "".join(f"{m:>16}" for m in methods)
          + "difference".rjust(12) * both)  # fmt: skip
    for size in next(iter(methods.values())):
        values = [scores[size] for scores in methods.values()]
        text = f"noise {size:<18g}" + "".join(f"{train.spread(v, 100, 1):>16}" for v in values)
        gain = 100 * (mean(values[-1]) - mean(values[0]))
        print(text + f"{gain:>+12.1f}" * both)
    if task in PAPER:
        print(f"{'paper, size not given':24}"
              + "".join(f"{PAPER[task].get(m, ''):>16}" for m in methods))  # fmt: skip


def main() -> None:
    parser = Parser(description="Table 4: accuracy of runs under noise on the input embeddings")
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN",
                        help="finished runs (default: train nano/roberta on CoLA)")  # fmt: skip
    parser.add_argument("--sizes", type=float, nargs="+", default=[0, 0.25, 0.5, 1, 1.5, 2],
                        help="of the noise, relative to the embedding's norm (0 to 2)")  # fmt: skip
    parser.add_argument("--noise-seeds", type=int, default=5, help="draws of noise per size (5)")
    parser.add_argument("--out", type=Path, default=Path("runs/table4"),
                        help="where the picture goes and, without RUN, its runs")  # fmt: skip
    args = parser.parse_args()
    if min(args.sizes) < 0 or args.noise_seeds < 1:
        raise InputError("no size of noise can be below 0, and no number of seeds below 1")
    device, folders = default_device(), args.runs
    if not folders:
        folders = [train.run(s, args.out, False, device) for s in train.parse(SMALL)[1]]
    configs, first = {folder: read_run(folder)[0] for folder in folders}, {}
    for folder, config in configs.items():
        check(folder, config, first.setdefault(config["task"], config))

    results: dict[str, dict[str, Scores]] = {}
    for folder, config in configs.items():
        method = train.Settings(**config).method
        scores = results.setdefault(config["task"], {}).setdefault(method, defaultdict(list))
        for size, values in robustness(
            folder, sorted(args.sizes), args.noise_seeds, device
        ).items():
            scores[size] += values
    for task, methods in results.items():
        print_table(task, methods)
    picture = args.out / "robustness.png"
    plot(results, picture)
    print(f"\n{picture}: the same as curves")


if __name__ == "__main__":
    command_line(main)
