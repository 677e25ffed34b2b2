"""The transformer in model.py against transformers' own, on small random checkpoints of each family
and, where it can be had, on a real one (SmolLM2-135M); loading, and what it refuses.

pytest tests/test_model.py
"""

import json
import math
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import ROPE, TINY, VOCAB, load_lm, need_shared, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from data import Tokenizer
from lora import add_lora
from model import Cache, Config, Transformer, load
from support.checkpoints import our_config
from support.files import InputError

NANO = Path(__file__).resolve().parents[1] / "nano" / "gpt2"
DECODERS = [name for name in TINY if "roberta" not in name]
# Of a padded batch; RoBERTa's classification head reads the first token, so not on the left.
PADDED = [(n, s) for n in TINY for s in ("right", "left") if (n, s) != ("roberta-labels", "left")]
PAD = 1


def head_of(name: str) -> str | int:
    return 3 if name == "roberta-labels" else "lm"


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def pad(rows: list[Tensor], side: str, to: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as ids and mask, each (B, to)."""
    ids = torch.full((len(rows), to), PAD)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(to - len(row), to)
        ids[i, span], mask[i, span] = row, True
    return ids, mask


@torch.no_grad()
def theirs(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """transformers' logits. Its decoders are told the positions, which they would count from the
    padding; its RoBERTa finds them by the padding's id."""
    if mask is None or model.config.model_type == "roberta":
        return model(ids, attention_mask=mask).logits
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask, position_ids=positions).logits


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def parts(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """The config and the tensors of a checkpoint."""
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def write(folder: Path, config: dict, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: w.contiguous() for name, w in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ------------------------------------------------------------------------------- equal transformers


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_logits_equal_transformers(checkpoint, name):
    ids = random_ids(3, 64)  # as long as the positions reach, and beyond Llama's original 32
    expected = theirs(tiny(name), ids)
    assert expected.std() > 0.3
    close(load_lm(checkpoint(name), head_of(name))(ids), expected)


@pytest.mark.parametrize("name, side", PADDED)
@torch.no_grad()
def test_logits_equal_transformers_in_a_padded_batch(checkpoint, name, side):
    ids, mask = pad([random_ids(n, seed=n) for n in (9, 5, 1)], side, to=12)
    ours, expected = (
        load_lm(checkpoint(name), head_of(name))(ids, mask),
        theirs(tiny(name), ids, mask),
    )
    close(*((ours, expected) if ours.dim() == 2 else (ours[mask], expected[mask])))


@pytest.mark.parametrize("name", ["roberta", "gpt2", "llama"])
@torch.no_grad()
def test_padding_has_the_states_of_transformers(checkpoint, name):
    """On the right, too, where it reads the real tokens, or the earlier ones, and not itself."""
    ids, mask = pad([random_ids(n, seed=n) for n in (9, 5, 1)], "right", to=12)
    close(load_lm(checkpoint(name), head_of(name))(ids, mask), theirs(tiny(name), ids, mask))


@pytest.mark.parametrize(
    "name, changes",
    [
        ("gpt2", dict(n_inner=40, activation_function="gelu", layer_norm_epsilon=0.1)),
        ("roberta", dict(layer_norm_eps=0.1, max_position_embeddings=20, pad_token_id=2)),
        ("llama", dict(num_key_value_heads=4, head_dim=16, attention_bias=True)),
        ("llama", dict(num_key_value_heads=1, rms_norm_eps=0.1)),
        ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))),
    ],
)
def test_settings_of_the_config(tmp_path, name, changes):
    reference = tiny(name, **changes)
    reference.save_pretrained(tmp_path)
    ids = random_ids(2, 16)
    close(load_lm(tmp_path)(ids), theirs(reference, ids))


def test_special_tokens_of_the_config(checkpoint, tmp_path):
    c = Config.load(checkpoint("roberta"))
    assert (c.bos, c.pad, c.eos) == (0, 1, 2)
    config, tensors = parts(checkpoint("llama"))
    c = Config.load(write(tmp_path, config | dict(eos_token_id=[5, 6]), tensors))
    # Llama 3.1's instruct models end in several ways
    assert (c.bos, c.pad, c.eos) == (1, None, (5, 6))


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_rope_scaling_as_on_the_hub(checkpoint, tmp_path, kind):
    """Llama 3.2's config.json is older than transformers 5: rope_theta and rope_scaling apart."""
    config, tensors = parts(checkpoint("llama"))
    del config["rope_parameters"]
    scaling = {n: x for n, x in ROPE.items() if n not in ("rope_type", "rope_theta")}
    config |= dict(rope_theta=500.0, rope_scaling={kind: "llama3", **scaling})
    folder, ids = write(tmp_path, config, tensors), random_ids(2, 64)
    assert ids.shape[1] > scaling["original_max_position_embeddings"]
    close(load(folder)(ids), theirs(LlamaForCausalLM.from_pretrained(folder), ids))


