"""experiments/table3_transfer.py: how labels map, the task it makes, the accuracies it prints.

pytest tests/test_table3_transfer.py
"""

import csv
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import call, need_shared, printed_by
from test_nano_e2e import read

from data import GLUE, encode_glue
from eval import classify, load_run
from experiments import table3_transfer as table3
from support.files import locate

Table = dict[tuple[str, str], list[str]]


def tsv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Table]:
    """The small form on a part of the data: its folder, and (trained on, on) -> printed cells."""
    folder = tmp_path_factory.mktemp("table3")
    for split, rows in (("train", 32), ("dev", 40)):
        lines = (locate("nano/glue") / "MRPC" / f"{split}.tsv").read_text("utf-8").split("\n")
        (folder / "glue" / "MRPC").mkdir(parents=True, exist_ok=True)
        (folder / "glue" / "MRPC" / f"{split}.tsv").write_text(
            "\n".join(lines[: rows + 1]), "utf-8"
        )
    few = f"{table3.SMALL} --data {folder / 'glue'} --epochs 1"
    with mock.patch.object(table3, "SMALL", few):
        printed = run("--out", folder / "out")
    return folder / "out", printed


def run(*flags: object) -> Table:
    cells = [re.split(r"\s{2,}", line.strip()) for line in printed_by(table3, *flags)]
    return {(c[0], c[1]): c[2:] for c in cells if len(c) > 4}


def test_yes_is_the_class_that_the_official_files_call_so():
    names = {task: GLUE[task].labels[number] for task, number in table3.YES.items()}
    assert names == {"qnli": "entailment", "rte": "entailment", "mrpc": "1", "qqp": "1"}


def test_the_rte_it_makes(small):
    """What the texts say is read back from them."""
    rows = tsv(small[0] / "data" / "RTE" / "dev.tsv")
    assert Counter(r["label"] for r in rows) == {"entailment": 150, "not_entailment": 150}
    for row in rows:
        premise, hypothesis = set(read(row["sentence1"])), set(read(row["sentence2"]))
        assert (hypothesis <= premise) == (row["label"] == "entailment"), row
        assert {a for a, _ in hypothesis} <= {a for a, _ in premise}
        assert len(hypothesis) in (3, 4), "neither label is the longer one"


def test_accuracies(small):
    """The own task's are the runs' own. On RTE whoever says "1", equivalent, is right where the
    file says "entailment"."""
    out, table = small
    folders = sorted(out.glob("nano-*"))
    own = [json.loads((f / "scores.json").read_text())["accuracy"] for f in folders]
    assert table["MRPC", "MRPC"][1:3] == [f"{100 * a:.1f}" for a in own]
    rows, rates = tsv(out / "data" / "RTE" / "dev.tsv"), []
    for folder in folders:
        model, tokenizer, config = load_run(folder, torch.device("cpu"))
        pairs = [((r["sentence1"], r["sentence2"]), 0) for r in rows]
        said = classify(model, encode_glue(tokenizer, pairs, 512), config.eval_batch)
        right = [(s == 1) == (r["label"] == "entailment") for s, r in zip(said, rows, strict=True)]
        rates.append(sum(right) / len(right))
    assert table["MRPC", "RTE"] == ["50.0", *(f"{100 * r:.1f}" for r in rates)]


@pytest.mark.parametrize("source", ["mrpc", "rte"])
def test_one_who_knows_scores_one_on_every_task(small, monkeypatch, source):
    """Texts that say yes or no, and a model that reads them and answers in its task's classes."""
    run = next(small[0].glob("nano-*-lora-*"))
    texts = {0.0: "no", 1.0: "yes"}
    monkeypatch.setattr(
        table3, "load_run", lambda folder, device: (model, tokenizer, replace(config, task=source))
    )
    model, tokenizer, config = load_run(run, torch.device("cpu"))
    yes_rows = {"mrpc": "1", "qqp": "1", "rte": "entailment", "qnli": "entailment"}

    def rows(folder, task, split):
        said = [name == yes_rows[task] for name in GLUE[task].labels]
        return [
            ((texts[float(s)],), GLUE[task].labels.index(n))
            for s, n in zip(said, GLUE[task].labels, strict=True)
        ] * 3

    def know(model, examples, batch):
        names = GLUE[source].labels
        no = next(n for n in names if n != yes_rows[source])
        said = [tokenizer.decode(e.prompt) for e in examples]
        return [names.index(yes_rows[source] if s == "yes" else no) for s in said]

    monkeypatch.setattr(table3, "read_glue", rows)
    monkeypatch.setattr(table3, "classify", know)
    found = table3.transfer(run, [*table3.YES], "anywhere", torch.device("cpu"))
    assert found == {task: (1.0, 0.5) for task in [source, *found]} and len(found) == 4


def test_paper_numbers(small):
    """All six pairs are printed, and their numbers are the paper's."""
    line = need_shared("paper/molex-paper.txt").read_text("utf-8").split("Table 3: ")[1][:900]
    for (source, target), cells in table3.PAPER.items():
        printed = small[1][GLUE[source].folder, GLUE[target].folder]
        assert printed == ["-", "-", "-", *cells]
        for cell in cells:
            assert re.search(re.escape(cell).replace(r"±", r"\D+").replace(r"\ ", ""), line), cell


def test_runs_given_as_folders(small):
    out, table = small
    folders = [str(f) for f in sorted(out.glob("nano-*"))]
    again = run(*folders, "--targets", "rte", "--data", out / "data")
    assert again == table


@pytest.mark.parametrize("task", ["cola", "mnli"])
def test_a_run_of_another_kind_of_task(small, monkeypatch, failure, task):
    source = next(small[0].glob("nano-*-lora-*"))
    model, tokenizer, config = load_run(source, torch.device("cpu"))
    other = (model, tokenizer, replace(config, task=task))
    monkeypatch.setattr(table3, "load_run", lambda folder, device: other)
    assert f" is a run on {task}, " in failure(call, table3, source)
