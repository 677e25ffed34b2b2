"""experiments/borrowing.py: its loss against transformers', its lines against Eq. 4 by plain loops.

pytest tests/test_borrowing.py
"""

import re
from pathlib import Path

import pytest
import torch
from conftest import call, printed_by
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

import train
from data import Tokenizer, read_e2e
from eval import load_run
from experiments import borrowing
from lora import loras
from model import Config, Context, load
from support.files import locate

TEXTS = [[5, 9, 2, 40, 7], [3, 3], [8, 1, 60, 33, 12, 90, 4, 4]]


class Borrow(nn.Module):
    """Eq. 4 with layer picks[t] in slot t."""

    def __init__(self, blocks: nn.ModuleList, picks: list[int]) -> None:
        super().__init__()
        self.blocks, self.picks = blocks, picks

    def forward(self, z: Tensor, ctx: Context) -> Tensor:
        for t, j in enumerate(self.picks):
            u, v = (self.blocks[i](z, ctx, (t, i)) - z for i in (t, j))
            z = z + 0.95 * u + 0.05 * v
        return z


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    flags = "--model nano/gpt2 --max-steps 2 --test-limit 2 --beams 2 --molex-layers 0-7"
    s = train.parse(flags.split())[1][0]
    folder = tmp_path_factory.mktemp("borrowing") / s.name
    train.train(s, folder, torch.device("cpu"))
    return folder


def lines_of(*flags: object) -> dict[str, float]:
    """What the script prints, name -> rise of the loss."""
    lines = printed_by(borrowing, *flags)
    return {m[1]: float(m[2]) for x in lines if (m := re.fullmatch(r"(.+?) +([+-]\d+\.\d+)", x))}


def test_the_loss_is_transformers(checkpoint):
    theirs = GPT2LMHeadModel.from_pretrained(checkpoint("gpt2")).eval()
    ids = [torch.tensor([text]) for text in TEXTS]
    with torch.no_grad():
        losses = [theirs(x, labels=x).loss.item() for x in ids]
    mean = sum(n * loss for n, loss in zip((4, 1, 7), losses, strict=True)) / 12
    assert borrowing.text_loss(load(checkpoint("gpt2")), TEXTS) == pytest.approx(mean, rel=1e-5)


def test_each_line_is_the_loss_of_eq_4_less_the_plain_one(run_folder, tmp_path):
    found = lines_of(run_folder, "--texts", 5, "--out", tmp_path)
    model, folder = load("nano/gpt2"), locate("nano/gpt2")
    tokenizer = Tokenizer.load(folder, Config.load(folder))
    texts = [tokenizer.encode(ref) for _, ref in read_e2e("nano/e2e", "dev")[:5]]
    plain, T = borrowing.text_loss(model, texts), model.config.n_layer

    trained, _, _ = load_run(run_folder, torch.device("cpu"))
    for lora in loras(trained).values():  # of what it has trained, its gate is left
        lora.B.data.zero_()
    gate = borrowing.text_loss(trained, texts)
    picks = trained.layers.routes.counts.argmax(1).tolist()
    assert len(set(picks)) < T and picks != [*range(T)]
    wanted = {f"layer {j}": [j] * T for j in range(T)}
    wanted |= {"the neighbour": [*range(1, T), T - 2], "/".join(run_folder.parts[-2:]): picks}
    blocks = model.layers.blocks
    for name, layers in wanted.items():
        model.layers = Borrow(blocks, layers)
        by_loops = borrowing.text_loss(model, texts) - plain
        assert found[name] == pytest.approx(by_loops, abs=1e-3), name
    assert found.keys() == wanted.keys() and gate - plain == pytest.approx(by_loops, abs=1e-5)
    assert (tmp_path / "borrowing.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "nano/roberta"], "nano/roberta is an encoder"),
        (["--model", "nano/roberta", "RUN"], "is no run of nano/roberta with MoLEx"),
        (["--data", "nowhere"], "trainset.csv|devset.csv"),
        (["--texts", "0"], "0 is less than 1"),
    ],
)
def test_what_does_not_fit_is_named(run_folder, failure, flags, message):
    flags = [str(run_folder) if flag == "RUN" else flag for flag in flags]
    assert re.search(message, failure(call, borrowing, *flags))
