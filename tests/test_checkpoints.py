"""Checkpoints that say a thing twice, or in another way: what transformers makes of them.

pytest tests/test_checkpoints.py
"""

import json
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import ROPE, tiny
from safetensors.torch import save_file
from test_model import close, parts, random_ids, theirs, write
from transformers import (
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import train
from data import GLUE, Tokenizer
from eval import beam_search
from model import Config, load
from support.checkpoints import LABELS, order_head
from support.files import InputError

WEIGHTS = ["model.safetensors", "model.safetensors.index.json"]
WEIGHTS += ["pytorch_model.bin", "pytorch_model.bin.index.json"]


def put(folder: Path, name: str, tensors: dict) -> None:
    """The tensors as a file of that name: one, or an index and two shards."""
    tensors = {n: w.clone() for n, w in tensors.items()}
    save = torch.save if "bin" in name else save_file
    if not name.endswith(".json"):
        return save(tensors, folder / name)
    ending = ".bin" if "bin" in name else ".safetensors"
    places = {n: f"part-{i % 2}{ending}" for i, n in enumerate(tensors)}
    for file in set(places.values()):
        save({n: w for n, w in tensors.items() if places[n] == file}, folder / file)
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("one, other", [(name, None) for name in WEIGHTS] + [
    (a, b) for a, b in combinations(WEIGHTS, 2) if a[-5:] != b[-5:] or "bin" in b and "bin" not in a
])  # fmt: skip
@torch.no_grad()
def test_of_several_files_the_one_that_transformers_takes(checkpoint, tmp_path, one, other):
    config, tensors = parts(checkpoint("llama"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    put(tmp_path, one, tensors)
    if other:
        put(tmp_path, other, {n: 1.3 * w for n, w in tensors.items()})
    ids = random_ids(2, 16)
    close(load(tmp_path)(ids), theirs(LlamaForCausalLM.from_pretrained(tmp_path), ids))


SCALING = {n: x for n, x in ROPE.items() if n != "rope_theta"}
ROTARY = [
    dict(),
    dict(rope_theta=500.0),
    dict(rope_scaling=SCALING),
    dict(rope_scaling=SCALING, rope_theta=700.0),
    dict(rope_scaling=SCALING, rope_parameters=dict(rope_type="default", rope_theta=90.0)),
    dict(rope_scaling=None, rope_parameters=dict(SCALING, rope_theta=90.0), rope_theta=7.0),
    dict(rope_parameters=dict(rope_type="default"), rope_theta=90.0),
    dict(rope_scaling={n: x for n, x in SCALING.items() if "original" not in n}),
    dict(rope_scaling=dict(SCALING, type="linear")),
    dict(rope_theta=3580165449.0),
]


@pytest.mark.parametrize("said", ROTARY)
@torch.no_grad()
def test_rotary_settings_that_are_said_twice(checkpoint, tmp_path, said):
    config, tensors = parts(checkpoint("llama"))
    for name in ("rope_parameters", "rope_scaling", "rope_theta"):
        config.pop(name, None)
    write(tmp_path, config | said, tensors)
    ids = random_ids(2, 64)
    close(load(tmp_path)(ids), theirs(LlamaForCausalLM.from_pretrained(tmp_path), ids))


@pytest.mark.parametrize("where", ["config", "rope_parameters"])
def test_rotary_positions_for_a_part_of_the_channels_are_refused(checkpoint, tmp_path, where):
    config, tensors = parts(checkpoint("llama"))
    (config if where == "config" else config[where])["partial_rotary_factor"] = 0.5
    with pytest.raises(InputError, match="partial_rotary_factor to 0.5: not supported"):
        load(write(tmp_path, config, tensors))


@pytest.mark.parametrize("family, causal", [("gpt2", False), ("llama", False), ("roberta", True)])
def test_who_sees_whom_is_the_familys(checkpoint, tmp_path, family, causal):
    """transformers' Llama and RoBERTa heed is_causal."""
    config, tensors = parts(checkpoint(family))
    where = write(tmp_path, config | dict(is_causal=causal), tensors)
    with pytest.raises(InputError, match=f"sets is_causal to {causal}: not supported"):
        load(where)


def test_an_adapter_in_a_checkpoints_folder_is_refused(checkpoint, tmp_path):
    """transformers puts it onto the model."""
    where = write(tmp_path, *parts(checkpoint("gpt2")))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="and, in adapter_config.json, an adapter for one"):
        load(where)


@pytest.mark.parametrize("said", [dict(num_hidden_layers=2), dict(num_attention_heads=2),
                                  dict(n_layer=None, num_hidden_layers=2)])  # fmt: skip
def test_gpt2s_other_names_of_its_settings(checkpoint, tmp_path, said):
    config, tensors = parts(checkpoint("gpt2"))
    config = {n: x for n, x in (config | said).items() if x is not None}
    write(tmp_path, config, tensors)
    right = GPT2LMHeadModel.from_pretrained(tmp_path).config
    ours = Config.load(tmp_path)
    assert (ours.n_layer, ours.n_head) == (right.n_layer, right.n_head)


# ------------------------------------------------------------------------------ how a text ends


@pytest.mark.parametrize("config, generation, ends", [
    (2, None, 2), (2, 2, 2), ([5, 6], None, (5, 6)), (2, [40, 2], (2, 40)),
    (None, [40, 7], (40, 7)), ([40, 2], 2, (40, 2)), (None, None, None), (2, ..., 2),
])  # fmt: skip
def test_a_text_ends_as_either_file_says(checkpoint, tmp_path, config, generation, ends):
    settings, tensors = parts(checkpoint("llama"))
    write(tmp_path, settings | dict(eos_token_id=config), tensors)
    if generation is not None:
        said = {} if generation is ... else {"eos_token_id": generation}
        (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert Config.load(tmp_path).eos == ends


@pytest.mark.parametrize("beams", [1, 3])
def test_every_end_ends_an_answer(checkpoint, tmp_path, beams):
    config, tensors = parts(checkpoint("llama"))
    ends = [40, 2, 41, 7, 9, 11]
    write(tmp_path, config | dict(eos_token_id=ends), tensors)
    ours, reference = load(tmp_path), LlamaForCausalLM.from_pretrained(tmp_path).eval()
    lengths = set()
    for seed in range(6):
        prompt = random_ids(1, 6, seed=seed)
        how = dict(num_beams=beams, do_sample=False, max_new_tokens=20, pad_token_id=0)
        right = reference.generate(prompt, length_penalty=0.9, **how)[0, 6:].tolist()
        right = right[: next((i for i, t in enumerate(right) if t in ends), len(right))]
        search = dict(beams=beams, no_repeat_ngram=0, max_new_tokens=20)
        assert beam_search(ours, prompt.tolist(), ours.config.eos, **search) == [right]
        lengths.add(len(right))
    assert len(lengths) > 1


def test_the_first_of_several_ends_is_the_one_that_is_written():
    config = Config.load("nano/gpt2")
    object.__setattr__(config, "eos", (7, 0))
    tokenizer = Tokenizer.load("nano/gpt2", config)
    assert tokenizer.eos == 7 and tokenizer.ends == (7, 0)


@torch.no_grad()
def test_gpt2s_default_tokens_beyond_a_small_vocabulary(checkpoint, tmp_path):
    config, tensors = parts(checkpoint("gpt2"))
    write(tmp_path, config | dict(bos_token_id=50256, eos_token_id=50256), tensors)
    model, ids = load(tmp_path), random_ids(2, 16)
    close(model(ids), theirs(GPT2LMHeadModel.from_pretrained(tmp_path), ids))
    assert model.config.bos is model.config.eos is None


@pytest.mark.parametrize("ids", ["2", -1, 1.5, [2, "x"], True, {}])
def test_ends_that_are_no_tokens_are_refused(checkpoint, tmp_path, ids):
    config, tensors = parts(checkpoint("llama"))
    with pytest.raises(InputError, match="config.json: eos_token_id is .*, not int from 0"):
        load(write(tmp_path, config | dict(eos_token_id=ids), tensors))


# ------------------------------------------------------------------------------- tensors' names


@torch.no_grad()
def test_tied_weights_under_the_heads_name(checkpoint, tmp_path):
    embeddings = {"gpt2": "transformer.wte.weight", "llama-tied": "model.embed_tokens.weight"}
    for name, embedding in embeddings.items():
        config, tensors = parts(checkpoint(name))
        tensors["lm_head.weight"] = tensors.pop(embedding)
        ids = random_ids(2, 16)
        close(load(write(tmp_path / name, config, tensors))(ids), theirs(tiny(name), ids))


@torch.no_grad()
def test_old_names_of_norms(checkpoint, tmp_path):
    config, tensors = parts(checkpoint("roberta-labels"))
    old = {}
    for name, w in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old[name.replace("LayerNorm.bias", "LayerNorm.beta")] = w
    assert old.keys() != tensors.keys()
    ids = random_ids(2, 16)
    close(load(write(tmp_path, config, old), head=3)(ids), theirs(tiny("roberta-labels"), ids))
    again = old["roberta.embeddings.LayerNorm.gamma"].clone()
    both = old | {"roberta.embeddings.LayerNorm.weight": again}
    with pytest.raises(InputError, match="two tensors that both are norm.weight"):
        load(write(tmp_path, config, both), head=3)


def test_a_decoders_classifier_starts_a_new_head(tmp_path, capsys):
    reference = LlamaForSequenceClassification(
        LlamaConfig(**tiny("llama").config.to_dict() | dict(num_labels=2, pad_token_id=0))
    )
    reference.save_pretrained(tmp_path)
    model = load(tmp_path, head=2, task="sst2")
    assert model.head.out.weight.shape == (2, 32)
    said = "its classifier, of label_0, label_1, is not one for sst2: the head is new"
    assert f"{tmp_path}: {said}" in capsys.readouterr().out
    assert load(tmp_path, head=2).head.out.weight.shape == (2, 32)


# -------------------------------------------------------------------- the classes of a classifier


def test_every_task_of_glue_has_the_names_of_its_classes():
    assert LABELS.keys() == GLUE.keys()
    for task, names in LABELS.items():
        assert len(names) == max(1, len(GLUE[task].labels))
    for task in ("mnli", "qnli", "rte"):  # their files have the names themselves
        assert tuple(LABELS[task]) == GLUE[task].labels


@pytest.mark.parametrize("task", GLUE)
def test_a_classifiers_classes_are_put_in_glues_order(task):
    names = LABELS[task][::-1]
    row = {name: float(i) for i, name in enumerate(names)}
    tensors = {"head.out.weight": torch.tensor([[row[n]] * 4 for n in names])}
    tensors["head.out.bias"] = tensors["head.out.weight"][:, 0]
    shown = {str(i): n.upper().replace("_", "-") for i, n in enumerate(names)}
    found = order_head(tensors, {"id2label": shown}, task, "x")
    assert found["head.out.bias"].tolist() == [row[name] for name in LABELS[task]]
    assert found["head.out.weight"][:, 0].tolist() == [row[name] for name in LABELS[task]]


@torch.no_grad()
def test_an_mnli_model_says_here_what_it_says_in_transformers(checkpoint, tmp_path):
    config, tensors = parts(checkpoint("roberta-labels"))
    names = ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]  # as in roberta-large-mnli
    write(tmp_path, config | dict(id2label=dict(enumerate(names))), tensors)
    ids = random_ids(4, 16)
    right = theirs(tiny("roberta-labels"), ids)[:, [2, 1, 0]]
    close(load(tmp_path, head=3, task="mnli")(ids), right)


@pytest.mark.parametrize("names", [None, ["LABEL_0", "LABEL_1", "LABEL_2"], ["a", "b", "c"],
                                   ["entailment", "neutral"]])  # fmt: skip
def test_classes_that_say_nothing_of_the_task_make_a_new_head(checkpoint, tmp_path, capsys, names):
    config, tensors = parts(checkpoint("roberta-labels"))
    config["id2label"] = names and dict(enumerate(names))
    model = load(write(tmp_path, config, tensors), head=3, task="mnli")
    assert not torch.equal(model.head.out.weight, tensors["classifier.out_proj.weight"])
    assert "is not one for mnli: the head is new" in capsys.readouterr().out


@pytest.mark.parametrize("names", [{"x": "entailment"}, {"0": 1}, [1], 7])
def test_classes_that_are_none_are_refused(checkpoint, tmp_path, names):
    config, tensors = parts(checkpoint("roberta-labels"))
    with pytest.raises(InputError, match="id2label"):
        load(write(tmp_path, config | dict(id2label=names), tensors), head=3, task="mnli")


def test_a_masked_lm_has_no_classifier_to_speak_of(checkpoint, capsys):
    load(checkpoint("roberta"), head=3, task="mnli")
    assert not capsys.readouterr().out


ONE_DROPOUT = [
    ("gpt2", dict(resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1)),
    ("gpt2", dict(resid_pdrop=0.1)),  # the others' default
    ("roberta", dict(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)),
    ("roberta", dict(hidden_dropout_prob=0.1, classifier_dropout=None)),
    ("llama", dict(attention_dropout=0.0)),
]
SEVERAL = [
    ("gpt2", dict(resid_pdrop=0.1, attn_pdrop=0.0), "attn_pdrop to 0.0, resid_pdrop to 0.1"),
    ("gpt2", dict(resid_pdrop=0.0), "embd_pdrop to 0.1, resid_pdrop to 0.0"),
    ("roberta", dict(attention_probs_dropout_prob=0.3), "attention_probs_dropout_prob to 0.3"),
    ("roberta", dict(classifier_dropout=0.3), "classifier_dropout to 0.3, hidden_dropout_prob to"),
    ("llama", dict(attention_dropout=0.2), "attention_dropout to 0.2"),
]


def with_dropouts(base: Path, folder: Path, dropouts: dict) -> Path:
    """A copy of a checkpoint that says of dropout no more than that."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config = {n: x for n, x in config.items() if "dropout" not in n and "pdrop" not in n}
    (folder / "config.json").write_text(json.dumps(config | dropouts))
    return folder


@pytest.mark.parametrize("family, said", ONE_DROPOUT)
def test_a_dropout_that_is_one_is_trained_with(checkpoint, tmp_path, family, said):
    model = with_dropouts(checkpoint(family), tmp_path / "model", said)
    s = train.parse(["--model", str(model), "--task", "cola", "--no-molex"])[1][0]
    assert s.dropout == max(x or 0.0 for x in said.values())


@pytest.mark.parametrize("family, said, message", SEVERAL)
def test_dropouts_that_differ_are_refused_where_they_matter(
    checkpoint, tmp_path, family, said, message
):
    model = with_dropouts(checkpoint(family), tmp_path / "model", said)
    load(model)
    flags = ["--model", str(model), "--task", "cola", "--no-molex"]
    with pytest.raises(InputError, match=f"sets {message}.* choose it with --dropout"):
        train.parse(flags)
    assert train.parse([*flags, "--dropout", "0.05"])[1][0].dropout == 0.05
    if family != "roberta":  # on E2E the pretrained model's dropout is the setting's
        train.parse(["--model", str(model), "--task", "e2e"])
