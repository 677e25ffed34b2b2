"""Tests of train.py: the paper's settings, the training step, runs that are killed, bad input.

They train nano/gpt2 on nano/e2e for a few steps.
"""

import csv
import hashlib
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import call, meteor, run_main
from portalocker import AlreadyLocked
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

import eval as evaluation
import train
from data import (
    E2E_TOKENIZED,
    Example,
    collate,
    e2e_prompt,
    encode_pairs,
    group_references,
    read_e2e,
)
from lora import trained_tensors
from model import Layers, Transformer
from molex import MoLExConfig
from support import runs
from support.files import InputError, locked, write_atomic, write_text
from support.pictures import plot_routes
from support.runs import RunFolder
from support.settings import PAPER, Settings
from support.tables import interval, spread
from train import graphed_step, make_optimizer, parse, prepare, train_step

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
# Decoding kept short where it is not what is tested.
SHORT = "--test-limit 5 --beams 2 --max-new-tokens 6"


def settings(flags: str = "", molex: bool = True) -> Settings:
    return parse(f"--model nano/gpt2 {flags}{'' if molex else ' --no-molex'}".split())[1][0]


def some_examples(tokenizer, count=12):
    return encode_pairs(tokenizer, read_e2e("nano/e2e", "train")[:: 2000 // count][:count], 256)


# ----------------------------------------------------------------------------------- the settings

TABLE_6 = {  # as the paper prints it -> ours
    "Weight Decay 0.01": ("weight_decay", 0.01),
    "Dropout Prob 0.1": ("lora_dropout", 0.1),
    "Batch Size 8": ("batch_size", 8),
    "# Epoch 5": ("epochs", 5),
    "Warmup Steps 500": ("warmup", 500),
    "Label Smooth 0.1": ("label_smoothing", 0.1),
    "Learning Rate 0.0002": ("lr", 0.0002),
    "Adaptation r_q = r_v = 4": ("lora_r", 4),
    "LoRA alpha 32": ("lora_alpha", 32),
    "Load Balance 0.01": ("load_balance", 0.01),
    "Beam Size 10": ("beams", 10),
    "Length Penalty 0.9": ("length_penalty", 0.9),
    "No Repeat Ngram Size 4": ("no_repeat_ngram", 4),
    "gate learning rate of 0.1": ("gate_lr", 0.1),
    "gate weight decay of 0.01": ("gate_weight_decay", 0.01),
}
TABLE_6_GATE = {
    "Gate Type Linear": ("gate", "linear"),
    "softmax activation": ("activation", "softmax"),
    "Layers with MoLEx 0 to 11 (inclusive)": ("layers", tuple(range(12))),
    "Indv Gate no": ("individual_gates", False),
    "Batch Agg Mode": ("vote", "mode"),
    "Mixing Weights Fixed": ("learn_alpha", False),
    "alpha = 0.95": ("alpha", 0.95),
    "K is set to 1": ("top_k", 1),
}


@pytest.fixture
def gpt2_medium(monkeypatch, tmp_path):
    """The hub, as far as the command line needs it."""
    config = dict(model_type="gpt2", vocab_size=50257, n_embd=1024, n_layer=24, n_head=16,
                  n_positions=1024, layer_norm_epsilon=1e-5)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path)
    )
    return asked


def test_defaults_are_table_6(gpt2_medium):
    args, runs = parse(["--model", "gpt2-medium", "--task", "e2e"])
    assert set(gpt2_medium) == {"gpt2-medium"} and len(runs) == 1
    for cell, (name, value) in TABLE_6.items():
        assert getattr(runs[0], name) == value, cell
    for cell, (name, value) in TABLE_6_GATE.items():
        assert getattr(runs[0].molex, name) == value, cell
    assert runs[0].data is None  # the hub's
    assert runs[0].name == "gpt2-medium-e2e-molex-s0"


def test_methods_and_seeds(gpt2_medium):
    base = ["--model", "gpt2-medium", "--task", "e2e"]
    assert [r.molex for r in parse([*base, "--no-molex"])[1]] == [None]
    runs = parse([*base, "--compare", "--seeds", "0", "3"])[1]
    names = ["lora-s0", "molex-s0", "lora-s3", "molex-s3"]
    assert [r.name for r in runs] == [f"gpt2-medium-e2e-{n}" for n in names]
    assert replace(runs[1], molex=None) == runs[0]  # nothing else differs
    runs = parse(["--seeds", "1", "1"])[1]
    assert [r.seed for r in runs] == [1, 1]  # LoRA and MoLEx: the same seed counts once
    runs = parse(["--task", "STS-B"])[1]
    assert {r.task for r in runs} == {"stsb"}
    runs = parse([])[1]
    assert [r.name for r in runs] == ["nano-gpt2-e2e-lora-s0", "nano-gpt2-e2e-molex-s0"]


def test_a_folder_is_the_same_however_the_shell_completes_it():
    for model, data in (("nano/gpt2/", "./nano/e2e"), ("./nano/gpt2", "nano/e2e/")):
        s = parse(["--model", model, "--data", data])[1][0]
        assert (s.model, s.data) == ("nano/gpt2", "nano/e2e")


@pytest.mark.parametrize("flag", ["--model", "--data", "--init-from"])
def test_an_empty_name_such_as_of_an_unset_variable_is_refused(flag):
    with pytest.raises(InputError, match=f"argument {flag}: it is empty"):
        parse([flag, ""])


@pytest.mark.parametrize("flag", ["cuda-graphs", "individual-gates", "learn-alpha"])
def test_a_switch_can_be_turned_off(flag):
    off, on = (parse([f"--{word}{flag}"])[1][1] for word in ("no-", ""))
    name = flag.replace("-", "_")
    values = [getattr(s if hasattr(s, name) else s.molex, name) for s in (off, on)]
    assert values == [False, True]


