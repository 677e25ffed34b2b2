"""Which layers can a pretrained model borrow? Not in the paper.

Before anything is trained, each layer j in turn joins every slot of the pretrained model (Eq. 4, no
gate), then the neighbour does, as in controls.py, then what the gates of finished runs choose,
without what else they have trained. A line each says by how much this raises the loss of the texts'
next tokens: what the LoRA has to make up for before MoLEx can gain anything.

    python experiments/borrowing.py                              nano/gpt2 on references of E2E
    python experiments/borrowing.py --model smollm2 --task sst2 --data DIR [RUN ...]

The texts are the first --texts of the dev set, 16 of like length in a batch; every token votes, as
in GLUE. Not for encoders, which predict no next token.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import GLUE, Example, by_length, collate, read_e2e, read_glue
from eval import load_model, read_run
from experiments.controls import Arm, give, neighbour
from model import Transformer
from molex import upcycle
from support.adapters import GATE
from support.cli import Parser, at_least, command_line, pick_device
from support.files import InputError, fill, write_atomic


@torch.no_grad()
def text_loss(model: Transformer, texts: list[list[int]]) -> float:
    """Mean loss of the next token, in nats, over all texts."""
    total = 0.0
    for some in by_length(texts, 16, "  texts"):
        batch = collate([Example(texts[i]) for i in some]).to(model.device)
        real = batch.mask[:, 1:]
        logits = model(batch.ids, batch.mask)[:, :-1][real].float()
        total += F.cross_entropy(logits, batch.ids[:, 1:][real], reduction="sum").item()
    return total / sum(len(text) - 1 for text in texts)


def plot(layers: list[float], others: dict[str, float], path: Path) -> None:
    """The rise over the layer that is borrowed; the others as lines across."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    panel = figure.subplots()
    panel.plot(range(len(layers)), layers, "o-", color="tab:blue", markersize=4)
    for i, (name, rise) in enumerate(others.items(), 1):
        panel.axhline(rise, color=f"C{i}", linewidth=1, linestyle="--", label=name)
    panel.set(xlabel="layer that joins every slot", ylabel="rise of the loss, nats")
    if min(*layers, *others.values()) > 0:
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
    figure.legend(fontsize=7, loc="outside right upper")
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def main() -> None:
    parser = Parser(description="Loss of a pretrained model that borrows each of its layers")
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="and what these choose")
    parser.add_argument("--model", default="nano/gpt2", help="a decoder (nano/gpt2)")
    parser.add_argument("--task", choices=["e2e", *GLUE], default="e2e", help="whose texts (e2e)")
    parser.add_argument("--data", default="nano/e2e", help="folder of its files (nano/e2e)")
    parser.add_argument("--texts", type=at_least(1), default=64, help="how many (64)")
    parser.add_argument("--out", type=Path, default=Path("runs/borrowing"), help="for the picture")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    args = parser.parse_args()
    gates = {}
    for folder in args.runs:
        config, tensors = read_run(folder)
        if config.model != args.model or not config.molex:
            raise InputError(f"{folder} is no run of {args.model} with MoLEx")
        gate = {n: w for n, w in tensors.items() if n.startswith(GATE)}
        gates["/".join(folder.parts[-2:])] = config.molex, gate
    model, tokenizer = load_model(args.model, pick_device(args.device))
    if model.config.family == "roberta":
        raise InputError(f"{args.model} is an encoder; take a decoder such as gpt2-medium")
    if args.task == "e2e":
        texts = [reference for _, reference in read_e2e(args.data, "dev")]
    else:
        rows = read_glue(args.data, args.task, GLUE[args.task].dev[0])
        texts = [" ".join(parts) for parts, _ in rows]
    longest = model.config.max_positions
    texts = [ids[:longest] for text in texts if len(ids := tokenizer.encode(text)) > 1]
    texts = texts[: args.texts]

    plain, T = text_loss(model, texts), model.config.n_layer
    print(f"{args.model}, {len(texts)} texts: {plain:.3f} nats a token\n")
    print(f"{'borrowed':32}{'rise':>8}")

    def rise(name: str) -> float:
        found = text_loss(model, texts) - plain
        print(f"{name:32}{found:+8.3f}", flush=True)
        return found

    upcycle(model)
    layers = []
    for j in range(T):
        give(model, Arm(pick=lambda T, seed, j=j: lambda t: j), 0)
        layers.append(rise(f"layer {j}"))
    give(model, Arm(pick=neighbour), 0)
    others = {"the neighbour": rise("the neighbour")}
    for name, (molex, tensors) in gates.items():
        upcycle(model, molex)
        gate = {n: p for n, p in model.named_parameters() if n.startswith(GATE)}
        fill(gate, tensors, f"the gate of {name} does not fit: it")
        others[name] = rise(name)
    args.out.mkdir(parents=True, exist_ok=True)
    plot(layers, others, args.out / "borrowing.png")
    print(f"\n{args.out / 'borrowing.png'}: the same as a picture")


if __name__ == "__main__":
    command_line(main)
