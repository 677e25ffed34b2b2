"""The table at the end: all runs of a command beside each other, and what the paper has."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.pictures import plot_curves
from support.runs import RunFolder
from support.scoring import paired_bootstrap
from support.settings import PAPER, Settings

# Student's t for a 95% interval, of 2 to 10 values
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
Cells = dict[tuple[str, str], str]  # (task, score) -> a number of the paper's
AVERAGE = ("glue", "average")

# ------------------------------------------------------------------------------ the paper's numbers


def paper(s: Settings, tasks: Mapping[str, Any]) -> Cells:
    """What the paper reports for runs like this, by task and score."""
    kind = "glue" if s.task in PAPER["tasks"] else s.task
    rows = PAPER["results"].get(kind, {}).get(s.shape, {})
    row = rows.get(f"{s.method} from MNLI" if s.init else s.method, [])
    keys = [(s.task, name) for name in tasks[s.task].scores]
    if kind == "glue":
        keys = [(task, tasks[task].metric) for task in PAPER["tasks"]] + [AVERAGE]
    cells = {}
    for key, cell in zip(keys, row, strict=False):
        if cell and (key[0] == s.task or key == AVERAGE):
            cells[key] = cell
    count = PAPER["trainable"].get(s.shape, {}).get(s.method)
    if cells and count:
        cells[s.task, "trainable"] = count
    return cells


def departures(runs: list[Settings], out: Path, tasks: Mapping[str, Any]) -> list[str]:
    """A line for every setting in which runs beside the paper's numbers are not the paper's."""
    lines = {}  # without repetition, in order
    for s in runs:
        title = tasks[s.task].title
        for name, pair in s.differs.items():
            ours, theirs = ("none" if value is None else value for value in pair)
            if name != "beam_rule":  # below
                lines[f"{title}: {name.replace('_', ' ')} {ours} (paper: {theirs})"] = True
        if s.init:
            lines[f"{title}: starts from {s.init} (paper: the best MNLI run)"] = True
        scores = RunFolder(out / s.name).read_scores(tasks[s.task].scores)
        for part, count in scores.get("examples", {}).items():
            official = PAPER["examples"].get(s.task, {}).get(part, count)
            if count != official:
                lines[f"{title}: {count:,} {part} examples (official data: {official:,})"] = True
        if s.task == "e2e":
            if s.beam_rule != "lora":
                lines[f"e2e: beam search as in transformers {LORA_RULE}"] = True
            if not tasks["e2e"].tokenized(s.data):
                lines[f"e2e: the official text {LORA_TEXT}"] = True
    seeds = len({s.seed for s in runs})
    if seeds != 5:
        lines[f"seeds: {seeds} (paper: 5)"] = True
    return list(lines)


LORA_RULE = "(paper, probably: --beam-rule lora)"
LORA_TEXT = "(paper, probably: the LoRA code's tokenized one)"
BATCHES = """
Table 5's batch size is taken as that of all GPUs together. To read it as that of each of 8, pass 8
times as much as --batch-size, and --accumulate where memory is short."""

# ---------------------------------------------------------------------------------------- the cells


def spread(values: list[float], factor: float, decimals: int) -> str:
    """Mean, and standard deviation (n - 1) if there are several."""
    values = [v * factor for v in values]
    text = f"{statistics.mean(values):,.{decimals}f}"
    return f"{text} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else text


def interval(values: list[float]) -> float:
    """Half the width of the 95% interval of the mean, by Student's t distribution (for more than
    10 values that of 10, which is a little too wide)."""
    t = STUDENT[min(len(values), 10) - 2]
    return t * statistics.stdev(values) / math.sqrt(len(values))


@dataclass
class Table:
    """A column for each method and, if there are two, their difference, with its 95% interval over
    the seeds; then what the paper has."""

    papers: dict[str, Cells]  # by method

    def head(self) -> str:
        text = f"{'':22}" + "".join(f"{method:>18}" for method in self.papers)
        if len(self.papers) == 2:
            text += f"{'difference':>18}"
        for method, cells in self.papers.items():
            if cells:
                text += f"{'paper: ' + method.split()[-1]:>14}"
        return text

    def row(
        self, key: tuple[str, str], values: list[list[float]], name: str, factor: float, digits: int
    ) -> str:
        """`values`: for each method those of its seeds."""
        text = f"{name:22}" + "".join(f"{spread(v, factor, digits):>18}" for v in values)
        if len(values) == 2:
            gains = [factor * (b - a) for a, b in zip(*values, strict=True)]
            gain = f"{statistics.mean(gains):+,.{digits}f}"
            if len(gains) > 1:
                gain += f" ± {interval(gains):.{digits}f}"
            text += f"{gain:>18}"
        return text + "".join(
            f"{cells.get(key, ''):>14}" for cells in self.papers.values() if cells
        )


# ---------------------------------------------------------------------------------------- the table


def report(runs: list[Settings], out: Path, tasks: Mapping[str, Any]) -> None:
    """Print one table of all runs in `out`, and how they were made otherwise than the paper's.
    `tasks`: name -> what has a title, a metric and scores. Raises InputError."""
    papers: dict[str, Cells] = {s.method: {} for s in runs}
    for s in sorted(runs, key=lambda s: bool(s.init)):  # the average is Table 9's, if it is that
        papers[s.method].update(paper(s, tasks))
    table = Table(papers)
    print(f"\n{table.head()}")
    names = list(dict.fromkeys(s.task for s in runs))
    results = []  # [task][method][seed], the main score
    for name in names:
        groups = [[s for s in runs if (s.task, s.method) == (name, method)] for method in papers]
        folders = [[RunFolder(out / s.name) for s in group] for group in groups]
        results.append(report_task(table, name, tasks[name], folders, alone=len(names) == 1))
    if len(names) > 1:
        # The mean over the tasks, for each method and seed.
        means = [
            [statistics.mean(v) for v in zip(*m, strict=True)] for m in zip(*results, strict=True)
        ]
        print(table.row(AVERAGE, means, "average", 100, 2))
    seeds = len({s.seed for s in runs})
    if len(papers) == 2 and seeds > 1:
        print(f"\ndifference: paired, mean of {seeds} seeds with its 95% interval (Student's t)")
    if any(papers.values()):
        if any(AVERAGE in cells for cells in papers.values()):
            print(BATCHES)
        lines = departures(runs, out, tasks)
        if lines:
            print("\nNot as in the paper:", *lines, sep="\n  ")


def report_task(
    table: Table, name: str, task: Any, folders: list[list[RunFolder]], alone: bool
) -> list[list[float]]:
    """Print the rows of one task, whose `folders` are by method and seed; returns so its main
    score."""
    scores = [[folder.read_scores(task.scores) for folder in group] for group in folders]
    main = next(iter(task.scores))
    rows = dict(task.scores)
    for key in scores[0][0]:  # MNLI's two dev sets
        if key.startswith(f"{main}_"):
            rows[key] = (key.replace(f"{main}_", "  "), 100, 2)
    if alone:
        rows = {"trainable": ("trainable parameters", 1, 0), **rows}
        rows["seconds_per_step"] = ("seconds per step", 1, 3)
    for key, (title, factor, digits) in rows.items():
        values = [[run[key] for run in group] for group in scores]
        if key == "trainable":  # alike in all seeds
            values = [group[:1] for group in values]
        text = table.row((name, key), values, title, factor, digits)
        if key == "bleu" and len(folders) == 2:
            text += f"   p = {', '.join(p_value(*pair) for pair in zip(*folders, strict=True))}"
        print(text)
    return [[run[main] for run in group] for group in scores]


def p_value(baseline: RunFolder, system: RunFolder) -> str:
    """Of a difference in BLEU, by a paired bootstrap over the test set."""
    outputs, references = baseline.outputs()
    return f"{paired_bootstrap(outputs, system.outputs()[0], references)[1]:.3f}"


def report_pictures(runs: list[Settings], out: Path, tasks: Mapping[str, Any]) -> None:
    """For every task the losses of all its runs in one picture."""
    for name in dict.fromkeys(s.task for s in runs):
        metric = tasks[name].metric
        logs = [
            (s.method, RunFolder(out / s.name, metric).read_log()) for s in runs if s.task == name
        ]
        model = runs[0].name.partition(f"-{runs[0].task}-")[0]
        picture = out / f"{model}-{name}-loss.png"
        plot_curves(logs, metric, picture)
        print(f"\nloss over steps, all runs: {picture}")