def test_every_setting_has_a_flag():
    flags = dict(
        epochs=7, max_steps=3, batch_size=2, accumulate=2, length_groups=3, lr=0.5,
        weight_decay=0.5, warmup=1,
        label_smoothing=0.5, dropout=0.5, max_length=99, lora_r=2, lora_alpha=3.0,
        lora_dropout=0.5, gate_lr=0.5, gate_weight_decay=0.5, load_balance=0.5, beams=3,
        length_penalty=0.5, no_repeat_ngram=2, max_new_tokens=9, eval_batch=3, test_limit=4,
        train_limit=6, dev_limit=7,
        tune="full", clip=0.5, adam_eps=0.5, beam_rule="lora", precision="bf16",
    )  # fmt: skip
    on = dict(cuda_graphs=True)
    gate = dict(gate="cosine", proj_dim=8, activation="sigmoid", vote="mean", top_k=2, alpha=0.5,
                gate_weight="prob", borrow_size="own", route="sequence")  # fmt: skip
    text = "".join(f" --{n.replace('_', '-')} {v}" for n, v in (flags | gate).items())
    text += " --molex-layers 2-3 --individual-gates --learn-alpha --cuda-graphs"
    s = settings(text)
    assert {n: getattr(s, n) for n in flags | on} == flags | on
    extra = dict(layers=(2, 3), individual_gates=True, learn_alpha=True, on_device=False)
    assert asdict(s.molex) == gate | extra
    fixed = {"model", "task", "data", "seed", "molex", "init", "shape", "differs"}
    assert asdict(s).keys() == flags.keys() | on.keys() | fixed
    quick = settings("--on-device --cuda-graphs")  # which changes no result
    assert quick.molex.on_device and not quick.differs


# ------------------------------------------------------------------------------------- one step


def test_loss_is_the_smoothed_mean_over_the_answers():
    s = settings("--lora-dropout 0", molex=False)
    model, tokenizer = prepare(s, CPU)
    examples = some_examples(tokenizer, 3)
    expected, tokens = 0.0, 0
    for e in examples:  # one by one, no padding, every logit computed
        ids = torch.tensor([e.prompt + e.answer])
        log_p = model(ids)[0, len(e.prompt) - 1 : -1].log_softmax(-1)
        target = torch.tensor(e.answer)
        nll, uniform = -log_p.gather(1, target[:, None]).sum(), -log_p.mean(1).sum()
        expected += 0.9 * nll + 0.1 * uniform
        tokens += len(e.answer)
    loss = train_step(model, make_optimizer(model, s, 10)[0], examples, s)
    assert loss.item() == pytest.approx(expected.item() / tokens, rel=1e-5)


def test_logits_only_where_there_is_a_target(monkeypatch):
    model, tokenizer = prepare(settings(molex=False), CPU)
    examples = some_examples(tokenizer, 4)
    rows = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda h: rows.append(h.shape) or logits(h))
    model.loss(collate(examples))
    assert rows == [(sum(len(e.answer) for e in examples), model.config.d_model)]


@pytest.mark.parametrize("molex", [False, True])
def test_bf16_rounds_the_products_and_nothing_that_is_trained(molex):
    losses, trained = {}, {}
    for precision in ("float32", "bf16"):
        s = settings(f"--precision {precision} --lora-dropout 0 --warmup 1", molex)
        model, tokenizer = prepare(s, CPU)
        optimizer, schedule = make_optimizer(model, s, 9)
        losses[precision] = []
        for _ in range(3):
            losses[precision].append(train_step(model, optimizer, some_examples(tokenizer, 5), s))
            schedule.step()
        trained[precision] = trained_tensors(model)
        assert {p.dtype for p in trained[precision].values()} == {torch.float32}
        held = model.layers.blocks[0].attn.q.base.weight.dtype
        assert held == (torch.bfloat16 if precision == "bf16" else torch.float32)
    for exact, rounded in zip(*losses.values(), strict=True):
        assert exact != rounded and abs(exact - rounded) < 0.01 * exact
    for n, p in trained["float32"].items():  # the same way, but for what rounding turns
        if ".B" in n:
            both = torch.stack([p, trained["bf16"][n]]).flatten(1)
            assert torch.cosine_similarity(*both, dim=0) > 0.95, n


def test_an_unknown_precision_is_not_taken_for_float32():
    model, tokenizer = prepare(settings(molex=False), CPU)
    model.precision = "fp16"
    with pytest.raises(InputError, match="precision is 'fp16', not bf16 or float32"):
        evaluation.dev_loss(model, some_examples(tokenizer), 4)


def test_micro_batches_add_up_to_the_batch():
    after = []
    for accumulate in (1, 3):
        s = settings(f"--lora-dropout 0 --accumulate {accumulate}", molex=False)
        model, tokenizer = prepare(s, CPU)
        # not Adam, which makes a whole step of a gradient that is next to nothing but rounding
        optimizer = torch.optim.SGD(trained_tensors(model).values(), lr=0.1)
        for _ in range(3):
            train_step(model, optimizer, some_examples(tokenizer), s)
        after.append(trained_tensors(model))
    for name in after[0]:
        torch.testing.assert_close(after[0][name], after[1][name], atol=1e-6, rtol=1e-4)


def test_gate_has_its_own_parameter_group():
    s = settings("--learn-alpha --lr 0.003 --gate-lr 0.2 --gate-weight-decay 0.03")
    model, _ = prepare(s, CPU)
    optimizer, _ = make_optimizer(model, s, 100)
    groups = {(g["initial_lr"], g["weight_decay"]): g["params"] for g in optimizer.param_groups}
    lora, gate, alpha = groups[0.003, 0.01], groups[0.2, 0.03], groups[0.2, 0.0]
    T, D = model.config.n_layer, model.config.d_model
    assert sum(p.numel() for p in gate) == T * D + T
    assert [p is model.layers.alpha_logit for p in alpha] == [True]  # decay would pull it to 1/2
    assert sum(p.numel() for p in lora) == T * 2 * 2 * D * s.lora_r


@pytest.mark.parametrize("warmup, steps", [(4, 12), (0, 5), (0.06, 40), (1, 1), (500, 20)])
def test_the_learning_rate_is_transformers_at_every_step(warmup, steps):
    s = settings(f"--warmup {warmup} --lr 1.0", molex=False)
    model, _ = prepare(s, CPU)
    optimizer, schedule = make_optimizer(model, s, steps)
    other = torch.optim.AdamW(model.layers.parameters(), lr=1.0)
    warm = math.ceil(warmup * steps) if warmup < 1 else warmup  # as its Trainer does
    theirs = get_linear_schedule_with_warmup(other, warm, steps)
    for _ in range(steps):
        assert schedule.get_last_lr()[0] == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step(), other.step(), schedule.step(), theirs.step()


