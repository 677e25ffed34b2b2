"""LoRA: a frozen linear layer W x plus a trainable low-rank update (alpha / r) B A x.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. The MoLEx paper fine-tunes
with LoRA on the query and value projections of every layer (Tables 5 and 6).

    add_lora(model, r=4, alpha=32)      one function to add,
    merge(model); unmerge(model)        one to fold B A into W (faster), one to take it out,
    remove(model)                       one to drop it;
    save_lora(model, folder)            and peft's own files, so that what is trained here loads
    load_lora(model, folder)            there, over the transformers model, and the other way round;
    load_loralib(model, file)           reads the .bin files that the LoRA paper's code published.

    python lora.py                      nano/gpt2 with a LoRA learns one sequence
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from model import ClassificationHead, Transformer
from support.files import InputError, check, fill, read_json, read_tensors


class LoRA(nn.Module):
    """A linear layer (in -> out) with an update of rank r. B starts at zero: no change at first."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base, self.r, self.alpha, self.dropout, self.merged = base, r, alpha, dropout, False
        like = dict(dtype=base.weight.dtype, device=base.weight.device)
        self.A = nn.Parameter(torch.empty(r, base.in_features, **like))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, **like))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as nn.Linear, and as the LoRA code

    def delta(self) -> Tensor:
        """The update to the weight, (out, in)."""
        return self.alpha / self.r * (self.B @ self.A)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        low = F.linear(F.dropout(x, self.dropout, self.training), self.A)
        return self.base(x) + F.linear(low, self.B) * (self.alpha / self.r)


def add_lora(
    model: Transformer,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("q", "v"),
) -> Transformer:
    """Put a LoRA on the `targets` (of q, k, v, o) of every layer; all else but a new task head is
    frozen. Changes the model and returns it. Raises InputError if r is no rank."""
    if not 1 <= r <= model.config.d_model:
        raise InputError(f"the rank of a LoRA is {r}, not from 1 to {model.config.d_model}")
    for p in model.parameters():
        p.requires_grad_(False)
    if isinstance(model.head, ClassificationHead):
        model.head.requires_grad_(True)
    for block in model.layers.blocks:
        for name in targets:
            setattr(block.attn, name, LoRA(getattr(block.attn, name), r, alpha, dropout))
    return model.train(model.training)  # a new module starts in training mode, with dropout


def adapt(model: Transformer, tune: str, *lora: float) -> Transformer:
    """Choose what is trained, beside a new task head: "lora", with r, alpha and dropout as in
    `add_lora`; "full", every parameter; "bitfit", every bias (Zaken et al., 2021). Raises
    InputError if there is none."""
    if tune == "lora":
        return add_lora(model, *lora)
    for name, p in model.named_parameters():
        p.requires_grad_(tune == "full" or name.endswith("bias") or name in task_head(model))
    if trained_tensors(model).keys() <= task_head(model):
        raise InputError("the model has no biases, which are what bitfit trains")
    return model


def trained_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by the names that adapter.safetensors has."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def task_head(model: Transformer) -> set[str]:
    """Names of the parameters of a new classification head. They are not counted as trainable, as
    in Table 1, and not taken over from another run."""
    new = isinstance(model.head, ClassificationHead)
    return {"head." + name for name, _ in model.head.named_parameters()} if new else set()


def loras(model: nn.Module) -> dict[str, LoRA]:
    """Every LoRA in the model, by name ("layers.blocks.0.attn.q")."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """W <- W + (alpha / r) B A: the adapted model at the cost of the plain one."""
    for lora in loras(model).values():
        if not lora.merged:
            lora.base.weight += lora.delta()
        lora.merged = True


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Undo `merge` (up to rounding)."""
    for lora in loras(model).values():
        if lora.merged:
            lora.base.weight -= lora.delta()
        lora.merged = False


def remove(model: nn.Module) -> None:
    """Put the plain linear layers back. After `merge` they keep the update, else it is dropped."""
    for name, lora in loras(model).items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, lora.base)


# ------------------------------------------------------------------------------------- peft's files


def fuse(q: LoRA, v: LoRA) -> tuple[Tensor, Tensor]:
    """One LoRA of rank 2r for GPT-2's c_attn, whose output stacks q, k and v.

    A holds q's rows above v's; B is block-shaped, with zeros for k. With alpha doubled as well, the
    scale alpha / r is the same.
    """
    D, r = q.B.shape
    B = q.B.new_zeros(3 * D, 2 * r)
    B[:D, :r], B[2 * D :, r:] = q.B.detach(), v.B.detach()
    return torch.cat([q.A, v.A]).detach(), B


