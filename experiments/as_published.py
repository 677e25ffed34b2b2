"""MoLEx as its authors' code has it, beside MoLEx as the paper writes it (Tables 1 and 2).

The first author's code (github.com/ahihidongok111/molex: NLG's model.py and gpt2_beam.py, NLU's
modeling_roberta.py, the scripts) answers what the paper leaves open:

- Texts are padded to 512 tokens, and every position votes. In GPT-2 padding is token 0, a token
  like any other; in RoBERTa it is no key, so all padding of a text has one state.
- The mixture's weights are constant, so the task teaches the gate nothing. Load balance does: T
  times the mean score of the layer that was chosen, summed over the slots.
- While an answer is written the newest tokens vote anew in every step, and a slot has one cache,
  the alpha-weighted mean of both layers' keys and values. Answers are decoded one by one.

DECISIONS.md has the rest beside ours, as_published.toml the settings. E2E is scored by the last
epoch (GLUE, here, by the best); 8 processes that vote each for itself are 8 micro-batches here.

    python experiments/as_published.py             small: nano/gpt2 on E2E, one seed, few steps
    python experiments/as_published.py --model gpt2-medium --task e2e --seeds 0 1 2 3 4    Table 2
    python experiments/as_published.py --model roberta-base --task cola          a cell of Table 1
    publish(model, MoLExConfig())           from Python; flags are --pad and train.py's
"""

import math
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import eval as evaluation
import train
from data import TASKS, Batch, Example, Tokenizer
from lora import merge, trained_tensors
from model import Config, Context, Transformer
from molex import LOG_AFFINITIES, MoLEx, MoLExConfig, linear_gate
from support.cli import Parser, at_least, command_line, pick_device
from support.files import NUMBER, InputError, fill, locked, read_json, write_json
from support.processes import world
from support.runs import RunFolder
from support.settings import Settings
from support.tables import paper, shown, spread

SCRIPTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
PATCH = mock.patch.object
SMALL = "--max-steps 25 --test-limit 10 --beams 4 --max-new-tokens 40".split()


class PublishedCosineGate(nn.Module):
    """Projection (with a bias) and layers' vectors; the projected states are normalised over the
    sequence; times a learned temperature from 2 to 100. (B, N, D) -> (B, N, T)."""

    def __init__(self, d_model: int, T: int, config: MoLExConfig) -> None:
        super().__init__()
        self.project = linear_gate(d_model, config.proj_dim, config)
        self.layer = nn.Parameter(0.01 * torch.randn(config.proj_dim, T))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(2.0)))

    def forward(self, z: Tensor) -> Tensor:
        cosine = F.normalize(self.project(z), dim=1) @ F.normalize(self.layer, dim=0)
        return cosine * self.log_temperature.clamp(max=math.log(100.0)).exp()


class Published(MoLEx):
    """The stack of layers as the authors' code has it; see the top of this file."""

    def __init__(self, blocks: nn.ModuleList, d_model: int, config: MoLExConfig) -> None:
        super().__init__(blocks, d_model, config)
        if config.gate == "cosine":
            gates = [PublishedCosineGate(d_model, len(blocks), config) for _ in self.gates]
            self.gates = nn.ModuleList(gates)
        if config.learn_alpha:  # two weights with the gate, whose rate and decay they share
            del self.alpha_logit
            for gate in self.gates:
                gate.mixing = nn.Parameter(torch.full((2,), 0.5))

    def alpha(self, t: int) -> Tensor | float:
        if self.config.learn_alpha:
            return self.gates[self.gate_of(t)].mixing.softmax(0)[0]
        return self.config.alpha

    def mix(self, t: int, z: Tensor, ctx: Context) -> Tensor:
        own = self.blocks[t](z, ctx, (t, t))
        j, alpha = self.elect(t, z), self.alpha(t)
        other = self.blocks[j](z, ctx, (t, "other"))  # runs also where it is layer t itself
        if ctx.cache is not None:  # of the newest tokens both layers keep the mean
            new = slice(ctx.cache.real.shape[1] - z.shape[1], ctx.cache.real.shape[1])
            for x, y in zip(ctx.cache.kv[t, t], ctx.cache.kv[t, "other"], strict=True):
                x[:, :, new] = y[:, :, new] = alpha * x[:, :, new] + (1 - alpha) * y[:, :, new]
        return alpha * own + (1 - alpha) * other

    def scores(self, t: int, z: Tensor) -> Tensor:
        """The gate's, before softmax or sigmoid: (B, N, D) -> (B, N, T)."""
        with torch.autocast(z.device.type, enabled=False):
            return self.gates[self.gate_of(t)](z.to(torch.promote_types(z.dtype, torch.float32)))

    def elect(self, t: int, z: Tensor) -> int:
        """The layer for which all positions of the batch vote; adds what load balance costs."""
        scores = self.scores(t, z)
        j = self.winner(scores.flatten(0, 1))
        mean = scores.softmax(-1).mean((0, 1))
        if self.training:  # a mean over the processes
            self.load_balance = self.load_balance + len(mean) * mean[j] / world()[1]
        self.routes.add(torch.tensor([[j]], device=z.device), mean.detach()[None])
        return j

    def winner(self, scores: Tensor) -> int:
        """Of scores (positions, T) the layer with most votes, or the best mean; then the first."""
        if self.config.vote == "mode":
            votes = F.one_hot(scores.argmax(-1), scores.shape[-1]).sum(0)
        else:
            votes = LOG_AFFINITIES[self.config.activation](scores).exp().mean(0)
        return votes.argsort(descending=True, stable=True)[0].item()


