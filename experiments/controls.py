"""MoLEx taken apart: which part of the method makes a difference? Not in the paper.

The paper compares LoRA with LoRA + MoLEx (Tables 1 and 2). Between the two lie a second layer in
every slot, a gate that chooses it, an alpha, and more compute. Here each has an arm of its own:

    lora, molex, published        LoRA; MoLEx; MoLEx as the authors' code has it (as_published.py)
    own-size                      MoLEx with --borrow-size own: what a layer adds is scaled to the
                                  length of what the slot's own adds; also with -random,
                                  -neighbour and -0.5, as below
    straight-through, prob        MoLEx with that --gate-weight: the task teaches the gate, too
    sequence                      with --route sequence
    frozen                        the gate stays at its random start (--gate-lr 0)
    random                        another layer, drawn anew for every slot and batch
    neighbour, permutation        a fixed other layer: t + 1 (for the last t - 1); a random cycle
    own                           molex's run, evaluated with every slot's own layer alone
    lora-gate, lora-neighbour     lora's run, evaluated with the layers that molex's gate, or
                                  neighbour, mixes in
    alpha-0.5 ... alpha-0.99      MoLEx with that alpha (molex has 0.95)
    learned                       MoLEx with a learned alpha
    lora-long                     LoRA with twice the steps, about what MoLEx computes

    python experiments/controls.py                    small: nano/gpt2 on E2E, one seed, 8 minutes
    python experiments/controls.py --seeds 0 1 2 3 4                  the embedded default, in full
    python experiments/controls.py --model smollm2 --data DIR --max-steps 150 --seeds 0 1 2 \
        --arms lora molex neighbour

All flags but the four of `--help` are train.py's. A seed gives all arms the same start of the LoRA
and the same batches in the same order; seed after seed, so that an end too early leaves whole
seeds. The same command again resumes and keeps what is finished; with --report it trains nothing
and prints what is there. A run is scored by its best epoch: GLUE by the task's metric, E2E by BLEU
on the test set and dev loss, Alpaca by dev loss.

What an arm leaves alone:

- Where a layer is given, it has all the weight of Eq. 4, and neither gate nor hidden states have a
  gradient from a gate. With `frozen` load balance still has one to what the gate reads. A learned
  alpha has the gate's rate, so `frozen` holds it, too.
- random draws from the run's seed. What is evaluated is drawn too, a layer for each batch. A run
  that was killed goes on with other draws than one that was not.
- lora-long's learning rate decays over its own, longer training.

Measured: differences with their 95% interval; with so many, some leave it by chance. 1 to 3: five
seeds, `--model nano/gpt2 --epochs 1 --seeds 0 1 2 3 4 --arms molex published straight-through
frozen random`. 4 to 8: three seeds of the other arms (the picture is figures/controls-alpha.png).
9 to 11: the first steps of a real model, `--model smollm2 --data DIR --task sst2 --precision bf16
--no-learn-alpha --max-steps 200`, three seeds where there is an interval, else one; 9 and 10 on a
CPU, 11 on an H100 (STS-B: 150 steps). RESULTS.md has the tables.

1. nano: MoLEx has more BLEU than LoRA with every seed, 74.36 for 73.80, +0.56 ± 0.51 (on another
   machine -0.29 ± 1.30); in dev loss they are level, +0.002 ± 0.009. With the task teaching the
   gate, too, it is the same (+0.59 ± 0.77). As published, 73.70, it is level: -0.11 ± 0.88.
2. A layer that no gate has learned to choose is level with LoRA: frozen +0.08 ± 0.98, random
   +0.05 ± 1.47.
3. Against MoLEx itself frozen lacks 0.48 ± 1.06 BLEU, random 0.51 ± 1.19: these seeds cannot say
   whether it matters what the gate learns.
4. MoLEx's run with every slot's own layer alone is level with itself, -0.41 ± 1.36 BLEU and
   -0.004 ± 0.030 dev loss: what it has learned is in the LoRA.
5. LoRA's run does not take every second layer that it was not trained with: its dev loss rises by
   0.037 ± 0.015 with the neighbour, by 0.057, 0.131 and 0.005 with MoLEx's gate.
6. Small alphas hurt: 0.5 lowers BLEU by 15.30 ± 13.08 and raises the dev loss by 0.340 ± 0.256;
   0.8 has -3.40 ± 8.35.
7. From 0.9 on alpha makes no clear difference in BLEU: 0.9 has -0.84 ± 5.80, 0.99 +0.12 ± 0.70;
   learned, it goes to 0.981 and has -0.25 ± 1.25.
8. Twice the steps give LoRA +0.34 ± 1.38 BLEU and the lowest dev loss, -0.024 ± 0.026; at such
   compute MoLEx has 0.10 ± 1.37 BLEU more and 0.022 ± 0.010 dev loss more.
9. SmolLM2: MoLEx is far behind LoRA (one seed: 60.3 for 83.8), as is a layer drawn anew for every
   batch (-22.44 ± 14.47, at the slot's own size -2.56 ± 1.19); with the task teaching the gate,
   too, it is so with two seeds of three (-19.30 ± 36.33). The neighbour in every slot is level
   (-2.48 ± 4.74, at the slot's own size +1.03 ± 1.24; on STS-B -0.73 ± 3.31 and +2.21 ± 9.79). A
   frozen gate is level with two seeds and 29 behind with the third, whose layers alone cost the
   pretrained model 3 nats a token (borrowing.py): which layers join seems to slow learning, rather
   than that there are two.
10. There MoLEx's run has 68.1 without its second layers, and LoRA's run keeps 79.6 of 83.8 with the
    neighbour, 58.4 with MoLEx's gate: which layers join harms training, and use as well.
11. With three seeds MoLEx has 67.35 for 83.94; at the slot's own size 82.34, on STS-B 48.66 where
    MoLEx has 14.91 and LoRA 60.56: there most of what MoLEx costs is gone.
"""