def test_lora_starts_the_same_with_and_without_molex():
    with_molex, without = (trained_tensors(prepare(settings(molex=m), CPU)[0]) for m in (1, 0))
    assert without.keys() < with_molex.keys()
    assert all(torch.equal(without[n], with_molex[n]) for n in without)


def test_the_load_balance_loss_trains_the_gate():
    """With the same data and start, its coefficient changes the gate's gradient and nothing of the
    reported loss."""
    moved, losses = [], []
    for coefficient in ("0.1", "5"):
        s = settings(f"--lora-dropout 0 --load-balance {coefficient}")
        model, tokenizer = prepare(s, CPU)
        optimizer, _ = make_optimizer(model, s, 10)
        losses.append(train_step(model, optimizer, some_examples(tokenizer), s))
        moved.append(optimizer.state[optimizer.param_groups[1]["params"][0]]["exp_avg"].clone())
    assert torch.equal(*losses) and not torch.allclose(*moved)


def test_an_empty_share_of_a_batch_counts_for_nothing():
    """A process without a sequence (2 processes, 1 sequence) still takes part, with zeros."""
    model, _ = prepare(settings(), CPU)
    loss = model.loss(collate([]), 0.1)
    loss.backward()
    assert loss.item() == 0
    for name, p in trained_tensors(model).items():
        assert p.grad is None or not p.grad.count_nonzero(), name
    assert not collate([]).mask.any() and len(Example([], [])) == 0


# ------------------------------------------------------------------------------------ CUDA graphs


def ten_steps(graphed: bool, device: torch.device) -> tuple[list[Tensor], Transformer]:
    """Losses of ten steps on batches of two sizes and many lengths, and the trained model. On the
    CPU a "graph" is the step itself, on the same fixed batch. In bf16, CUDA's default, what
    rounding does depends on the length that a batch is padded to: seen were 0.4% of a loss."""
    s = settings("--lora-dropout 0 --on-device --clip 0.5 --lr 1e-2 --precision float32")
    model, tokenizer = prepare(s, device)
    optimizer, schedule = make_optimizer(model, s, 10)
    step = graphed_step(model, optimizer, s) if graphed else None
    if graphed and device.type == "cpu":
        step.capture = lambda batch: lambda: step.step(batch)
    examples, losses = some_examples(tokenizer, 48), []
    for i in range(10):
        batch = examples[4 * i : 4 * i + 4 - (i % 5 == 4)]
        losses.append(step(batch) if step else train_step(model, optimizer, batch, s))
        schedule.step()
    if step:
        assert 1 < len(step.steps) < 10 and any(step.steps.values())
    return losses, model


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_graphed_steps_are_those_of_train_step(device):
    """Rounded lengths, targets that do not count, fixed buffers and the moving learning rate."""
    losses, model = ten_steps(False, torch.device(device))
    graphed, other = ten_steps(True, torch.device(device))
    torch.testing.assert_close(torch.stack(graphed), torch.stack(losses), rtol=1e-4, atol=1e-4)
    for name, p in trained_tensors(model).items():
        torch.testing.assert_close(trained_tensors(other)[name], p, rtol=1e-2, atol=1e-3)
    assert torch.equal(other.layers.routes.sums[0], model.layers.routes.sums[0])