def check(config: Config, molex: MoLExConfig) -> None:
    """Raise InputError for what the published code has not."""
    if config.rotary:
        raise InputError("the published code has GPT-2 and RoBERTa, and no Llama")
    ours = ("on_device", "route", "top_k", "gate_weight", "borrow_size")
    if given := [name for name in ours if getattr(molex, name) != getattr(MoLExConfig, name)]:
        raise InputError(f"as published there is no --{given[0].replace('_', '-')}")
    if molex.vote not in ("mode", "mean"):
        raise InputError(f"as published there is no --vote {molex.vote}")


def publish(model: Transformer, config: MoLExConfig) -> Transformer:
    """Put `Published` in the place of the model's layers. Raises InputError, see `check`."""
    check(model.config, config)
    layers = Published(model.layers.blocks, model.config.d_model, config)
    model.layers = layers.to(model.device)
    return model.train(model.training)


def padded_collate(config: Config, pad: int):
    """`collate` for texts padded to `pad` tokens."""

    def padded(examples: list[Example]) -> Batch:
        batch = data.collate(examples)
        N = batch.ids.shape[1]
        mask = F.pad(batch.mask, (0, pad - N))
        ids = F.pad(batch.ids, (0, pad - N)).masked_fill(~mask, 0 if config.causal else config.pad)
        where = batch.where
        if config.causal:  # places in the flattened batch; padding is a token like any other
            mask, where = torch.ones_like(mask), where // N * pad + where % N
        return Batch(ids, mask, mask, where, batch.target)

    return padded


def decode(model: Transformer, tokenizer: Tokenizer, s: Settings, pad: int) -> tuple[list, list]:
    """E2E's outputs, references. All `pad` places of a prompt vote; the answer sees no padding."""
    hidden = model.hidden

    def wide(tokenizer: Tokenizer, text: str) -> list[int]:
        ids = data.encode_prompt(tokenizer, text)
        if len(ids) > pad:
            raise InputError(f"--pad is {pad}, but the prompt {text!r} has {len(ids)} tokens")
        return ids + (pad - len(ids)) * [-1]  # beam_search's number for padding

    def all_real_at_first(ids: Tensor, mask: Tensor | None = None, **more) -> Tensor:
        h = hidden(ids, **more)  # padding, with number 0, is a token like any other
        return h if mask is None else h[torch.arange(len(h)), mask.sum(1) - 1][:, None]

    with PATCH(evaluation, "encode_prompt", wide), PATCH(model, "hidden", all_real_at_first):
        return evaluation.decode_test(model, tokenizer, s)[1:]


