"""LoRA in lora.py against peft, over the same small checkpoints; its files, read by peft and back.

pytest tests/test_lora.py
"""

from pathlib import Path

import peft
import pytest
import torch
from conftest import VOCAB, load_lm, tiny
from torch import Tensor, nn

from lora import LoRA, add_lora, load_lora, loras, merge, save_lora
from model import Transformer, load
from support.files import InputError

R, ALPHA = 4, 24.0
FAMILIES = ["gpt2", "roberta", "llama"]
TARGETS = {"gpt2": ["c_attn"], "roberta": ["query", "value"], "llama": ["q_proj", "v_proj"]}
IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


def adapted(folder: Path, targets: tuple[str, ...] = ("q", "v"), **settings) -> Transformer:
    """The checkpoint with a LoRA whose B is not zero, as if it had been trained."""
    torch.manual_seed(2)
    model = add_lora(load_lm(folder), R, ALPHA, targets=targets, **settings)
    with torch.no_grad():
        for lora in loras(model).values():
            lora.B.normal_(std=0.1)
    return model


def in_peft(name: str, **settings) -> peft.PeftModel:
    """The transformers model with a random LoRA by peft."""
    settings = dict(r=R, lora_alpha=ALPHA, target_modules=TARGETS[name]) | settings
    torch.manual_seed(3)
    model = peft.get_peft_model(
        tiny(name), peft.LoraConfig(fan_in_fan_out=name == "gpt2", **settings)
    )
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.normal_(std=0.1)
    return model.eval()


@torch.no_grad()
def ours(model: Transformer) -> Tensor:
    return model.double()(IDS)


@torch.no_grad()
def theirs(model: nn.Module) -> Tensor:
    return model.double().eval()(IDS).logits


# In float64, but transformers takes Llama's RMSNorm in float32 all the same.
TOLERANCE = {"gpt2": 1e-6, "roberta": 1e-6, "llama": 1e-5}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def changes_much(model: Transformer, name: str) -> bool:
    return bool((ours(model) - theirs(tiny(name))).abs().max() > 0.1)


