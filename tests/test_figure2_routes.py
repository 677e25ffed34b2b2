"""experiments/figure2_routes.py, and the routes that eval.py leaves for it: against the choices
that were made, thirds by hand, the picture's axes.

pytest tests/test_figure2_routes.py
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import call, need_shared, printed_by
from safetensors.torch import save_file
from torch import Tensor

import train
from data import GLUE, data_files
from eval import build, evaluate_run
from experiments import figure2_routes as figure2
from lora import trained_tensors
from molex import MoLEx
from support.files import locate
from support.pictures import plot_routes
from support.runs import origin

CPU = torch.device("cpu")
RUNS = {
    "cola": ["--model", "nano/roberta", "--task", "cola"],
    "stsb sequence": ["--model", "nano/roberta", "--task", "stsb", "--route", "sequence"],
    "e2e": ["--model", "nano/gpt2", "--task", "e2e", "--test-limit", "40"],
    "e2e top 2": ["--model", "nano/gpt2", "--task", "e2e", "--test-limit", "40", "--top-k", "2",
                  "--molex-layers", "1-6", "--vote", "mean", "--route", "sequence"],
}  # fmt: skip


def make_run(folder: Path, *flags: str) -> Path:
    """A run that has trained nothing, with a gate that likes some layers better than others."""
    s = train.parse([*flags, "--eval-batch", "4", "--max-new-tokens", "3", "--beams", "2"])[1][0]
    torch.manual_seed(1)
    model, _ = build(s, CPU)
    if s.molex:
        with torch.no_grad():
            for gate in model.layers.gates:
                gate.weight.normal_()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(s)))
    (folder / "origin.json").write_text(json.dumps(origin(s, data_files(s.task, s.data), "MoLEx")))
    save_file(
        {n: p.detach() for n, p in trained_tensors(model).items()}, folder / "adapter.safetensors"
    )
    metric = GLUE[s.task].metric if s.task in GLUE else "dev_loss"
    log = [{metric: 0.0, "train_loss": 0.0, "step": i + 1, "curve": []} for i in range(s.epochs)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    return folder


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    """A part of nano/glue."""
    out = tmp_path_factory.mktemp("glue")
    for task in ("CoLA", "MRPC", "STS-B"):
        (out / task).mkdir()
        for split in ("train", "dev"):
            lines = (locate("nano/glue") / task / f"{split}.tsv").read_text("utf-8").split("\n")
            (out / task / f"{split}.tsv").write_text("\n".join(lines[:33]), "utf-8")
    return out


def evaluated(folder: Path, monkeypatch) -> Tensor:
    """routes.json as eval.py writes it, for as much of `folder` as it needs, after a look at it
    against the choices that came up: those of the prompts in E2E, of whole texts elsewhere."""
    config, count = json.loads((folder / "config.json").read_text()), [0]
    made, choose = torch.zeros(8, 8), MoLEx.choose

    def spy(self, t, log_a, best, ctx):
        new = ctx.cache is None if config["task"] != "e2e" else t not in ctx.cache.route
        picks = choose(self, t, log_a, best, ctx)
        if new:
            count[0] += len(log_a) * (t == self.slots[0])
            for j in picks.expand(len(log_a), -1).flatten():
                made[t, j] += 1
        return picks

    with monkeypatch.context() as patch:
        patch.setattr(MoLEx, "choose", spy)
        patch.setattr("eval.e2e_scores", lambda outputs, references: {})
        evaluate_run(folder, CPU)
    shares = torch.tensor(json.loads((folder / "routes.json").read_text()))
    torch.testing.assert_close(shares, 100 * made / count[0])
    task, read = figure2.read_routes(folder)
    assert task == config["task"] and torch.equal(read, shares)
    assert (folder / "routes.png").read_bytes().startswith(b"\x89PNG")
    return shares


@pytest.mark.parametrize("name", [*RUNS])
def test_shares_are_those_of_the_choices_made_in_evaluation(tmp_path, glue, monkeypatch, name):
    data = "nano/e2e" if "e2e" in name else str(glue)
    folder = make_run(tmp_path / "run", *RUNS[name], "--data", data)
    shares = evaluated(folder, monkeypatch)
    slots, k = (range(1, 7), 2) if "top 2" in name else (range(8), 1)
    expected = torch.zeros(8)
    expected[list(slots)] = 100.0 * k
    torch.testing.assert_close(shares.sum(1), expected)
    chosen = (shares > 0).sum().item()
    assert chosen > len(slots) * k, "batches should not all choose alike"


def test_alpacas_shares_are_those_of_the_dev_set_without_the_samples(tmp_path, monkeypatch):
    rows = [
        dict(instruction=f"Name {n} pubs.", input="near " * (n % 9), output="$7, $8; " * 40)
        for n in range(200)
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    flags = ["--model", "nano/gpt2", "--task", "alpaca", "--data", str(tmp_path / "alpaca.json")]
    shares = evaluated(make_run(tmp_path / "run", *flags), monkeypatch)
    torch.testing.assert_close(shares * 20 / 100, (shares * 20 / 100).round())  # 20 examples
    assert shares.sum(1).tolist() == pytest.approx([100] * 8)


def test_thirds_by_hand():
    share = torch.zeros(8, 8)  # 0-2 are early, 3-5 middle, 6-7 later
    share[0, 2], share[1, 3], share[2, 5], share[7, 7], share[3, 6] = 20, 40, 60, 50, 30
    assert figure2.thirds(share) == (pytest.approx([10, 50, 40]), pytest.approx(25))
    assert figure2.thirds(torch.eye(12)) == (pytest.approx([100 / 3] * 3), pytest.approx(100))


def test_picture(monkeypatch, tmp_path):
    """x is the slot, y the layer; thirds lie between layers."""
    from matplotlib.figure import Figure

    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda f, *a, **k: savefig(f, *a, **k) or drawn.append(f)
    )
    share = torch.zeros(8, 8)
    share[6, 2], share[6, 3], share[1, 1] = 75, 25, 100
    plot_routes({f"runs{n}/r": share for n in range(5)}, tmp_path / "routes.png")
    panels = [p for p in drawn[0].axes if p.images]
    assert [p.get_title() for p in panels] == [f"runs{n}\nr" for n in range(5)]
    (image,) = panels[4].images
    shown = image.get_array()
    assert (shown[2, 6], shown[3, 6], shown[1, 1], shown[6, 2]) == (75, 25, 100, 0)
    assert image.origin == "lower" and panels[4].get_xlabel() == "slot t"
    lines = [line.get_data() for line in panels[4].lines]
    assert sorted(float(y[0]) for x, y in lines if [*x] == [0, 1]) == [2.5, 5.5]
    assert sorted(float(x[0]) for x, y in lines if [*y] == [0, 1]) == [2.5, 5.5]


def test_small_form(glue, tmp_path, monkeypatch):
    few = [f"{flags} --data {glue} --epochs 1" for flags in figure2.SMALL]
    monkeypatch.setattr(figure2, "SMALL", few)
    lines = printed_by(figure2, "--out", tmp_path / "new")
    rows = [re.split(r"\s{2,}", line) for line in lines]
    rows = {r[0]: r[1:] for r in rows if "/" in r[0]}
    runs = [f"new/nano-roberta-{task}-molex-s0" for task in ("cola", "mrpc")]
    assert [key for key in rows if "png" not in key] == runs
    for cells in (rows[key] for key in runs):
        assert sum(map(int, cells[:3])) == pytest.approx(100, abs=2)
    assert (tmp_path / "new" / "routes.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_paper_says():
    text = need_shared("paper/molex-paper.txt").read_text("utf-8")
    assert "CoLA, layer 9 mixes with layer 2, 100% of the time" in text
    assert "for QQP and MNLI, there is a heavy emphasis on the middle layers" in text
    assert (
        "MRPC, a similar task on sentences instead of questions, it mainly chooses the earlier"
        in text
    )


def test_a_run_without_molex(glue, tmp_path, failure):
    folder = make_run(tmp_path / "run", *RUNS["cola"], "--data", str(glue), "--no-molex")
    assert "no routes.json: " in failure(call, figure2, folder)
