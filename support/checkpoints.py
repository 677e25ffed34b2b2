"""Other people's checkpoints: config.json and tensors as the Hugging Face hub has them.

What comes out is in our names: a dictionary for model.Config, tensors for model.Transformer;
tokenizers.py has the tokenizers. Loading is strict: a setting that is not supported and a tensor
that nobody uses are errors. families.toml has the names, family by family.
"""

import re
import reprlib
import tomllib
from pathlib import Path

import torch
from torch import Tensor

from support.files import InputError, check, locate, read_json, read_tensors, reason

FAMILIES = tomllib.loads(Path(__file__).with_name("families.toml").read_text("utf-8"))
NAMES, FIXED, REDUNDANT = map(FAMILIES.pop, ("names", "fixed", "redundant"))
COUNT, FEW, SHARE = (int, 1, 2**24), (int, 1, 4096), (float, 0, 1)  # see `check`
FORMS = dict.fromkeys("vocab_size d_model d_head d_ff max_positions".split(), COUNT)
FORMS |= dict.fromkeys("n_layer n_head n_kv_head".split(), FEW)
FORMS |= dict(activation=(str,), norm_eps=SHARE, dropout=SHARE, tied=(bool,), bias=(bool,))
ROPE_LLAMA3 = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]


def our_config(c: dict, where: object = "config.json") -> dict:
    """Read the dictionary in a Hugging Face config.json, which messages call `where`. Raises
    InputError if it is unsupported or unsound."""
    family = c.get("model_type")
    if str(family) not in FAMILIES:
        raise InputError(f"model_type {family!r} is not supported; use {', '.join(FAMILIES)}")
    fixed = {"quantization_config": None, **FIXED, **FAMILIES[family]["fixed"]}
    for name, value in fixed.items():
        if c.get(name, value) != value:
            raise InputError(f"{where} sets {name} to {reprlib.repr(c[name])}: not supported")
    if isinstance(c.get("eos_token_id"), list):  # some models end in several ways
        c = c | {"eos_token_id": [*c["eos_token_id"], None][0]}
    token = (int, 0, check(c, {"vocab_size": COUNT}, where)["vocab_size"] - 1)
    pad = token if "pad" in FAMILIES[family]["missing"] else (int, -1, 2**24)
    names, config = NAMES | FAMILIES[family]["names"], dict(family=family)
    missing = dict(bos=None, eos=None, pad=None) | FAMILIES[family]["missing"]
    for name, form in (FORMS | dict(bos=token, eos=token, pad=pad)).items():
        theirs = names.get(name, name)
        absent = name in missing and c.get(theirs) is None
        config[name] = missing[name] if absent else check(c, {theirs: form}, where)[theirs]
    n_head, d_model = config["n_head"], config["d_model"]
    config["n_kv_head"] = config["n_kv_head"] or n_head
    config["d_head"] = config["d_head"] or d_model // n_head
    config["d_ff"] = config["d_ff"] or 4 * d_model
    config |= FAMILIES[family]["flags"]
    if config["first_position"] == "after pad":
        config["first_position"] = config["pad"] + 1
        config["max_positions"] -= config["pad"] + 1
    rope = {"rope_theta": c.get("rope_theta", 10000.0)}
    for name in ("rope_scaling", "rope_parameters"):  # an older name and a newer one
        rope |= check(c, {name: (dict,)}, where)[name] if c.get(name) is not None else {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise InputError(f"rope_type {kind!r} is not supported; use default or llama3")
    numbers = ["rope_theta", *(ROPE_LLAMA3 if kind == "llama3" else ())]
    config["rope"] = check(rope, dict.fromkeys(numbers, (float, 1e-6, 1e9)), where)
    config["rope"]["rope_type"] = kind
    odd = config["rotary"] and config["d_head"] % 2  # rotary positions come in pairs
    if n_head % config["n_kv_head"] or odd:
        raise InputError(f"{where}: the numbers of heads and channels do not fit")
    return check(config, dict(d_head=COUNT, max_positions=COUNT), where)


def convert(tensors: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Hugging Face's state dict as ours: names, GPT-2's transposed and fused projections."""
    out = {}
    for name, w in tensors.items():
        for pattern, new in FAMILIES[config["family"]]["rename"]:
            name = re.sub(pattern, new, name)
        if re.search(REDUNDANT, name):
            continue
        w = torch.atleast_1d(w)
        if config["family"] == "gpt2" and re.search(r"\.(attn|mlp)\.\w+\.weight$", name):
            w = w.transpose(0, -1)  # GPT-2 stores these as (in, out)
        if ".attn.c_attn." in name:  # q, k and v in one
            for part, piece in zip("qkv", w.chunk(3), strict=False):
                out[name.replace("c_attn", part)] = piece
        else:
            out[name] = w[:1] if name == "token_type.weight" else w
    for name, other in FAMILIES[config["family"]]["again"].items():
        if config["tied"] and name in out and other in out and torch.equal(out[name], out[other]):
            del out[name]
    return out


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder. Raises InputError if there are none, or not whole."""
    names = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")
    index, single, legacy = (folder / name for name in names)
    if not (index.exists() or single.exists() or legacy.exists()):
        raise InputError(f"{folder} holds no model.safetensors and no pytorch_model.bin")
    files = [single if single.exists() else legacy]
    if index.exists():
        shards = read_json(index, {"weight_map": (dict,)})["weight_map"].values()
        files = [folder / name for name in sorted(set(map(str, shards)))]
    return {name: w for file in files for name, w in read_tensors(file).items()}


def checkpoint_folder(name: str | Path) -> Path:
    """A local folder, or a hub name such as "gpt2-medium", downloaded once and cached."""
    folder = locate(name)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download  # slow to import, and only needed here
    from huggingface_hub.errors import GatedRepoError

    wanted = ["*.json", "*.safetensors", "merges.txt"]
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(str(name), allow_patterns=["pytorch_model.bin"])
        return folder
    except GatedRepoError as error:
        what = f"model '{name}' is gated: ask for access at https://huggingface.co/{name}"
        way = "then log in with `hf auth login` or set HF_TOKEN to your access token"
        raise InputError(f"{what}, {way}") from error
    except Exception as error:  # offline, unknown, ...: many kinds, one thing to tell the user
        what = f"model '{name}' is neither a folder nor to be had from the hub"
        raise InputError(f"{what} ({reason(error)})") from error


def read_config(folder: Path) -> dict:
    """What a checkpoint's config.json says, in our names. Raises InputError if it is missing or
    not supported."""
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no config.json, so it is not a checkpoint")
    return our_config(read_json(folder / "config.json"), folder / "config.json")


def read_checkpoint(name: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Config and tensors of a checkpoint folder or hub name, in our names."""
    folder = checkpoint_folder(name)
    config = read_config(folder)
    return config, convert(read_weights(folder), config)