# ------------------------------------------------------------------------------- runs, end to end


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """`--compare` as a user runs it: a process of its own, in a folder of its own."""
    out = tmp_path_factory.mktemp("compared")
    command = (
        f"{sys.executable} {ROOT / 'train.py'} --compare --max-steps 8 --test-limit 12 --beams 3"
    )
    done = subprocess.run(command.split(), cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_leaves_its_files(compared):
    out, stdout = compared
    common = ["adapter.safetensors", "config.json", "last.pt", "loss.png", "metrics.jsonl",
              "origin.json", "predictions.tsv", "references.txt", "samples.txt",
              "scores.json"]  # fmt: skip
    lora, molex = (out / f"runs/nano-gpt2-e2e-{m}-s0" for m in ("lora", "molex"))
    assert sorted(f.name for f in lora.iterdir()) == common
    assert sorted(f.name for f in molex.iterdir()) == sorted([*common, "routes.json", "routes.png"])
    assert (out / "runs/nano-gpt2-e2e-loss.png").stat().st_size > 10_000  # of the two
    for folder in (lora, molex):
        (entry,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        (point,) = entry["curve"]
        assert point["step"] == entry["step"] == 8
        assert point["loss_sum"] / 8 == pytest.approx(entry["train_loss"])
        assert ("affinity" in point) == (folder == molex)
    assert (molex / "samples.txt").read_text().count("reference:") == 5
    assert len((lora / "predictions.tsv").read_text().splitlines()) == 13
    extra = (
        load_file(molex / "adapter.safetensors").keys()
        - load_file(lora / "adapter.safetensors").keys()
    )
    assert extra == {"layers.gates.0.weight", "layers.gates.0.bias"}


def test_the_table_compares_the_two(compared):
    out, stdout = compared
    scores = [
        json.loads((out / f"runs/nano-gpt2-e2e-{m}-s0/scores.json").read_text())
        for m in ("lora", "molex")
    ]
    lines = stdout.splitlines()
    header = next(i for i, line in enumerate(lines) if "LoRA + MoLEx" in line)
    table = {line[:22].strip(): line[22:].split() for line in lines[header + 1 : header + 9]}
    T, D = 8, 128
    assert table["trainable parameters"][2] == f"+{T * D + T:,}"
    for name in ("BLEU", "METEOR", "ROUGE-L"):
        values = [100 * s[name.lower().replace("-", "_")] for s in scores]
        assert table[name][:2] == [f"{v:,.2f}" for v in values]
        assert float(table[name][2]) == pytest.approx(values[1] - values[0], abs=0.006)
    assert table["BLEU"][3:5] == ["p", "="] and 0 <= float(table["BLEU"][5]) <= 1
    assert float(table["seconds per step"][0]) > 0


def test_predictions_score_the_same_from_the_file(compared, capsys, tmp_path):
    """eval.py --predictions on what a run wrote gives what the run reported."""
    folder = compared[0] / "runs/nano-gpt2-e2e-molex-s0"
    outputs, references = folder / "predictions.tsv", folder / "references.txt"
    call(evaluation, "--predictions", outputs, "--references", references, "--json")
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    scores = json.loads((folder / "scores.json").read_text())
    assert again == {n: pytest.approx(scores[n], abs=1e-12) for n in again} and len(again) == 5
    assert len(references.read_text().split("\n\n")) == 12


def test_load_model_takes_a_run_or_a_pretrained_model_but_no_unfinished_run(compared, tmp_path):
    folder = compared[0] / "runs/nano-gpt2-e2e-molex-s0"
    trained, tokenizer = evaluation.load_model(folder, CPU)
    pretrained, other = evaluation.load_model("nano/gpt2", CPU)
    learned = load_file(folder / "adapter.safetensors")
    assert len(learned) == 34 and not trained.training
    for name, p in trained_tensors(trained).items():
        assert torch.equal(p, learned[name]), name
    assert isinstance(pretrained.layers, Layers)  # neither LoRA nor MoLEx
    assert tokenizer.encode("A pub.") == other.encode("A pub.")
    for name in ("config.json", "last.pt"):  # killed in its first epoch
        shutil.copy(folder / name, tmp_path)
    with pytest.raises(InputError, match="not a run with a finished epoch"):
        evaluation.load_model(tmp_path, CPU)


def test_a_finished_run_is_kept_and_a_changed_one_refused(compared, capsys):
    out = compared[0] / "runs"
    scores = out / "nano-gpt2-e2e-lora-s0/scores.json"
    before = scores.stat().st_mtime_ns
    flags = f"--model nano/gpt2 --no-molex --max-steps 8 --test-limit 12 --out {out} --beams"
    lock = out / ".nano-gpt2-e2e-lora-s0.lock"
    lock.touch()  # left by a kill after the last file
    run_main(flags, "3")
    assert not lock.exists()
    assert "finished before, kept" in capsys.readouterr().out
    assert scores.stat().st_mtime_ns == before
    with pytest.raises(InputError, match="another beams"):
        run_main(flags, "4")
    assert scores.stat().st_mtime_ns == before


@pytest.mark.parametrize("molex", [True, False])
def test_a_killed_run_resumes_bit_for_bit(monkeypatch, tmp_path, train_with_kills, molex):
    """Killed within an epoch and at its end, with dropout; 5 steps an epoch: none is lost or
    doubled."""
    monkeypatch.setattr("data.read_e2e", lambda data, split, *_: read_e2e(data, split)[:40])
    s = settings("--max-steps 13 --learn-alpha", molex)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.train(s, whole, CPU)
    train_with_kills(s, killed)
    one, other = (load_file(f / "adapter.safetensors") for f in (whole, killed))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    one, other = (torch.load(f / "last.pt", weights_only=True) for f in (whole, killed))
    assert all(torch.equal(one["tensors"][n], other["tensors"][n]) for n in one["tensors"])
    assert torch.equal(one["rng"], other["rng"])
    logs = [
        [dict(e, seconds_per_step=0) for e in state["progress"]["log"]] for state in (one, other)
    ]
    assert logs[0] == logs[1] and [e["epoch"] for e in logs[0]] == [1, 2, 3]


@pytest.mark.parametrize("name", ["adapter.safetensors", "metrics.jsonl", "last.pt"])
def test_a_kill_between_two_files_loses_nothing(monkeypatch, tmp_path, name):
    """Whichever file of the last epoch is the first not to be written, the next start makes up."""
    monkeypatch.setattr("data.read_e2e", lambda data, split, *_: read_e2e(data, split)[:16])
    s, rename = settings("--epochs 1"), os.replace

    def dies(source, target):
        if Path(target).name == name:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr("support.files.os.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        train.train(s, tmp_path, CPU)
    monkeypatch.setattr("support.files.os.replace", rename)
    train.train(s, tmp_path, CPU)
    assert (tmp_path / "adapter.safetensors").exists()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_training_and_decoding_see_the_same_prompts(monkeypatch, tmp_path):
    """The prompt under which an answer is learned is the one under which it is asked for."""
    monkeypatch.setattr("data.read_e2e", lambda data, split, *_: read_e2e(data, "train")[:8])
    monkeypatch.setattr(evaluation, "read_e2e", lambda data, split, *_: read_e2e(data, "train")[:8])
    learned, asked = set(), set()
    step, search = train.train_step, evaluation.beam_search
    monkeypatch.setattr(
        train,
        "train_step",
        lambda m, o, examples, s: (
            learned.update(tuple(e.prompt) for e in examples) or step(m, o, examples, s)
        ),
    )
    monkeypatch.setattr(
        evaluation,
        "beam_search",
        lambda m, prompts, *rest, **kw: (
            asked.update(map(tuple, prompts)) or search(m, prompts, *rest, **kw)
        ),
    )
    monkeypatch.setattr(evaluation, "e2e_scores", lambda *_: {})
    train.train(settings(f"--epochs 1 {SHORT}"), tmp_path, CPU)
    evaluation.evaluate_run(tmp_path, CPU)
    assert learned == asked and len(asked) > 1


def test_a_step_takes_so_many_batches_and_each_can_vote_for_itself(monkeypatch, tmp_path):
    """The other reading of the paper's batch size: that of one GPU of several."""
    steps, votes, loss = [], [], Transformer.loss
    s = settings("--batch-size 12 --accumulate 3 --max-steps 2")
    step = train.train_step
    monkeypatch.setattr(
        train, "train_step", lambda m, o, e, s: steps.append(len(e)) or step(m, o, e, s)
    )

    def vote(model, batch, *smoothing):
        votes.extend([len(batch.ids)] * model.training)
        return loss(model, batch, *smoothing)

    monkeypatch.setattr(Transformer, "loss", vote)
    train.train(s, tmp_path, CPU)
    assert steps == [12, 12] and votes == [4] * 6


def test_a_run_on_the_lora_papers_text(monkeypatch, capsys, tmp_path):
    """Trained, decoded and scored on it: --data with its three files is all it takes."""
    for split, name in E2E_TOKENIZED.items():
        pairs = read_e2e("nano/e2e", split)[:40]
        lines = [f"{e2e_prompt(mr)}||{ref.replace('-', ' - ')}\n" for mr, ref in pairs]
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    monkeypatch.setitem(
        PAPER["models"], "gpt2-medium", ["gpt2", 8, 128]
    )  # the paper's numbers beside
    monkeypatch.setattr(evaluation, "meteor", meteor)
    flags = f"--data {tmp_path} --max-steps 3 --batch-size 4 {SHORT} --out {tmp_path / 'runs'}"
    run_main("--model nano/gpt2", flags)
    out = capsys.readouterr().out
    lines = out.partition("Not as in the paper:")[2]
    assert re.search(r"BLEU .* 70\.7 ± \.4", out) and "max steps 3 (paper: none)" in lines
    assert "40 train examples (official data: 42,061)" in lines and "official text" not in lines
    assert "beam search as in transformers (paper, probably: --beam-rule lora)" in lines
    folder = tmp_path / "runs/nano-gpt2-e2e-molex-s0"
    table = (folder / "predictions.tsv").read_text("utf-8").splitlines()
    assert table[1].startswith("name : ") and len(table) == 6
    groups = zip(*group_references(read_e2e(tmp_path, "test")), strict=True)
    with open(tmp_path / "refs.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [("mr", "ref")] + [(mr, ref) for mr, group in [*groups][:5] for ref in group]
        )
    predictions, references = folder / "predictions.tsv", tmp_path / "refs.csv"
    call(evaluation, "--predictions", predictions, "--references", references, "--json")
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    scores = json.loads((folder / "scores.json").read_text())
    assert {n: scores[n] for n in again} == again


@pytest.mark.parametrize("point", [3, {"step": 1}, {"step": 1, "loss_sum": 0.5, "alpha": 0.9}])
def test_a_log_whose_curve_is_damaged_is_refused(tmp_path, point):
    entry = dict(step=1, dev_loss=0.5, curve=[dict(step=1, loss_sum=0.5), point])
    (tmp_path / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(InputError, match="metrics.jsonl"):
        RunFolder(tmp_path).read_log()


def test_the_best_epoch_by_dev_loss_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr("data.read_e2e", lambda data, split, *_: read_e2e(data, split)[:16])
    losses, seen = iter([2.0, 1.0, 1.5]), []

    def dev_loss(model, *_):
        seen.append({n: p.detach().clone() for n, p in trained_tensors(model).items()})
        return next(losses)

    monkeypatch.setattr(evaluation, "dev_loss", dev_loss)
    train.train(settings("--epochs 3"), tmp_path, CPU)
    kept = load_file(tmp_path / "adapter.safetensors")
    assert all(torch.equal(kept[n], seen[1][n]) for n in kept)
    assert not all(torch.equal(kept[n], seen[2][n]) for n in kept)


def test_dev_loss_is_the_mean_over_tokens():
    model, tokenizer = prepare(settings(molex=False), CPU)
    examples = some_examples(tokenizer, 5)
    expected = sum(
        F.cross_entropy(
            model.eval()(torch.tensor([e.prompt + e.answer]))[0, len(e.prompt) - 1 : -1],
            torch.tensor(e.answer),
            reduction="sum",
        ).item()
        for e in examples
    )
    tokens = sum(len(e.answer) for e in examples)

    def dev_loss(model: Transformer, examples: list[Example]) -> float:
        return evaluation.dev_scores(model, "e2e", {"dev": examples}, 2)["dev_loss"]

    for training in (True, False):
        model.train(training)
        assert dev_loss(model, examples) == pytest.approx(expected / tokens, rel=1e-5)
        assert model.training == training


def test_seeds_give_mean_and_deviation():
    assert spread([0.5, 0.7, 0.6], 100, 2) == "60.00 ± 10.00"
    assert spread([1234.0], 1, 0) == "1,234"


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_interval_of_a_mean_is_students(n):
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)).tolist()
    low, high = stats.t.interval(0.95, n - 1, loc=0, scale=stats.sem(values))
    assert interval(values) == pytest.approx((high - low) / 2, rel=2e-3)


@pytest.mark.parametrize("kind", ["buffer", "frozen"])
def test_a_gate_that_a_run_would_not_keep_is_refused(kind, tmp_path):
    s = settings()
    model, tokenizer = prepare(s, CPU)
    if kind == "buffer":
        model.layers.gates[0].register_buffer("R", torch.ones(3))
    else:
        model.layers.gates[0].bias.requires_grad_(False)
    examples = some_examples(tokenizer)
    name = "R" if kind == "buffer" else "bias"
    with pytest.raises(InputError, match=rf"layers\.gates\.0\.{name} is not trained"):
        train.fit(s, tmp_path, model, examples, {"dev": examples})
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_without_load_balance_the_gate_stays_as_drawn(tmp_path, processes):
    """Neither a missing gradient nor weight decay moves it, and that is said once."""
    flags = f"--model nano/roberta --task mrpc --load-balance 0 --max-steps 3 --out {tmp_path}"
    launch = "" if processes == 1 else "-m torch.distributed.run --standalone --nproc-per-node 2 "
    command = f"{sys.executable} {launch}{ROOT / 'train.py'} {flags} --clip 1 --dev-limit 40"
    done = subprocess.run(command.split(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "nano-roberta-mrpc-molex-s0"
    said = f"{folder.name}: without load balance nothing teaches the gate, which stays as drawn"
    assert done.stdout.count(said) == 1
    trained = load_file(folder / "adapter.safetensors")
    start = trained_tensors(prepare(evaluation.read_run(folder)[0], CPU)[0])
    gate = [name for name in trained if name.startswith("layers.gates")]
    assert gate and all(torch.equal(trained[name], start[name]) for name in gate)
    assert not torch.equal(trained["head.out.weight"], start["head.out.weight"])


@pytest.mark.parametrize("flags", ["--load-balance 0.01", "--gate-weight prob", "--top-k 2"])
def test_a_gate_that_is_taught_is_not_said_to_stay(flags, capsys):
    for balance in ("", "--load-balance 0 "):
        if "load" not in flags or not balance:
            prepare(settings(balance + flags), CPU)
    assert "stays as drawn" not in capsys.readouterr().out


def test_two_processes_equal_one(tmp_path):
    """torchrun on two CPU processes (gloo), 10 steps, votes and load balance included: the same
    tensors as one process to 1e-5. The last batch of an epoch leaves one process without work."""
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("trainset", 33), ("devset", 8), ("testset_w_refs", 8)):
        lines = (ROOT / f"nano/e2e/{split}.csv").read_text().splitlines(keepends=True)
        (data / f"{split}.csv").write_text("".join(lines[: count + 1]))
    script = tmp_path / "train_quickly.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import eval, train\nfrom conftest import meteor\n"
        "eval.meteor = meteor\ntrain.main()\n"
    )
    flags = (
        f"{script} --model nano/gpt2 --data {data} --max-steps 10 --lora-dropout 0"
        f" --learn-alpha {SHORT} --out {tmp_path}/"
    )
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2"
    commands = {
        "one": f"{sys.executable} {flags}one",
        "two": f"{sys.executable} {torchrun} {flags}two",
    }
    tensors = []
    for name, command in commands.items():
        done = subprocess.run(command.split(), capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / name / "nano-gpt2-e2e-molex-s0"
        tensors.append(torch.load(folder / "last.pt", weights_only=True))
    one, two = tensors
    assert one["progress"]["step"] == two["progress"]["step"] == 10
    for name, p in one["tensors"].items():
        torch.testing.assert_close(p, two["tensors"][name], atol=1e-5, rtol=0, msg=name)
    logs = [state["progress"]["log"][0] for state in (one, two)]
    assert logs[1]["train_loss"] == pytest.approx(logs[0]["train_loss"], abs=1e-5)
    points = [log["curve"][-1] for log in logs]
    for name in ("changed", "own", "affinity", "balance"):
        assert points[1][name] == pytest.approx(points[0][name], abs=1e-5), name
    gate = one["tensors"]["layers.gates.0.weight"]
    start = trained_tensors(prepare(settings("--learn-alpha"), CPU)[0])["layers.gates.0.weight"]
    assert (gate - start).abs().max() > 0.05  # far enough for the test to mean something


def test_processes_that_end_right_after_a_sum_do_not_hang():
    """Twenty groups one after the other. In torch 2.6 one of the first few hung, unless gloo's
    thread had been given the time to let go of what was added up."""
    script = (
        "import os, torch\n"
        "from support.processes import sum_over_processes, torchrun\n"
        "for group in range(20):\n"
        f"    os.environ['MASTER_PORT'] = str({20_000 + os.getpid() % 10_000} + group)\n"
        "    with torchrun(torch.device('cpu')):\n"
        "        x = torch.ones(6)\n"
        "        sum_over_processes(x)\n"
        "    assert x.sum() == 12\n"
    )
    processes = []
    for rank in "01":
        names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="localhost")
        command = [sys.executable, "-c", script]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | names))
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