def test_rope_scaling_matters(checkpoint, tmp_path):
    config, tensors = parts(checkpoint("llama"))
    plain = write(tmp_path, config | dict(rope_parameters=dict(rope_theta=10000.0)), tensors)
    a, b = load(plain)(random_ids(1, 64)), load(checkpoint("llama"))(random_ids(1, 64))
    assert (a - b).abs().max() > 0.1


@torch.no_grad()
def test_smollm2_equals_transformers(smollm2):
    ours, reference = load(smollm2), LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = Tokenizer.load(smollm2, ours.config)
    texts = ["The capital of France is", "Blue Spice is a coffee shop in the city centre. It costs"]
    ids, mask = pad([torch.tensor(tokenizer.encode(t)) for t in texts], "left", to=20)
    a, b = ours(ids, mask), theirs(reference, ids, mask)
    close(a[mask], b[mask])
    assert tokenizer.decode(a[0, -1:].argmax(-1).tolist()) == " Paris"


@torch.no_grad()
def test_nano_gpt2_equals_transformers():
    check_against_transformers(NANO)


def check_against_transformers(folder: Path) -> None:
    ours, reference = load(folder), GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer, their_tokenizer = (
        Tokenizer.load(folder, ours.config),
        AutoTokenizer.from_pretrained(folder),
    )
    text = "name : Blue Spice | price : £20-25\n\nIt isn't a  café, it's a pub; rated 5 out of 5."
    ids = tokenizer.encode(text)
    assert ids == their_tokenizer.encode(text) and tokenizer.decode(ids) == text
    ids = torch.tensor([ids, ids[::-1]])
    close(ours(ids), theirs(reference.eval(), ids))


# ---------------------------------------------------------------------- what must hold in any model


@pytest.mark.parametrize("name, side", PADDED)
@torch.no_grad()
def test_padding_never_changes_a_real_token(checkpoint, name, side):
    model = load_lm(checkpoint(name), head_of(name))
    rows = [random_ids(n, seed=n) for n in (7, 4, 1)]
    ids, mask = pad(rows, side, to=30)
    for i, out in enumerate(model(ids, mask)):
        close(out if out.dim() == 1 else out[mask[i]], model(rows[i][None])[0], 1e-5)


@pytest.mark.parametrize("name", ["gpt2", "roberta", "llama"])
@torch.no_grad()
def test_who_looks_at_whom(checkpoint, name):
    model, ids = load_lm(checkpoint(name)), random_ids(1, 12)
    changed = ids.clone()
    changed[0, 7] = 3 if ids[0, 7] != 3 else 4
    difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert difference[7:].min() > 1e-3  # all from the changed token on see it,
    if name == "roberta":
        assert difference[:7].min() > 1e-3  # and in RoBERTa all before it;
    else:
        assert difference[:7].max() == 0  # in a decoder none


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_cached_generation_equals_transformers_without_cache_or_padding(checkpoint, name, side):
    """Prompts of three lengths, then tokens by one and by two; on the way the batch is reordered,
    one sequence doubled and one dropped."""
    model, reference = load_lm(checkpoint(name)), tiny(name)
    rows = [random_ids(n, seed=n) for n in (6, 3, 1)]
    cache = Cache()
    prompt_logits = model(*pad(rows, side, to=6), cache=cache)
    ends = [len(row) - 1 if side == "right" else -1 for row in rows]
    close(
        torch.stack([logits[end] for logits, end in zip(prompt_logits, ends, strict=True)]),
        torch.stack([theirs(reference, row[None])[0, -1] for row in rows]),
    )
    for step, (size, index) in enumerate([(1, None), (1, [2, 0, 0]), (2, None), (1, [1, 2])]):
        if index is not None:
            cache.select(torch.tensor(index))
            rows = [rows[i] for i in index]
        new = random_ids(len(rows), size, seed=100 + step)
        logits = model(new, cache=cache)
        rows = [torch.cat(pair) for pair in zip(rows, new, strict=True)]
        expected = [theirs(reference, row[None])[0, -size:] for row in rows]
        close(logits, torch.stack(expected))


