"""MoLEx taken apart: which part of the method makes a difference? Not in the paper.

The paper compares LoRA with LoRA + MoLEx (Tables 1 and 2). Between the two lie a second layer in
every slot, a gate that chooses it, an alpha, and more compute. Here each has an arm of its own:

    lora, molex, prob, sequence   LoRA; MoLEx; with --gate-weight prob; with --route sequence
    frozen                        the gate stays at its random start (--gate-lr 0)
    random                        another layer, drawn anew for every slot and batch
    neighbour, permutation        a fixed other layer: t + 1 (for the last t - 1); a random cycle
    own                           molex's run, evaluated with every slot's own layer alone
    lora-gate, lora-neighbour     lora's run, evaluated with the layers that molex's gate, or
                                  neighbour, mixes in
    alpha-0.5 ... alpha-0.99      MoLEx with that alpha (molex has 0.95)
    learned                       MoLEx with a learned alpha
    lora-long                     LoRA with twice the steps, about what MoLEx computes

    python experiments/controls.py                    small: nano/gpt2 on E2E, one seed, few steps
    python experiments/controls.py --seeds 0 1 2 3 4                  the embedded default, in full
    python experiments/controls.py --model smollm2 --data DIR --max-steps 150 --seeds 0 1 2 \
        --arms lora molex neighbour

All flags but the three of `--help` are train.py's. A seed gives all arms the same start of the LoRA
and the same batches in the same order; seed after seed, so that an end too early leaves whole
seeds. The same command again resumes and keeps what is finished; with --report it trains nothing
and prints what is there. A run is scored by its best epoch: GLUE by the task's metric, E2E by BLEU
on the test set and dev loss, Alpaca by dev loss.

What an arm leaves alone:

- Where a layer is given, it has all the weight of Eq. 4, and neither gate nor hidden states have a
  gradient from a gate. With `frozen` the gate's input still has the one of the affinities.
- random draws from the run's seed. What is evaluated is drawn too, a layer for each batch. A run
  that was killed goes on with other draws than one that was not.
- lora-long's learning rate decays over its own, longer training.
"""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from data import GLUE, Tokenizer, clean, e2e_prompt
from eval import (
    Parser,
    bleu,
    command_line,
    generate,
    load_run,
    locked,
    pick_device,
    read_log,
    read_run,
    read_test,
    search_settings,
    trained_tensors,
    write_atomic,
    write_text,
)
from lora import merge
from model import InputError, Transformer, fill, read_json
from molex import MoLEx

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
    of: tuple[str, ...] = ()  # trains nothing: the first's run, with what the second's has trained


ARMS = {
    "lora": Arm(molex=False),
    "molex": Arm(),
    "prob": Arm("--gate-weight prob"),
    "sequence": Arm("--route sequence"),
    "frozen": Arm("--gate-lr 0"),
    "random": Arm(pick=draw),
    "neighbour": Arm(pick=neighbour),
    "permutation": Arm(pick=permutation),
    "own": Arm(pick=own, of=("molex",)),
    "lora-gate": Arm(of=("molex", "lora")),
    "lora-neighbour": Arm(pick=neighbour, of=("molex", "lora")),
    **{f"alpha-{a}": Arm(f"--alpha {a}") for a in (0.5, 0.8, 0.9, 0.99)},
    "learned": Arm("--learn-alpha"),
    "lora-long": Arm(molex=False, times=2),
}
SMALL = ["--max-steps", "40", "--test-limit", "20", "--beams", "4"]
METRICS = {"bleu": ("BLEU", 100, 2), "dev_loss": ("dev loss", 1, 4)} | {
    task.metric: (task.metric, 100, 2) for task in GLUE.values()
}  # name, factor, decimals
# 97.5% quantiles of Student's t with 1, 2, ... degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
       2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip


def interval(differences: list[float]) -> float:
    """Half the width of the 95% interval of their mean (Student's t); more than 21 count as 21."""
    n = len(differences)
    return T95[min(n - 1, len(T95)) - 1] * stdev(differences) / sqrt(n)


