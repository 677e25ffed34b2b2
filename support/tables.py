"""The table at the end: all runs of a command beside each other, and what the paper has."""

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.cli import cpu_has_bf16
from support.files import locate
from support.pictures import plot_curves
from support.runs import RunFolder
from support.scoring import paired_bootstrap
from support.settings import PAPER, Settings

# Student's t for a 95% interval, of 2 to 10 values
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
AVERAGE = ("glue", "average")
Cells = dict[tuple[str, str], str]  # (task, score) -> a number of the paper's
Papers = dict[str, Cells]  # by method
Tasks = Mapping[str, Any]  # name -> what has a folder and a metric


def shown(task: str, tasks: Tasks) -> dict[str, tuple[str, int, int]]:
    """What a table shows of a task, the main score first: score -> title, factor, decimals."""
    if task in PAPER["shown"]:
        return PAPER["shown"][task]
    metric = tasks[task].metric
    return {metric: (f"{tasks[task].folder} {metric}", 100, 2)}


def paper(s: Settings, tasks: Tasks) -> Cells:
    """What the paper reports for runs like this, by task and score."""
    kind = "glue" if s.task in PAPER["tasks"] else s.task
    rows = PAPER["results"].get(kind, {}).get(s.shape, {})
    row = rows.get(f"{s.method} from MNLI" if s.init else s.method, [])
    keys = [(s.task, name) for name in shown(s.task, tasks)]
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


def departures(runs: list[Settings], out: Path, tasks: Tasks) -> list[str]:
    """A line for every setting in which runs beside the paper's numbers are not the paper's."""
    lines = []
    for s in runs:
        title = tasks[s.task].folder
        for name, pair in s.differs.items():
            ours, theirs = ("none" if value is None else value for value in pair)
            if name != "beam_rule":  # below
                lines.append(f"{title}: {name.replace('_', ' ')} {ours} (paper: {theirs})")
        if s.init:
            lines.append(f"{title}: starts from {s.init} (paper: the best MNLI run)")
        scores = RunFolder(out / s.name).read_scores(shown(s.task, tasks))
        for part, count in scores.get("examples", {}).items():
            official = PAPER["examples"].get(s.task, {}).get(part, count)
            if count != official:
                lines.append(f"{title}: {count:,} {part} examples (official data: {official:,})")
        if s.task == "e2e" and s.beam_rule != "lora":
            lines.append(PAPER["notes"]["beam_rule"])
        if s.task == "e2e" and (s.data is None or (locate(s.data) / "trainset.csv").exists()):
            lines.append(PAPER["notes"]["official_text"])
    seeds = len({s.seed for s in runs})
    if seeds != 5:
        lines.append(f"seeds: {seeds} (paper: 5)")
    return list(dict.fromkeys(lines))  # without repetition


def opening(
    s: Settings,
    folder: Path,
    model: Any,
    trained: int,
    counts: dict[str, int],
    steps: tuple[int, int],
) -> str:
    """What a run tells when it begins, or goes on. `model`: a Transformer; `trained`: how many of
    its parameters are, but for a head; `counts`: examples of each split; `steps`: done and all."""
    done, end = steps
    parameters = sum(p.numel() for p in model.parameters())
    data, precision = s.data or "the hub", "bf16" if model.bf16 else "float32"
    lines = [
        f"{s.name}: {s.model}, {parameters:,} parameters, {trained:,} trained (a head not counted)",
        f"  {s.task} from {data}: {counts['train']:,} training examples, {counts['dev']:,} of dev",
    ]
    steps_left = f"steps {done + 1:,} to {end:,}" if done < end else f"all {end:,} steps are done,"
    lines.append(f"  {steps_left} on {model.device} in {precision}, written to {folder}")
    if model.bf16 and model.device.type == "cpu" and not cpu_has_bf16():
        lines.append("  this processor has no bf16 instructions: --precision float32 is faster")
    if s.warm_steps(end) >= end:
        lines.append(f"  the rate rises for {s.warm_steps(end):g} steps: it never is --lr {s.lr:g}")
    if end == 1 and s.warmup:
        lines.append("  the rate begins at 0: a single step trains nothing")
    return "\n".join(lines)


def footnotes(runs: list[Settings], out: Path, p: bool) -> list[str]:
    """What a reader of the table wants to know of its numbers. `p`: it has that column."""
    lines = []
    if p:
        lines.append(
            "p: how often chance alone makes such a difference in BLEU (paired bootstrap of"
        )
        lines.append("  the test MRs), seed by seed")
    if any(s.label_smoothing for s in runs):
        lines.append("the train loss that epochs show is label-smoothed, dev loss is not")
    for part in ("train", "dev", "test"):
        for limit in {getattr(s, f"{part}_limit") for s in runs} - {None}:
            lines.append(f"--{part}-limit: only the first {limit} of the {part} set")
    for s in runs:
        counts = RunFolder(out / s.name).read_scores(()).get("examples")
        per_epoch = math.ceil(counts["train"] / s.batch_size) if counts else 1
        if s.max_steps and s.max_steps < s.epochs * per_epoch and s.max_steps % per_epoch:
            lines.append(f"--max-steps: {s.max_steps} steps; {per_epoch} are an epoch")
    return list(dict.fromkeys(lines))


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


