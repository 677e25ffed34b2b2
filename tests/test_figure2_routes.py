"""experiments/figure2_routes.py: the counts against those of eval.py's own passes, thirds by hand,
the picture's axes.

pytest tests/test_figure2_routes.py
"""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import need_shared
from safetensors.torch import save_file

import train
from data import encode_alpaca, read_alpaca
from eval import (
    build,
    command_line,
    evaluate_e2e,
    evaluate_glue,
    generate,
    load_run,
    trained_tensors,
)
from experiments import figure2_routes as figure2
from model import locate

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
    model, _ = build(asdict(s), CPU)
    if s.molex:
        with torch.no_grad():
            for gate in model.layers.gates:
                gate.weight.normal_()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(s)))
    save_file({n: p.detach() for n, p in trained_tensors(model).items()},
              folder / "adapter.safetensors")  # fmt: skip
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


@pytest.mark.parametrize("name", [*RUNS])
def test_counts_are_those_of_the_evaluation(tmp_path, glue, monkeypatch, name):
    data = "nano/e2e" if "e2e" in name else str(glue)
    folder = make_run(tmp_path / "run", *RUNS[name], "--data", data)
    share = figure2.routes(folder, CPU)
    model, tokenizer, config = load_run(folder, CPU)
    monkeypatch.setattr("eval.e2e_scores", lambda outputs, references: {})
    evaluate = evaluate_e2e if "e2e" in name else evaluate_glue
    evaluate(model, tokenizer, config, folder)
    counts, slots = model.layers.counts, model.layers.slots
    many = len((folder / "predictions.tsv").read_text().splitlines()) - 1
    torch.testing.assert_close(share, 100 * counts / many)
    expected = torch.zeros(len(counts))
    expected[slots] = 100.0 * config["molex"]["top_k"]
    torch.testing.assert_close(share.sum(1), expected)
    chosen = (counts > 0).sum().item()
    assert chosen > len(slots) * config["molex"]["top_k"], "batches should not all choose alike"


def test_counts_of_alpaca_are_those_of_answering_every_dev_prompt(tmp_path):
    rows = [dict(instruction=f"Name {n} pubs.", input="near " * (n % 9), output="$7, $8; " * 40)
            for n in range(200)]  # fmt: skip
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    flags = ["--model", "nano/gpt2", "--task", "alpaca", "--data", str(tmp_path / "alpaca.json")]
    folder = make_run(tmp_path / "run", *flags)
    model, tokenizer, config = load_run(folder, CPU)
    dev = encode_alpaca(tokenizer, read_alpaca(config["data"], "dev"), 256)
    generate(model, tokenizer, [e.prompt for e in dev], config["eval_batch"], max_new_tokens=1)
    assert model.layers.counts.sum(1).tolist() == [20] * 8
    torch.testing.assert_close(figure2.routes(folder, CPU), 100 * model.layers.counts / 20)


def test_thirds_by_hand():
    share = torch.zeros(8, 8)  # 0-2 are early, 3-5 middle, 6-7 later
    share[0, 2], share[1, 3], share[2, 5], share[7, 7], share[3, 6] = 20, 40, 60, 50, 30
    assert figure2.thirds(share) == (pytest.approx([10, 50, 40]), pytest.approx(25))
    assert figure2.thirds(torch.eye(12)) == (pytest.approx([100 / 3] * 3), pytest.approx(100))


def test_picture(monkeypatch, tmp_path):
    """x is the slot, y the layer; thirds lie between layers; a name says which folder it is in."""
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    share = torch.zeros(8, 8)
    share[6, 2], share[6, 3], share[1, 1] = 75, 25, 100
    many = {Path(f"some/where/runs{n}/r"): share for n in range(5)}
    figure2.draw(many, tmp_path / "new" / "routes.png")
    panels = [p for p in pyplot.gcf().axes if p.images]
    pyplot.close("all")
    assert [p.get_title() for p in panels] == [f"runs{n}\nr" for n in range(5)]
    (image,) = panels[4].images
    shown = image.get_array()
    assert (shown[2, 6], shown[3, 6], shown[1, 1], shown[6, 2]) == (75, 25, 100, 0)
    assert image.origin == "lower" and panels[4].get_xlabel() == "slot t"
    lines = [line.get_data() for line in panels[4].lines]
    assert sorted(float(y[0]) for x, y in lines if [*x] == [0, 1]) == [2.5, 5.5]
    assert sorted(float(x[0]) for x, y in lines if [*y] == [0, 1]) == [2.5, 5.5]
    assert (tmp_path / "new" / "routes.png").exists()


def test_small_form(glue, tmp_path, monkeypatch):
    lines: list[str] = []
    few = [*figure2.SMALL, "--data", str(glue), "--epochs", "1"]
    monkeypatch.setattr(figure2, "SMALL", few)
    monkeypatch.setattr(figure2, "print", lines.append, raising=False)
    monkeypatch.setattr(sys, "argv", ["figure2_routes.py", "--out", str(tmp_path)])
    figure2.main()
    rows = [re.split(r"\s{2,}", line) for line in lines]
    rows = {r[0]: r[1:] for r in rows if "/" in r[0]}
    runs = [f"{tmp_path.name}/nano-roberta-{task}-molex-s0" for task in ("cola", "mrpc")]
    assert [key for key in rows if "png" not in key] == runs
    for cells in (rows[key] for key in runs):
        assert sum(map(int, cells[:3])) == pytest.approx(100, abs=2)
    assert (tmp_path / "routes.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_paper_says():
    text = need_shared("paper/molex-paper.txt").read_text("utf-8")
    assert "CoLA, layer 9 mixes with layer 2, 100% of the time" in text
    assert "for QQP and MNLI, there is a heavy emphasis on the middle layers" in text
    assert (
        "MRPC, a similar task on sentences instead of questions, it mainly chooses the earlier"
        in text
    )


def test_a_run_without_molex(glue, tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path / "run", *RUNS["cola"], "--data", str(glue), "--no-molex")
    monkeypatch.setattr(sys, "argv", ["figure2_routes.py", str(folder)])
    with pytest.raises(SystemExit) as stop:
        command_line(figure2.main)
    assert stop.value.code == 2
    assert re.fullmatch("error: .* without MoLEx: .*\n", capsys.readouterr().err)
