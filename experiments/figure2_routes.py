"""Which layer mixes with which: the heat maps of Figure 2 (appendix C.3).

For RoBERTa-base on every task of GLUE the paper shows how often the gate chose layer j (y) to join
slot t (x): white never, black always, both axes cut into thirds, for early, middle and later
layers. It points out that on CoLA layer 2 joins slot 9 in 100% of cases, that QQP and MNLI choose
middle layers, and MRPC mainly early ones.

    python experiments/figure2_routes.py            small: nano/roberta learns CoLA and MRPC first
    python experiments/figure2_routes.py runs/roberta-base-*-molex-s0                   in full

In full it takes finished runs of train.py with MoLEx, of any model and task, and draws them side by
side. Red dots mark the slot's own layer: a choice on them adds nothing (Eq. 4 with v = u).

Where the paper is silent:

- Over which data: what eval.py evaluates a run on, in its batches, so these are the routes behind
  the run's own score: the dev sets of GLUE and Alpaca, the prompts of E2E's test set.
- What is counted: sequences. With batch routing all sequences of a batch count alike. With K = 2
  the shares of a slot add up to 200%; the table's are parts of all choices.
- Layer j of T is early, middle or later as 3 j / T is below 1, 2 or 3. A slot that does not mix
  (--molex-layers) has no choice to show, and stays white.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval import read_run
from experiments.small import finished_runs, runs_parser
from support import settings
from support.cli import command_line
from support.files import InputError, check, make_folder, parse_json, read_text
from support.pictures import plot_routes

PAPER = settings.PAPER["figure2"]
SMALL = [f"--model nano/roberta --epochs 1 --task {task}" for task in ("cola", "mrpc")]


def read_routes(folder: Path) -> tuple[str, Tensor]:
    """The task of a finished run, and its `RouteLog.shares`. Raises InputError if it has none."""
    if not (folder / "routes.json").exists():
        raise InputError(f"{folder} holds no routes.json: it is not a finished run with MoLEx")
    path = folder / "routes.json"
    rows = parse_json(read_text(path), path)
    numbers = dict.fromkeys(range(len(rows)), (float, 0, 1e6)) if isinstance(rows, list) else None
    if not numbers or any(not isinstance(r, list) or len(r) != len(rows) for r in rows):
        raise InputError(f"{path} is no table of slots and layers")
    for t, row in enumerate(rows):
        check(dict(enumerate(row)), numbers, f"{path}, slot {t}, layer")
    return read_run(folder)[0].task, torch.tensor(rows, dtype=torch.float32)


def thirds(shares: Tensor) -> tuple[list[float], float]:
    """The part of all choices, in %, that fell on early, middle and later layers, and on the slot's
    own layer."""
    T, total = len(shares), shares.sum().item()
    by_third = [0.0] * 3
    for j, chosen in enumerate(shares.sum(0).tolist()):
        by_third[3 * j // T] += 100 * chosen / total
    return by_third, 100 * shares.trace().item() / total


def main() -> None:
    about = "Figure 2: heat maps of the routes of runs, side by side"
    what = "finished runs with MoLEx (default: train nano/roberta on CoLA and on MRPC)"
    args = runs_parser(about, what, "runs/figure2", draws=True).parse_args()
    make_folder(args.out)
    found = {folder: read_routes(folder) for folder in finished_runs(args, *SMALL)}

    heads = ("early", "middle", "later", "own")
    print(f"\n{'% of choices':48}" + "".join(f"{head:>8}" for head in heads) + "   paper")
    panels = {}
    for folder, (task, shares) in found.items():
        name = "/".join(folder.parts[-2:])  # runs in different folders may share a name
        panels[name] = shares
        by_third, own = thirds(shares)
        cells = "".join(f"{x:>8.0f}" for x in (*by_third, own))
        print(f"{name:48}{cells}   {PAPER.get(task, '')}")
    plot_routes(panels, args.out / "routes.png")
    print(f"\n{args.out / 'routes.png'}: what each slot chose")


if __name__ == "__main__":
    command_line(main)