def head_row(papers: Papers) -> str:
    """A column for each method and, if there are two, their difference; then the paper's."""
    text = f"{'':22}" + "".join(f"{method:>18}" for method in papers)
    if len(papers) == 2:
        text += f"{'difference':>18}"
    titles = [f"paper: {method.split()[-1]}" for method, cells in papers.items() if cells]
    return text + "".join(f"{title:>14}" for title in titles)


def row(papers: Papers, key: tuple, values: list[list[float]], form: tuple) -> str:
    """`values`: for each method those of its seeds; `form`: title, factor, decimals. A difference
    has its 95% interval over the seeds."""
    title, factor, digits = form
    text = f"{title:22}" + "".join(f"{spread(v, factor, digits):>18}" for v in values)
    if len(values) == 2:
        gains = [factor * (b - a) for a, b in zip(*values, strict=True)]
        gain = f"{statistics.mean(gains):+,.{digits}f}"
        if len(gains) > 1:
            gain += f" ± {interval(gains):.{digits}f}"
        text += f"{gain:>18}"
    return text + "".join(f"{cells.get(key, ''):>14}" for cells in papers.values() if cells)


def report(runs: list[Settings], out: Path, tasks: Tasks) -> None:
    """Print one table of all runs in `out`, and how they were made otherwise than the paper's.
    Raises InputError."""
    papers: Papers = {s.method: {} for s in runs}
    for s in sorted(runs, key=lambda s: bool(s.init)):  # the average is Table 9's, if it is that
        papers[s.method].update(paper(s, tasks))
    print(f"\n{head_row(papers)}")
    names = list(dict.fromkeys(s.task for s in runs))
    results = []  # [task][method][seed], the main score
    for name in names:
        groups = [[s for s in runs if (s.task, s.method) == (name, method)] for method in papers]
        folders = [[RunFolder(out / s.name) for s in group] for group in groups]
        results.append(report_task(papers, name, shown(name, tasks), folders, len(names) == 1))
    if len(names) > 1:  # the mean over the tasks, for each method and seed
        by_method = zip(*results, strict=True)
        means = [[statistics.mean(v) for v in zip(*m, strict=True)] for m in by_method]
        print(row(papers, AVERAGE, means, ("average", 100, 2)))
    seeds = len({s.seed for s in runs})
    print("", *footnotes(runs, out, len(papers) == 2 and "e2e" in names), sep="\n")
    if len(papers) == 2 and seeds > 1:
        print(f"\ndifference: paired, mean of {seeds} seeds with its 95% interval (Student's t)")
    if any(papers.values()):
        if any(AVERAGE in cells for cells in papers.values()):
            print(PAPER["notes"]["batch_size"])
        if lines := departures(runs, out, tasks):
            print("\nNot as in the paper:", *lines, sep="\n  ")


def rows_of(forms: dict, scores: dict[str, float]) -> dict:
    """The rows of a task's table; below the main score that of each of several dev sets."""
    main = next(iter(forms))
    parts = [name for name in scores if name.startswith(f"{main}_")]
    return forms | {name: (name.replace(f"{main}_", "  "), 100, 2) for name in parts}


def print_scores(task: str, scores: dict[str, float], tasks: Tasks, as_json: bool) -> None:
    """What an evaluation has found, in the units of the tables, and as JSON, too."""
    for name, (title, factor, digits) in rows_of(shown(task, tasks), scores).items():
        if name in scores:
            print(f"{title:22}{scores[name] * factor:>18.{digits}f}")
    if as_json:
        print(json.dumps(scores))


def report_task(
    papers: Papers, task: str, forms: dict, folders: list[list[RunFolder]], alone: bool
) -> list[list[float]]:
    """Print the rows of a task, whose `folders` are by method and seed; returns so its main score.
    `alone`: there is no other task."""
    scores = [[folder.read_scores(forms) for folder in group] for group in folders]
    main = next(iter(forms))
    rows = {"trainable": ("trainable parameters", 1, 0)} if alone else {}
    rows.update(rows_of(forms, scores[0][0]))
    if alone:
        rows["seconds_per_step"] = ("seconds per step", 1, 3)
    runs = [folder.path for group in folders for folder in group] if len(folders) == 2 else []
    older = [path for path in runs if not (path / "references.txt").exists()]  # p needs them
    for key, form in rows.items():
        values = [[run[key] for run in group] for group in scores]
        if key == "trainable":  # alike in all seeds
            values = [group[:1] for group in values]
        text = row(papers, (task, key), values, form)
        if key == "bleu" and older:
            text += f"   p: first python eval.py {older[0]}"
        elif key == "bleu" and len(folders) == 2:
            text += f"   p = {', '.join(p_value(*pair) for pair in zip(*folders, strict=True))}"
        print(text)
    return [[run[main] for run in group] for group in scores]


def p_value(baseline: RunFolder, system: RunFolder) -> str:
    """Of a difference in BLEU, by a paired bootstrap over the test set."""
    outputs, references = baseline.outputs()
    return f"{paired_bootstrap(outputs, system.outputs()[0], references):.3f}"


def pictures(runs: list[Settings], out: Path, tasks: Tasks) -> None:
    """For every task the losses of all its runs in one picture."""
    for task in dict.fromkeys(s.task for s in runs):
        metric = tasks[task].metric
        folders = [(s.method, RunFolder(out / s.name, metric)) for s in runs if s.task == task]
        model = runs[0].name.partition(f"-{runs[0].task}-")[0]
        picture = out / f"{model}-{task}-loss.png"
        plot_curves([(method, run.read_log()) for method, run in folders], metric, picture)
        print(f"\nloss over steps, all runs: {picture}")
