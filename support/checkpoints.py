"""Other people's checkpoints: config.json and tensors as the Hugging Face hub has them.

What comes out is in our names: a dictionary for model.Config, tensors for model.Transformer;
tokenizers.py has the tokenizers. Loading is strict: a setting that is not supported and a tensor
that nobody uses are errors. families.toml has the names, family by family.
"""

import os
import re
import reprlib
import tomllib
from pathlib import Path

import torch
from torch import Tensor

from support.files import InputError, check, locate, read_json, read_tensors, reason
from support.processes import say

FAMILIES = tomllib.loads(Path(__file__).with_name("families.toml").read_text("utf-8"))
NAMES, FIXED, REDUNDANT = map(FAMILIES.pop, ("names", "fixed", "redundant"))
LABELS = FAMILIES.pop("labels")
COUNT, FEW, SHARE = (int, 1, 2**24), (int, 1, 4096), (float, 0, 1)  # see `check`
FORMS = dict.fromkeys("vocab_size d_model d_head d_ff max_positions".split(), COUNT)
FORMS |= dict.fromkeys("n_layer n_head n_kv_head".split(), FEW)
FORMS |= dict(activation=(str,), norm_eps=SHARE, dropout=SHARE, tied=(bool,), bias=(bool,))
ROPE_LLAMA3 = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
WEIGHTS = ["model.safetensors", "model.safetensors.index.json"]  # the first that is there
WEIGHTS += ["pytorch_model.bin", "pytorch_model.bin.index.json"]
SETTINGS = (  # the other files that are read, here and by tokenizers.py
    "config.json generation_config.json tokenizer.json vocab.json merges.txt "
    "tokenizer_config.json special_tokens_map.json added_tokens.json"
).split()


def our_config(c: dict, where: object = "config.json") -> dict:
    """Read the dictionary in a Hugging Face config.json, which messages call `where`. What it says
    in two ways counts as in transformers. Raises InputError if it is unsupported or unsound."""
    family = c.get("model_type")
    if str(family) not in FAMILIES:
        raise InputError(f"model_type {family!r} is not supported; use {', '.join(FAMILIES)}")
    aliases = FAMILIES[family]["aliases"]
    c = c | {theirs: c[alias] for alias, theirs in aliases.items() if alias in c}
    fixed = {"quantization_config": None, **FIXED, **FAMILIES[family]["fixed"]}
    for name, value in fixed.items():
        if c.get(name, value) != value:
            raise InputError(f"{where} sets {name} to {reprlib.repr(c[name])}: not supported")
    size = check(c, {"vocab_size": COUNT}, where)["vocab_size"]
    pad = (int, 0, size - 1) if "pad" in FAMILIES[family]["missing"] else (int, -1, 2**24)
    names, config = NAMES | FAMILIES[family]["names"], dict(family=family)
    missing = dict(pad=None) | FAMILIES[family]["missing"]
    forms = FORMS | dict(pad=pad)
    for name in FAMILIES[family]["names"]:
        forms.setdefault(name, (object,))  # a fork's, of any kind
    for name, form in forms.items():
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
    for name in ("bos", "eos"):
        config[name] = token_ids(c, f"{name}_token_id", size, where)
    config["rope"] = rope_settings(c, where)
    odd = config["rotary"] and config["d_head"] % 2  # rotary positions come in pairs
    if n_head % config["n_kv_head"] or odd:
        raise InputError(f"{where}: the numbers of heads and channels do not fit")
    return check(config, dict(d_head=COUNT, max_positions=COUNT), where)


def check_dropouts(path: Path) -> None:
    """Raise InputError if a config.json has several dropouts, of which a model here has one. It
    matters in training only."""
    c = read_json(path)
    ours, family = our_config(c, path)["dropout"], FAMILIES[c["model_type"]]
    for name, default in family["dropouts"].items():
        theirs = c.get(name, default)
        if theirs not in (None, "", ours):
            named = f"{family['names']['dropout']} to {ours}"
            what = f"{path} sets {name} to {reprlib.repr(theirs)}, {named}"
            raise InputError(f"{what}; training here has one dropout: choose it with --dropout")


