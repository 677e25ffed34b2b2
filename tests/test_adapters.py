"""support/adapters.py: what peft's files may say and hold, beside peft itself.

pytest tests/test_adapters.py
"""

import json
from dataclasses import MISSING, fields
from pathlib import Path

import peft
import pytest
import torch
from conftest import VOCAB, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPT2ForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from lora import LoRA, adapt, add_lora, load_lora, loras, merge, save_lora, trained_tensors
from model import ClassificationHead, Transformer, load
from molex import MoLExConfig, upcycle
from support.files import InputError

LABELS = 3
IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
TARGETS = {"gpt2": ["c_attn"], "roberta": ["query", "value"], "llama": ["q_proj", "v_proj"]}


@torch.no_grad()
def move(model: nn.Module) -> nn.Module:
    """A training's work in a few random numbers: all that is trained is no longer as it began."""
    torch.manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def in_peft(base: nn.Module, family: str, **settings) -> peft.PeftModel:
    """A transformers model with a LoRA by peft, after some training."""
    settings = dict(r=4, lora_alpha=24, target_modules=TARGETS[family]) | settings
    torch.manual_seed(2)
    return move(peft.get_peft_model(base, peft.LoraConfig(**settings)))


@torch.no_grad()
def same_logits(ours: Transformer, theirs: nn.Module) -> None:
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=0, atol=1e-4)


@pytest.fixture
def saved(checkpoint, tmp_path) -> Path:
    """A folder with a plain LoRA for the tiny Llama."""
    save_lora(move(add_lora(load(checkpoint("llama")), 4, 24)), tmp_path / "lora")
    return tmp_path / "lora"


def edit(folder: Path, **changes: object) -> None:
    """Change what adapter_config.json says."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------- what the config may say

READ = {"r", "lora_alpha", "lora_dropout", "use_rslora"}
CHOICES = {"peft_type", "bias", "init_lora_weights"}  # some values only
SELECTION = set(  # which modules have a LoRA: see test_tensors_that_peft_leaves_out_are_refused
    "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save".split()
)
SILENT = set(  # about the making of an adapter; the tensors say what came of it
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "fan_in_fan_out megatron_core qalora_group_size ensure_weight_tying loftq_config eva_config "
    "corda_config lora_ga_config runtime_config".split()
)


def another(field) -> object:
    """A value that is not the field's default, of the same type where that is known."""
    default = field.default if field.default is not MISSING else field.default_factory()
    if isinstance(default, bool):
        return not default
    return {str: "another", int: 3}.get(type(default), {"another": 1})


@pytest.mark.parametrize("field", fields(peft.LoraConfig), ids=lambda field: field.name)
def test_every_field_of_peft_is_understood_or_refused_by_name(checkpoint, saved, field):
    model = load(checkpoint("llama"))
    expected = load_lora(load(checkpoint("llama")), saved)(IDS)
    edit(saved, **{field.name: another(field)})
    if field.name in SILENT:
        load_lora(model, saved)
        assert torch.equal(model(IDS), expected)
    elif field.name not in READ | SELECTION | {"init_lora_weights"}:  # for these see below
        message = f"adapter_config.json sets {field.name} to .*, which is not supported; try peft"
        with pytest.raises(InputError, match=message):
            load_lora(model, saved)
        assert not loras(model)  # nothing has been changed


def test_the_lists_above_name_fields_of_peft():
    assert READ | CHOICES | SELECTION | SILENT <= {field.name for field in fields(peft.LoraConfig)}


WHOLE_NAMES = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(8) for p in "qv"]