# --------------------------------------------------------------------------------------- equal peft


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_equal_peft_with_the_same_tensors(checkpoint, name):
    model = adapted(checkpoint(name))
    # GPT-2 has q, k and v in one projection: there a LoRA of twice the rank holds q's and v's.
    double = 2 if name == "gpt2" else 1
    reference = in_peft(name, r=double * R, lora_alpha=double * ALPHA)
    state = dict(reference.named_parameters())
    for i, block in enumerate(model.layers.blocks):
        q, v = block.attn.q, block.attn.v
        if name == "gpt2":
            B = torch.zeros(96, 2 * R)
            B[:32, :R], B[64:, R:] = q.B, v.B
            pairs = {"c_attn": (torch.cat([q.A, v.A]), B)}
        else:
            pairs = dict(zip(TARGETS[name], [(q.A, q.B), (v.A, v.B)], strict=True))
        for module, tensors in pairs.items():
            for side, w in zip("AB", tensors, strict=True):
                (key,) = [n for n in state if f".{i}." in n and f"{module}.lora_{side}" in n]
                state[key].copy_(w)
    close(ours(model), theirs(reference), TOLERANCE[name])
    assert changes_much(model, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_here_loads_in_peft_and_here(checkpoint, tmp_path, name):
    model = adapted(checkpoint(name), dropout=0.1)
    save_lora(model, tmp_path, base="some/model")
    expected = ours(model)
    close(theirs(peft.PeftModel.from_pretrained(tiny(name), tmp_path)), expected, TOLERANCE[name])
    again = load_lora(load_lm(checkpoint(name)), tmp_path)
    close(ours(again), expected, 0)
    assert {(m.r, m.alpha, m.dropout) for m in loras(again).values()} == {(R, ALPHA, 0.1)}
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert config.base_model_name_or_path == "some/model" and config.lora_dropout == 0.1
    assert config.fan_in_fan_out == (name == "gpt2")  # as transformers stores GPT-2's weights
    assert config.target_modules == set(TARGETS[name]) and changes_much(model, name)


def test_all_four_projections_of_a_roberta_load_in_peft(checkpoint, tmp_path):
    model = adapted(checkpoint("roberta"), targets=("q", "k", "v", "o"))
    save_lora(model, tmp_path)
    close(theirs(peft.PeftModel.from_pretrained(tiny("roberta"), tmp_path)), ours(model))
    targets = peft.PeftConfig.from_pretrained(tmp_path).target_modules
    assert targets == {"query", "key", "value", "attention.output.dense"}  # not the MLP's "dense"


@pytest.mark.parametrize(
    "name, modules, targets",
    [
        ("roberta", ["query", "value"], "qv"),
        ("roberta", ["query", "key"], "kq"),
        ("roberta", ["query", "key", "value", "attention.output.dense"], "koqv"),
        ("llama", ["q_proj", "v_proj"], "qv"),
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj"], "koqv"),
    ],
)
def test_what_peft_saves_loads_here_and_is_saved_alike(
    checkpoint, tmp_path, name, modules, targets
):
    reference = in_peft(name, target_modules=modules)
    reference.save_pretrained(tmp_path / "theirs")
    model = load_lora(load_lm(checkpoint(name)), tmp_path / "theirs")
    assert sorted({n[-1] for n in loras(model)}) == list(targets)
    save_lora(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "ours")
    expected = theirs(reference)
    close(ours(model), expected, TOLERANCE[name])
    close(theirs(back), expected)
    assert changes_much(model, name)


# ------------------------------------------------------------------------------------- one LoRA


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_starts_as_no_change(checkpoint, name):
    model = load_lm(checkpoint(name))
    before = model(IDS)
    assert torch.equal(add_lora(model, R, ALPHA)(IDS), before)
    assert all(lora.A.std() > 0.05 for lora in loras(model).values())  # or it could not learn


def test_dropout_is_of_the_low_rank_input_and_in_training_only():
    """With A and B the identity the update is alpha / r times the input that was let through."""
    x = torch.rand(1000, 8) + 1
    lora = LoRA(nn.Linear(8, 8), r=8, alpha=16, dropout=0.25)
    nn.init.eye_(lora.A), nn.init.eye_(lora.B)
    update = lambda: (lora(x) - lora.base(x)).detach()  # noqa: E731
    close(lora.eval() and update(), 2 * x, 1e-5)
    out = lora.train() and update()
    dropped = out.abs() < 1e-5
    close(out[~dropped], 2 / 0.75 * x[~dropped], 1e-5)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.02)  # 4 deviations


def test_is_in_the_mode_of_its_model(checkpoint, tmp_path):
    """A model in evaluation mode stays deterministic when a LoRA with dropout comes in."""
    model = adapted(checkpoint("llama"), dropout=0.5)
    assert torch.equal(model(IDS), model(IDS))
    save_lora(model, tmp_path)
    again = load_lora(load(checkpoint("llama")), tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    training = load_lora(load(checkpoint("llama")).train(), tmp_path)
    assert not torch.equal(training(IDS), training(IDS))


@pytest.mark.parametrize("head", ["lm", 3])
@pytest.mark.parametrize("name", [*FAMILIES, "gpt2-untied"])
def test_only_lora_and_a_task_head_learn(checkpoint, name, head):
    model = add_lora(load_lm(checkpoint(name), head), R, ALPHA)
    learn = {n for n, p in model.named_parameters() if p.requires_grad}
    expected = {f"layers.blocks.{i}.attn.{p}.{x}" for i in range(3) for p in "qv" for x in "AB"}
    if head == 3:
        expected |= {"head.dense.weight", "head.dense.bias", "head.out.weight", "head.out.bias"}
    assert learn == expected
    with torch.no_grad():
        for lora in loras(model).values():
            lora.B.normal_(std=0.1)
    model(IDS).pow(2).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == expected
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("targets", [("q", "v"), ("v",), ("q", "k", "v", "o")])
def test_parameter_count(checkpoint, targets):
    model = load(checkpoint("llama"))
    sizes = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32)}  # 2 of 4 heads for k, v
    expected = sum(3 * R * (d_in + d_out) for d_in, d_out in map(sizes.get, targets))
    before = sum(p.numel() for p in model.parameters())
    add_lora(model, R, ALPHA, targets=targets)
    assert sum(p.numel() for p in model.parameters()) - before == expected
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert len(loras(model)) == 3 * len(targets)


