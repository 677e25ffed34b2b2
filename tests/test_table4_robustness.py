"""experiments/table4_robustness.py: the noise's length and seeds, the table against the runs' own
scores, the curve.

pytest tests/test_table4_robustness.py
"""

import json
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import call, need_shared, printed_by
from torch import Tensor

from data import Example
from eval import accuracy, load_run
from experiments import table4_robustness as table4
from support.files import locate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, str]:
    """The small form on a part of the data: its folder, and what it prints."""
    folder = tmp_path_factory.mktemp("table4")
    (folder / "glue" / "CoLA").mkdir(parents=True)
    for split, rows in (("train", 32), ("dev", 40)):
        lines = (locate("nano/glue") / "CoLA" / f"{split}.tsv").read_text("utf-8").split("\n")
        (folder / "glue" / "CoLA" / f"{split}.tsv").write_text("\n".join(lines[:rows]), "utf-8")
    few = f"{table4.SMALL} --data {folder / 'glue'} --epochs 1"
    with mock.patch.object(table4, "SMALL", few):
        flags = ["--noise-seeds", 2, "--sizes", 4, 0]
        lines = printed_by(table4, "--out", folder / "out", *flags)
    return folder / "out", "\n".join(lines)


def runs(small) -> list[Path]:
    return sorted(p for p in small[0].iterdir() if p.is_dir())  # LoRA, MoLEx


def noise(monkeypatch, folder: Path, size: float, seed: int) -> tuple[Tensor, Tensor]:
    """Clean embeddings of two batches, and what noisy_accuracy adds to them."""
    model, clean, noisy = load_run(folder, CPU)[0], [], []
    ids = torch.arange(600).view(20, 30)

    def look(model, examples, batch_size):
        noisy.extend(model.embed(ids) for _ in range(2))
        return [0]

    monkeypatch.setattr(table4, "classify", look)
    table4.noisy_accuracy(model, [[Example([5], label=0)]], 16, size, seed)
    clean.extend(model.embed(ids) for _ in range(2))
    return torch.stack(clean).detach(), (torch.stack(noisy) - torch.stack(clean)).detach()


def test_noise_is_as_long_as_the_size_says(monkeypatch, small):
    for size in (0.5, 2.0):
        e, added = noise(monkeypatch, runs(small)[0], size, 0)
        squared = added.square().sum(-1) / e.square().sum(-1)
        assert squared.mean().sqrt() == pytest.approx(size, rel=0.02)
        assert squared.sqrt().std() < 0.1 * size  # a token's own norm counts, not the average one
    _, none = noise(monkeypatch, runs(small)[0], 0, 0)
    assert not none.any()


def test_noise_is_shared_by_methods_and_sizes_but_not_by_seeds_and_batches(monkeypatch, small):
    lora, molex = runs(small)
    _, one = noise(monkeypatch, lora, 1, 0)
    torch.testing.assert_close(noise(monkeypatch, molex, 1, 0)[1], one)
    torch.testing.assert_close(noise(monkeypatch, lora, 2, 0)[1], 2 * one, atol=1e-6, rtol=1e-4)
    other = noise(monkeypatch, lora, 1, 1)[1]
    for a, b in ((one, other), (one[0], one[1]), (one[:, :10], one[:, 10:])):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.05


def test_noise_is_gone_afterwards_and_changes_the_states(small):
    model, tokenizer, _ = load_run(runs(small)[0], CPU)
    ids, states = torch.arange(40).view(2, 20), []
    model.embed.register_forward_hook(lambda *_: None)
    clean = model.hidden(ids)
    example = Example(tokenizer.encode("A pub."), label=0)
    hook = model.head.register_forward_hook(lambda m, inputs, out: states.append(inputs[0]))
    for size in (0.0, 1.0):
        table4.noisy_accuracy(model, [[example]], 16, size, 0)
    hook.remove()
    assert not torch.allclose(*states)
    assert torch.equal(model.hidden(ids), clean)