@pytest.mark.parametrize(
    "selection",
    [
        dict(target_modules=["q_proj"]),
        dict(target_modules=["proj"]),  # the end of a name, but not from a dot on
        dict(target_modules=["self_attn.q_proj", "v_proj"]),
        dict(target_modules=["model.layers.0.self_attn.q_proj", "v_proj"]),
        dict(target_modules=r".*\.[qv]_proj"),
        dict(target_modules=r".*\.1\..*\.[qv]_proj"),
        dict(target_modules="all-linear"),
        dict(target_modules=None),
        dict(target_modules=None, exclude_modules=["k_proj"]),
        dict(exclude_modules=["v_proj"]),
        dict(exclude_modules=["model.layers.1.self_attn.v_proj"]),
        dict(exclude_modules=r".*\.layers\.0\..*"),
        dict(exclude_modules="v_proj"),  # a regular expression for the whole name
        dict(layers_to_transform=0),
        dict(layers_to_transform=[0]),
        dict(layers_to_transform=list(range(8))),
        dict(layers_to_transform=[]),
        dict(layers_to_transform=[1], layers_pattern="layers"),
        dict(layers_to_transform=list(range(8)), layers_pattern=["blocks", "layers"]),
        dict(layers_to_transform=list(range(8)), layers_pattern="blocks"),
        dict(layers_to_transform=list(range(8)), layers_pattern=""),
        dict(layers_to_transform=list(range(8)), layers_pattern="(?P<i>layers)"),
        dict(target_modules=r".*\.[qv]_proj", layers_to_transform=[0]),
        dict(target_modules=WHOLE_NAMES, layers_to_transform=[0]),
        dict(layers_to_transform=[0, 1], layers_pattern="self|layers"),  # without a number
        dict(target_modules="All-Linear"),
        dict(target_modules=["*_proj", "q_proj", "v_proj"]),  # a list holds names, not patterns
        dict(exclude_modules=["("]),
        dict(target_modules=[]),
        dict(target_modules=""),
    ],
    ids=str,
)
def test_tensors_that_peft_leaves_out_are_refused(checkpoint, saved, selection):
    base, ours = checkpoint("llama"), load(checkpoint("llama"))
    whole = load_lora(load(base), saved)(IDS)
    edit(saved, **selection)
    try:
        theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), saved)
        same = torch.allclose(theirs(IDS).logits, whole, rtol=0, atol=1e-4)
    except ValueError:  # it selects nothing
        same = False
    if same:
        load_lora(ours, saved)
        same_logits(ours, theirs)
    else:
        with pytest.raises(InputError, match="selects other modules, so peft would leave it out"):
            load_lora(ours, saved)
        assert not loras(ours)


@pytest.mark.parametrize("family", ["gpt2", "roberta", "llama"])
def test_without_targets_a_config_means_those_of_peft_for_the_family(checkpoint, tmp_path, family):
    save_lora(move(add_lora(load(checkpoint(family)), 4, 24)), tmp_path / "lora")
    edit(tmp_path / "lora", target_modules=None)
    assert loras(load_lora(load(checkpoint(family)), tmp_path / "lora"))
    if family != "gpt2":  # it has q, k and v in one
        save_lora(move(add_lora(load(checkpoint(family)), 4, 24, 0.0, tuple("qkv"))), tmp_path)
        edit(tmp_path, target_modules=None)
        with pytest.raises(InputError, match="selects other modules"):
            load_lora(load(checkpoint(family)), tmp_path)


@pytest.mark.parametrize("field", ["target_modules", "layers_to_transform", "exclude_modules"])
@pytest.mark.parametrize("value", [2.5, [2.5], [None], {"a": 1}, True])
def test_a_selection_of_another_type(checkpoint, saved, field, value):
    edit(saved, **{field: value})
    with pytest.raises(InputError, match=f"adapter_config.json: {field} is "):
        load_lora(load(checkpoint("llama")), saved)


@pytest.mark.parametrize(
    "selection",
    [
        dict(target_modules="*_proj"),
        dict(exclude_modules="("),
        dict(modules_to_save=["(", ")"]),
        dict(modules_to_save=["(?i)score"]),  # not where peft puts it
        dict(layers_to_transform=[0], layers_pattern="(?i)layers"),
    ],
    ids=str,
)
def test_a_selection_that_is_no_regular_expression(checkpoint, saved, selection):
    edit(saved, **selection)
    with pytest.raises(InputError, match=r"adapter_config.json: .* is no regular expression"):
        load_lora(load(checkpoint("llama")), saved)


@pytest.mark.parametrize("value", [None, False, {}, [], ""])
def test_a_field_of_a_newer_peft_that_is_off(checkpoint, saved, value):
    edit(saved, use_something_new=value)
    load_lora(load(checkpoint("llama")), saved)


@pytest.mark.parametrize("value", [True, 16, "much", {"rank": 3}, ["q_proj"]])
def test_a_field_of_a_newer_peft_that_is_on(checkpoint, saved, value):
    edit(saved, use_something_new=value)
    with pytest.raises(InputError, match="sets use_something_new to .*which is not supported"):
        load_lora(load(checkpoint("llama")), saved)