@torch.no_grad()
def test_cache_without_padding(checkpoint):
    model, ids = load(checkpoint("llama")), random_ids(2, 5)
    cache = Cache()
    steps = [model(ids[:, i : i + 1], cache=cache) for i in range(5)]
    close(torch.cat(steps, dim=1), model(ids), 1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_decoder_classifies_by_its_last_real_token(checkpoint, name):
    model, bare = load(checkpoint(name), head=4), load(checkpoint(name), head="none")
    rows = [random_ids(n, seed=n) for n in (7, 4)]
    last = torch.stack([bare.hidden(row[None])[0, -1] for row in rows])
    expected = model.head.out(torch.tanh(model.head.dense(last)))
    for side in ("right", "left"):
        close(model(*pad(rows, side, to=9)), expected, 1e-5)


def test_dropout_comes_from_the_config_unless_given(checkpoint):
    ids = random_ids(1, 8)
    for name, rate in [("gpt2", 0.1), ("roberta", 0.1), ("llama", 0.0)]:
        assert load(checkpoint(name)).config.dropout == rate
    model = load(checkpoint("gpt2"))
    assert not model.training and torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    still = load(checkpoint("gpt2"), dropout=0.0)
    close(still.train()(ids), model.eval()(ids), 0)


@pytest.mark.parametrize("name", ["gpt2", "roberta", "llama"])
@torch.no_grad()
def test_too_long_a_sequence(checkpoint, name):
    model, cache = load_lm(checkpoint(name)), Cache()
    assert model(random_ids(1, 64)).shape == (1, 64, VOCAB)
    with pytest.raises(InputError, match="65 tokens are more than the 64 positions"):
        model(random_ids(1, 65))
    if name != "roberta":
        model(random_ids(1, 60), cache=cache)
        with pytest.raises(InputError, match="65 tokens are more than the 64 positions"):
            model(random_ids(1, 5), cache=cache)


# --------------------------------------------------------------------------- layouts of checkpoints


def legacy_gpt2(tensors: dict) -> dict:
    """The hub's GPT-2: no prefix, and in every layer the causal mask as a buffer."""
    out = {n.removeprefix("transformer."): w for n, w in tensors.items()}
    for i in range(3):
        out[f"h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        out[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return out


def legacy_roberta(tensors: dict) -> dict:
    """The hub's RoBERTa: a pooler, position numbers and the output embedding in it."""
    return tensors | {
        "roberta.pooler.dense.weight": torch.randn(32, 32),
        "roberta.pooler.dense.bias": torch.randn(32),
        "roberta.embeddings.position_ids": torch.arange(66)[None],
        "lm_head.decoder.weight": tensors["roberta.embeddings.word_embeddings.weight"].clone(),
        "lm_head.decoder.bias": tensors["lm_head.bias"].clone(),
    }


def legacy_llama(tensors: dict) -> dict:
    """Llama 2's: the rotary frequencies of every layer, and a tied LM head stored again."""
    inverse = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    return tensors | inverse | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


@pytest.mark.parametrize(
    "name, rewrite",
    [("gpt2", legacy_gpt2), ("roberta", legacy_roberta), ("llama-tied", legacy_llama)],
)
def test_redundant_tensors_are_passed_over(checkpoint, tmp_path, name, rewrite):
    config, tensors = parts(checkpoint(name))
    ids = random_ids(2, 10)
    close(load_lm(write(tmp_path, config, rewrite(tensors)))(ids), theirs(tiny(name), ids))


@torch.no_grad()
def test_bare_roberta(checkpoint, tmp_path):
    """A RobertaModel: names without a prefix, and no head."""
    reference, ids = tiny("roberta").roberta, random_ids(2, 10)
    reference.save_pretrained(tmp_path)
    close(load(tmp_path, head="none").hidden(ids), reference(ids).last_hidden_state)
    close(load(tmp_path)(ids), reference(ids).last_hidden_state)  # it has no head to be read
    with pytest.raises(InputError, match=r"lacks 5 tensor\(s\): head.bias, head.dense.bias"):
        load_lm(tmp_path)


def test_pytorch_model_bin(checkpoint, tmp_path):
    config, tensors = parts(checkpoint("gpt2"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    ids = random_ids(2, 10)
    close(load(tmp_path)(ids), theirs(tiny("gpt2"), ids))


def test_sharded(tmp_path):
    tiny("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids = random_ids(2, 10)
    close(load(tmp_path)(ids), theirs(tiny("llama"), ids))


def test_half_precision_becomes_float32(checkpoint, tmp_path):
    config, tensors = parts(checkpoint("gpt2"))
    half = {n: w.half() for n, w in tensors.items()}
    model = load(write(tmp_path, config, half))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    reference = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    close(model(random_ids(2, 10)), theirs(reference, random_ids(2, 10)))


@pytest.mark.parametrize("name", ["gpt2", "roberta", "roberta-labels", "llama"])
def test_new_classification_head(checkpoint, name):
    """A head of another size than the checkpoint's is new; all else is the checkpoint's."""
    model, bare = load(checkpoint(name), head=5), load(checkpoint(name), head="none")
    assert model.head.out.weight.shape == (5, 32) and model.head.out.weight.std() > 0
    body = {n: w for n, w in model.state_dict().items() if not n.startswith("head.")}
    assert body.keys() == bare.state_dict().keys()
    assert all(torch.equal(w, bare.state_dict()[n]) for n, w in body.items())


# ------------------------------------------------------------------------------ numbers of the real


def on_meta(config: str, head: str | int = "lm") -> Transformer:
    """The architecture of ../shared/models/configs/<config>.json, without memory for it."""
    path = need_shared(f"models/configs/{config}.json")
    with torch.device("meta"):
        return Transformer(Config(**our_config(json.loads(path.read_text()))), head)


def count(model: Transformer, trainable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


@pytest.mark.parametrize(
    "config, head, expected",
    [
        ("gpt2", "lm", 124_439_808),
        ("gpt2-medium", "lm", 354_823_168),
        ("roberta-base", "none", 124_055_040),
        ("roberta-large", "none", 354_310_144),
        ("llama-3.2-1b", "lm", 1_235_814_400),
    ],
)
def test_parameter_counts(config, head, expected):
    assert count(on_meta(config, head)) == expected


def test_lora_parameter_counts_and_flops():
    assert count(add_lora(on_meta("roberta-base", 2), r=8, alpha=8), trainable=True) == 294_912 + (
        768 * 768 + 768 + 2 * 768 + 2  # the classification head
    )
    llama = add_lora(on_meta("llama-3.2-1b"), r=8, alpha=16)  # Table 14
    assert (count(llama), count(llama, trainable=True)) == (1_236_666_368, 851_968)
    counter = FlopCounterMode(display=False)
    with counter, torch.device("meta"):
        llama(torch.zeros(1, 4096, dtype=torch.long))
    assert round(counter.get_total_flops() / 1e12, 3) == 12.329


# ------------------------------------------------------------------------------ what cannot be read


@pytest.mark.parametrize("reason", ["401 Client Error\nfor url ...", ""])
def test_unknown_model(monkeypatch, reason):
    def fail(*args, **kwargs):
        raise ConnectionError(reason)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match="model 'gpt7' is neither a folder nor .* hub") as caught:
        load("gpt7")
    assert "\n" not in str(caught.value) and (reason[:3] or "ConnectionError") in str(caught.value)


@pytest.mark.parametrize("name", ["9" * 5000, "a\0b", "\ud800", "", "a/" * 3000])
def test_a_name_that_can_be_no_path(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError):
        load(name)


def test_hub_name(checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or checkpoint("gpt2"),
    )
    close(load("someone/gpt2")(random_ids(1, 5)), theirs(tiny("gpt2"), random_ids(1, 5)))
    assert asked == [("someone/gpt2", ["*.json", "*.safetensors", "merges.txt"])]


def test_hub_name_without_safetensors(checkpoint, monkeypatch, tmp_path):
    """The bigger, older file is fetched only where there is no other."""

    def fetch(name, allow_patterns):
        shutil.copy(checkpoint("gpt2") / "config.json", tmp_path)
        if "pytorch_model*.bin" in allow_patterns:
            tensors = load_file(checkpoint("gpt2") / "model.safetensors")
            torch.save(tensors, tmp_path / "pytorch_model.bin")
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    close(load("someone/gpt2")(random_ids(1, 5)), theirs(tiny("gpt2"), random_ids(1, 5)))


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("gpt2", dict(model_type="bert"), "model_type 'bert' is not supported; use gpt2"),
        ("gpt2", dict(model_type=None), "model_type None is not supported"),
        ("gpt2", dict(model_type=["gpt2"]), r"model_type \['gpt2'\] is not supported"),
        ("gpt2", dict(n_head=None, n_embd=None), "config.json lacks n_embd$"),
        ("roberta", dict(intermediate_size=None), "config.json lacks intermediate_size"),
        ("llama", dict(rope_parameters=ROPE | dict(rope_type="yarn")), "rope_type 'yarn'"),
        ("gpt2", dict(activation_function="relu"), "activation 'relu' is not one of"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "sets scale_attn_by_inverse_layer_i"),
        ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights"),
        ("roberta", dict(is_decoder=True), "sets is_decoder"),
        ("gpt2", dict(n_layer=2), r"has unknown 16 tensor\(s\): layers.blocks.2.attn.k.bias, "),
        ("gpt2", dict(n_layer=4), r"lacks 16 tensor\(s\): layers.blocks.3.attn.k.bias, .*\.\.\.$"),
        ("gpt2", dict(tie_word_embeddings=False), r"lacks 1 tensor\(s\): head.weight$"),
        ("roberta", dict(tie_word_embeddings=False), "tie_word_embeddings"),
    ],
)
def test_config_that_does_not_fit(checkpoint, tmp_path, name, changes, message):
    config, tensors = parts(checkpoint(name))
    config = {n: x for n, x in (config | changes).items() if x is not None}
    with pytest.raises(InputError, match=message):
        load(write(tmp_path, config, tensors))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"transformer.h.1.ln_1.weight": None}, r"lacks 1 tensor\(s\): layers.blocks.1.norm1.weig"),
        ({"transformer.h.1.attn.c_attn.bias": None}, "lacks 3 .*1.attn.k.bias, .*q.bias, .*v.bias"),
        ({"transformer.h.0.adapter.weight": torch.ones(2)}, "has unknown 1 .*0.adapter.weight"),
        (
            {"transformer.wpe.weight": torch.ones(10, 32)},
            r"has misshapen 1 .*positions.weight \(10, 32\), not \(64, 32\)",
        ),
    ],
)
def test_tensors_that_do_not_fit(checkpoint, tmp_path, changes, message):
    config, tensors = parts(checkpoint("gpt2"))
    tensors = {n: w for n, w in (tensors | changes).items() if w is not None}
    with pytest.raises(InputError, match=re.escape(str(tmp_path)) + " " + message):
        load(write(tmp_path, config, tensors))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_named(checkpoint, tmp_path, value):
    config, tensors = parts(checkpoint("gpt2"))
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 4] = value
    message = r"has NaN or infinite values in 1 tensor\(s\): layers.blocks.1.mlp.up.weight$"
    with pytest.raises(InputError, match=message):
        load(write(tmp_path, config, tensors))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(checkpoint, tmp_path, dtype):
    config, tensors = parts(checkpoint("llama"))
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].mul(10).to(dtype)
    with pytest.raises(InputError, match=r"has quantized 1 .*: layers.blocks.0.attn.q.weight$"):
        load(write(tmp_path, config, tensors))


