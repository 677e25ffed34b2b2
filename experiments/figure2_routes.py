"""Which layer mixes with which: the heat maps of Figure 2 (appendix C.3).

For RoBERTa-base on every task of GLUE the paper shows how often the gate chose layer j (y) to join
slot t (x): white never, black always, both axes cut into thirds, for early, middle and later
layers. It points out that on CoLA layer 2 joins slot 9 in 100% of cases, that QQP and MNLI choose
middle layers, and MRPC mainly early ones.

    python experiments/figure2_routes.py            small: nano/roberta learns CoLA and MRPC first
    python experiments/figure2_routes.py runs/roberta-base-*-molex-s0                   in full

In full it takes finished runs of train.py with MoLEx, of any model and task, and draws them side by
side. Red dots mark the slot's own layer: a choice on them adds nothing (Eq. 4 with v = u).

Where the paper is silent:

- Over which data: what eval.py evaluates on (the dev sets of GLUE, the prompts of E2E's test set),
  in the same batches, so these are the routes behind the run's own score; for Alpaca the prompts of
  all dev examples. In a language model the prompt chooses, and its choice is held.
- What is counted: sequences. With batch routing all sequences of a batch count alike. With K = 2
  the shares of a slot add up to 200%; the table's are parts of all choices.
- Layer j of T is early, middle or later as 3 j / T is below 1, 2 or 3. A slot that does not mix
  (--molex-layers) has no choice to show, and stays white.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # noqa: E402
from data import (  # noqa: E402
    GLUE,
    Example,
    Tokenizer,
    collate,
    e2e_prompt,
    encode_alpaca,
    encode_glue,
    encode_prompt,
    read_alpaca,
    read_glue,
)
from eval import (  # noqa: E402
    Parser,
    autocast,
    cast_frozen,
    command_line,
    default_device,
    load_run,
    read_run,
    read_test,
)
from model import InputError  # noqa: E402

PAPER = {"mnli": "mainly middle", "mrpc": "mainly early", "cola": "slot 9 takes 2 in 100%",
         "qqp": "mainly middle"}  # fmt: skip
SMALL = ["--model", "nano/roberta", "--epochs", "1"]


def read_prompts(config: dict, tokenizer: Tokenizer, limit: int) -> list[list[Example]]:
    """What a run is evaluated on, one list for each split."""
    task, data = config["task"], config["data"]
    if task in GLUE:
        splits = [read_glue(data, task, split) for split in GLUE[task].dev]
        return [encode_glue(tokenizer, rows, limit) for rows in splits]
    if task == "alpaca":
        found = encode_alpaca(tokenizer, read_alpaca(data, "dev"), limit)
        return [[Example(e.prompt) for e in found]]
    return [[Example(encode_prompt(tokenizer, e2e_prompt(mr))) for mr in read_test(config)[0]]]


@torch.no_grad()
def routes(folder: Path, device: torch.device) -> Tensor:
    """(T, T) of a run: for how many of its sequences, in %, layer j was chosen in slot t."""
    model, tokenizer, config = load_run(folder, device)
    cast_frozen(model)
    size, limit = config["eval_batch"], min(config["max_length"], model.config.max_positions)
    splits = read_prompts(config, tokenizer, limit)
    for split in splits:
        split.sort(key=len)  # as in eval.py
        for i in range(0, len(split), size):
            batch = collate(split[i : i + size]).to(device)
            with autocast(device):
                model.hidden(batch.ids, batch.mask)
    return 100 * model.layers.counts / sum(map(len, splits))


def thirds(share: Tensor) -> tuple[list[float], float]:
    """The part of all choices, in %, that fell on early, middle and later layers, and on the slot's
    own layer. share (T, T): see `routes`."""
    T, total = len(share), share.sum().item()
    by_third = [0.0] * 3
    for j, chosen in enumerate(share.sum(0).tolist()):
        by_third[3 * j // T] += 100 * chosen / total
    return by_third, 100 * share.trace().item() / total


def title(folder: Path) -> str:
    return "/".join(folder.parts[-2:])  # runs in different folders may share a name


def draw(shares: dict[Path, Tensor], path: Path) -> None:
    """A panel for each run folder and its `routes`, at most four in a row."""
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wide = min(4, len(shares))
    high, T = -(-len(shares) // wide), max(map(len, shares.values()))
    inches = 1 + 0.2 * T
    figure, axes = pyplot.subplots(high, wide, squeeze=False, layout="constrained",
                                   figsize=(inches * wide + 0.8, inches * high))  # fmt: skip
    for panel in axes.flat[len(shares) :]:
        panel.axis("off")
    for panel, (folder, share) in zip(axes.flat, shares.items(), strict=False):
        T = len(share)
        image = panel.imshow(share.T.numpy(), cmap="Greys", vmin=0, vmax=100, origin="lower")
        panel.plot(range(T), range(T), ".", color="tab:red", markersize=3)
        for third in (-(-T // 3), -(-2 * T // 3)):  # the first layer of the next
            panel.axhline(third - 0.5, color="tab:blue", linewidth=0.8)
            panel.axvline(third - 0.5, color="tab:blue", linewidth=0.8)
        panel.set(xticks=range(0, T, 2), yticks=range(0, T, 2))
        panel.set(xlabel="slot t", ylabel="layer chosen by the gate")
        panel.set_title(title(folder).replace("/", "\n"), fontsize=8)
    figure.colorbar(image, ax=axes, label="% of sequences")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = Parser(description="Figure 2: heat maps of the routes of runs, side by side")
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="finished runs with MoLEx"
                        " (default: train nano/roberta on CoLA and on MRPC)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/figure2"),
                        help="where the picture goes and, without RUN, its runs")  # fmt: skip
    args = parser.parse_args()
    device, folders = default_device(), args.runs
    if not folders:
        settings = [
            s for task in ("cola", "mrpc") for s in train.parse([*SMALL, "--task", task])[1]
        ]
        folders = [train.run(s, args.out, False, device) for s in settings]
    configs = {folder: read_run(folder)[0] for folder in folders}
    for folder, config in configs.items():
        if not config["molex"]:
            raise InputError(f"{folder} is a run without MoLEx: it has no routes")

    shares = {folder: routes(folder, device) for folder in tqdm(folders, "runs")}
    heads = ("early", "middle", "later", "own")
    print(f"\n{'% of choices':48}" + "".join(f"{head:>8}" for head in heads) + "   paper")
    for folder, share in shares.items():
        by_third, own = thirds(share)
        cells = "".join(f"{x:>8.0f}" for x in (*by_third, own))
        print(f"{title(folder):48}{cells}   {PAPER.get(configs[folder]['task'], '')}")
    picture = args.out / "routes.png"
    draw(shares, picture)
    print(f"\n{picture}: what each slot chose")


if __name__ == "__main__":
    command_line(main)