import random
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from math import log10
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from data import GLUE, TASKS, Example, Tokenizer, data_files
from eval import bleu, build, decode_test, dev_scores, read_run
from experiments import as_published
from lora import merge, trained_tensors
from model import Config, Transformer
from molex import MoLEx
from support.cli import Parser, command_line, pick_device
from support.files import NUMBER, InputError, fill, locked, read_json, write_atomic, write_json
from support.runs import RunFolder, origin, other_settings
from support.tables import interval, spread

Pick = Callable[[int], int]  # slot -> the layer that joins it


def own(T: int, seed: int) -> Pick:
    return lambda t: t


def neighbour(T: int, seed: int) -> Pick:
    return lambda t: t + 1 if t + 1 < T else t - 1


def permutation(T: int, seed: int) -> Pick:
    cycle = random.Random(seed).sample(range(T), T)  # no layer is its own successor
    return {j: cycle[i - 1] for i, j in enumerate(cycle)}.__getitem__


def draw(T: int, seed: int) -> Pick:
    generator = random.Random(seed)
    return lambda t: generator.choice([j for j in range(T) if j != t])


@dataclass(frozen=True)
class Arm:
    flags: str = ""  # of train.py
    molex: bool = True  # or LoRA alone
    pick: Callable[[int, int], Pick] | None = None  # (T, seed) -> in the gate's place
    times: int = 1  # as many steps
    published: bool = False  # see as_published.py
    of: tuple[str, ...] = ()  # trains nothing: the first's run, with what the second's has trained


