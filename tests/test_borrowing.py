"""experiments/borrowing.py: its loss against transformers', its lines against Eq. 4 by plain loops.

pytest tests/test_borrowing.py
"""

import re
import shutil
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
    """Eq. 4 with layer picks[t] in slot t, as it stands or at the slot's own size."""

    def __init__(self, blocks: nn.ModuleList, picks: list[int], own_size: bool) -> None:
        super().__init__()
        self.blocks, self.picks, self.own_size = blocks, picks, own_size

    def forward(self, z: Tensor, ctx: Context) -> Tensor:
        for t, j in enumerate(self.picks):
            u, v = (self.blocks[i](z, ctx, (t, i)) - z for i in (t, j))
            if self.own_size:
                v = v / v.norm(dim=-1, keepdim=True) * u.norm(dim=-1, keepdim=True)
            z = z + 0.95 * u + 0.05 * v
        return z


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    flags = "--model nano/gpt2 --max-steps 2 --test-limit 2 --beams 2 --molex-layers 0-7"
    s = train.parse(flags.split())[1][0]
    folder = tmp_path_factory.mktemp("borrowing") / s.name
    train.train(s, folder, torch.device("cpu"))
    return folder


def lines_of(*flags: object) -> dict[str, list[float]]:
    """What the script prints, name -> the rises of the loss, as in Eq. 4 and at the own size."""
    lines = printed_by(borrowing, *flags)
    line = r"(.+?) +([+-]\d+\.\d+) +([+-]\d+\.\d+)"
    return {m[1]: [float(m[2]), float(m[3])] for x in lines if (m := re.fullmatch(line, x))}


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
        by_loops = []
        for own_size in (False, True):
            model.layers = Borrow(blocks, layers, own_size)
            by_loops.append(borrowing.text_loss(model, texts) - plain)
        assert found[name] == pytest.approx(by_loops, abs=1e-3), name
        assert by_loops[0] != by_loops[1], name
    assert found.keys() == wanted.keys() and gate - plain == pytest.approx(by_loops[0], abs=1e-5)
    for picture in ("borrowing.png", "sizes.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("family", ["gpt2", "llama", "roberta"])
def test_the_ratios_by_plain_loops(family, checkpoint):
    model = load(checkpoint(family))
    inputs = []
    hooks = [
        b.register_forward_hook(lambda _, args, out: inputs.append(args))
        for b in model.layers.blocks
    ]
    sizes: dict[tuple[int, int], list[Tensor]] = {}
    with torch.no_grad():
        for text in TEXTS:
            model.hidden(torch.tensor([text]))
        for hook in hooks:
            hook.remove()
        for z, ctx, (t, _) in inputs:
            for j, block in enumerate(model.layers.blocks):
                sizes.setdefault((t, j), []).append((block(z, ctx, (t, j)) - z)[0].norm(dim=1))
    found = borrowing.size_ratios(model, TEXTS)
    T = len(model.layers.blocks)
    assert found.shape == (T, T) and torch.equal(found.diag(), torch.ones(T))
    for (t, j), own in ((key, sizes[key[0], key[0]]) for key in sizes):
        ratios = torch.cat(sizes[t, j]) / torch.cat(own)
        assert found[t, j].item() == pytest.approx(ratios.sort().values[7].item(), rel=1e-4)


def test_an_encoder_has_ratios_and_no_loss(tmp_path):
    said = printed_by(borrowing, "--model", "nano/roberta", "--texts", 3, "--out", tmp_path)
    assert any(line.startswith("|u_j(z_t)| / |u_t(z_t)|, median ") for line in said)
    assert [file.name for file in tmp_path.iterdir()] == ["sizes.png"]
    assert not any("nats" in line for line in said)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "nano/roberta", "RUN"], "is no run of nano/roberta with MoLEx"),
        (["--data", "nowhere"], "trainset.csv|devset.csv"),
        (["--texts", "0"], "0 is less than 1"),
        (["--out", "nano/README.md"], "the folder nano/README.md cannot be made: .*exists"),
        (
            ["--model", "nano/roberta", "--task", "cola", "--data", "SHORT"],
            "no text .* has two tokens",
        ),
        (["--model", "ONE"], "has one layer, so none to borrow"),
        (["--model", "RUN"], "is a run with MoLEx; name it at the end"),
    ],
)
def test_what_does_not_fit_is_named(run_folder, tmp_path, failure, flags, message):
    one = tmp_path / "one"  # a model of one layer
    model = GPT2LMHeadModel.from_pretrained("nano/gpt2")
    del model.transformer.h[1:]
    model.config.n_layer = 1
    model.save_pretrained(one)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(locate("nano/gpt2") / name, one)
    short = tmp_path / "short/CoLA"  # one text, of one token
    short.mkdir(parents=True)
    (short / "dev.tsv").write_text("source\t1\t\ta\n")
    places = {"RUN": run_folder, "ONE": one, "SHORT": short.parent}
    flags = [str(places.get(flag, flag)) for flag in flags]
    flags = flags if "--out" in flags else [*flags, "--out", str(tmp_path / "out")]
    assert re.search(message, failure(call, borrowing, *flags))
