"""Other people's files of a LoRA: peft's two, and the .bin files of the LoRA paper's own code.

Inside, a LoRA is two tensors for each projection, "layers.blocks.0.attn.q.A" (r, in) and ".B" (out,
r). families.toml has peft's names, family by family. Reading is strict: a setting that may change
what the tensors mean and a tensor that nobody uses, peft included, are errors.
"""

import math
import re
import reprlib
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.checkpoints import FAMILIES, as_list
from support.files import InputError, check, read_json, read_tensors, write_atomic, write_json

Tensors = dict[str, Tensor]
GATE = ("layers.gates.", "layers.alpha")  # how the names of MoLEx's own parameters begin
PREFIX = "base_model.model."  # how the names in peft's files begin

# What adapter_config.json may say, by peft's names. READ is used, see `check`. Of CHOICES these
# values are as good as the default. SELECTION says which modules have one. SILENT says how the LoRA
# was made; the tensors say the rest.
READ = dict(r=(int, 1, 4096), lora_alpha=(float, -1e9, 1e9), lora_dropout=(float, 0, 1))
READ |= dict(use_rslora=(bool, None))
STARTS = (True, "gaussian", "orthogonal", "eva", "mica")  # others change the model's own weights
CHOICES = dict(peft_type=("LORA",), bias=("none",), init_lora_weights=STARTS)
SELECTION = dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save"), str)
SELECTION |= dict(layers_to_transform=int, layers_pattern=str)  # one, a list, or null
SILENT = (
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "fan_in_fan_out megatron_core qalora_group_size ensure_weight_tying loftq_config eva_config "
    "corda_config lora_ga_config runtime_config"
).split()