ARMS = {
    "lora": Arm(molex=False),
    "molex": Arm(),
    "published": Arm(published=True),
    "own-size": Arm("--borrow-size own"),
    "straight-through": Arm("--gate-weight straight-through"),
    "prob": Arm("--gate-weight prob"),
    "sequence": Arm("--route sequence"),
    "frozen": Arm("--gate-lr 0"),
    "random": Arm(pick=draw),
    "neighbour": Arm(pick=neighbour),
    "own-size-random": Arm("--borrow-size own", pick=draw),
    "own-size-neighbour": Arm("--borrow-size own", pick=neighbour),
    "permutation": Arm(pick=permutation),
    "own": Arm(pick=own, of=("molex",)),
    "lora-gate": Arm(of=("molex", "lora")),
    "lora-neighbour": Arm(pick=neighbour, of=("molex", "lora")),
    **{f"alpha-{a}": Arm(f"--alpha {a}") for a in (0.5, 0.8, 0.9, 0.99)},
    "own-size-0.5": Arm("--borrow-size own --alpha 0.5"),
    "learned": Arm("--learn-alpha"),
    "lora-long": Arm(molex=False, times=2),
}
SMALL = ["--max-steps", "25", "--test-limit", "20", "--beams", "4"]
METRICS = {"bleu": ("BLEU", 100, 2), "dev_loss": ("dev loss", 1, 4)} | {
    task.metric: (task.metric, 100, 2) for task in GLUE.values()
}  # name, factor, decimals

Scores = dict[str, dict[int, dict[str, float]]]  # arm -> seed -> what `run` has found


class Given(MoLEx):
    """MoLEx whose slots are given their layers: every token is all for `pick(t)`."""

    pick: Pick

    def log_affinity(self, t: int, z: Tensor) -> Tensor:
        log_a = torch.full((*z.shape[:2], len(self.blocks)), -100.0, device=z.device)
        log_a[..., self.pick(t)] = 0.0
        return log_a


def check(arm: Arm, config: Config) -> None:
    """Raise InputError if the arm gives another layer, and the model has none."""
    if arm.pick not in (None, own) and config.n_layer == 1:
        raise InputError("a model of one layer has no other to give")


def give(model: Transformer, arm: Arm, seed: int) -> Transformer:
    """Put the arm's pick, if it has one, in the gate's place."""
    if arm.pick:
        check(arm, model.config)
        model.layers.__class__ = Given  # what it holds, and the draws of its start, stay
        model.layers.pick = arm.pick(model.config.n_layer, seed)
    return model


def mismatch(folder: Path, s: train.Settings) -> str:
    """In which settings the run that is there is another; "": in none, or there is no run."""
    where = folder / "config.json"
    other = other_settings(read_json(where), s, where) if where.exists() else []
    return f"{folder} is of a run with another {', '.join(other)}" if other else ""


def last_entry(folder: Path, s: train.Settings) -> dict:
    """Of the log, with the `seconds` that training took."""
    entry = RunFolder(folder, TASKS[s.task].metric).read_log()[-1]
    return entry | dict(seconds=entry["step"] * entry["seconds_per_step"])


def run(name: str, s: train.Settings, out: Path, device: torch.device) -> None:
    """Train and evaluate one run, or what is left of it; its scores go to controls.json."""
    arm, folder = ARMS[name], out / name / f"s{s.seed}"
    if what := mismatch(folder, s):
        raise InputError(f"{what}; take another --out, or remove it")
    read = data_files(s.task, s.data)
    if (folder / "controls.json").exists():
        RunFolder(folder).check_files(s, read, "take another --out, or remove it")
        return
    print(folder, flush=True)
    if arm.published:
        found = as_published.run(s, folder, device)
        last = last_entry(folder, s)
        gate = last["curve"][-1] if last["curve"] else {}
        if "own" not in gate:
            raise InputError(f"{folder / 'metrics.jsonl'} has no point with a gate")
        found.update(alpha=gate["alpha"], own=100 * gate["own"], seconds=last["seconds"])
        write_json(folder / "controls.json", found)
        return
    model, tokenizer = train.prepare(s, device)
    examples, dev = train.read_data(s, tokenizer, model.config.max_positions)
    with locked(folder):
        if arm.of:
            write_json(folder / "origin.json", origin(s, read, type(model.layers).__name__))
            write_json(folder / "config.json", s.as_json())
        else:
            train.fit(s, folder, give(model, arm, s.seed), examples, dev)
        first, *others = [out / source / folder.name for source in arm.of or [name]]
        model = build(s, device)[0].eval()
        layers = Given.__name__ if arm.pick and not arm.of else ""
        fill(trained_tensors(model), RunFolder(first).best(s, layers), first)
        for other in others:
            theirs = read_run(other)[1]
            ours = {n: p for n, p in trained_tensors(model).items() if n in theirs}
            fill(ours, theirs, f"{other} does not fit {first}: it")
        found = score(give(model, arm, s.seed), tokenizer, dev, s) | dict(seconds=None)
        if not arm.of:
            found["seconds"] = last_entry(folder, s)["seconds"]
        write_json(folder / "controls.json", found)


