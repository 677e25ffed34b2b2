"""experiments/speed.py: contenders start from the same weights; what it counts, on jobs whose
counts are known; every row in the table and in the JSON file. Nothing depends on how fast it is.

    pytest tests/test_speed.py
"""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from conftest import call

from experiments import speed
from experiments.speed import ALONE, GOALS, LORA, MOLEX, THEIRS
from support.files import InputError

CPU = torch.device("cpu")
SMALL = {  # SHAPES, smaller
    "gpt2": dict(model_type="gpt2", vocab_size=97, n_embd=32, n_layer=3, n_head=4,
                 bos_token_id=0, eos_token_id=0),
    "roberta": dict(model_type="roberta", vocab_size=97, hidden_size=32, num_hidden_layers=14,
                    num_attention_heads=4, intermediate_size=48, num_labels=2),
    "llama": speed.SHAPES["Llama-3.2-1B"]
    | dict(vocab_size=97, hidden_size=32, num_hidden_layers=14, num_attention_heads=4,
           num_key_value_heads=2, head_dim=8, intermediate_size=48),
}  # fmt: skip
TINY = ["--rounds", "2", "--batch", "2", "--prompts", "2", "--new-tokens", "3", "--fit", "1"]


@pytest.fixture
def run(tmp_path, capsys):
    """run(flags): what the command prints, and its JSON file if it wrote one."""

    def command(*flags: str) -> tuple[str, dict]:
        out = tmp_path / "deep" / "speed.json"
        call(speed, *TINY, "--out", out, *flags)
        return capsys.readouterr().out, json.loads(out.read_text()) if out.exists() else {}

    return command


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-5), ("bf16", 0.02)])
@pytest.mark.parametrize("family", SMALL)
def test_all_start_from_the_same_weights(tmp_path, family, precision, tolerance):
    folder = speed.random_checkpoint(SMALL[family], tmp_path)
    models = speed.contenders(folder, CPU, precision)
    slots = ["all 3"] if family == "gpt2" else ["12", "all 14"]
    assert [*models] == [THEIRS, LORA, *(f"LoRA + MoLEx, {n} slots" for n in slots)]
    batches, _ = speed.random_texts(models[LORA].model.config, 1, 3, 1)
    with torch.no_grad():
        losses = {name: one.loss(batches[0]) for name, one in models.items()}
        assert losses[THEIRS].item() == pytest.approx(losses[LORA].item(), rel=tolerance)
        ids = torch.randint(3, 97, (2, 8))
        a, b = (models[name].infer(ids).float() for name in (THEIRS, LORA))
        torch.testing.assert_close(a, b, rtol=tolerance, atol=10 * tolerance)
    for name in [*models][2:]:  # MoLEx with alpha = 1 is the LoRA model
        layers = models[name].model.layers
        with torch.no_grad():
            assert models[name].loss(batches[0]) != losses[LORA]
            layers.config = replace(layers.config, alpha=1.0)
            assert models[name].loss(batches[0]) == losses[LORA]
        layers.config = replace(layers.config, alpha=0.95)


@pytest.mark.parametrize("family", SMALL)
def test_steps_train_the_lora_and_leave_the_weights(tmp_path, family):
    models = speed.contenders(speed.random_checkpoint(SMALL[family], tmp_path), CPU, "float32")
    batches, _ = speed.random_texts(models[LORA].model.config, 1, 3, 1)
    for name, one in models.items():
        optimizer = one.optimizer()
        trained = [p for p in one.model.parameters() if p.requires_grad]
        assert [p for group in optimizer.param_groups for p in group["params"]] and all(
            any(p is q for q in trained) for g in optimizer.param_groups for p in g["params"]
        )
        before = {n: p.clone() for n, p in one.model.state_dict().items()}
        one.model.train()
        one.step(optimizer, batches[0])
        assert all(optimizer.state[p]["exp_avg"].any() for p in trained[:2]), name
        assert all(p.equal(before[n]) for n, p in one.model.state_dict().items()), name


def test_table_and_json_have_every_row(run):
    out, made = run("--models", "nano/gpt2")
    rows = made["models"]["nano/gpt2"]["rows"]
    assert [*rows] == [THEIRS, ALONE, LORA, "LoRA + MoLEx, all 8 slots"]
    for label, row in rows.items():
        keys = {"beam", "beam_tokens", "same"}
        if label != ALONE:
            keys |= {"training", "training_tokens", "inference", "inference_tokens", "loss",
                     "memory", "launches", "waits", "flop"}  # fmt: skip
        assert set(row) == keys and len(row["beam"]) == 2
        shown = re.findall(rf"^{re.escape(label)}  .*", out, re.M)
        assert len(shown) == (1 if label == ALONE else 2)
    assert rows[THEIRS]["loss"] == pytest.approx(rows[LORA]["loss"], rel=1e-5)
    assert rows[THEIRS]["same"] == rows[ALONE]["same"] == rows[LORA]["same"] == 2
    assert [*made["models"]["nano/gpt2"]["ratios"]] == [*GOALS]
    assert all(
        re.search(rf"^{re.escape(what)}.*(: met|: missed|no goal)", out, re.M) for what in GOALS
    )