def test_a_quantization_config_is_refused(checkpoint, tmp_path):
    config, tensors = parts(checkpoint("llama"))
    load(write(tmp_path, config | dict(quantization_config=None), tensors))
    config["quantization_config"] = dict(quant_method="bitsandbytes", load_in_8bit=True)
    with pytest.raises(InputError, match="sets quantization_config to {'load_in_8bit': True"):
        load(write(tmp_path, config, tensors))


HEADS = {"gpt2": "transformer.wte.weight", "llama-tied": "model.embed_tokens.weight"}


@torch.no_grad()
@pytest.mark.parametrize("name", HEADS)
def test_a_tied_head_that_differs_is_used_as_in_transformers(checkpoint, tmp_path, capsys, name):
    config, tensors = parts(checkpoint(name))
    ids, embedding = random_ids(2, 10), tensors[HEADS[name]]
    load(write(tmp_path, config, tensors | {"lm_head.weight": embedding.clone()}))
    assert capsys.readouterr().out == ""  # it is the embedding again
    write(tmp_path, config, tensors | {"lm_head.weight": embedding.flip(0)})
    ours, reference = load(tmp_path), TINY[name][0].from_pretrained(tmp_path).eval()
    assert re.search(r"ties lm_head.weight .* differs: used as is", capsys.readouterr().out)
    close(ours(ids), theirs(reference, ids))
    assert (ours(ids) - load(checkpoint(name))(ids)).abs().max() > 0.1
    load(tmp_path, head=2), load(tmp_path, head="none")
    assert capsys.readouterr().out == ""  # it is not used