def score(
    model: Transformer, tokenizer: Tokenizer, dev: dict[str, list[Example]], s: train.Settings
) -> dict[str, float]:
    """The metrics; alpha; how often, in %, a slot was given its own layer on the dev set."""
    found = dev_scores(model, s.task, dev, s.eval_batch) | dict(alpha=1.0, own=100.0)
    layers = model.layers
    if isinstance(layers, MoLEx):
        found["alpha"] = layers.mean_alpha()
        found["own"] = 100 * (layers.routes.counts.trace() / layers.routes.counts.sum()).item()
    if s.task == "e2e":
        merge(model)
        found["bleu"] = bleu(*decode_test(model, tokenizer, s)[1:])
    return found


def column(found: Scores, name: str, metric: str) -> tuple[list[float], list[float]]:
    """An arm's values, and their differences to LoRA's of the same seed."""
    runs, base, factor = found[name], found["lora"], METRICS[metric][1]
    gains = [factor * (runs[seed][metric] - base[seed][metric]) for seed in runs if seed in base]
    return [factor * r[metric] for r in runs.values()], gains


def report(found: Scores, metrics: list[str]) -> None:
    """The table."""
    heads = "".join(f"{METRICS[m][0]:>18}{'less LoRA, 95%':>18}" for m in metrics)
    print(f"\n{'':20}{'seeds':>5}{heads}{'time':>7}{'own %':>7}{'alpha':>7}")
    for name, runs in found.items():
        text = f"{name:20}{len(runs):5}"
        for m in metrics:
            decimals, (values, gains) = METRICS[m][2], column(found, name, m)
            cell = f"{mean(gains):+.{decimals}f}" if gains and name != "lora" else ""
            if cell and len(gains) > 1:
                cell += f" ± {interval(gains):.{decimals}f}"
            text += f"{spread(values, 1, decimals):>18}{cell:>18}"
        timed = [seed for seed, r in runs.items() if r["seconds"] and seed in found["lora"]]
        times = [runs[seed]["seconds"] / found["lora"][seed]["seconds"] for seed in timed]
        text += f"{mean(times):7.2f}" if times else f"{'':7}"
        text += f"{mean(r['own'] for r in runs.values()):7.0f}"
        print(text + f"{mean(r['alpha'] for r in runs.values()):7.3f}")