# -------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_merge(checkpoint, name):
    model = adapted(checkpoint(name))
    weights = {n: lora.base.weight.clone() for n, lora in loras(model).items()}
    logits = model(IDS)
    merge(model)
    merge(model)  # once is enough
    for n, lora in loras(model).items():
        close(lora.base.weight, weights[n] + ALPHA / R * lora.B @ lora.A)
        assert (lora.base.weight - weights[n]).abs().max() > 0.1
    close(model(IDS), logits, 1e-5)


def test_merging_leaves_the_weights_frozen(checkpoint):
    model = adapted(checkpoint("llama"))
    merge(model)
    assert not any(lora.base.weight.requires_grad for lora in loras(model).values())


# ------------------------------------------------------------------------------ what is refused


def test_cannot_be_saved(checkpoint, tmp_path):
    with pytest.raises(InputError, match="no LoRA to save"):
        save_lora(load(checkpoint("gpt2")), tmp_path)
    with pytest.raises(InputError, match="LoRA on q and v only"):
        save_lora(adapted(checkpoint("gpt2"), targets=("q", "k", "v")), tmp_path)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("gpt2", dict(), "c_attn.lora_B.weight is not one for q and one for v"),
        ("gpt2", dict(r=1), "not one for q and one for v"),
        ("gpt2", dict(target_modules=["c_fc"]), "mlp.c_fc.lora_A.weight, which is not a LoRA on"),
        (
            "llama",
            dict(target_modules=["gate_proj"]),
            "holds .*mlp.gate_proj.lora_A.weight, which is",
        ),
        ("llama", dict(use_dora=True), "sets use_dora to True, which is not supported"),
        ("llama", dict(modules_to_save=["lm_head"]), "holds .*lm_head.weight, which is not a LoRA"),
        ("llama", dict(layers_to_transform=[0]), "made for a model of another shape"),
        ("llama", dict(rank_pattern={"q_proj": 2}), "rank_pattern"),
        ("llama", dict(alpha_pattern={"q_proj": 2}), "alpha_pattern"),
        ("llama", dict(alora_invocation_tokens=[5], task_type="CAUSAL_LM"), "alora_invocation_to"),
    ],
)
def test_peft_adapters_that_are_no_plain_lora(checkpoint, tmp_path, name, settings, message):
    in_peft(name, **settings).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_lora(load(checkpoint(name)), tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("changes", [dict(num_hidden_layers=2), dict(hidden_size=64)])
def test_adapter_of_another_model(checkpoint, tmp_path, changes):
    tiny("llama", **changes).save_pretrained(tmp_path / "model")
    save_lora(adapted(tmp_path / "model"), tmp_path / "lora")
    with pytest.raises(InputError, match="lora was made for a model of another shape"):
        load_lora(load(checkpoint("llama")), tmp_path / "lora")
    with pytest.raises(
        InputError, match="holds .*q_proj.lora_A.weight, which is not a LoRA on q, k"
    ):
        load_lora(load(checkpoint("roberta")), tmp_path / "lora")


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("adapter_config.json", None, "cannot read .*adapter_config.json: No such file"),
        ("adapter_config.json", b"{", "is not JSON"),
        ("adapter_config.json", b'{"lora_alpha": 1}', "lacks r$"),
        ("adapter_config.json", b'{"lora_alpha": 1, "r": -5}', "r is -5, not int from 1 to"),
        (
            "adapter_config.json",
            b'{"lora_alpha": 1, "r": 99}',
            "rank of a LoRA is 99, not from 1 t",
        ),
        ("adapter_config.json", b'{"lora_alpha": 1, "r": "4"}', "r is '4', not int from 1 to"),
        ("adapter_config.json", b"[4]", r"holds \[4\], not names with values"),
        ("adapter_model.safetensors", None, "holds no adapter_model.safetensors and no"),
        ("adapter_model.safetensors", b"cut", "cannot be read"),
        ("adapter_model.safetensors", b"\x02" + bytes(7) + b"{}", "holds no LoRA$"),
    ],
)
def test_damaged_adapter(checkpoint, tmp_path, file, content, message):
    save_lora(adapted(checkpoint("llama")), tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_lora(load(checkpoint("llama")), tmp_path)
    assert str(tmp_path) in str(caught.value) or "rank" in message