def test_a_roberta_with_a_decoder_of_its_own_is_refused(checkpoint, tmp_path):
    """transformers would use it; there is no such head here."""
    config, tensors = parts(checkpoint("roberta"))
    embedding = tensors["roberta.embeddings.word_embeddings.weight"]
    folder = write(tmp_path, config, tensors | {"lm_head.decoder.weight": embedding.flip(0)})
    with pytest.raises(InputError, match=r"has unknown 1 tensor\(s\): head.decoder.weight"):
        load_lm(folder)
    load(folder, head=2)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("gpt2", dict(n_embd="32"), "n_embd is '32', not int from 1 to"),
        ("gpt2", dict(n_head=0), "n_head is 0, not int from 1 to"),
        ("gpt2", dict(n_layer=True), "n_layer is True, not int"),
        ("gpt2", dict(resid_pdrop=1.5), "resid_pdrop is 1.5, not float from 0 to 1"),
        ("gpt2", dict(layer_norm_epsilon=math.nan), "layer_norm_epsilon is nan, not float"),
        ("gpt2", dict(eos_token_id=-1), "eos_token_id is -1, not int from 0 to"),
        ("gpt2", dict(n_head=33), "d_head is 0, not int from 1 to"),
        ("roberta", dict(pad_token_id=96), "max_positions is -31, not int from 1 to"),
        ("llama", dict(num_key_value_heads=3), "numbers of heads and channels do not fit"),
        ("llama", dict(head_dim=5), "numbers of heads and channels do not fit"),
        ("llama", dict(rope_parameters=ROPE | dict(factor="x")), "factor is 'x', not float from"),
        ("llama", dict(rope_parameters=dict(rope_type="llama3")), "lacks factor$"),
    ],
)
def test_values_of_the_config_are_checked(checkpoint, tmp_path, name, changes, message):
    config, tensors = parts(checkpoint(name))
    with pytest.raises(InputError, match=message) as caught:
        load(write(tmp_path, config | changes, tensors))
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"[1]", r"holds \[1\], not names with values"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (b'{"a":' * 100_000, "is not JSON: maximum recursion depth"),
        (b"\xff{}", "is not UTF-8 text"),
        ("{}".encode("utf-16"), "is not UTF-8 text"),
        (b'{"model_type": "\\u0007\\n"}', "model_type"),
    ],
)
def test_a_config_that_is_none(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        Config.load(tmp_path)
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


def test_a_pickle_that_holds_code_is_refused_in_a_sentence(checkpoint, tmp_path):
    folder = write(tmp_path, *parts(checkpoint("gpt2")))
    path = to_bin(folder, {"a": Path("runs code when loaded")})
    with pytest.raises(InputError) as caught:
        load(folder)
    assert str(caught.value) == f"{path} cannot be read: it is damaged, or holds code"


def test_a_changed_byte_in_a_pickle_is_noticed(checkpoint, tmp_path):
    """torch itself would load it."""
    config, tensors = parts(checkpoint("gpt2"))
    path = to_bin(write(tmp_path, config, tensors), tensors)
    data = bytearray(path.read_bytes())
    data[data.index(tensors["transformer.wte.weight"].numpy().tobytes()[:64])] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    with pytest.raises(InputError, match="in it is not what was written"):
        load(tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def to_bin(folder: Path, content: object) -> Path:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


SHARDS = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "config.json").unlink(), "holds no config.json, so it is not a checkpoint"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors and no pytorch"),
        (lambda f: cut(f / "model.safetensors"), "cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be read"),
        (lambda f: cut(to_bin(f, {"a": torch.ones(99)})), "cannot be read"),
        (lambda f: to_bin(f, {}).write_bytes(b""), "cannot be read"),
        (lambda f: to_bin(f, {"a": Path("runs code when loaded")}), "cannot be read"),
        (lambda f: index(f, SHARDS), "cannot be read.*model-00001-of-00002.safetensors"),
        (lambda f: index(f, "{"), "index.json is not JSON"),
        (lambda f: index(f, "{}"), "index.json lacks weight_map"),
    ],
)
def test_damaged_checkpoint(checkpoint, tmp_path, damage, message):
    folder = write(tmp_path, *parts(checkpoint("gpt2")))
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_relative_folder_is_found_beside_the_scripts(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Config.load(NANO) == load("nano/gpt2").config