# ------------------------------------------------------------------------- runs that can be trusted


class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL does: nothing handles it."""


@pytest.fixture
def short(monkeypatch):
    """Two steps an epoch, and no METEOR."""
    for module in ("data", "train", "eval"):
        monkeypatch.setattr(
            f"{module}.read_e2e", lambda data, split, *_: read_e2e(data, split)[:16]
        )
    names = ("bleu", "nist", "meteor", "rouge_l", "cider")
    monkeypatch.setattr(evaluation, "e2e_scores", lambda *_: dict.fromkeys(names, 0.5))


def stop_in_step(monkeypatch, n: int, stop) -> None:
    """Call `stop` in the n-th call of train_step from now on, when its work is done."""
    step, calls = train.train_step, []

    def train_step(*args):
        calls.append(step(*args))
        return stop(*args) if len(calls) == n else calls[-1]

    monkeypatch.setattr(train, "train_step", train_step)


def kill(*_):
    raise Killed


def command(folder: Path, flags: str = "") -> str:
    return f"--model nano/gpt2 --no-molex --epochs 3 {SHORT} --out {folder} {flags}"


def killed_run(monkeypatch, out: Path, flags: str = "") -> Path:
    """The folder of a run that is killed in its second epoch."""
    with monkeypatch.context() as m:
        stop_in_step(m, 3, kill)
        with pytest.raises(Killed):
            run_main(command(out, flags))
    return out / "nano-gpt2-e2e-lora-s0"


def test_an_unfinished_run_is_scored_but_not_marked(short, monkeypatch, tmp_path, capsys):
    folder = killed_run(monkeypatch, tmp_path)
    before = sorted(folder.iterdir())
    call(evaluation, folder)
    said = capsys.readouterr().out
    assert "unfinished, 2 of 6 steps" in said and "BLEU" in said
    assert sorted(folder.iterdir()) == sorted([*before, folder / "unfinished"])
    run_main(command(tmp_path))
    assert "resumed" in capsys.readouterr().out
    assert torch.load(folder / "last.pt", weights_only=True)["progress"]["step"] == 6
    assert (folder / "scores.json").exists()


def test_a_loss_that_is_not_finite_names_its_step(short, monkeypatch, failure, tmp_path):
    """Not only where losses are looked at: the third step of an epoch of two."""
    stop_in_step(monkeypatch, 3, lambda *_: torch.tensor(math.nan))
    error = failure(run_main, command(tmp_path))
    assert "step 3 (batch 1 of epoch 2)" in error and "--lr" in error
    folder = tmp_path / "nano-gpt2-e2e-lora-s0"
    assert torch.load(folder / "last.pt", weights_only=True)["progress"]["step"] == 2
    assert not (folder / "scores.json").exists()


def test_weights_that_are_not_finite_are_not_saved(short, monkeypatch, failure, tmp_path):
    def spoil(model, *_):
        next(iter(trained_tensors(model).values())).data[0, 0] = math.inf
        return torch.tensor(1.0)

    stop_in_step(monkeypatch, 4, spoil)
    assert "step 4 (batch 2" in failure(run_main, command(tmp_path))
    folder = tmp_path / "nano-gpt2-e2e-lora-s0"
    assert torch.load(folder / "last.pt", weights_only=True)["progress"]["step"] == 2


def test_a_learning_rate_beyond_reason_ends_in_one_line(short, failure, tmp_path):
    flags = "--lr 1e6 --warmup 1 --epochs 15"
    error = failure(run_main, command(tmp_path, flags))
    assert "no finite loss or weights" in error


def test_the_origin_of_a_run_is_recorded(short, monkeypatch, tmp_path):
    folder = killed_run(monkeypatch, tmp_path)
    origin = json.loads((folder / "origin.json").read_text())
    files = [ROOT / "nano/gpt2" / n for n in ("config.json", "vocab.json", "merges.txt")]
    files += [ROOT / "nano/gpt2/model.safetensors"]
    files += [ROOT / "nano/e2e" / f"{n}.csv" for n in ("trainset", "devset", "testset_w_refs")]
    assert origin["files"] == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    assert origin["versions"]["torch"] == torch.__version__
    assert origin["command"].startswith("train.py --model nano/gpt2")
    assert datetime.fromisoformat(origin["date"]).tzinfo is not None
    assert origin["settings"] == json.loads((folder / "config.json").read_text())
    assert torch.load(folder / "last.pt", weights_only=True)["origin"] == origin


@pytest.mark.parametrize("name", ["data/devset.csv", "model/merges.txt"])
def test_other_data_or_another_checkpoint_stop_a_resumption(
    short, monkeypatch, failure, tmp_path, name
):
    shutil.copytree(ROOT / "nano/gpt2", tmp_path / "model")
    shutil.copytree(ROOT / "nano/e2e", tmp_path / "data")
    flags = f"--model {tmp_path / 'model'} --data {tmp_path / 'data'}"
    flags = command(tmp_path / "runs", flags)
    with monkeypatch.context() as m:
        stop_in_step(m, 3, kill)
        with pytest.raises(Killed):
            run_main(flags)
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text.rstrip("\n"))
    error = failure(run_main, flags)
    assert f"another {Path(name).name};" in error and "--fresh" in error
    with monkeypatch.context() as m:
        m.setattr(train, "fit", lambda *_: None)
        m.setattr(train, "evaluate_run", kill)
        with pytest.raises(Killed):  # --fresh starts anew
            run_main(flags, "--fresh")
    assert not [*(tmp_path / "runs").glob("*/last.pt")]


def test_what_was_changed_and_put_back_resumes_and_versions_are_told(
    short, monkeypatch, tmp_path, capsys
):
    killed_run(monkeypatch, tmp_path)
    monkeypatch.setattr(runs.platform, "python_version", lambda: "4.0")
    run_main(command(tmp_path))
    assert "python was 3." in (said := capsys.readouterr().out) and "is now 4.0" in said


@pytest.mark.parametrize("how", ["no config.json", "another run's config.json"])
def test_a_state_is_never_taken_for_another_runs(short, monkeypatch, failure, tmp_path, how):
    folder = killed_run(monkeypatch, tmp_path)
    (folder / "config.json").unlink()
    if how != "no config.json":
        config = asdict(settings(f"--epochs 3 {SHORT} --lr 0.5", molex=False))
        (folder / "config.json").write_text(json.dumps(config))
    flags = command(tmp_path, "" if how == "no config.json" else "--lr 0.5")
    before = (folder / "last.pt").read_bytes()
    error = failure(run_main, flags)
    assert "last.pt is of a run with another" in error and "--fresh" in error
    assert (folder / "last.pt").read_bytes() == before


def test_a_kill_while_an_old_run_is_removed_leaves_none_of_it(short, monkeypatch, tmp_path):
    folder = killed_run(monkeypatch, tmp_path)

    def dies(path, **_):
        if Path(path).exists():
            (Path(path) / "config.json").unlink()
            raise Killed

    with monkeypatch.context() as m:
        m.setattr(runs.shutil, "rmtree", dies)
        with pytest.raises(Killed):
            run_main(command(tmp_path), "--fresh")
    assert not folder.exists()
    run_main(command(tmp_path, "--fresh --lr 0.5"))
    assert json.loads((folder / "scores.json").read_text())["step"] <= 6
    assert [f.name for f in tmp_path.iterdir()] == [folder.name]  # and no rest of the old one


def test_bad_input_removes_no_run(short, monkeypatch, failure, tmp_path):
    folder = killed_run(monkeypatch, tmp_path)
    failure(run_main, command(tmp_path), "--fresh --max-length 2")
    assert (folder / "last.pt").exists()


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_a_second_process_is_told_of_the_first(short, failure, tmp_path, script):
    flags = command(tmp_path, "--epochs 1")
    folder = tmp_path / "nano-gpt2-e2e-lora-s0"
    started = (run_main, flags)
    if script == "eval.py":
        run_main(flags)
        started = (call, evaluation, folder)
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(folder,))
    holder.start()
    lock = tmp_path / f".{folder.name}.lock"
    while not (lock.exists() and lock.read_text()):
        assert holder.is_alive()
        time.sleep(0.01)
    assert f"is in use by process {holder.pid}" in failure(*started)
    holder.kill()  # and the system ends the lock
    holder.join()
    started[0](*started[1:])
    assert not [*tmp_path.glob(".*")]


@pytest.mark.parametrize("text", [None, ""])
def test_a_lock_whose_holder_has_just_ended_is_still_one_line(monkeypatch, tmp_path, text):
    """Its file may be gone, or not yet written, when it is read for the message."""

    def taken(lock):
        Path(lock.filename).unlink(missing_ok=True)
        if text is not None:
            Path(lock.filename).write_text(text)
        raise AlreadyLocked

    monkeypatch.setattr("portalocker.TemporaryFileLock.acquire", taken)
    with pytest.raises(InputError, match="run is in use by another process; wait for its end"):
        with locked(tmp_path / "run"):
            pass


def hold(folder: Path) -> None:
    with locked(folder):
        time.sleep(60)


@pytest.mark.parametrize("out", ["file", "file/below", "runs"])
def test_no_folder_where_a_file_is(short, failure, tmp_path, out):
    (tmp_path / "file").write_text("text")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/nano-gpt2-e2e-lora-s0").write_text("text")
    error = failure(run_main, command(tmp_path / out))
    assert str(tmp_path / out) in error and "cannot be" in error
    assert (tmp_path / "file").read_text() == "text"


@contextmanager
def room(size: int):
    """No file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "a" * 100_000),
        lambda path: write_atomic(path, lambda p: torch.save(dict(a=torch.ones(50_000)), p)),
        lambda path: write_atomic(path, lambda p: save_file(dict(a=torch.ones(50_000)), p)),
        lambda path: plot_routes({"a": torch.rand(40, 40)}, path),
    ],
)
def test_a_full_disk_leaves_the_old_file_and_no_other(failure, tmp_path, write):
    path = tmp_path / "file"
    path.write_text("old")
    with room(5000):
        error = failure(lambda: write(path))
    assert f"{path} cannot be written" in error
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_a_disk_that_fills_up_loses_no_state(short, monkeypatch, failure, tmp_path):
    """The run goes on from where it was, to the same end."""
    folder = killed_run(monkeypatch, tmp_path / "killed")
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with room(5000):
        assert "cannot be" in failure(run_main, command(tmp_path / "killed"))
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    for out in ("killed", "whole"):
        run_main(command(tmp_path / out))
    one, two = (
        load_file(f / "adapter.safetensors") for f in (folder, tmp_path / "whole" / folder.name)
    )
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("where", ["train_step", "dev_scores", "torch.save"])
def test_a_signal_in_training_saves_the_state(
    short, monkeypatch, tmp_path, capsys, name, code, where
):
    """The third step is done to its end, or the dev set is left, and the file written first."""
    out, number = tmp_path / "killed", getattr(signal, name)
    owner, attribute = (torch, "save") if "." in where else (train, where)
    function, calls = getattr(owner, attribute), []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's is switched off

    def signalled(*args):
        calls.append(1)
        if len(calls) == (3 if where == "train_step" else 2):
            os.kill(os.getpid(), number)
        return function(*args)

    with monkeypatch.context() as m:
        m.setattr(owner, attribute, signalled)
        with pytest.raises(SystemExit) as stopped:
            evaluation.command_line(lambda: run_main(command(out)), "the same command goes on")
    assert stopped.value.code == code
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "interrupted" in x]
    assert line == "interrupted; the same command goes on"
    folder = out / "nano-gpt2-e2e-lora-s0"
    state = torch.load(folder / "last.pt", weights_only=True)
    steps = {"train_step": (3, 1), "dev_scores": (4, 1), "torch.save": (2, 1)}[where]
    assert (state["progress"]["step"], len(state["progress"]["log"])) == steps
    for o in (out, tmp_path / "whole"):
        run_main(command(o))
    logs = [
        (o / folder.name / "metrics.jsonl").read_text().splitlines()
        for o in (out, tmp_path / "whole")
    ]
    logs = [[dict(json.loads(e), seconds_per_step=0) for e in log] for log in logs]
    assert logs[0] == logs[1]
    assert not [*tmp_path.rglob("*.tmp")]