def as_list(value: object) -> list:
    """A value that may be a list, or null for an empty one."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def token_ids(c: dict, name: str, size: int, where: object) -> int | tuple[int, ...] | None:
    """The id, or ids, that a config.json has under a name; none beyond the vocabulary, as GPT-2's
    defaults are for a smaller one. Raises InputError."""
    ids = as_list(c.get(name))
    for i in ids:
        check({name: i}, {name: (int, 0, 2**24)}, where)
    known = tuple(i for i in ids if i < size)
    if len(known) > 1:
        return known
    return known[0] if known else None


def rope_settings(c: dict, where: object) -> dict:
    """Rotary theta and, for Llama 3, its scaling. Of the older name and the newer one for all of
    them the older counts, and theta on its own only where they do not say it."""
    for name in ("rope_scaling", "rope_parameters"):
        check(c, {name: (dict,)} if c.get(name) is not None else {}, where)
    scaling = c.get("rope_scaling") or c.get("rope_parameters") or {}
    rope = {"rope_theta": c.get("rope_theta", 10000.0), **scaling}
    part = rope.get("partial_rotary_factor", c.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise InputError(f"{where} sets partial_rotary_factor to {part!r}: not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise InputError(f"rope_type {kind!r} is not supported; use default or llama3")
    numbers = ["rope_theta"]
    if kind == "llama3":
        numbers += ROPE_LLAMA3
        rope.setdefault(ROPE_LLAMA3[-1], c.get("max_position_embeddings"))
    check(rope, dict.fromkeys(numbers, (float, 1e-6, 1e15)), where)
    return rope | {"rope_type": kind}


def convert(tensors: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Hugging Face's state dict as ours: names, GPT-2's transposed and fused projections."""
    out = {}
    for name, w in tensors.items():
        for pattern, new in FAMILIES[config["family"]]["rename"]:
            name = re.sub(pattern, new, name)
        if re.search(REDUNDANT, name):
            continue
        if name in out:
            raise InputError(f"the checkpoint has two tensors that both are {name}")
        w = torch.atleast_1d(w)
        if config["family"] == "gpt2" and re.search(r"\.(attn|mlp)\.\w+\.weight$", name):
            w = w.transpose(0, -1)  # GPT-2 stores these as (in, out)
        if ".attn.c_attn." in name:  # q, k and v in one
            for part, piece in zip("qkv", w.chunk(3), strict=False):
                out[name.replace("c_attn", part)] = piece
        else:
            out[name] = w[:1] if name == "token_type.weight" else w
    for name, other in FAMILIES[config["family"]]["again"].items():
        if config["tied"] and name in out:
            first = out.setdefault(other, out[name])  # a file may have it under either name
            if torch.equal(out[name], first):
                del out[name]
    return out


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that are read. Raises InputError if it has no weights."""
    files = [folder / name for name in SETTINGS] + [weights_file(folder), *shards(folder)]
    return [file for file in files if os.path.isfile(file)]  # a name may be too long for a file's


def is_checkpoints(name: str) -> bool:
    """Whether a file of that name is a checkpoint's, not one of data."""
    return name in SETTINGS or name.endswith((".safetensors", ".bin", ".index.json"))


def weights_file(folder: Path) -> Path:
    """The file of a checkpoint folder's tensors, or the index of several; where there are both, the
    one that transformers takes. Raises InputError if there is none."""
    found = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if not found:
        raise InputError(f"{folder} holds no model.safetensors and no pytorch_model.bin")
    return found


def shards(folder: Path) -> list[Path]:
    """The files that hold a checkpoint folder's tensors. Raises InputError."""
    found = weights_file(folder)
    if found.suffix != ".json":
        return [found]
    names = read_json(found, {"weight_map": (dict,)})["weight_map"].values()
    return [folder / name for name in sorted(set(map(str, names)))]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder. Raises InputError if there are none, or not whole."""
    return {name: w for file in shards(folder) for name, w in read_tensors(file).items()}


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
            snapshot_download(str(name), allow_patterns=["pytorch_model*.bin"])
        return folder
    except GatedRepoError as error:
        what = f"model '{name}' is gated: ask for access at https://huggingface.co/{name}"
        way = "then log in with `hf auth login` or set HF_TOKEN to your access token"
        raise InputError(f"{what}, {way}") from error
    except Exception as error:  # offline, unknown, ...: many kinds, one thing to tell the user
        what = f"model '{name}' is neither a folder nor to be had from the hub"
        raise InputError(f"{what} ({reason(error)})") from error


def read_config(folder: Path) -> dict:
    """What a checkpoint's config.json says, in our names. A text ends as it says, and as
    generation_config.json does. Raises InputError if it is missing or not supported."""
    where, generation = folder / "config.json", folder / "generation_config.json"
    if not where.exists():
        raise InputError(f"{folder} holds no config.json, so it is not a checkpoint")
    if (folder / "adapter_config.json").exists():  # which transformers puts onto the model
        what = f"{folder} holds a model and, in adapter_config.json, an adapter for one"
        raise InputError(f"{what}; load what peft's merge_and_unload gives, or part the two")
    c = read_json(where)
    if generation.exists():
        ids = as_list(c.get("eos_token_id"))
        for i in as_list(read_json(generation).get("eos_token_id")):
            if i not in ids:
                ids.append(i)
        c["eos_token_id"] = ids
    return our_config(c, where)


def read_checkpoint(name: str | Path, task: str | None = None) -> tuple[dict, dict[str, Tensor]]:
    """Config and tensors of a checkpoint folder or hub name, in our names. With a GLUE `task` a
    classifier's head is put in order, see `order_head`."""
    folder = checkpoint_folder(name)
    config = read_config(folder)
    tensors = convert(read_weights(folder), config)
    if task is not None:
        tensors = order_head(tensors, read_json(folder / "config.json"), task, name)
    return config, tensors


def order_head(tensors: dict[str, Tensor], c: dict, task: str, name: object) -> dict[str, Tensor]:
    """A classifier's head with its classes in GLUE's order, by their names in config.json. A head
    whose classes are not the task's is left out, which is said."""
    if not {"head.out.weight", "head.score.weight"} & tensors.keys():
        return tensors  # no classifier
    names = c.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    where = f"{name}: id2label in config.json"
    numbers = [str(i) for i in range(len(check(names, {}, where)))]
    check(names, dict.fromkeys(numbers, (str,)), where)
    names = [re.sub(r"\W", "_", names[i]).lower() for i in numbers]
    wanted = LABELS.get(task, [])
    if "head.score.weight" not in tensors and sorted(names) == sorted(wanted):
        order = [names.index(label) for label in wanted]
        rows = {n: tensors[n][order] for n in ("head.out.weight", "head.out.bias")}
        return tensors | rows
    say(f"{name}: its classifier, of {', '.join(names)}, is not one for {task}: the head is new")
    return {n: w for n, w in tensors.items() if not n.startswith("head.")}
