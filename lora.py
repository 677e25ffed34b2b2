"""LoRA: a frozen linear layer W x plus a trainable low-rank update (alpha / r) B A x.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. The MoLEx paper fine-tunes
with LoRA on the query and value projections of every layer (Tables 5 and 6).

    add_lora(model, r=4, alpha=32)      put a LoRA on q and v of every layer, freeze the rest
    merge(model)                        fold B A into W: as fast as the plain model
    save_lora(model, folder)            write the LoRA as peft does
    load_lora(model, folder)            read one that peft, or save_lora, has written

    python lora.py                      nano/gpt2 with a LoRA learns one sequence
"""

import math
from collections.abc import Container
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ClassificationHead, Transformer
from support.adapters import GATE, read_peft, write_peft
from support.files import InputError, fill


class LoRA(nn.Module):
    """A linear layer (in -> out) with an update of rank r. B starts at zero: no change at first."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base, self.r, self.alpha, self.dropout = base, r, alpha, dropout
        self.merged = False
        self.A = nn.Parameter(base.weight.new_empty(r, base.in_features))
        self.B = nn.Parameter(base.weight.new_zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as in nn.Linear and the LoRA code

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        low = F.linear(F.dropout(x, self.dropout, self.training), self.A)
        return self.base(x) + self.alpha / self.r * F.linear(low, self.B)


def add_lora(
    model: Transformer, r: int, alpha: float, dropout: float = 0.0, targets: tuple = ("q", "v")
) -> Transformer:
    """Put a LoRA on the `targets` (of q, k, v, o) of every layer. All else is frozen, except a
    classification head and MoLEx's gate. Changes the model and returns it."""
    if loras(model):
        raise InputError("the model has a LoRA already; load the model again to add another one")
    if not 1 <= r <= model.config.d_model:
        raise InputError(f"the rank of a LoRA is {r}, not from 1 to {model.config.d_model}")
    for name, p in model.named_parameters():
        p.requires_grad_(name in task_head(model) or name.startswith(GATE))
    for block in model.layers.blocks:
        for name in targets:
            linear = getattr(block.attn, name)
            setattr(block.attn, name, LoRA(linear, r, alpha, dropout))
    return model.train(model.training)  # new modules start in training mode, with dropout


def loras(model: nn.Module) -> dict[str, LoRA]:
    """Every LoRA in the model, by name ("layers.blocks.0.attn.q")."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """W <- W + (alpha / r) B A: the adapted model at the cost of the plain one."""
    for lora in loras(model).values():
        if not lora.merged:
            lora.base.weight += lora.alpha / lora.r * (lora.B @ lora.A)
            lora.merged = True


def adapt(model: Transformer, tune: str, r: int, alpha: float, dropout: float) -> Transformer:
    """Choose what is trained beside a classification head: "lora", "full" (every parameter) or
    "bitfit" (every bias, Zaken et al., 2021)."""
    if tune == "lora":
        return add_lora(model, r, alpha, dropout)
    for name, p in model.named_parameters():
        new = name in task_head(model) or name.startswith(GATE)
        p.requires_grad_(tune == "full" or name.endswith("bias") or new)
    if trained_tensors(model).keys() <= task_head(model):
        raise InputError("the model has no biases, which are what bitfit trains")
    return model


def trained_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name: what a run saves."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def task_head(model: Transformer) -> set[str]:
    """The names of a classification head's parameters, which no other run takes over."""
    if not isinstance(model.head, ClassificationHead):
        return set()
    return {"head." + name for name, _ in model.head.named_parameters()}


def trainable(model: Transformer) -> int:
    """How many parameters are trained, without a classification head (as in Table 1)."""
    return sum(p.numel() for n, p in trained_tensors(model).items() if n not in task_head(model))


def adapters(model: Transformer, names: Container = ()) -> dict[str, Tensor]:
    """A and B of every LoRA, by name ("layers.blocks.0.attn.q.A"), and the parameters `names`."""
    return {n: p for n, p in model.named_parameters() if n.endswith((".A", ".B")) or n in names}


OTHER_SHAPE = "was made for a model of another shape or rank, or head: it"


def save_lora(model: Transformer, folder: Path, base: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft does, with a classifier's
    head; `base` is the name of the pretrained model, which the config notes."""
    settings = {(lora.r, lora.alpha, lora.dropout) for lora in loras(model).values()}
    write_peft(folder, model.config.family, model.state_dict(), task_head(model), settings, base)


def load_lora(model: Transformer, folder: Path) -> Transformer:
    """Add the LoRA in peft's folder to a model without one; a head in it replaces the model's."""
    settings, tensors = read_peft(folder, model.config.family, model.config.d_model)
    add_lora(model, *settings)
    fill(adapters(model, tensors), tensors, f"{folder} {OTHER_SHAPE}")
    return model


if __name__ == "__main__":
    from data import Tokenizer
    from model import Config, load

    tokenizer = Tokenizer.load("nano/gpt2", Config.load("nano/gpt2"))
    model = load("nano/gpt2")
    text = "Ember Hall is a Thai restaurant by the river."
    ids = torch.tensor([tokenizer.encode(text)])
    plain = model(ids)
    trained = adapters(add_lora(model, r=4, alpha=32))
    print(f"{trainable(model):,} parameters are trained to say: {text}")
    print("with B = 0 nothing has changed:", torch.equal(model(ids), plain))
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for step in range(31):
        logits = model(ids)
        loss = F.cross_entropy(logits[0, :-1], ids[0, 1:])
        if step % 10 == 0:
            says = tokenizer.decode(logits[0, :-1].argmax(-1).tolist())
            print(f"step {step:2}: loss {loss.item():.3f}, the likeliest next tokens:{says}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learned = model(ids)
    merge(model)
    print(f"merged, logits differ by at most {(model(ids) - learned).abs().max():.0e}")