def as_script(s: Settings, pad: int | None = None) -> Settings:
    """The settings of a run as its script has them; `pad`: 512, or all positions of the model."""
    config = Config.load(s.model)
    check(config, s.molex)
    if s.init or s.task not in SCRIPTS or config.causal != (s.task == "e2e"):
        raise InputError("the published code has E2E with GPT-2, GLUE with RoBERTa, no --init-from")
    room = config.max_positions - (s.max_new_tokens if s.task == "e2e" else 0)
    if (pad or 0) > room:
        raise InputError(f"--pad is {pad}, but the model has room for {room} tokens")
    script = {} if s.task == "e2e" else dict(SCRIPTS["glue"])
    script.update(SCRIPTS[s.task], **SCRIPTS.get(s.shape, {}), max_length=pad or min(512, room))
    processes = script.pop("processes", 1)
    if s.shape.startswith("roberta"):
        script.update(batch_size=processes * s.batch_size, accumulate=processes)
    of_gate = {name: script.pop(name) for name in vars(s.molex).keys() & script.keys()}
    return replace(s, molex=replace(s.molex, **of_gate), **script)


def run(s: Settings, folder: Path, device: torch.device) -> dict[str, float]:
    """Train and score one run as published, or what is left of it."""
    if RunFolder(folder).finished(s, data.data_files(s.task, s.data)):
        return read_json(folder / "scores.json", dict.fromkeys(shown(s.task, TASKS), NUMBER))
    model, tokenizer = train.prepare(s, device)
    publish(model, s.molex)
    uncut = replace(s, max_length=model.config.max_positions)
    examples, dev = train.read_data(uncut, tokenizer, uncut.max_length)
    longest, pad = max(len(e) for split in (examples, *dev.values()) for e in split), s.max_length
    if longest > pad:
        raise InputError(f"--pad is {pad}, but the longest text has {longest} tokens")
    collate = padded_collate(model.config, pad)
    with locked(folder), PATCH(train, "collate", collate), PATCH(evaluation, "collate", collate):
        train.fit(s, folder, model, examples, dev)
        if s.task != "e2e":
            fill(trained_tensors(model), RunFolder(folder).best(s, Published.__name__), folder)
        scores = evaluation.dev_scores(model.eval(), s.task, dev, s.eval_batch)
        if s.task == "e2e":
            merge(model)
            scores.update(evaluation.e2e_scores(*decode(model, tokenizer, s, pad)))
        write_json(folder / "scores.json", scores)
    return scores


def report(task: str, papers: list[dict], columns: list[list[dict]]) -> None:
    """Print the table of a task; `columns`: the scores of LoRA's runs, MoLEx's, the published."""
    heads = ("LoRA", "MoLEx as written", "as published", "paper: LoRA", "paper: MoLEx")
    print(f"\n{task:16}" + "".join(f"{head:>19}" for head in heads))
    for name, (title, factor, digits) in shown(task, TASKS).items():
        cells = [spread([run[name] for run in column], factor, digits) for column in columns]
        cells += [numbers.get((task, name), "") for numbers in papers]
        print(f"{title:16}" + "".join(f"{cell:>19}" for cell in cells))


def main() -> None:
    parser = Parser(description="MoLEx as published; also train.py's flags", allow_abbrev=False)
    parser.add_argument("--pad", type=at_least(1), help="positions of a text (512, if it has them)")
    parser.add_argument("--out", type=Path, default=Path("runs/as-published"), help="for the runs")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    args, flags = parser.parse_known_args()
    given, runs = train.parse([*(flags or SMALL), "--compare"])
    if given.fresh:
        raise InputError("--fresh is not heeded here: remove the runs that are to go")
    out = args.out if flags else args.out / "small"
    device, papers, notes = pick_device(args.device), {}, set()
    for s in runs:  # an error, if another run is there
        RunFolder(out / s.name).finished(s, data.data_files(s.task, s.data))
    columns = {s.task: ([], [], []) for s in runs}  # task -> the scores of each method's runs
    for plain, written in zip(runs[::2], runs[1::2], strict=True):
        task, script = written.task, as_script(written, args.pad)
        columns[task][2].append(run(script, out / "as-published" / script.name, device))
        for found, s in zip(columns[task], (plain, written), strict=False):
            finished = RunFolder(train.run(s, out, False, device))
            found.append(finished.read_scores(shown(task, TASKS)))
        papers[task] = [paper(s, TASKS) for s in (plain, written)]
        ours, code = (dict(vars(s), molex=None, **vars(s.molex)) for s in (written, script))
        notes |= {f"{task}: {n} {x}, as written {ours[n]}" for n, x in code.items() if x != ours[n]}
    for task, found in columns.items():
        report(task, papers[task], list(found))
    print("\nSettings as published:", *sorted(notes), sep="\n  ")


if __name__ == "__main__":
    command_line(main, "the same command goes on with what was begun")