def plot(found: Scores, metrics: list[str], path: Path) -> None:
    """Each metric over alpha: dots for the seeds, a line through their means, and as a band the 95%
    interval of the difference to LoRA, whose alpha is 1 and whose mean is the dashed line."""
    from matplotlib.figure import Figure  # slow to import

    names = [n for n in found if n in ("lora", "molex") or n.startswith("alpha-")]
    arms = {n: next(iter(found[n].values()))["alpha"] for n in names}
    arms = dict(sorted(arms.items(), key=lambda item: item[1]))
    x = [-log10(1.02 - a) for a in arms.values()]  # room between the alphas near 1
    figure = Figure(figsize=(5 * len(metrics), 3.5), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)
    for panel, m in zip(axes.flat, metrics, strict=True):
        columns = [column(found, name, m) for name in arms]
        y = [mean(values) for values, _ in columns]
        half = [interval(gains) if len(gains) > 1 else 0.0 for _, gains in columns]
        low, high = ([a + k * b for a, b in zip(y, half, strict=True)] for k in (-1, 1))
        how = dict(color="tab:blue", alpha=0.2, linewidth=0)
        panel.fill_between(x, low, high, label="95% of the difference to LoRA", **how)
        panel.plot(x, y, "o-", color="tab:blue", markersize=4, label="mean (dots: seeds)")
        for place, (values, _) in zip(x, columns, strict=True):
            panel.plot([place] * len(values), values, ".", color="tab:gray", markersize=3)
        panel.axhline(y[-1], color="tab:red", linewidth=0.8, linestyle="--", label="LoRA")
        panel.set_xticks(x, [f"{a:g}" for a in arms.values()])
        panel.set(xlabel="alpha (1: LoRA)", ylabel=METRICS[m][0])
        panel.legend(fontsize=7)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def main() -> None:
    about = "MoLEx taken apart; all other flags are train.py's"
    parser = Parser(description=about, allow_abbrev=False)
    arms = dict(nargs="+", choices=ARMS, default=[*ARMS], metavar="ARM")
    parser.add_argument("--arms", help=f"and lora, and what they need ({' '.join(ARMS)})", **arms)
    parser.add_argument("--out", type=Path, default=Path("runs/controls"), help="where runs go")
    parser.add_argument("--report", action="store_true", help="train nothing, print what is there")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    args, flags = parser.parse_known_args()
    device, out = pick_device(args.device), args.out if flags else args.out / "small"
    wanted = {"lora", *args.arms, *(n for arm in args.arms for n in ARMS[arm].of)}
    plan: dict[str, dict[int, train.Settings]] = defaultdict(dict)  # arm -> seed
    said: dict[str, None] = {}  # what the flags of some arms mean nothing to, each once
    for name, arm in ARMS.items():
        if name in wanted:
            notes = StringIO()
            try:
                with redirect_stdout(notes):
                    theirs, runs = train.parse([*(flags or SMALL), *arm.flags.split(), "--compare"])
                    check(arm, Config.load(theirs.model))
                    if arm.published:
                        runs = [as_published.as_script(s) for s in runs if s.molex]
            except InputError as error:
                if name == "lora":
                    raise
                print(f"{name} is left out: {error}")
                continue
            said |= dict.fromkeys(notes.getvalue().splitlines())
            if theirs.fresh or len({s.task for s in runs}) > 1:
                raise InputError("give one task, and no --fresh: remove the runs that are to go")
            for s in runs:
                if bool(s.molex) == arm.molex:
                    longer = dict(epochs=arm.times * s.epochs)
                    longer["max_steps"] = s.max_steps and arm.times * s.max_steps
                    plan[name][s.seed] = replace(s, **longer)
    print(*said, sep="\n", end="\n" if said else "")
    task = runs[0].task
    metrics = {"e2e": ["bleu", "dev_loss"], "alpaca": ["dev_loss"]}.get(task)
    metrics = metrics or [GLUE[task].metric]
    forms = dict.fromkeys((*metrics, "alpha", "own"), NUMBER) | dict(seconds=(*NUMBER, None))
    found: Scores = {}
    for seed in plan["lora"]:
        for name, runs in plan.items():
            file = out / name / f"s{seed}" / "controls.json"
            if args.report and (what := mismatch(file.parent, runs[seed])):
                print(what)
            if not args.report:
                run(name, runs[seed], out, device)
            if file.exists():
                found.setdefault(name, {})[seed] = read_json(file, forms)
    if "lora" not in found:
        raise InputError(f"{out} holds no finished run of lora")
    report(found, metrics)
    plot(found, metrics, out / "alpha.png")
    print(f"\n{out / 'alpha.png'}: the metric over alpha; seeds: {len(found['lora'])}")


if __name__ == "__main__":
    command_line(main, "the same command goes on with what was begun")