def give(model: Transformer, arm: Arm, s: train.Settings) -> None:
    """Put the arm's pick, if it has one, in the gate's place: every token is all for that layer."""
    if not arm.pick:
        return
    pick = arm.pick(model.config.n_layer, s.seed)

    def log_affinity(t: int, z: Tensor) -> Tensor:
        log_a = z.new_full((*z.shape[:2], len(model.layers.blocks)), -100.0, dtype=torch.float32)
        log_a[..., pick(t)] = 0.0
        return log_a

    model.layers.log_affinity = log_affinity


Scores = dict[str, dict[int, dict[str, float]]]  # arm -> seed -> what `score` returns


def settings(name: str, flags: list[str]) -> dict[int, train.Settings]:
    """Those of the arm's run of each seed."""
    arm = ARMS[name]
    args, runs = train.parse([*flags, *arm.flags.split(), "--compare"])
    if args.fresh or len({s.task for s in runs}) > 1:
        raise InputError("give one task, and no --fresh: remove the runs that are to go")
    runs = [s for s in runs if bool(s.molex) == arm.molex]
    longer = [(arm.times * s.epochs, s.max_steps and arm.times * s.max_steps) for s in runs]
    return {
        s.seed: replace(s, epochs=epochs, max_steps=steps)
        for s, (epochs, steps) in zip(runs, longer, strict=True)
    }


def run(name: str, s: train.Settings, out: Path, device: torch.device) -> None:
    """Train and evaluate one run, or what is left of it."""
    arm, folder = ARMS[name], out / name / f"s{s.seed}"
    for source in arm.of:
        if not (out / source / folder.name / "controls.json").exists():
            raise InputError(f"{name} needs the run of {source}; name it under --arms too")
    if (folder / "config.json").exists():
        now = json.loads(json.dumps(asdict(s)))
        if other := train.differences(read_json(folder / "config.json"), now):
            raise InputError(f"{folder} is of a run with another {', '.join(other)}; take another"
                             " --out, or remove it")  # fmt: skip
    if (folder / "controls.json").exists():
        return
    print(f"{folder}", flush=True)
    model, tokenizer = train.prepare(s, device)
    examples, dev = train.read_data(s, tokenizer, min(s.max_length, model.config.max_positions))
    with locked(folder):
        if not arm.of:
            give(model, arm, s)
            train.fit(s, folder, model, examples, dev)
        source, *others = [out / n / folder.name for n in arm.of or [name]]
        model, _, _ = load_run(source, device)
        for other in others:
            tensors = read_run(other)[1]
            ours = {n: p for n, p in trained_tensors(model).items() if n in tensors}
            fill(ours, tensors, f"{other} does not fit: it")
        give(model, arm, s)
        found = score(model, tokenizer, dev, s)
        if not arm.of:
            last = read_log(folder, s.task)[-1]
            found["seconds"] = last["step"] * last["seconds_per_step"]
        write_text(folder / "controls.json", json.dumps(found, indent=2) + "\n")


def score(model: Transformer, tokenizer: Tokenizer, dev: dict, s: train.Settings) -> dict:
    """The metrics; alpha; how often, in %, the dev set's slots were given their own layer."""
    found, layers = train.dev_scores(model, dev, s), model.layers
    if isinstance(layers, MoLEx):
        found["alpha"] = mean(float(layers.alpha(t)) for t in layers.slots)
        found["own"] = 100 * (layers.counts.trace() / layers.counts.sum()).item()
    if s.task == "e2e":
        merge(model)
        mrs, references = read_test(asdict(s))
        prompts, how = [e2e_prompt(mr) for mr in mrs], search_settings(asdict(s))
        outputs = generate(model, tokenizer, prompts, s.eval_batch, **how)
        found["bleu"] = bleu([clean(" ".join(o.split())) for o in outputs], references)
    return found


