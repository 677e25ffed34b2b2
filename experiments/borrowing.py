"""Which layers can a pretrained model borrow, and at what size? Not in the paper.

Before anything is trained, each layer j in turn joins every slot of the pretrained model (Eq. 4, no
gate), then the neighbour does, as in controls.py, then what the gates of finished runs choose,
without what else they have trained. A line each says by how much this raises the loss of the texts'
next tokens: what the LoRA has to make up for before MoLEx can gain anything. The second number is
the same at the slot's own size (`--borrow-size own`): u_j(z) is scaled, token by token, to the
length of u_t(z). An encoder predicts no next token, so for it there are no such lines.

Before them stands the reason: |u_j(z_t)| / |u_t(z_t)|, the median over all tokens, for every layer
j in every slot t of the pretrained model. Where it is above 19, the other layer's 5% are longer
than the slot's own 95%.

    python experiments/borrowing.py                              nano/gpt2 on references of E2E
    python experiments/borrowing.py --model nano/roberta
    python experiments/borrowing.py --model smollm2 --task sst2 --data DIR [RUN ...]

The texts are the first --texts of the dev set, 16 of like length in a batch; every token votes, as
in GLUE.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import GLUE, Batch, Example, by_length, collate, read_e2e, read_glue
from eval import load_model, read_run
from experiments.controls import Arm, Pick, give, neighbour
from model import Transformer
from molex import MoLEx, MoLExConfig, upcycle
from support.adapters import GATE
from support.cli import Parser, at_least, command_line, pick_device
from support.files import InputError, fill, make_folder, write_atomic

TITLES = {"as-is": "as in Eq. 4", "own": "at the slot's own size"}


def batches(model: Transformer, texts: list[list[int]]) -> Iterator[Batch]:
    for some in by_length(texts, 16, "  texts"):
        yield collate([Example(texts[i]) for i in some]).to(model.device)


@torch.no_grad()
def text_loss(model: Transformer, texts: list[list[int]]) -> float:
    """Mean loss of the next token, in nats, over all texts."""
    total = 0.0
    for batch in batches(model, texts):
        real = batch.mask[:, 1:]
        logits = model(batch.ids, batch.mask)[:, :-1][real].float()
        total += F.cross_entropy(logits, batch.ids[:, 1:][real], reduction="sum").item()
    return total / sum(len(text) - 1 for text in texts)


@torch.no_grad()
def size_ratios(model: Transformer, texts: list[list[int]]) -> Tensor:
    """|u_j(z_t)| / |u_t(z_t)|, its median over all tokens: (T, T), slot t, layer j. `model` has no
    MoLEx, so z_t is what the pretrained model has there."""
    blocks = model.layers.blocks
    seen: list[list[Tensor]] = [[] for _ in blocks]  # of slot t: (T, tokens) for each batch

    def note_sizes(t: int, args: tuple, output: Tensor) -> None:
        z, ctx, _ = args
        sizes = [
            ((output if j == t else block.forward(z, ctx, (t, j))) - z).norm(dim=-1)[ctx.real]
            for j, block in enumerate(blocks)
        ]
        seen[t].append(torch.stack(sizes) / sizes[t])

    hooks = [
        block.register_forward_hook(lambda _, args, output, t=t: note_sizes(t, args, output))
        for t, block in enumerate(blocks)
    ]
    for batch in batches(model, texts):
        model.hidden(batch.ids, batch.mask)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(ratios, 1).median(1).values.cpu() for ratios in seen])


def plain_numbers(axis: Axis) -> None:
    """At the ticks of a logarithmic axis; between the powers of ten only where there is room."""
    low, high = axis.get_view_interval()
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}" if high / low < 50 else NullFormatter())


def plot_rises(layers: list[tuple], others: dict[str, tuple], path: Path) -> None:
    """The rise over the layer that is borrowed, a curve for each size; the others as lines across,
    in the colour of their size."""
    figure = Figure(figsize=(7.5, 3.5), layout="constrained")
    panel = figure.subplots()
    colors = ("tab:blue", "tab:orange")
    for color, title, rises in zip(colors, TITLES.values(), zip(*layers, strict=True), strict=True):
        panel.plot(range(len(rises)), rises, "o-", color=color, markersize=4, label=title)
    for i, (name, rises) in enumerate(others.items()):
        for color, rise in zip(colors, rises, strict=True):
            line = dict(color=color, linewidth=1, linestyle=("--", ":", "-.")[i % 3])
            panel.axhline(rise, label=name if color == colors[0] else None, **line)
    panel.set(xlabel="layer that joins every slot", ylabel="rise of the loss, nats")
    if min(min(rises) for rises in (*layers, *others.values())) > 0:
        panel.set_yscale("log")
        plain_numbers(panel.yaxis)
    figure.legend(fontsize=7, loc="outside right upper")
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def plot_sizes(ratios: Tensor, path: Path) -> None:
    """A heat map of the ratios, (T, T): slots across, layers up; white is 1."""
    most = max(2.0, ratios.max().item(), 1 / ratios.min().item())
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    panel = figure.subplots()
    norm = LogNorm(1 / most, most)
    image = panel.imshow(ratios.T.numpy(), cmap="RdBu_r", norm=norm, origin="lower")
    panel.set(xlabel="slot t", ylabel="layer j")
    label = "$|u_j(z_t)|\\; /\\; |u_t(z_t)|$, median over tokens"
    plain_numbers(figure.colorbar(image, label=label).ax.yaxis)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def main() -> None:
    parser = Parser(description="Loss of a pretrained model that borrows each of its layers")
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="and what these choose")
    parser.add_argument("--model", default="nano/gpt2", help="hub name or folder (nano/gpt2)")
    parser.add_argument("--task", choices=["e2e", *GLUE], default="e2e", help="whose texts (e2e)")
    parser.add_argument("--data", default="nano/e2e", help="folder of its files (nano/e2e)")
    parser.add_argument("--texts", type=at_least(1), default=64, help="how many (64)")
    parser.add_argument("--out", type=Path, default=Path("runs/borrowing"), help="for the pictures")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    args = parser.parse_args()
    make_folder(args.out)
    gates = {}
    for folder in args.runs:
        config, tensors = read_run(folder)
        if config.model != args.model or not config.molex:
            raise InputError(f"{folder} is no run of {args.model} with MoLEx")
        gate = {n: w for n, w in tensors.items() if n.startswith(GATE)}
        gates["/".join(folder.parts[-2:])] = config.molex, gate
    model, tokenizer = load_model(args.model, pick_device(args.device))
    if isinstance(model.layers, MoLEx):
        raise InputError(f"{args.model} is a run with MoLEx; name it at the end, not as --model")
    encoder = not model.config.causal
    if encoder and gates:
        raise InputError(f"{args.model} is an encoder, which has no loss to compare runs by")
    if args.task == "e2e":
        texts = [reference for _, reference in read_e2e(args.data, "dev")]
    else:
        rows = read_glue(args.data, args.task, GLUE[args.task].dev[0])
        texts = [" ".join(parts) for parts, _ in rows]
    longest = model.config.max_positions
    texts = [ids[:longest] for text in texts if len(ids := tokenizer.encode(text)) > 1]
    texts = texts[: args.texts]
    if not texts:
        raise InputError(f"no text of {args.task} has two tokens, so none has a next one")

    T = model.config.n_layer
    if T == 1:
        raise InputError(f"{args.model} has one layer, so none to borrow")
    ratios = size_ratios(model, texts)
    own = torch.eye(T, dtype=torch.bool)
    foreign = ratios[~own]
    t, j = divmod(ratios.masked_fill(own, 0).argmax().item(), T)
    low, high = foreign.aminmax()
    print(f"{args.model}, {len(texts)} texts, every layer in every slot but its own:")
    print(f"|u_j(z_t)| / |u_t(z_t)|, median {foreign.median():.2f}, {low:.2f} to {high:.2f}")
    print(f"(layer {j} in slot {t}: its 5% have {high / 19:.2f} times the length of the other 95%)")
    plot_sizes(ratios, args.out / "sizes.png")
    print(f"\n{args.out / 'sizes.png'}: the ratios as a picture")
    if encoder:
        return
    plain = text_loss(model, texts)
    print(f"\n{plain:.3f} nats a token before a layer is borrowed; then they rise by\n")
    print(f"{'borrowed':32}" + "".join(f"{title:>24}" for title in TITLES.values()))

    def rise(
        name: str, config: MoLExConfig, pick: Pick | None = None, gate: dict | None = None
    ) -> tuple[float, ...]:
        """At each of the two sizes: with the layers that are given, or else a run's gate."""
        found = []
        for size in TITLES:
            upcycle(model, replace(config, borrow_size=size))
            if pick:
                give(model, Arm(pick=lambda T, seed: pick), 0)
            else:
                ours = {n: p for n, p in model.named_parameters() if n.startswith(GATE)}
                fill(ours, gate, f"the gate of {name} does not fit: it")
            found.append(text_loss(model, texts) - plain)
        print(f"{name:32}" + "".join(f"{x:+24.3f}" for x in found), flush=True)
        return tuple(found)

    every = MoLExConfig()
    layers = [rise(f"layer {j}", every, lambda t, j=j: j) for j in range(T)]
    others = {"the neighbour": rise("the neighbour", every, neighbour(T, 0))}
    for name, (config, gate) in gates.items():
        others[name] = rise(name, config, gate=gate)
    plot_rises(layers, others, args.out / "borrowing.png")
    print(f"\n{args.out / 'borrowing.png'}: the same as a picture")


if __name__ == "__main__":
    command_line(main)
