"""experiments/table8_topk.py: what it trains, that it resumes, the table against the runs' files.

pytest tests/test_table8_topk.py
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import call, need_shared, printed_by

from data import encode_glue, read_glue
from eval import classify, load_run
from experiments import table8_topk as table8
from support.files import locate


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A part of the data, and beside it, in out/, what the small form makes of it."""
    folder = tmp_path_factory.mktemp("table8")
    (folder / "glue" / "CoLA").mkdir(parents=True)
    for split, rows in (("train", 64), ("dev", 40)):
        lines = (locate("nano/glue") / "CoLA" / f"{split}.tsv").read_text("utf-8").split("\n")
        (folder / "glue" / "CoLA" / f"{split}.tsv").write_text("\n".join(lines[:rows]), "utf-8")
    return folder


@pytest.fixture(scope="module")
def table(small) -> dict[str, list[str]]:
    return run(small)


def run(folder: Path) -> dict[str, list[str]]:
    """Its small form: row -> cells."""
    flags = ["--data", folder / "glue", "--epochs", 1, "--out", folder / "out"]
    cells = [re.split(r"\s{2,}", line.strip()) for line in printed_by(table8, *flags) if line]
    return {"": cells[0], **{c[0]: c[1:] for c in cells[1:]}}


def runs(small) -> dict[int, Path]:
    return {k: next((small / "out" / f"top-{k}").iterdir()) for k in (1, 2)}


def test_runs_differ_in_k_alone(small, table):
    one, two = (json.loads((f / "config.json").read_text()) for f in runs(small).values())
    assert (one["molex"].pop("top_k"), two["molex"].pop("top_k")) == (1, 2)
    assert two["differs"].pop("top_k") == [2, 1]  # from the preset
    assert one == two and one["task"] == "cola" and one["molex"]


@pytest.mark.parametrize("k", [1, 2])
def test_k_layers_are_chosen_for_every_slot(small, table, k):
    model, tokenizer, config = load_run(runs(small)[k], torch.device("cpu"))
    rows = read_glue(config.data, "cola", "dev")
    classify(model, encode_glue(tokenizer, rows, 512), config.eval_batch)
    assert (model.layers.routes.counts.sum(1) == k * len(rows)).all()
    assert (model.layers.routes.counts <= len(rows)).all()


def test_table(small, table):
    """Matthews and accuracy written out, from the predictions."""
    assert table[""] == ["CoLA matthews", "CoLA accuracy"]
    for k, folder in runs(small).items():
        lines = [x.split("\t") for x in (folder / "predictions.tsv").read_text().splitlines()[1:]]
        tp, tn, fp, fn = (
            sum((x[2], x[3]) == pair for x in lines)
            for pair in (("1", "1"), ("0", "0"), ("0", "1"), ("1", "0"))
        )
        assert tp + tn + fp + fn == len(lines) == 40
        product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        r = (tp * tn - fp * fn) / product**0.5 if product else 0.0
        assert table[f"top-{k}"] == [f"{100 * r:.1f}", f"{100 * (tp + tn) / 40:.1f}"]
        assert table[f"paper, top-{k}"] == [table8.PAPER[k]["cola", "matthews"], "-"]


def test_what_is_finished_is_kept(small, table):
    before = [(f / "last.pt").stat().st_mtime_ns for f in runs(small).values()]
    assert run(small) == table
    assert [(f / "last.pt").stat().st_mtime_ns for f in runs(small).values()] == before


def test_paper_numbers():
    """Table 8's. Its top-1 line is Table 1's MoLEx line, where CoLA is a Matthews correlation."""
    text = need_shared("paper/molex-paper.txt").read_text("utf-8")
    number = r"[\d.]*\d"
    for k, cells in table8.PAPER.items():
        row = next(x for x in text.split("\n") if x.startswith(f"MoLEx (Top{k})"))
        paper = [re.findall(number, cell) for cell in row.split("\t")[1:]]
        assert paper == [re.findall(number, cell) for cell in cells.values()]
    base = next(x for x in text.split("\n") if "(MoLex)" in x and x.startswith("<b>RoB"))
    columns = base.split("\t")[2:]  # MNLI, SST-2, MRPC, CoLA, QNLI, QQP, RTE, STS-B, average
    assert [re.findall(number, columns[i]) for i in (3, 5, 1)] == [
        re.findall(number, cell) for cell in table8.PAPER[1].values()
    ]


def test_damaged_predictions(small, table, tmp_path, failure):
    folder = Path(shutil.copytree(runs(small)[1], tmp_path / "run"))
    file = folder / "predictions.tsv"
    file.write_text(file.read_text().replace("prediction", "said"))
    error = failure(table8.scores, folder, "cola")
    assert error == f"error: {file} has no column prediction"
    file.unlink()
    assert f"cannot read {file}" in failure(table8.scores, folder, "cola")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--task", "qqp"], r".*QQP/train.tsv is missing; .*"),
        (["--task", "stsb"], r".*invalid choice: 'stsb'.*"),
        (["--epochs", "0"], r"--epochs cannot be 0: it is 1 or more"),
        (["--model", ""], r".*argument --model: it is empty"),
        (["--data", ""], r".*argument --data: it is empty"),
        (["--epochs", ""], r".*argument --epochs: invalid int value: ''"),
        (["--model", "nowhere/at-all"], r"model 'nowhere/at-all' is neither .*"),
    ],
)
def test_bad_input(monkeypatch, failure, tmp_path, flags, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert re.fullmatch(f"error: {message}", failure(call, table8, "--out", tmp_path, *flags))