def report(found: Scores) -> None:
    """The table. Differences are to LoRA's run of the same seed."""
    base = found["lora"]
    metrics = [m for m in METRICS if m in next(iter(base.values()))]
    head = "".join(f"{METRICS[m][0]:>18}{'less LoRA, 95%':>18}" for m in metrics)
    print(f"\n{'':16}{'seeds':>5}{head}{'time':>7}{'own %':>7}{'alpha':>7}")
    for name, runs in found.items():
        text = f"{name:16}{len(runs):5}"
        for m in metrics:
            _, factor, decimals = METRICS[m]
            text += f"{train.spread([r[m] for r in runs.values()], factor, decimals):>18}"
            gains = [factor * (r[m] - base[seed][m]) for seed, r in runs.items() if seed in base]
            cell = f"{mean(gains):+.{decimals}f}" if gains and name != "lora" else ""
            if cell and len(gains) > 1:
                cell += f" ± {interval(gains):.{decimals}f}"
            text += f"{cell:>18}"
        ratios = [r["seconds"] / base[seed]["seconds"] for seed, r in runs.items()
                  if seed in base and "seconds" in r]  # fmt: skip
        text += f"{mean(ratios):7.2f}" if ratios else f"{'':7}"
        for key, decimals in (("own", 0), ("alpha", 3)):
            values = [r[key] for r in runs.values() if key in r]
            text += f"{mean(values):7.{decimals}f}" if values else f"{'':7}"
        print(text.rstrip())


def plot(found: Scores, path: Path) -> None:
    """Each metric over alpha: the mean, the seeds as dots, and as a band the 95% interval of the
    difference to LoRA, which is alpha = 1."""
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = found["lora"]
    arms = [n for n in found if n == "molex" or n.startswith("alpha-")]
    arms.sort(key=lambda n: mean(r["alpha"] for r in found[n].values()))
    metrics = [m for m in METRICS if m in next(iter(base.values()))]
    figure, axes = pyplot.subplots(1, len(metrics), squeeze=False, layout="constrained",
                                   figsize=(4.6 * len(metrics), 3.4))  # fmt: skip
    for panel, m in zip(axes.flat, metrics, strict=True):
        label, factor, _ = METRICS[m]
        x, y, half = [], [], []
        for name in [*arms, "lora"]:
            runs = found[name]
            values = [factor * r[m] for r in runs.values()]
            x.append(mean(r.get("alpha", 1.0) for r in runs.values()))
            y.append(mean(values))
            gains = [factor * (r[m] - base[seed][m]) for seed, r in runs.items() if seed in base]
            half.append(interval(gains) if len(gains) > 1 else 0.0)
            panel.plot([x[-1]] * len(values), values, ".", color="tab:gray", markersize=4)
        low, high = ([a + sign * b for a, b in zip(y, half, strict=True)] for sign in (-1, 1))
        panel.fill_between(x, low, high, color="tab:blue", alpha=0.2, linewidth=0)
        panel.plot(x, y, "o-", color="tab:blue", markersize=4)
        panel.axhline(y[-1], color="tab:red", linewidth=0.8, linestyle="--")
        panel.set_xscale("function", functions=(lambda a: -np.log10(1.02 - a),
                                                lambda v: 1.02 - 10.0**-v))  # fmt: skip
        panel.set_xticks(x, [f"{a:g}" for a in x[:-1]] + ["LoRA"])
        panel.set(xlabel="alpha", ylabel=label)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    pyplot.close(figure)


def main() -> None:
    parser = Parser(description="MoLEx taken apart. All other flags are train.py's",
                    allow_abbrev=False)  # fmt: skip
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS], metavar="ARM",
                        help=f"lora is always one (all of {', '.join(ARMS)})")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/controls"), help="where runs go")
    parser.add_argument("--report", action="store_true", help="train nothing, print what is there")
    args, flags = parser.parse_known_args()
    out = args.out if flags else args.out / "small"
    arms = [n for n in ARMS if n in ("lora", *args.arms)]
    device = pick_device(train.make_parser().parse_args(flags).device)
    plan = {name: settings(name, flags or SMALL) for name in arms}
    found: Scores = {name: {} for name in arms}
    for seed in plan["lora"]:
        for name in arms:
            if not args.report:
                run(name, plan[name][seed], out, device)
            file = out / name / f"s{seed}" / "controls.json"
            if file.exists():
                found[name][seed] = read_json(file)
    found = {name: runs for name, runs in found.items() if runs}
    if "lora" not in found:
        raise InputError(f"{out} holds no finished run of lora")
    report(found)
    plot(found, out / "alpha.png")
    print(f"\n{out / 'alpha.png'}: the metric over alpha")


if __name__ == "__main__":
    command_line(main)