def test_table(small):
    """Without noise every method has its run's own accuracy; the sizes come in order."""
    out, printed = small
    rows = [re.split(r"\s{2,}", line) for line in printed.split("\n")]
    assert [row[0] for row in rows if len(row) == 3] == [
        "CoLA accuracy, %", "noise 0", "noise 4",
        "QNLI accuracy, %", "paper, size unknown", "SST-2 accuracy, %", "paper, size unknown",
    ]  # fmt: skip
    rows = {row[0]: row[1:] for row in rows if len(row) == 3}
    assert rows["CoLA accuracy, %"] == ["LoRA", "LoRA + MoLEx"]
    for folder, cell in zip(runs(small), rows["noise 0"], strict=True):
        lines = (folder / "predictions.tsv").read_text().splitlines()[1:]
        labels, said = zip(*(line.split("\t")[2:] for line in lines), strict=True)
        assert len(labels) == 40
        assert cell == f"{100 * accuracy(said, labels):.1f} ± 0.0"
    assert (out / "robustness.png").read_bytes().startswith(b"\x89PNG")
    assert f"{out / 'robustness.png'}" in printed


def test_curve(monkeypatch, tmp_path):
    """A panel for each task, a line for each method, in %."""
    from matplotlib.figure import Figure

    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda f, *a, **k: savefig(f, *a, **k) or drawn.append(f)
    )
    scores = {0.0: [0.9, 0.9], 1.0: [0.6, 0.8]}
    table4.plot(
        {"qnli": {"LoRA": scores, "LoRA + MoLEx": scores}, "sst2": {"LoRA": scores}},
        tmp_path / "new" / "curve.png",
    )
    panels = drawn[0].axes
    assert [panel.get_title() for panel in panels] == ["QNLI", "SST-2"]
    assert [len(panel.containers) for panel in panels] == [2, 1]
    x, y = panels[0].containers[0].lines[0].get_data()
    assert [*x] == [0, 1] and [*y] == pytest.approx([90, 70])
    assert (tmp_path / "new" / "curve.png").exists()


def test_paper_numbers():
    rows = need_shared("paper/molex-paper.txt").read_text("utf-8").split("Table 4: ")[1]
    for task, place in (("qnli", 1), ("sst2", 2)):
        for method, name in (("LoRA", "LoRA"), ("LoRA + MoLEx", "MoLEx")):
            row = next(line for line in rows.split("\n") if line.startswith(name + "\t"))
            numbers = re.findall(r"[\d.]*\d", row.split("\t")[place])
            assert re.findall(r"[\d.]*\d", table4.PAPER[task][method]) == numbers


def test_a_run_on_a_part_of_its_dev_set_is_evaluated_on_that_part(small, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(runs(small)[0], tmp_path / "part"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dev_limit": 7}))
    seen = []

    def look(model, examples, batch_size):
        seen.append(len(examples))
        return [0] * len(examples)

    monkeypatch.setattr(table4, "classify", look)
    table4.robustness(folder, [0.0], 1, CPU)
    assert seen == [7]


@pytest.mark.parametrize(
    "changes, flags, message",
    [
        ({"dev_limit": 7}, [], r".* has another dev_limit than the run on cola .*"),
        ({"eval_batch": 7}, [], r".* has another eval_batch than the run on cola .*"),
        ({"task": "stsb"}, [], r".* is a run on stsb, which has no accuracy"),
        ({"task": "e2e"}, [], r".* is a run on e2e, which has no accuracy"),
        ({}, ["--sizes", "-1"], r"--sizes are numbers, none below 0"),
        ({}, ["--sizes", "0", "nan"], r"--sizes are numbers, none below 0"),
        ({}, ["--noise-seeds", "0"], r"argument --noise-seeds: 0 is less than 1"),
    ],
)
def test_bad_input(small, tmp_path, failure, changes, flags, message):
    good = runs(small)[0]
    other = Path(shutil.copytree(good, tmp_path / "other"))
    config = json.loads((good / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | changes))
    assert re.fullmatch(f"error: {message}", failure(call, table4, good, other, *flags))
