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

- Over which data: the set that eval.py evaluates on (the dev sets of GLUE, the prompts of E2E's test
  set) in the same batches, so these are the routes behind the run's own score. Only prompts go
  through the model: routes are chosen from them and then held.
- What is counted: sequences. With batch routing all sequences of a batch count alike.
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
    encode_glue,
    encode_prompt,
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
from model import InputError, Transformer  # noqa: E402

PAPER = {"mnli": "mainly middle", "mrpc": "mainly early", "cola": "slot 9 takes 2 in 100%",
         "qqp": "mainly middle"}  # fmt: skip
SMALL = ["--model", "nano/roberta", "--data", "nano/glue", "--lr", "5e-3", "--epochs", "1"]


def examples(config: dict, tokenizer: Tokenizer, limit: int) -> list[list[Example]]:
    """What a run is evaluated on: the prompts of every split."""
    if config["task"] not in GLUE:
        prompts = [encode_prompt(tokenizer, e2e_prompt(mr)) for mr in read_test(config)[0]]
        return [[Example(ids) for ids in prompts]]
    rows = [read_glue(config["data"], config["task"], s) for s in GLUE[config["task"]].dev]
    return [encode_glue(tokenizer, some, limit) for some in rows]


@torch.no_grad()
def count_routes(folder: Path, device: torch.device) -> Tensor:
    """counts (T, T) of a run: for how many sequences layer j was chosen in slot t."""
    model, tokenizer, config = load_run(folder, device)
    cast_frozen(model)
    limit = min(config["max_length"], model.config.max_positions)
    for split in examples(config, tokenizer, limit):
        run_prompts(model, split, config["eval_batch"])
    return model.layers.counts


def run_prompts(model: Transformer, split: list[Example], batch_size: int) -> None:
    """All prompts through the layers, in the batches of eval.py's `classify` and `generate`."""
    device, order = model.embed.weight.device, sorted(split, key=len)
    for i in range(0, len(order), batch_size):
        batch = collate(order[i : i + batch_size]).to(device)
        with autocast(device):
            model.hidden(batch.ids, batch.mask)


def thirds(counts: Tensor) -> tuple[list[float], float]:
    """The share of all choices, in %, that fell on early, middle and later layers, and on the
    slot's own layer."""
    T, total = len(counts), counts.sum().item()
    by_third = [0.0] * 3
    for j, chosen in enumerate(counts.sum(0).tolist()):
        by_third[3 * j // T] += 100 * chosen / total
    return by_third, 100 * counts.trace().item() / total


def draw(runs: dict[str, Tensor], path: Path) -> None:
    """A panel for each title and its counts, at most four in a row."""
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wide = min(4, len(runs))
    high, T = -(-len(runs) // wide), max(map(len, runs.values()))
    inches = 1 + 0.2 * T
    figure, axes = pyplot.subplots(high, wide, squeeze=False, layout="constrained",
                                   figsize=(inches * wide + 0.8, inches * high))  # fmt: skip
    for panel in axes.flat[len(runs) :]:
        panel.axis("off")
    for panel, (title, counts) in zip(axes.flat, runs.items(), strict=False):
        T = len(counts)
        share = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
        image = panel.imshow(share.T, cmap="Greys", vmin=0, vmax=100, origin="lower")
        panel.plot(range(T), range(T), ".", color="tab:red", markersize=3)
        for third in (-(-T // 3), -(-2 * T // 3)):  # the first layer of the next
            panel.axhline(third - 0.5, color="tab:blue", linewidth=0.8)
            panel.axvline(third - 0.5, color="tab:blue", linewidth=0.8)
        panel.set(xticks=range(0, T, 2), yticks=range(0, T, 2))
        panel.set(xlabel="slot t", ylabel="layer chosen by the gate")
        panel.set_title(title, fontsize=8)
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

    counts = {folder: count_routes(folder, device) for folder in tqdm(folders, "runs")}
    print(f"\n% of choices{'':24}" + "".join(f"{n:>9}" for n in ("early", "middle", "later", "own"))
          + "   paper")  # fmt: skip
    for folder in folders:
        by_third, own = thirds(counts[folder])
        print(f"{folder.name:36}" + "".join(f"{x:>9.0f}" for x in (*by_third, own))
              + f"   {PAPER.get(configs[folder]['task'], '')}")  # fmt: skip
    picture = args.out / "routes.png"
    draw({folder.name: counts[folder] for folder in folders}, picture)
    print(f"\n{picture}: what each slot chose")


if __name__ == "__main__":
    command_line(main)