def save_lora(model: Transformer, folder: Path, base: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft does. `base` is the name of
    the pretrained model, noted in the config. GPT-2 takes LoRA on q and v only."""
    family, tensors, found = model.config.family, {}, loras(model)
    layers, peft = (model.config.hub[name] for name in ("layers", "peft"))
    if not found:
        raise InputError("the model has no LoRA to save; call add_lora first")
    names = sorted({name.rpartition(".")[2] for name in found})
    one = next(iter(found.values()))
    if family == "gpt2" and names != ["q", "v"]:
        raise InputError("for GPT-2, peft's format is written for LoRA on q and v only")
    factor = 2 if family == "gpt2" else 1
    for i, block in enumerate(model.layers.blocks):
        if family == "gpt2":
            pairs = {"attn.c_attn": fuse(block.attn.q, block.attn.v)}
        else:
            here = {peft[p]: getattr(block.attn, p) for p in names}
            pairs = {path: (lora.A, lora.B) for path, lora in here.items()}
        for path, (A, B) in pairs.items():
            key = f"base_model.model.{layers}.{i}.{path}"
            tensors[f"{key}.lora_A.weight"] = A.detach().cpu().contiguous()
            tensors[f"{key}.lora_B.weight"] = B.detach().cpu().contiguous()
    config = dict(peft_type="LORA", base_model_name_or_path=base, task_type=None, bias="none")
    config |= dict(r=one.r * factor, lora_alpha=one.alpha * factor, lora_dropout=one.dropout)
    config |= dict(inference_mode=True, fan_in_fan_out=family == "gpt2")
    parent = r"^(attn|self_attn|attention.self)\."  # "dense" alone would name others, too
    config["target_modules"] = sorted(re.sub(parent, "", path) for path in pairs)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_lora(model: Transformer, folder: Path) -> Transformer:
    """Add the LoRA in peft's folder to a model without one. InputError if they do not fit."""
    folder, family = Path(folder), model.config.family
    path, defaults = folder / "adapter_config.json", dict(lora_dropout=0.0)
    forms = dict(r=(int, 1, 4096), lora_alpha=(float, -1e9, 1e9), lora_dropout=(float, 0, 1))
    config = check(defaults | read_json(path), forms, path)
    r, alpha, dropout = (config[name] for name in forms)
    tensors = read_tensors(folder / "adapter_model.safetensors")
    for name in ("use_rslora", "alpha_pattern", "alora_invocation_tokens"):
        if config.get(name):  # the tensors would fit, but mean something else
            raise InputError(f"{folder} sets {name}, which is not supported")
    state = {}
    for key, w in tensors.items():
        match = re.search(r"\.(\d+)\.(\S+)\.lora_([AB])\.weight$", key)
        if match is None or w.dim() != 2:
            raise InputError(f"{folder} adapts {key}, which is not a LoRA on q, k, v or o")
        i, path, side = match.groups()
        if family == "gpt2" and path == "attn.c_attn":  # the inverse of `fuse`
            half = w.shape[side == "B"] // 2
            D = model.config.d_model
            blocks = (w[:half], w[half:]) if side == "A" else (w[:D, :half], w[2 * D :, half:])
            if side == "B" and sum(b.count_nonzero() for b in blocks) != w.count_nonzero():
                raise InputError(f"{folder}: the LoRA on {key} is not one for q and one for v")
            pairs = [*zip("qv", blocks, strict=True)]
        else:
            peft = model.config.hub["peft"].items()
            pairs = [(p, w) for p, theirs in peft if theirs == path]
        if not pairs:
            raise InputError(f"{folder} adapts {path}, which is not q, k, v or o here")
        state.update({f"layers.blocks.{i}.attn.{p}.{side}": x for p, x in pairs})
    if not state:
        raise InputError(f"{folder} holds no LoRA")
    targets = tuple(sorted({name.split(".")[-2] for name in state}))
    factor = 2 if family == "gpt2" else 1
    add_lora(model, r // factor, alpha / factor, dropout, targets)
    fill(adapters(model), state, f"{folder} was made for a model of another shape or rank: it")
    return model


def adapters(model: Transformer) -> dict[str, Tensor]:
    """A and B of every LoRA, by the names that they have in the model."""
    return {n: p for n, p in model.named_parameters() if n.endswith((".A", ".B"))}


def load_loralib(model: Transformer, file: Path) -> None:
    """Fill a RoBERTa's LoRA from a .bin file of github.com/microsoft/LoRA, whose names are those of
    transformers, with lora_A and lora_B. The task head in it is left out. It does not say alpha,
    which is 16 in that repository's scripts for RoBERTa-base. InputError if it does not fit."""
    pattern, tensors = r"\.(\d+)\.attention\.self\.(\w)\w+\.lora_([AB])$", read_tensors(file)
    found = {m: w for n, w in tensors.items() if (m := re.search(pattern, n))}
    if model.config.family != "roberta" or not found:
        raise InputError(f"{file} holds no lora_A and lora_B for a RoBERTa")
    state = {"layers.blocks.{}.attn.{}.{}".format(*m.groups()): w for m, w in found.items()}
    fill(adapters(model), state, f"{file} was made for a model of another shape or rank: it")


if __name__ == "__main__":
    from model import load

    model, ids = load("nano/gpt2"), torch.arange(100, 116)[None]
    plain = model(ids)
    trained = adapters(add_lora(model, r=4, alpha=32))
    count, total = (sum(p.numel() for p in ps) for ps in (trained.values(), model.parameters()))
    print(f"{count:,} of {total:,} parameters are trained")
    print("with B = 0 nothing has changed:", torch.equal(model(ids), plain))
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for step in range(10):
        loss = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
        print(f"step {step}: loss {loss.item():.3f}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learned = model(ids)
    merge(model)
    print(f"merged, logits differ by at most {(model(ids) - learned).abs().max().item():.0e}")