# ------------------------------------------------------------------------------------- bad input


def bad_csv(tmp_path, text):
    for name in ("trainset", "devset", "testset_w_refs"):
        (tmp_path / f"{name}.csv").write_text(text)
    return f"--data {tmp_path}"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--task nosuch", "nosuch"),
        ("--nosuch 3", "--nosuch"),
        ("--epochs many", "many"),
        ("--epochs 0", "--epochs cannot be 0"),
        ("--max-steps 0", "--max-steps cannot be 0"),
        ("--lr -1", "--lr cannot be -1.0"),
        ("--lora-dropout 1", "--lora-dropout cannot be 1.0"),
        ("--lr nan", "--lr cannot be nan"),
        ("--warmup nan", "--warmup cannot be nan"),
        ("--clip inf", "--clip cannot be inf"),
        ("--beams 5000", "--beams cannot be 5000"),
        ("--length-penalty 200", "--length-penalty cannot be 200.0"),
        ("--proj-dim 5000", "proj-dim cannot be 5000"),
        ("--gate cosine --proj-dim -1", "proj-dim cannot be -1"),
        ("--gate cosine --proj-dim 0", "proj-dim cannot be 0"),
        ("--seeds 99999999999999999999", "99999999999999999999 is more than 2147483647"),
        ("--molex-layers 5-3", "'5-3' is no range of layers"),
        ("--molex-layers 0,1,2", "'0,1,2' is no range of layers; write it as 0-11"),
        ("--seeds 0 -1", "-1 is less than 0"),
        ("--top-k 9", "top-k is 9, but the model has 8 layers"),
        ("--molex-layers 3-12", "layers 3-12 are to mix, but the model has layers 0-7"),
        ("--molex-layers 3-", "'3-' is no range of layers"),
        ("--gate quadratic", "invalid choice: 'quadratic'"),
        ("--alpha 1.5", "alpha is 1.5"),
        ("--data nosuch", "trainset.csv is missing"),
        ("--device nosuch", "--device nosuch cannot be used here"),
        ("--device cuda:99", "--device cuda:99 cannot be used here"),
        ("--device hpu", "--device hpu cannot be used here"),
        ("--device meta", "--device meta cannot be used here: it computes nothing"),
        ("--device=", "--device  cannot be used here"),
        ("--molex-layers 0-99999999999", "'0-99999999999' is no range of layers"),
        ("--cuda-graphs --device cpu", "--cuda-graphs needs a GPU"),
        ("--max-length 10", "no prompt fits into 10 tokens"),
        ("csv:", "trainset.csv is empty"),
        ("csv:mr,ref\n", "holds no examples"),
        ("csv:mr,text\nname[A],b\n", "no column ref"),
        ("csv:mr,ref,ref\nname[A],b,c\n", "two columns ref"),
        ("csv:mr,ref\nname(A),An A.\n", "trainset.csv, line 2: malformed MR"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(failure, tmp_path, flags, message):
    if flags.startswith("csv:"):
        flags = bad_csv(tmp_path, flags.removeprefix("csv:"))
    out = tmp_path / "runs"
    assert message in failure(run_main, flags, f"--out {out}")
    assert not out.exists()


def test_a_folder_whose_name_is_too_long(failure, tmp_path):
    error = failure(run_main, "--max-steps 1", f"--out {tmp_path / ('x' * 300)}")
    assert error.endswith("is not a path: File name too long")
    assert not any(tmp_path.iterdir())


def test_broken_weights_stop_a_run_before_it_starts(failure, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for f in (ROOT / "nano/gpt2").iterdir():
        (model / f.name).write_bytes(f.read_bytes()[: 9999 if "safetensors" in f.name else None])
    flags = f"--model {model} --data nano/e2e --out {tmp_path / 'runs'}"
    assert "cannot be read" in failure(run_main, flags)
    assert not (tmp_path / "runs").exists()


def test_importing_does_nothing():
    code = "import model, lora, molex, data, eval, train; print(len(__import__('os').listdir('.')))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == "" and math.isfinite(float(done.stdout)) and "\n" not in done.stdout[:-1]


def test_the_readme_example_runs(capsys):
    text = (ROOT / "README.md").read_text()
    (code,) = [x for x in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "import" in x]
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    scope: dict = {}
    exec(code, scope)
    assert scope["logits"].shape[2] == scope["model"].config.vocab_size
    assert capsys.readouterr().out.startswith("[")


def test_molex_config_survives_config_json():
    s = settings("--molex-layers 1-2")
    again = json.loads(json.dumps(asdict(s)))["molex"]
    assert asdict(MoLExConfig(**again)) == json.loads(json.dumps(asdict(s.molex)))