@pytest.mark.parametrize(
    "settings",
    [
        dict(init_lora_weights=False),
        dict(init_lora_weights="gaussian"),
        dict(init_lora_weights="orthogonal"),
        dict(init_lora_weights="mica"),
        dict(init_lora_weights="eva"),
        dict(use_rslora=True),
        dict(use_rslora=True, r=16, lora_alpha=3),
        dict(target_modules=r".*\.(q|v)_proj"),
        dict(target_modules=["q_proj", "v_proj", "up_proj"], exclude_modules=["up_proj"]),
        dict(layers_to_transform=[0, 1, 2], layers_pattern="layers"),
        dict(task_type="CAUSAL_LM", revision="main", ensure_weight_tying=True),
        dict(megatron_core="another", qalora_group_size=8),
    ],
    ids=str,
)
def test_what_is_read_means_the_same_in_peft(checkpoint, tmp_path, settings):
    theirs = in_peft(tiny("llama"), "llama", **settings)
    theirs.save_pretrained(tmp_path)
    model = load_lora(load(checkpoint("llama")), tmp_path)
    same_logits(model, theirs)
    with torch.no_grad():
        assert (theirs(IDS).logits - tiny("llama")(IDS).logits).abs().max() > 0.1
    save_lora(model, tmp_path / "again")
    same_logits(model, peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "again"))


def test_a_rank_stabilised_lora_of_a_gpt2(checkpoint, tmp_path):
    """There a LoRA on q and v is one of twice the rank in peft."""
    save_lora(move(add_lora(load(checkpoint("gpt2")), 4, 24)), tmp_path)
    edit(tmp_path, use_rslora=True)
    theirs = peft.PeftModel.from_pretrained(tiny("gpt2"), tmp_path)
    same_logits(load_lora(load(checkpoint("gpt2")), tmp_path), theirs)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_changes_the_base_is_refused(checkpoint, tmp_path, init):
    in_peft(tiny("llama"), "llama", init_lora_weights=init).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"sets init_lora_weights to '{init}', which is not supp"):
        load_lora(load(checkpoint("llama")), tmp_path)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_such_a_start_that_peft_has_made_a_plain_lora_of(checkpoint, tmp_path, use_rslora):
    settings = dict(init_lora_weights="pissa", use_rslora=use_rslora)
    config = peft.LoraConfig(r=4, lora_alpha=24, target_modules=TARGETS["llama"], **settings)
    theirs = peft.get_peft_model(tiny("llama"), config)
    config.init_lora_weights = True  # as peft's documentation has it
    theirs.save_pretrained(tmp_path / "start")
    config.init_lora_weights = "pissa"
    move(theirs).save_pretrained(
        tmp_path / "lora", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    same_logits(load_lora(load(checkpoint("llama")), tmp_path / "lora"), theirs)


@pytest.mark.parametrize("init", ["loftq", "corda", "lora_ga", "of a newer peft", 3])
def test_other_starts_are_refused(checkpoint, saved, init):
    edit(saved, init_lora_weights=init)
    with pytest.raises(InputError, match=f"sets init_lora_weights to {init!r}, which is not supp"):
        load_lora(load(checkpoint("llama")), saved)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_refused(checkpoint, tmp_path, bias):
    in_peft(tiny("roberta"), "roberta", bias=bias).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"sets bias to '{bias}', which is not supported"):
        load_lora(load(checkpoint("roberta"), head="none"), tmp_path)


def test_all_linear_layers_are_more_than_ours(checkpoint, tmp_path):
    in_peft(tiny("llama"), "llama", target_modules="all-linear").save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match="mlp.down_proj.lora_A.weight, which is not a LoRA on q, k"
    ):
        load_lora(load(checkpoint("llama")), tmp_path)


@pytest.mark.parametrize("path", ["model.vision.layers.0", "model.layers.0.more.layers.0"])
def test_layers_of_another_part_are_not_taken_for_ours(checkpoint, saved, path):
    """Two keys must not fill one tensor."""
    tensors = load_file(saved / "adapter_model.safetensors")
    key = f"base_model.model.{path}.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {key: torch.zeros(4, 32)}, saved / "adapter_model.safetensors")
    with pytest.raises(InputError, match=f"holds .*{path}.self_attn.*, which is not a LoRA on"):
        load_lora(load(checkpoint("llama")), saved)


