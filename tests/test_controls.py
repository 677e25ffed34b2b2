"""experiments/controls.py: each arm is what it says, Eq. 4 written out, the table, what is kept.

pytest tests/test_controls.py
"""

import json
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from conftest import call, printed_by
from safetensors.torch import load_file

import eval as evaluation
import train
from eval import dev_loss, load_run
from experiments import controls
from lora import add_lora
from model import load
from molex import MoLExConfig, upcycle
from support.files import InputError, locate
from support.tables import interval

CPU = torch.device("cpu")
TRAINED = ["lora", "molex", "frozen", "neighbour", "lora-long"]
EVALUATED = ["own", "lora-gate", "lora-neighbour"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A part of nano/e2e, and in out/ what two seeds of some arms make of it."""
    folder = tmp_path_factory.mktemp("controls")
    for name, rows in (("trainset", 13), ("devset", 9), ("testset_w_refs", 9)):
        lines = (locate("nano/e2e") / f"{name}.csv").read_text("utf-8").splitlines()
        (folder / f"{name}.csv").write_text("\n".join(lines[:rows]), "utf-8")
    (folder / "table.txt").write_text("\n".join(run(folder)))
    return folder


def run(folder: Path, *flags: str) -> list[str]:
    """The lines that it prints."""
    shared = ["--data", folder, "--out", folder / "out", "--arms", *TRAINED, *EVALUATED,
              "--max-steps", 3, "--warmup", 1, "--batch-size", 4, "--beams", 2,
              "--max-new-tokens", 3, "--seeds", 0, 1]  # fmt: skip
    return printed_by(controls, *shared, *flags)


def scores(small: Path, arm: str, seed: int = 0) -> dict[str, float]:
    return json.loads((small / "out" / arm / f"s{seed}" / "controls.json").read_text())


def evaluated(small: Path, arm: str, change=lambda model: None) -> float:
    """The dev loss of seed 0's run, changed."""
    model, tokenizer, config = load_run(small / "out" / arm / "s0", CPU)
    change(model)
    s = train.parse(["--data", str(small)])[1][0]
    dev = train.read_data(s, tokenizer, 512)[1]["dev"]
    return dev_loss(model, dev, config.eval_batch)


def test_picks():
    for seed in range(20):
        assert [controls.own(4, seed)(t) for t in range(4)] == [0, 1, 2, 3]
        assert [controls.neighbour(4, seed)(t) for t in range(4)] == [1, 2, 3, 2]
        fixed = controls.permutation(5, seed)
        layers = [fixed(t) for t in range(5)]
        assert sorted(layers) == [*range(5)] and all(j != t for t, j in enumerate(layers))
        pick, again = controls.draw(5, seed), controls.draw(5, seed)
        drawn = [pick(2) for _ in range(99)]
        assert {*drawn} == {0, 1, 3, 4} and drawn == [again(2) for _ in range(99)]
    assert len({controls.permutation(5, seed)(0) for seed in range(20)}) > 1


def test_a_given_layer_has_all_the_weight_of_eq_4(checkpoint):
    model = add_lora(load(checkpoint("gpt2")), 2, 4)
    upcycle(model, MoLExConfig(alpha=0.7))
    controls.give(model, controls.ARMS["neighbour"], 0)
    ids, z = torch.randint(97, (2, 9)), []
    for block in model.layers.blocks:
        block.register_forward_hook(lambda _, args, out: z.append((args[0], out)))
    model(ids).sum().backward()
    assert all(p.grad is None for p in model.layers.gates.parameters())
    assert model.layers.routes.counts.tolist() == [[0, 2, 0], [0, 0, 2], [0, 2, 0]]
    for t in range(2):  # calls come in pairs: the slot's own layer, then the other
        (start, own), (_, other) = z[2 * t : 2 * t + 2]
        expected = start + 0.7 * (own - start) + 0.3 * (other - start)
        torch.testing.assert_close(z[2 * t + 2][0], expected)


def test_a_model_of_one_layer_has_none_to_give(checkpoint):
    model = load(checkpoint("gpt2"))
    del model.layers.blocks[1:]
    model.config = replace(model.config, n_layer=1)
    upcycle(model, MoLExConfig())
    for arm in ("random", "neighbour", "permutation"):
        with pytest.raises(InputError, match="one layer has no other"):
            controls.give(model, controls.ARMS[arm], 0)
    assert controls.give(model, controls.ARMS["own"], 0) is model


def test_random_draws_for_every_batch(checkpoint):
    model = upcycle(load(checkpoint("gpt2")), MoLExConfig())
    controls.give(model, controls.ARMS["random"], 0)
    for _ in range(40):
        model(torch.zeros(1, 4, dtype=torch.long))
    assert (model.layers.routes.counts.fill_diagonal_(1) > 0).all()


def test_arms_by_flags():
    def parsed(arm: str) -> train.Settings:
        flags = controls.ARMS[arm].flags.split()
        return train.parse(["--model", "nano/gpt2", *flags])[1][0]

    paper = parsed("molex")
    for arm, name, value in [("prob", "gate_weight", "prob"), ("sequence", "route", "sequence"),
                             ("alpha-0.5", "alpha", 0.5), ("alpha-0.99", "alpha", 0.99),
                             ("learned", "learn_alpha", True)]:  # fmt: skip
        assert parsed(arm).molex == replace(paper.molex, **{name: value})
        assert replace(parsed(arm), molex=paper.molex, differs={}) == paper


def test_trained_arms(small):
    first = {arm: small / "out" / arm / "s0" for arm in TRAINED}
    logs = {arm: (folder / "metrics.jsonl").read_text() for arm, folder in first.items()}
    steps = {arm: json.loads(log.splitlines()[-1])["step"] for arm, log in logs.items()}
    assert steps == dict.fromkeys(TRAINED, 3) | {"lora-long": 6}
    gate = {
        arm: load_file(first[arm] / "adapter.safetensors")["layers.gates.0.weight"]
        for arm in TRAINED
        if not arm.startswith("lora")
    }
    s = train.parse(["--model", "nano/gpt2", "--data", str(small)])[1][0]
    start = train.prepare(s, CPU)[0].layers.gates[0].weight
    assert gate["frozen"].equal(start) and gate["neighbour"].equal(start)
    assert not gate["molex"].equal(start)
    assert scores(small, "neighbour")["own"] == 0 and scores(small, "molex")["alpha"] == 0.95
    assert len({scores(small, arm)["dev_loss"] for arm in TRAINED}) == len(TRAINED)
    assert scores(small, "molex")["dev_loss"] == evaluated(small, "molex")


def test_evaluated_arms(small):
    lora = load_file(small / "out" / "lora" / "s0" / "adapter.safetensors")
    molex = load_file(small / "out" / "molex" / "s0" / "adapter.safetensors")

    def alone(model) -> None:  # MoLEx's LoRA, in a model without MoLEx
        model.load_state_dict({n: molex[n] for n in lora}, strict=False)

    def mixed(model) -> None:  # LoRA's LoRA, with MoLEx's gate
        model.load_state_dict(lora, strict=False)

    def next_to(model) -> None:
        mixed(model)
        controls.give(model, controls.ARMS["neighbour"], 0)

    assert scores(small, "own")["dev_loss"] == evaluated(small, "lora", alone)
    assert scores(small, "own")["own"] == 100
    assert scores(small, "lora-gate")["dev_loss"] == evaluated(small, "molex", mixed)
    assert scores(small, "lora-neighbour")["dev_loss"] == evaluated(small, "molex", next_to)
    assert not (small / "out" / "own" / "s0" / "adapter.safetensors").exists()


def test_table_and_picture(small):
    lines = (small / "table.txt").read_text().splitlines()
    rows = {x.split()[0]: re.split(r"\s{2,}", x) for x in lines if x.startswith(("lora", "own"))}
    for arm in ("lora-long", "own"):
        losses = [scores(small, arm, seed)["dev_loss"] for seed in (0, 1)]
        gains = [x - scores(small, "lora", seed)["dev_loss"] for seed, x in enumerate(losses)]
        half = interval(gains)
        cells = [f"{mean(losses):.4f} ± {stdev(losses):.4f}", f"{mean(gains):+.4f} ± {half:.4f}"]
        assert rows[arm][1] == "2" and rows[arm][4:6] == cells
    assert rows["own"][6:] == ["100", "0.950"]  # no time: it trains nothing
    assert rows["lora-long"][7:] == ["100", "1.000"]
    assert (small / "out" / "alpha.png").stat().st_size > 10_000


def test_what_is_finished_is_kept(small, monkeypatch):
    monkeypatch.setattr(train, "fit", None)
    table = (small / "table.txt").read_text().splitlines()
    start = table.index(next(x for x in table if "BLEU" in x))
    assert run(small)[1:] == table[start:]
    for file in ("lora/s1", "molex/s0"):
        (small / "out" / file / "controls.json").rename(small / file.replace("/", "-"))
    part = {x.split()[0]: x.split()[1] for x in run(small, "--report") if "0." in x}
    assert (part["lora"], part["molex"], part["own"]) == ("1", "1", "2")
    for file in ("lora/s1", "molex/s0"):
        (small / file.replace("/", "-")).rename(small / "out" / file / "controls.json")


@pytest.mark.parametrize("arm", ["lora", "neighbour", "own", "lora-gate"])
def test_what_was_made_of_other_files_is_not_kept(small, failure, arm):
    data = small / "testset_w_refs.csv"
    before = data.read_text("utf-8")
    data.write_text(before.replace(" is ", " is not "), "utf-8")
    others = [x for x in [*TRAINED, *EVALUATED] if x != arm]
    try:
        for other in others:
            for seed in (0, 1):
                file = small / "out" / other / f"s{seed}" / "origin.json"
                file.rename(file.with_suffix(".off"))
                known = json.loads(file.with_suffix(".off").read_text())
                known["files"][data.name] = sha256(data.read_bytes()).hexdigest()
                file.write_text(json.dumps(known))
        error = failure(run, small)
    finally:
        data.write_text(before, "utf-8")
        for other in others:
            for seed in (0, 1):
                file = small / "out" / other / f"s{seed}" / "origin.json"
                file.with_suffix(".off").rename(file)
    assert f"{arm}/s0 was made of another testset_w_refs.csv; take another --out" in error


def test_a_run_whose_layers_were_given_is_not_evaluated_with_its_gate(small, failure):
    folder = small / "out/neighbour/s0"
    error = failure(call, evaluation, folder)
    assert f"{folder} is a run of Given, not of MoLEx; the script that trained it" in error


def test_a_report_says_what_is_of_other_settings(small):
    said = run(small, "--report", "--lr", "0.5")
    assert f"{small}/out/lora/s0 is of a run with another lr" in said
    assert not any("is of a run with another" in line for line in run(small, "--report"))


def test_what_the_flags_of_an_arm_do_not_fit_is_left_out(small, failure):
    flags = ["--data", small, "--out", small / "device", "--max-steps", 1, "--batch-size", 4]
    flags += ["--beams", 1, "--max-new-tokens", 2, "--proj-dim", 5]
    said = printed_by(controls, *flags, "--on-device", "--arms", "sequence", "molex")
    assert any(line.startswith("sequence is left out: --on-device needs one") for line in said)
    assert any(line.startswith("molex") for line in said)
    assert sum("--proj-dim has no effect here" in line for line in said) == 1
    error = failure(call, controls, *flags, "--on-device", "--route", "sequence")
    assert error.startswith("error: --on-device needs one choice")


def test_a_device_alone_is_the_small_form(tmp_path, failure):
    error = failure(call, controls, "--device", "cpu", "--report", "--out", tmp_path)
    assert error == f"error: {tmp_path}/small holds no finished run of lora"


def test_arms_that_need_another_layer_are_left_out_where_there_is_none(small, monkeypatch):
    read = controls.Config.load
    monkeypatch.setattr(controls.Config, "load", lambda name: replace(read(name), n_layer=1))
    said = run(small, "--report")
    assert "neighbour is left out: a model of one layer has no other to give" in said
    assert "lora-neighbour is left out: a model of one layer has no other to give" in said
    assert not any("left out" in line for line in said if line.startswith(("own", "lora-gate")))


@pytest.mark.parametrize("curve", [[], [{"step": 1, "loss_sum": 1.0}]])
def test_a_published_run_whose_log_lacks_the_gate_is_named(small, monkeypatch, failure, curve):
    s = train.parse(["--data", str(small), "--seeds", "7"])[1][-1]
    folder = small / "damaged/published/s7"
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"step": 3, "seconds_per_step": 1.0, "dev_loss": 2.0, "curve": curve}
    (folder / "metrics.jsonl").write_text(json.dumps(entry))
    monkeypatch.setattr(controls.as_published, "run", lambda *_: {})
    error = failure(controls.run, "published", s, small / "damaged", CPU)
    assert f"{folder}/metrics.jsonl has no point with a gate" in error


def test_an_arm_that_the_published_code_has_not_is_left_out(small):
    flags = ["--model", "nano/gpt2", "--data", small, "--out", small / "k2", "--top-k", 2]
    flags += ["--max-steps", 1, "--batch-size", 4, "--beams", 1, "--max-new-tokens", 2]
    said = printed_by(controls, *flags, "--arms", "molex", "published", "frozen")
    assert "published is left out: as published there is no --top-k" in said
    assert any(line.startswith("frozen") for line in said)


@pytest.mark.parametrize("flags, message", [
    (["--lr", "0.5"], r".*lora/s0 is of a run with another lr; take another --out, or remove it"),
    (["--fresh"], r"give one task, and no --fresh: .*"),
    (["--no-molex"], r".*not allowed with argument --no-molex"),
    (["--arms", "best"], r".*invalid choice: 'best'.*"),
    (["--report", "--out", "nowhere"], r"nowhere holds no finished run of lora"),
    (["--nonsense"], r".*unrecognized arguments: --nonsense"),
])  # fmt: skip
def test_bad_input(small, failure, flags, message):
    assert re.fullmatch(f"error: {message}", failure(run, small, *flags))
