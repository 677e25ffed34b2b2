"""Other people's files of a LoRA: peft's two, and the .bin files of the LoRA paper's own code.

Inside, a LoRA is two tensors for each projection, "layers.blocks.0.attn.q.A" (r, in) and ".B" (out,
r). families.toml has peft's names, family by family.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.checkpoints import FAMILIES
from support.files import InputError, check, read_json, read_tensors

Tensors = dict[str, Tensor]


class Adapter(NamedTuple):  # a LoRA as a file holds it
    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]  # of q, k, v, o
    tensors: Tensors


def fuse(q: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One LoRA (A, B) of rank 2r for GPT-2's c_attn, whose output stacks q, k and v. A holds q's
    rows above v's; B is block-shaped, with zeros for k."""
    (A_q, B_q), (A_v, B_v) = q, v
    D, r = B_q.shape
    B = B_q.new_zeros(3 * D, 2 * r)
    B[:D, :r] = B_q
    B[2 * D :, r:] = B_v
    return torch.cat([A_q, A_v]), B


def split(w: Tensor, side: str, D: int, where: str) -> Tensors:
    """The inverse of `fuse`: of c_attn's A or B the parts of q and v. Raises InputError if it is
    not made of two such parts."""
    half = w.shape["AB".index(side)] // 2
    if side == "A":
        return dict(q=w[:half], v=w[half:])
    parts = dict(q=w[:D, :half], v=w[2 * D :, half:])
    if sum(part.count_nonzero() for part in parts.values()) != w.count_nonzero():
        raise InputError(f"{where} is not one for q and one for v")
    return parts


def write_peft(
    folder: Path, family: str, tensors: Tensors, r: int, alpha: float, dropout: float, base: str
) -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft does. `base` is the name of
    the pretrained model, which the config notes. GPT-2 takes LoRA on q and v only."""
    hub, fused = FAMILIES[family], family == "gpt2"
    targets = sorted({name.split(".")[-2] for name in tensors})
    if fused and targets != ["q", "v"]:
        raise InputError("for GPT-2, peft's format is written for LoRA on q and v only")
    factor = 2 if fused else 1  # of alpha, too, so that alpha / r is the same
    paths = ["attn.c_attn"] if fused else [hub["peft"][p] for p in targets]
    out = {}
    for i in sorted({int(name.split(".")[2]) for name in tensors}):
        names = [f"layers.blocks.{i}.attn.{p}" for p in targets]
        pairs = [(tensors[f"{n}.A"].detach(), tensors[f"{n}.B"].detach()) for n in names]
        if fused:
            pairs = [fuse(*pairs)]
        for path, (A, B) in zip(paths, pairs, strict=True):
            key = f"base_model.model.{hub['layers']}.{i}.{path}"
            out[f"{key}.lora_A.weight"] = A.cpu().contiguous()
            out[f"{key}.lora_B.weight"] = B.cpu().contiguous()
    parent = r"^(attn|self_attn|attention.self)\."  # "dense" alone would name others, too
    modules = sorted(re.sub(parent, "", path) for path in paths)
    config = dict(peft_type="LORA", base_model_name_or_path=base, task_type=None, bias="none")
    config.update(r=r * factor, lora_alpha=alpha * factor, lora_dropout=dropout)
    config.update(inference_mode=True, fan_in_fan_out=fused, target_modules=modules)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(out, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_peft(folder: Path, family: str, d_model: int) -> Adapter:
    """The LoRA in peft's folder. Raises InputError if it adapts anything but q, k, v and o."""
    folder = Path(folder)
    path = folder / "adapter_config.json"
    forms = dict(r=(int, 1, 4096), lora_alpha=(float, -1e9, 1e9), lora_dropout=(float, 0, 1))
    config = check({"lora_dropout": 0.0} | read_json(path), forms, path)
    tensors = read_tensors(folder / "adapter_model.safetensors")
    for name in ("use_rslora", "alpha_pattern", "alora_invocation_tokens"):
        if config.get(name):  # the tensors would fit, but mean something else
            raise InputError(f"{folder} sets {name}, which is not supported")
    ours = {theirs: p for p, theirs in FAMILIES[family]["peft"].items()}
    found = {}
    for key, w in tensors.items():
        match = re.search(r"\.(\d+)\.(\S+)\.lora_([AB])\.weight$", key)
        if match is None or w.dim() != 2:
            raise InputError(f"{folder} adapts {key}, which is not a LoRA on q, k, v or o")
        i, path, side = match.groups()
        if family == "gpt2" and path == "attn.c_attn":
            parts = split(w, side, d_model, f"{folder}: the LoRA on {key}")
        elif path in ours:
            parts = {ours[path]: w}
        else:
            raise InputError(f"{folder} adapts {path}, which is not q, k, v or o here")
        for p, part in parts.items():
            found[f"layers.blocks.{i}.attn.{p}.{side}"] = part
    if not found:
        raise InputError(f"{folder} holds no LoRA")
    factor = 2 if family == "gpt2" else 1
    r, alpha = config["r"] // factor, config["lora_alpha"] / factor
    targets = tuple(sorted({name.split(".")[-2] for name in found}))
    return Adapter(r, alpha, config["lora_dropout"], targets, found)


def read_loralib(file: Path) -> Tensors:
    """The LoRA in a .bin file of github.com/microsoft/LoRA for a RoBERTa, whose names are those of
    transformers, with lora_A and lora_B. The task head in it is left out. The file does not say
    alpha, which is 16 in that repository's scripts for RoBERTa-base."""
    found = {}
    for name, w in read_tensors(file).items():
        match = re.search(r"\.(\d+)\.attention\.self\.(\w)\w+\.lora_([AB])$", name)
        if match:
            found["layers.blocks.{}.attn.{}.{}".format(*match.groups())] = w
    if not found:
        raise InputError(f"{file} holds no lora_A and lora_B for a RoBERTa")
    return found