@pytest.mark.parametrize("name", ["gpt2", "roberta", "llama"])
def test_an_adapter_made_for_the_model_without_its_head(checkpoint, tmp_path, name):
    base = tiny(name).base_model
    theirs = in_peft(base, name)
    if name == "gpt2":  # one LoRA for q and one for v
        ours = move(add_lora(load(checkpoint("gpt2"), head="none"), 4, 24))
        save_lora(ours, tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        tensors = {n.replace("transformer.", ""): w for n, w in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
        theirs = peft.PeftModel.from_pretrained(tiny(name).base_model, tmp_path)
    else:
        theirs.save_pretrained(tmp_path)
    model = load_lora(load(checkpoint(name), head="none"), tmp_path)
    with torch.no_grad():
        expected = theirs(IDS).last_hidden_state
        torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------- adapter_model.bin


@torch.no_grad()
def test_the_older_file_of_tensors(checkpoint, saved):
    expected = load_lora(load(checkpoint("llama")), saved)(IDS)
    new = saved / "adapter_model.safetensors"
    torch.save(load_file(new), saved / "adapter_model.bin")
    new.unlink()
    assert torch.equal(load_lora(load(checkpoint("llama")), saved)(IDS), expected)


@torch.no_grad()
def test_the_newer_file_comes_first_as_in_peft(checkpoint, saved):
    expected = load_lora(load(checkpoint("llama")), saved)(IDS)
    torch.save({}, saved / "adapter_model.bin")
    assert torch.equal(load_lora(load(checkpoint("llama")), saved)(IDS), expected)


def test_no_file_of_tensors(checkpoint, saved):
    (saved / "adapter_model.safetensors").unlink()
    message = "lora holds no adapter_model.safetensors and no adapter_model.bin$"
    with pytest.raises(InputError, match=message):
        load_lora(load(checkpoint("llama")), saved)


# ---------------------------------------------------------------------------- a classifier's head


def classifier(folder: Path) -> Transformer:
    return move(add_lora(load(folder, head=LABELS), 4, 24))


def test_a_classifier_from_here_to_peft_and_back(checkpoint, tmp_path):
    model = classifier(checkpoint("roberta"))
    save_lora(model, tmp_path)
    # The base model there has the same layers but a head of its own.
    layers = load_file(checkpoint("roberta") / "model.safetensors")
    layers = {n: w for n, w in layers.items() if n.startswith("roberta.")}
    base = tiny("roberta-labels")
    base.load_state_dict(layers, strict=False)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert isinstance(theirs, peft.PeftModelForSequenceClassification)
    same_logits(model, theirs)
    again = load_lora(load(checkpoint("roberta"), head=LABELS), tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    assert trained_tensors(again).keys() == trained_tensors(model).keys()


@pytest.mark.parametrize(
    "settings", [dict(task_type="SEQ_CLS"), dict(modules_to_save=["classifier"])], ids=str
)
def test_a_classifier_from_peft_to_here_and_back(checkpoint, tmp_path, settings):
    theirs = in_peft(tiny("roberta-labels"), "roberta", **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_lora(load(checkpoint("roberta-labels"), head=LABELS), tmp_path / "theirs")
    same_logits(model, theirs)
    with torch.no_grad():
        moved = model.head.out.weight - tiny("roberta-labels").classifier.out_proj.weight
    assert moved.abs().max() > 0.05
    save_lora(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny("roberta-labels"), tmp_path / "ours")
    same_logits(model, back.eval())


def test_a_plain_lora_leaves_the_head_of_a_classifier(checkpoint, tmp_path):
    save_lora(move(add_lora(load(checkpoint("roberta"), head="none"), 4, 24)), tmp_path)
    model = load(checkpoint("roberta"), head=LABELS)
    head = {n: w.clone() for n, w in model.head.state_dict().items()}
    load_lora(model, tmp_path)
    assert all(torch.equal(w, head[n]) for n, w in model.head.state_dict().items())


@pytest.mark.parametrize(
    "head, message",
    [
        ("none", "another shape or rank, or head.* has unknown 4 tensor.*: head.dense.bias"),
        (
            2,
            r"another shape or rank, or head.* has misshapen 2 tensor.*: head.out.bias \(3,\), not",
        ),
    ],
)
def test_a_head_that_the_model_does_not_have(checkpoint, tmp_path, head, message):
    save_lora(classifier(checkpoint("roberta")), tmp_path)
    with pytest.raises(InputError, match=message):
        load_lora(load(checkpoint("roberta"), head=head), tmp_path)


@pytest.mark.parametrize("part", ["classifier.out_proj.weight", "classifier"])
def test_a_head_that_is_not_whole(checkpoint, tmp_path, part):
    save_lora(classifier(checkpoint("roberta")), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {n: w for n, w in load_file(path).items() if part not in n}
    save_file(tensors, path)
    with pytest.raises(InputError, match="lacks .*classifier.*out_proj.weight"):
        load_lora(load(checkpoint("roberta"), head=LABELS), tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_another_kind_of_head_is_refused_both_ways(checkpoint, tmp_path, name):
    with pytest.raises(InputError, match=f"files have no place for a {name} classifier's head"):
        save_lora(classifier(checkpoint(name)), tmp_path)
    assert not [*tmp_path.iterdir()]
    base = {"gpt2": GPT2ForSequenceClassification, "llama": LlamaForSequenceClassification}[name]
    config = tiny(name).config
    config.num_labels = LABELS
    theirs = peft.get_peft_model(base(config), peft.LoraConfig(r=4, task_type="SEQ_CLS"))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds base_model.model.score.weight, which is"):
        load_lora(load(checkpoint(name), head=LABELS), tmp_path)


# ----------------------------------------------------------------------- what peft has no place for


@pytest.mark.parametrize("head, name", [("lm", "llama"), (LABELS, "roberta")])
def test_that_the_gate_is_left_out_is_said(checkpoint, tmp_path, capsys, head, name):
    model = upcycle(add_lora(load(checkpoint(name), head=head), 4, 24), MoLExConfig())
    save_lora(move(model), tmp_path / "molex")
    (line,) = capsys.readouterr().out.splitlines()
    assert "MoLEx's gate" in line and str(tmp_path) in line
    plain = load_lora(load(checkpoint(name), head=head), tmp_path / "molex")
    for n, m in loras(model).items():
        assert torch.equal(m.B, loras(plain)[n].B)
    save_lora(plain, tmp_path / "plain")
    assert not capsys.readouterr().out


def test_loras_that_differ_cannot_be_saved(checkpoint, tmp_path):
    model = add_lora(load(checkpoint("llama")), 4, 24)
    next(iter(loras(model).values())).alpha = 12
    with pytest.raises(InputError, match="one rank, alpha and dropout"):
        save_lora(model, tmp_path)


# --------------------------------------------------------------------------- a second LoRA, a gate


@pytest.mark.parametrize("merged", [False, True])
def test_a_second_lora_is_one_line(checkpoint, saved, merged):
    model = load_lora(load(checkpoint("llama")), saved)
    if merged:
        merge(model)
    before = model(IDS)
    for add in (lambda: add_lora(model, 2, 4), lambda: load_lora(model, saved)):
        with pytest.raises(InputError, match="has a LoRA already; load the model again"):
            add()
    assert torch.equal(model(IDS), before)


def learn(model: Transformer) -> set[str]:
    return set(trained_tensors(model))


@pytest.mark.parametrize("head", ["none", LABELS])
@pytest.mark.parametrize("individual", [False, True])
def test_the_gate_learns_whichever_comes_first(checkpoint, head, individual):
    config = MoLExConfig(learn_alpha=True, individual_gates=individual)
    first, last = [load(checkpoint("roberta"), head=head) for _ in "ab"]
    upcycle(add_lora(first, 4, 24), config)
    add_lora(upcycle(last, config), 4, 24)
    assert learn(first) == learn(last)
    assert {"layers.alpha_logit", "layers.gates.0.weight"} < learn(last)
    assert isinstance(last.layers.blocks[0].attn.q, LoRA)
    assert isinstance(last.head, ClassificationHead) == (head == LABELS)


def test_bitfit_after_upcycle_leaves_the_gate_to_learn(checkpoint):
    model = adapt(upcycle(load(checkpoint("roberta"), head=LABELS)), "bitfit", 4, 24, 0.0)
    new = {"layers.gates.0.weight", "head.dense.weight", "head.out.weight"}
    assert {n for n in learn(model) if not n.endswith("bias")} == new


def gradients(model: Transformer) -> dict[str, Tensor]:
    model.train()(IDS).pow(2).sum().add(model.layers.load_balance).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_lora_after_upcycle_is_trained_with_the_gate(checkpoint):
    model = upcycle(load(checkpoint("llama"), dropout=0.0), MoLExConfig())
    assert gradients(add_lora(model, 4, 24)).keys() == learn(model)
