"""Who decides in MoLEx as published: the text or its padding? Not in the paper.

In the authors' code every position of a padded batch votes (as_published.py). Here the batches of
a run's dev set are padded as in its training and given to its best epoch; in every slot the layer
that wins is held against the one that would win if padding alone voted, or real tokens alone.

    python experiments/padding_votes.py RUN ...     runs of as_published.py, or of controls.py's arm
    python experiments/padding_votes.py             small: 10 steps of nano/roberta on CoLA
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from data import TASKS, Example
from eval import build
from experiments import as_published
from experiments.as_published import Published, padded_collate, publish
from lora import trained_tensors
from model import Transformer
from molex import MoLExConfig
from support.cli import Parser, command_line, pick_device
from support.files import fill
from support.runs import RunFolder
from support.settings import read_settings


@torch.no_grad()
def whose_route(
    model: Transformer, examples: list[Example], size: int, pad: int
) -> tuple[float, float, float, int]:
    """Of a published model's batches of `size` texts padded to `pad` tokens, in %: the votes that
    padding has; the decisions that are those of padding alone; those of real tokens alone. And the
    number of decisions."""
    layers, collate = model.layers, padded_collate(model.config, pad)
    scores_of, heard = layers.scores, []
    layers.scores = lambda t, z: heard.append(scores_of(t, z)) or heard[-1]
    real_tokens = positions = decisions = of_padding = of_text = 0
    for i in range(0, len(examples), size):
        part = examples[i : i + size]
        batch = collate(part).to(model.device)
        lengths = torch.tensor([len(e) for e in part], device=model.device)
        real = torch.arange(pad, device=model.device) < lengths[:, None]
        heard.clear()
        model.hidden(batch.ids, batch.mask)
        for scores in heard:
            winner = layers.winner(scores.flatten(0, 1))
            of_padding += winner == layers.winner(scores[~real])
            of_text += winner == layers.winner(scores[real])
        decisions += len(heard)
        real_tokens += real.sum().item()
        positions += real.numel()
    del layers.scores
    shares = (100 * n / decisions for n in (of_padding, of_text))
    return 100 - 100 * real_tokens / positions, *shares, decisions


def main() -> None:
    parser = Parser(description="Who decides in MoLEx as published: the text or its padding?")
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="as published")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    args = parser.parse_args()
    device, folders = pick_device(args.device), args.runs
    if not folders:
        flags = "--model nano/roberta --task cola --max-steps 10 --dev-limit 64".split()
        s = as_published.as_script(train.parse(flags)[1][0])
        folders = [Path("runs/padding-votes") / s.name]
        as_published.run(s, folders[0], device)
    settings = [read_settings(folder, MoLExConfig) for folder in folders]
    runs = [RunFolder(folder) for folder in folders]
    trained = [run.best(s, Published.__name__) for run, s in zip(runs, settings, strict=True)]
    heads = ("votes of padding", "its route", "the text's", "decisions")
    print(f"{'':30}" + "".join(f"{head:>18}" for head in heads))
    for folder, s, tensors in zip(folders, settings, trained, strict=True):
        model, tokenizer = build(s, device)
        publish(model, s.molex).eval()
        fill(trained_tensors(model), tensors, f"{folder} is no run as published: it")
        dev = train.read_data(s, tokenizer, model.config.max_positions)[1]
        examples = [e for split in TASKS[s.task].dev for e in dev[split]]
        size = math.ceil(s.batch_size / s.accumulate)  # a process of theirs votes for itself
        padding, its, texts, count = whose_route(model, examples, size, s.max_length)
        name = f"{s.model}, {TASKS[s.task].folder}, seed {s.seed}"
        print(f"{name:30}{padding:16.1f} %{its:16.1f} %{texts:16.1f} %{count:18}")


if __name__ == "__main__":
    command_line(main)