def test_without_peft_its_rows_are_left_out(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    out, made = run()
    assert "not installed: peft" in out
    assert [*made["models"]["nano/gpt2"]["rows"]] == [LORA, "LoRA + MoLEx, all 8 slots"]
    assert made["models"]["nano/gpt2"]["rows"]["LoRA + MoLEx, all 8 slots"]["waits"] == 8
    rows = run("--on-device")[1]["models"]["nano/gpt2"]["rows"]
    assert [*rows] == [LORA, "LoRA + MoLEx, on device", "LoRA + MoLEx, all 8 slots"]
    assert rows["LoRA + MoLEx, on device"]["waits"] == rows[LORA]["waits"] == 0
    assert THEIRS not in out and "1.30 or more: not measured" in out


def test_without_transformers_its_shapes_are_left_out(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    out, made = run("--models", "random:roberta-base")
    assert "not installed: transformers (" in out and "random:roberta-base: skipped" in out
    assert not made


def test_an_encoder_writes_no_answers(run, monkeypatch):
    monkeypatch.setitem(speed.SHAPES, "roberta-base", SMALL["roberta"])
    out, made = run("--models", "random:roberta-base")
    rows = made["models"]["random:roberta-base"]["rows"]
    assert len(rows) == 4 and not any("beam" in row for row in rows.values())


def test_contenders_take_turns_and_the_first_round_is_left_out(monkeypatch):
    seen, clock = [], iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock) ** 2)
    jobs = {name: lambda r, name=name: seen.append(f"{name}{r}") for name in "ab"}
    seconds = speed.take_turns(jobs, 2, CPU, "test")
    assert seen == ["a0", "b0", "b0", "a0", "a1", "b1"]
    # to warm up the clock is read once for each; then job k lasts from (2k)^2 to (2k + 1)^2
    assert seconds == {"b": [5, 17], "a": [9, 13]}


def test_peak_memory_is_that_of_the_worst_moment():
    x = torch.ones(1000)

    def job() -> None:
        a = x + 1  # 4,000 bytes
        b = torch.cat([a, a])  # 8,000 more
        del a
        b.sum()

    for _ in range(2):
        assert 12_000 <= speed.peak_memory(job, CPU) < 12_100


def test_launches_and_waits_are_counted():
    x = torch.arange(6.0)
    with speed.Operations() as operations, speed.Lists() as lists:
        y = (x.view(2, 3).T + 1).flatten(0)  # an addition and a copy
        y.sum().item()
        y[y > 2]
        y.tolist()
    assert operations.launches == 5  # sum, the comparison and the index, too
    assert (operations.waits, lists.waits) == (2, 1)


def test_molex_counts_almost_twice_the_flop(tmp_path):
    models = speed.contenders(speed.random_checkpoint(SMALL["llama"], tmp_path), CPU, "float32")
    batches, _ = speed.random_texts(models[LORA].model.config, 1, 2, 1)
    theirs, lora, some, all_ = (speed.flop(one, batches[0]) for one in models.values())
    assert lora < theirs < 1.2 * lora  # they compute the logits of prompts and padding
    assert 1.7 < some / lora < all_ / lora < 2.2


def test_verdicts():
    def one(what: str, measured: list[float], name: str = "x", device: str = "cpu") -> str:
        return speed.verdict(what, measured, name, device, 1.88)

    training, molex = "LoRA over transformers + peft, training", f"{MOLEX}, time of a training step"
    assert one(training, [1.2, 1.4, 1.5]) == "1.30 or more: met"
    assert one(training, [1.2, 1.2, 1.5]) == "1.30 or more: missed"
    assert one(training, []) == "1.30 or more: not measured"
    assert one(molex, [1.9]) == "1.88 (its FLOP) or less: missed"
    assert one(molex, [1.9], device="cuda") == "no goal here"
    assert one(molex, [1.4], "random:gpt2-medium", "cuda") == "1.50 or less: met"


def test_what_the_user_can_put_right(run):
    with pytest.raises(InputError, match="random:gpt3 is none of random:gpt2-medium, random:rob"):
        run("--models", "random:gpt3")
