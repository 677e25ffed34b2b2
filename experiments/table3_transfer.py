"""Zero-shot transfer: train on one task of GLUE, evaluate on another (section 3.3, Table 3).

The paper fine-tunes RoBERTa-base on one of QNLI, RTE, MRPC and QQP and classifies another's dev set
as it is. MoLEx has the higher accuracy in all six pairs that it reports (PAPER, below).

    python experiments/table3_transfer.py           small: nano/roberta learns MRPC, meets an RTE
    python experiments/table3_transfer.py runs/roberta-base-{qnli,rte,mrpc,qqp}-*      in full

In full it takes finished runs of train.py, with and without MoLEx, of any seeds. The small RTE is
made here by the grammar of nano/glue: the second text says a part of what the first says
(entailment), or something else about half of that part or more.

How labels map. In each of the tasks one class means yes: the second text follows from the first
(RTE), the sentence holds the question's answer (QNLI), both say or ask the same (MRPC, QQP). Who
says the same entails it, so a head that has learned yes on one task can say it on another. The
numbers differ, in the official files as on the hub: yes is class 0 of QNLI and RTE, class 1 of MRPC
and QQP. Taken as bare numbers a perfect transfer from MRPC to RTE would score 0%.

Beside the accuracy stands that of one answer, the more frequent, for every pair: what a model that
has understood nothing can reach. Only what exceeds it is transfer. The paper does not show it.

Where the paper is silent:

- How labels map, as above. The two texts stay in the order of the files. Nothing is trained anew.
- The copy of the table that we worked from runs the rows of QNLI and RTE together. We read it so
  that each of three pairs of tasks is there in both directions.
- What its ± is over. All of them are Table 1's for the task evaluated on (MRPC's those of
  RoBERTa-large). Ours is over the runs given.
"""

import random
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE), str(HERE / "nano")]
from make_e2e import random_mr, shuffled
from make_glue import alter, realise_pair

from data import GLUE, encode_glue, read_glue
from eval import classify, load_run, read_run
from experiments.small import finished_runs, runs_parser
from support import settings
from support.cli import command_line, pick_device, plain_path
from support.files import InputError
from support.tables import spread

YES = {"qnli": 0, "rte": 0, "mrpc": 1, "qqp": 1}  # the class that means yes
PAPER = {  # trained on, evaluated on: LoRA, MoLEx
    (source, target): cells
    for source, row in settings.PAPER["table3"].items()
    for target, cells in row.items()
}
SMALL = "--model nano/roberta --task mrpc --compare --epochs 2"


def write_rte(folder: Path, rows: int = 300) -> None:
    """RTE/dev.tsv in the official layout, one half of it entailment."""
    rng, lines = random.Random(0), ["index\tsentence1\tsentence2\tlabel\n"]
    for i in range(rows):
        mr = random_mr(rng)
        kept = shuffled([a for a in mr if a != "name"], rng)[: rng.choice([2, 3])]
        part = {a: mr[a] for a in mr if a == "name" or a in kept}
        label = ("entailment", "not_entailment")[i % 2]
        texts = realise_pair(mr, part if label == "entailment" else alter(part, rng), rng)
        lines.append("\t".join([str(i), *texts, label]) + "\n")
    (folder / "RTE").mkdir(parents=True, exist_ok=True)
    (folder / "RTE" / "dev.tsv").write_text("".join(lines), encoding="utf-8")


def transfer(
    folder: Path, targets: list[str], data: str | None, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Target -> a run's accuracy on its dev set, and the best accuracy of one answer for all. The
    run's own task comes first; the others are read from `data`, None: from where its own is."""
    model, tokenizer, config = load_run(folder, device)
    own = config.task
    if own not in YES:
        known = ", ".join(YES)
        raise InputError(
            f"{folder} is a run on {own}, whose labels mean something else than {known}'s"
        )
    model.cast_frozen()
    limit, found = min(config.max_length, model.config.max_positions), {}
    for task in dict.fromkeys([own, *targets]):
        rows = read_glue(config.data if task == own else data or config.data, task, "dev")
        answers = classify(model, encode_glue(tokenizer, rows, limit), config.eval_batch)
        labels = [label == YES[task] for _, label in rows]
        right = [(a == YES[own]) == label for a, label in zip(answers, labels, strict=True)]
        most = Counter(labels).most_common(1)[0][1]
        found[task] = statistics.mean(right), most / len(labels)
    return found


def main() -> None:
    about = "Table 3: evaluate runs on the dev sets of other tasks"
    what = f"finished runs of {', '.join(YES)} (default: train nano/roberta on MRPC)"
    parser = runs_parser(about, what, "runs/table3")
    what = "tasks to evaluate on (all four)"
    parser.add_argument("--targets", nargs="+", choices=[*YES], default=[*YES], help=what)
    text = "folder of their official files (default: the run's own)"
    parser.add_argument("--data", type=plain_path, help=text)
    args = parser.parse_args()
    folders, targets, data = finished_runs(args, SMALL), args.targets, args.data
    if not args.runs:
        targets, data = ["rte"], str(args.out / "data")
        write_rte(Path(data))

    scores, methods = defaultdict(lambda: defaultdict(list)), []
    for folder in folders:
        found = transfer(folder, targets, data, pick_device(args.device))
        s = read_run(folder)[0]
        methods += [s.method] * (s.method not in methods)
        for task, (accuracy, base) in found.items():
            scores[s.task, task]["one answer"] = [base]
            scores[s.task, task][s.method].append(accuracy)
    columns = ["one answer", *methods]
    heads = [f"{'accuracy, %':12}{'on':10}", *(f"{c:>16}" for c in columns)]
    print("\n" + "".join(heads) + f"{'paper: LoRA':>14}{'paper: MoLEx':>14}")
    for source, target in dict.fromkeys([*scores, *PAPER]):
        pair = scores[source, target]
        cells = [spread(pair[c], 100, 1) if pair[c] else "-" for c in columns]
        text = f"{GLUE[source].folder:12}{GLUE[target].folder:10}"
        text += "".join(f"{cell:>16}" for cell in cells)
        print(text + "".join(f"{cell:>14}" for cell in PAPER.get((source, target), ())))
    print("\nRows with one task twice are no transfer: the run's own score.")


if __name__ == "__main__":
    command_line(main)
