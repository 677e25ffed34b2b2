"""Which layer knows what of a sentence: the probing tasks of the MoLEx paper, Table 7, appendix C.

The ten tasks are SentEval's (Conneau et al., 2018): RoBERTa-base reads its sentences, and a small
classifier learns the label from the states after one layer. The paper finds surface properties in
the first layers (SentLen 91.48 % in layer 0), syntax in the middle (TopConst 59.90 in layer 6), and
layer 11 good at nearly all (BShift 85.25); word content is poor everywhere (WC 18.25 at best).

    python experiments/table7_probing.py          # nano/roberta, three small tasks, under a minute
    python experiments/table7_probing.py --model roberta-base --senteval SentEval/data/probing
    python experiments/table7_probing.py --model RUN --senteval TASKS     # of table7_tasks.py

The second is Table 7 in full: 120,000 sentences a task, hours on a GPU, 5 GB of memory for states.
The small form's tasks are made by table7_tasks.py of nano/e2e's sentences.

What is decided here. Row t holds the states after layer t (a decoder's before its final norm); the
embeddings have no row. In Jawahar et al. (2019), whose setup the paper takes, layer 0 is the first
layer too, and Table 7 has 12 rows for 12 layers. A sentence is the mean state of its tokens, <s>,
</s> or the end of text among them. (Jawahar et al.'s public code takes the first token alone. So
did the paper, perhaps: a mean keeps more of the words than its WC shows.)
As in SentEval the MLP is linear, dropout, sigmoid, linear, under Adam (1e-3, batches of 64), is
validated every 4 epochs, and stops when that has brought nothing new 6 times. The paper's grid is
searched, not SentEval's weight decay beside it. Features are standardised, as SentEval's are not:
the states of a pre-norm model grow from layer to layer and would saturate the sigmoid.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import Example, Tokenizer, collate, encode_texts, read_e2e
from eval import load_model
from experiments.table7_tasks import FILES, read_senteval, write_tasks
from model import Transformer
from support.cli import Parser, at_least, command_line, pick_device, progress_bar
from support.files import InputError
from support.settings import PAPER

GRID = [(hidden, dropout) for hidden in (50, 100, 200) for dropout in (0.0, 0.1, 0.2)]  # app. C.2


@torch.no_grad()
def features(model: Transformer, tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """The state of each text after each layer, (S, T, D) on the CPU: the mean over its real tokens.
    All layers are read in one pass."""
    device, limit = model.device, model.config.max_positions
    ids = [encode_texts(tokenizer, (text,), limit) for text in texts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out, layers = torch.empty(len(ids), model.config.n_layer, model.config.d_model), model.layers

    def store(t: int, z: Tensor) -> None:  # `rows` and `mask` are those of the batch at hand
        out[rows, t] = ((z * mask[..., None]).sum(1) / mask.sum(1)[:, None]).float().cpu()

    def before(block: nn.Module, args: tuple) -> None:
        z, _, (t, j) = args  # what enters slot t is the state after slot t - 1, in MoLEx as well
        if j == t > 0:
            store(t - 1, z)

    hooks = [b.register_forward_pre_hook(before) for b in layers.blocks]
    hooks.append(layers.register_forward_hook(lambda m, args, z: store(len(m.blocks) - 1, z)))
    with model.autocast():
        for i in progress_bar(range(0, len(order), 64), "states", leave=False):
            rows = order[i : i + 64]
            batch = collate([Example(ids[j]) for j in rows]).to(device)
            mask = batch.mask
            model.hidden(batch.ids, mask)
    for hook in hooks:
        hook.remove()
    return out


class Probes(nn.Module):
    """All classifiers of the grid at once, and logistic regression if `linear`: (B, D) -> (G, B,
    classes). They share nothing: the first matrix is one only so that there is one product."""

    def __init__(self, d: int, classes: int, linear: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(d, sum(h for h, _ in GRID))
        self.out = nn.ModuleList(nn.Linear(h, classes) for h, _ in GRID)
        self.linear = nn.Linear(d, classes) if linear else None

    def forward(self, x: Tensor) -> Tensor:
        parts = self.hidden(x).split([h for h, _ in GRID], dim=-1)
        logits = [
            out(torch.sigmoid(F.dropout(part, dropout, self.training)))
            for part, out, (_, dropout) in zip(parts, self.out, GRID, strict=True)
        ]
        return torch.stack(logits + ([self.linear(x)] if self.linear else []))


def probe(x: Sequence[Tensor], y: Sequence[Tensor], linear: bool) -> float:
    """Test accuracy of the classifier of the grid that validates best, at the epoch where it does.
    x: three (S, D), to train, validate, test; y: three (S,), numbers of classes. Each classifier
    stops as in SentEval, whatever the others do."""
    torch.manual_seed(0)
    mean, std = x[0].mean(0), x[0].std(0) + 1e-6
    x = [(v - mean) / std for v in x]
    model = Probes(x[0].shape[1], int(torch.cat(y).max()) + 1, linear).to(mean.device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    best = test = misses = torch.zeros(len(GRID) + linear, device=mean.device)
    for _ in range(50):  # 200 epochs at most
        model.train()
        for _ in range(4):
            for some in torch.randperm(len(y[0]), device=mean.device).split(64):
                logits = model(x[0][some]).flatten(0, 1)
                target = y[0][some].repeat(len(best))
                loss = F.cross_entropy(logits, target, reduction="sum") / len(some)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        model.eval()
        with torch.no_grad():
            va, te = ((model(x[i]).argmax(-1) == y[i]).float().mean(1) for i in (1, 2))
        better = (va > best) & (misses < 6)
        best, test = torch.where(better, va, best), torch.where(better, te, test)
        misses = misses + ~better
        if (misses >= 6).all():
            break
    return float(test[best.argmax()])


def print_table(title: str, table: dict[str, list[float]], chance: list[float]) -> None:
    """Per cent, rows are layers, columns tasks; the two best of each column are bold, on a terminal
    as in Markdown."""
    ansi = sys.stdout.isatty()
    print(f"\n{title}\n\n| Layer  | " + " | ".join(f"{name:>9}" for name in table) + " |")
    print("| ------ | " + " | ".join("-" * 8 + ":" for _ in table) + " |")
    for t in range(len(next(iter(table.values())))):
        cells = []
        for column in table.values():
            cell, bold = f"{column[t]:.2f}", column[t] >= sorted(column)[-2:][0]
            cell = f"**{cell}**" if bold and not ansi else cell
            cells.append(f"\033[1m{cell:>9}\033[0m" if bold and ansi else f"{cell:>9}")
        print(f"| {t:<6} | " + " | ".join(cells) + " |")
    if chance:
        print("| chance | " + " | ".join(f"{c:9.2f}" for c in chance) + " |")


def main() -> None:
    parser = Parser(description="Table 7: what a small classifier finds in each layer's states")
    parser.add_argument("--model", default="nano/roberta", help="folder, hub name or run folder")
    what = "SentEval's data/probing, or what table7_tasks.py made (default: of nano/e2e)"
    parser.add_argument("--senteval", type=Path, metavar="DIR", help=what)
    parser.add_argument("--tasks", nargs="+", choices=FILES, help="only these")
    what = "training sentences, and half as many to validate and to test (all; of nano/e2e 1000)"
    parser.add_argument("--size", type=at_least(20), help=what)
    what = "without --senteval: where the tasks go"
    parser.add_argument("--out", type=Path, default=Path("runs/table7"), help=what)
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    args = parser.parse_args()
    if not args.senteval:
        texts = [r for s in ("train", "dev", "test") for _, r in read_e2e(Path("nano/e2e"), s)]
        write_tasks(args.out, texts, args.size or 1000, 1000)
    folder = args.senteval or args.out
    present = [name for name, file in FILES.items() if (folder / f"{file}.txt").exists()]
    if not present:
        raise InputError(f"{folder} holds none of SentEval's files, such as {FILES['WC']}.txt")
    if not args.tasks and len(present) < len(FILES):
        print(f"{folder} holds {', '.join(present)} alone")
    names = [name for name in FILES if name in (args.tasks or present)]
    tasks = {name: read_senteval(folder, name, args.size) for name in names}

    device = pick_device(args.device)
    model, tokenizer = load_model(args.model, device, head="none")
    table, chance = {}, []
    for name, task in tasks.items():
        rows, sizes = sum(task.values(), []), [len(rows) for rows in task.values()]
        numbers = {label: i for i, label in enumerate(sorted({label for label, _ in rows}))}
        amount = f"{name}: {sizes} sentences to train, validate, test; {len(numbers)} classes"
        if not all(sizes) or len(numbers) < 2:
            raise InputError(f"{amount}, which is too little; give a larger --size")
        print(amount)
        y = torch.tensor([numbers[label] for label, _ in rows], device=device).split(sizes)
        chance.append(100 * y[2].bincount().max().item() / len(y[2]))
        states = features(model, tokenizer, [text for _, text in rows])
        table[name] = [
            100 * probe(states[:, t].to(device).split(sizes), y, linear=name == "WC")
            for t in progress_bar(range(model.config.n_layer), f"probe {name}", leave=False)
        ]
    print_table(f"{args.model}, accuracy in %", table, chance)
    paper = {name: PAPER["table7"][name] for name in table}
    print_table("Table 7 of the paper: RoBERTa-base, SentEval's own files", paper, [])


if __name__ == "__main__":
    command_line(main)