class LoRASettings(NamedTuple):  # what add_lora takes
    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]  # of q, k, v, o


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
    folder: Path, family: str, parameters: Tensors, head: set[str], settings: set[tuple], base: str
) -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft does: of a model's parameters
    the LoRA and the classification head, whose names are `head`. `settings` has the rank, alpha and
    dropout of every LoRA. `base` is the name of the pretrained model, which the config notes.
    Raises InputError for what peft's files cannot hold; for MoLEx's gate it prints a line."""
    if not settings:
        raise InputError("the model has no LoRA to save; call add_lora first")
    if len(settings) > 1:
        raise InputError("peft's files hold one rank, alpha and dropout, but these LoRAs differ")
    [(r, alpha, dropout)] = settings
    names = FAMILIES[family]["peft_head"] if head else {}
    if head and not names:
        raise InputError(
            f"peft's files have no place for a {family} classifier's head of this kind"
        )
    held = {n: w.cpu() for n, w in parameters.items() if n.endswith((".A", ".B"))}
    out, modules = in_peft_names(held, family)
    for theirs, ours in names.items():
        out[theirs] = parameters[ours].cpu()
    fused = family == "gpt2"
    factor = 2 if fused else 1  # of alpha, too, so that alpha / r is the same
    config = dict(peft_type="LORA", base_model_name_or_path=base, task_type=None, bias="none")
    config.update(r=r * factor, lora_alpha=alpha * factor, lora_dropout=dropout)
    config.update(inference_mode=True, fan_in_fan_out=fused, target_modules=modules)
    if head:
        config.update(task_type="SEQ_CLS", modules_to_save=["classifier"])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = {PREFIX + name: w.contiguous() for name, w in out.items()}
    form = dict(metadata={"format": "pt"})
    write_atomic(folder / "adapter_model.safetensors", lambda path: save_file(held, path, **form))
    write_json(folder / "adapter_config.json", config)
    if any(name.startswith(GATE) for name in parameters):
        what = "the LoRA and the head" if head else "the LoRA alone"
        print(f"{folder}: peft's files hold {what}, not MoLEx's gate")


def in_peft_names(tensors: Tensors, family: str) -> tuple[Tensors, list[str]]:
    """A LoRA's tensors under peft's names, and what peft calls the modules that have one. GPT-2
    takes LoRA on q and v only."""
    hub, fused = FAMILIES[family], family == "gpt2"
    targets = sorted({name.split(".")[-2] for name in tensors})
    if fused and targets != ["q", "v"]:
        raise InputError("for GPT-2, peft's format is written for LoRA on q and v only")
    paths = ["attn.c_attn"] if fused else [hub["peft"][p] for p in targets]
    out = {}
    for i in sorted({int(name.split(".")[2]) for name in tensors}):
        names = [f"layers.blocks.{i}.attn.{p}" for p in targets]
        pairs = [(tensors[f"{n}.A"], tensors[f"{n}.B"]) for n in names]
        if fused:
            pairs = [fuse(*pairs)]
        for path, (A, B) in zip(paths, pairs, strict=True):
            key = f"{hub['layers']}.{i}.{path}"
            out[f"{key}.lora_A.weight"] = A
            out[f"{key}.lora_B.weight"] = B
    parent = r"^(attn|self_attn|attention.self)\."  # "dense" alone would name others, too
    return out, sorted(re.sub(parent, "", path) for path in paths)


def read_peft_config(path: Path) -> dict:
    """What adapter_config.json says. Raises InputError, with its name, for a field that is set and
    not known to leave the meaning of the tensors alone."""
    absent = dict.fromkeys(SELECTION) | dict(lora_dropout=0.0, use_rslora=False)
    config = absent | read_json(path)
    for name, value in config.items():
        known = name in (*SILENT, *READ, *SELECTION) or value in CHOICES.get(name, ())
        if value and not known:  # what is off, null or empty does nothing
            what = f"{path} sets {name} to {reprlib.repr(value)}, which is not supported"
            raise InputError(
                f"{what}; try peft's merge_and_unload and load the model that it gives"
            )
    check(config, READ, path)
    for name, kind in SELECTION.items():
        if any(type(value) is not kind for value in as_list(config[name])):
            what = f"{path}: {name} is {reprlib.repr(config[name])}"
            raise InputError(f"{what}, not {kind.__name__}, a list of it, or null")
    return config


def is_selected(module: str, config: dict, default: list[str]) -> bool:
    """Whether peft (0.21) gives a module, by its name from the model's root, a LoRA. default: the
    targets where the config is silent. In a list each is a module's whole name or the end of it;
    one string is a regular expression, which peft takes only without layers. Raises re.error."""

    def named(names: str | list[str]) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(f".{module}".endswith(f".{name}") for name in names)

    targets = default if config["target_modules"] is None else config["target_modules"]
    saved = as_list(config["modules_to_save"])
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
        return False
    if config["exclude_modules"] and named(config["exclude_modules"]):
        return False
    if not named(targets) and str(targets).lower() != "all-linear":
        return False
    if module in as_list(targets):  # a whole name is taken whatever the layers
        return True
    layers = as_list(config["layers_to_transform"])
    if not layers or isinstance(targets, str):
        return not layers
    # The layer's number follows one of the patterns or, without any, a name that is not the first.
    starts = [rf"(?:^|.*?\.){pattern}" for pattern in as_list(config["layers_pattern"] or None)]
    starts = starts or [r".*?\.[^.]*"]
    found = (re.match(rf"{start}\.(?P<idx>\d+)\.", module) for start in starts)
    first = next((match for match in found if match), None)
    return bool(first and first["idx"]) and int(first["idx"]) in layers


def read_peft(folder: Path, family: str, d_model: int) -> tuple[LoRASettings, Tensors]:
    """The LoRA in peft's folder and, if there is one, the head of a RoBERTa classifier. Raises
    InputError if the folder sets or holds anything else."""
    folder, hub = Path(folder), FAMILIES[family]
    where = folder / "adapter_config.json"
    config = read_peft_config(where)
    newer, older = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not newer.exists() and not older.exists():
        raise InputError(f"{folder} holds no {newer.name} and no {older.name}")
    stem, layers = hub["layers"].split(".", 1)  # a model without a head has no stem
    pattern = re.compile(rf"({stem}\.)?{layers}\.(\d+)\.(\S+)\.lora_([AB])\.weight")
    fused = {"attn.c_attn": "qv"} if family == "gpt2" else {}
    paths = {theirs: p for p, theirs in hub["peft"].items()} | fused
    # Without targets peft takes those of q and v.
    default = [theirs.split(".")[-1] for theirs, p in paths.items() if p in "qv"]
    lora, head = {}, {}
    for key, w in read_tensors(newer if newer.exists() else older).items():
        name = key.removeprefix(PREFIX)
        match = pattern.fullmatch(name)
        if name in hub["peft_head"]:
            head[hub["peft_head"][name]] = w
        elif match is None or match[3] not in paths or w.dim() != 2:
            raise InputError(f"{folder} holds {key}, which is not a LoRA on q, k, v or o here")
        else:
            try:
                selected = is_selected(name[: name.index(".lora_")], config, default)
            except re.error as error:
                what = f"{where}: a pattern in it is no regular expression"
                raise InputError(f"{what} ({error})") from None
            if not selected:
                what = f"{folder} holds {key}, but its adapter_config.json selects other modules"
                raise InputError(f"{what}, so peft would leave it out")
            _, i, path, side = match.groups()
            parts = {paths[path]: w}
            if fused:
                parts = split(w, side, d_model, f"{folder}: the LoRA on {key}")
            for p, part in parts.items():
                lora[f"layers.blocks.{i}.attn.{p}.{side}"] = part
    if not lora:
        raise InputError(f"{folder} holds no LoRA")
    lacks = [theirs for theirs, ours in hub["peft_head"].items() if ours not in head]
    if lacks and (head or config.get("task_type") == "SEQ_CLS"):
        raise InputError(f"{folder} lacks {', '.join(lacks)} of a classifier's head")
    factor = 2 if family == "gpt2" else 1
    r, alpha = config["r"] // factor, config["lora_alpha"] / factor
    if config["use_rslora"]:  # then peft divides alpha by the root of the rank
        alpha *= math.sqrt(config["r"])
    targets = tuple(sorted({name.split(".")[-2] for name in lora}))
    return LoRASettings(r, alpha, config["lora_dropout"], targets), lora | head


def read_loralib(file: Path, family: str) -> Tensors:
    """The LoRA in a .bin file of github.com/microsoft/LoRA for a RoBERTa, whose names are those of
    transformers, with lora_A and lora_B. The task head in it is left out. The file does not say
    alpha, which is 16 in that repository's scripts for RoBERTa-base. Raises InputError for a model
    of another family."""
    found = {}
    for name, w in read_tensors(file).items():
        match = re.search(r"\.(\d+)\.attention\.self\.(\w)\w+\.lora_([AB])$", name)
        if match:
            found["layers.blocks.{}.attn.{}.{}".format(*match.groups())] = w
    if not found:
        raise InputError(f"{file} holds no lora_A and lora_B for a RoBERTa")
    if family != "roberta":
        raise InputError(f"{file} is for a RoBERTa, which this model is not")
    return found
