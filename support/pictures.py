"""The pictures of a run: which layers the gate has chosen, and how the losses went."""

import math
from pathlib import Path

from torch import Tensor

from support.files import write_atomic


def plot_routes(runs: dict[str, Tensor], path: Path) -> None:
    """Heat maps of which layer (y) was chosen in which slot (x), as in Figure 2: white never, black
    always; a panel for each name and its `RouteLog.shares`, at most four in a row. Every chosen
    layer has a tick."""
    from matplotlib.figure import Figure  # slow to import

    wide = min(4, len(runs))
    high = math.ceil(len(runs) / wide)
    inches = 2 + 0.1 * max(len(shares) for shares in runs.values())
    figure = Figure(figsize=(inches * wide + 0.8, inches * high), layout="constrained")
    axes = figure.subplots(high, wide, squeeze=False)
    for panel in axes.flat[len(runs) :]:
        panel.axis("off")
    for panel, (name, shares) in zip(axes.flat, runs.items(), strict=False):
        T = len(shares)
        image = panel.imshow(shares.T.numpy(), cmap="Greys", vmin=0, vmax=100, origin="lower")
        panel.plot(range(T), range(T), ".", color="tab:red", markersize=2)  # the slot's own layer
        for third in (math.ceil(T / 3), math.ceil(2 * T / 3)):  # the first layer of the next
            panel.axhline(third - 0.5, color="tab:blue", linewidth=0.5)
            panel.axvline(third - 0.5, color="tab:blue", linewidth=0.5)
        panel.set(xlabel="slot t", ylabel="layer chosen by the gate")
        chosen = [j for j in range(T) if shares[:, j].sum() > 0]
        panel.set(xticks=range(0, T, 2), yticks=chosen if len(chosen) <= 16 else range(0, T, 2))
        panel.set_title(name.replace("/", "\n"), fontsize=8)
    figure.colorbar(image, ax=axes, label="% of sequences")
    caption = "red: a slot's own layer; blue: thirds of the stack, as in Figure 2 of the paper"
    figure.supxlabel(caption if wide > 1 else caption.replace("; ", "\n"), fontsize=7)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


GATE_LINES = dict(changed="-", own="--", affinity=":", alpha="-.")
GATE_WORDS = dict(
    changed="slots with another layer than a batch ago",
    own="slots with their own layer",
    affinity="mean affinity of the chosen layer",
    alpha="alpha",
)


def plot_curves(runs: list[tuple[str, list[dict]]], metric: str, path: Path) -> None:
    """Training loss and dev metric over steps and, with MoLEx, what the gate did: the values of
    `RouteLog.summary`. A colour for each label, a line for each log, a point for every 25 steps."""
    from matplotlib.figure import Figure  # slow to import

    gated = any("alpha" in point for _, log in runs for point in log[0]["curve"])
    figure = Figure(figsize=(16 if gated else 8, 3.2), layout="constrained")
    axes = figure.subplots(1, 4 if gated else 2)
    points = [point for _, log in runs for entry in log for point in entry["curve"]]
    lines = {name: line for name, line in GATE_LINES.items() if any(name in p for p in points)}
    if len({point["alpha"] for point in points if "alpha" in point}) < 2:
        lines.pop("alpha", None)  # it is fixed
    colours = {label: f"C{i}" for i, label in enumerate(dict.fromkeys(label for label, _ in runs))}
    for label, log in runs:
        style = dict(color=colours[label], linewidth=1)
        losses = mean_losses(log)
        axes[0].plot([*losses], [*losses.values()], **style)
        steps = [entry["step"] for entry in log]
        axes[1].plot(steps, [entry[metric] for entry in log], "o-", **style)
        points = [p for entry in log for p in entry["curve"] if "alpha" in p]
        if points:
            steps = [p["step"] for p in points]
            for name, line in lines.items():
                seen = [p for p in points if name in p]
                axes[2].plot([p["step"] for p in seen], [p[name] for p in seen], line, **style)
            axes[3].plot(steps, [p["balance"] for p in points], "-", **style)
    for label, colour in colours.items():
        axes[0].plot([], [], color=colour, label=label)
    if gated:
        for name, line in lines.items():
            axes[2].plot([], [], line, color="black", label=GATE_WORDS[name])
        axes[2].legend(fontsize=6)
    titles = [
        "training loss",
        f"dev {metric.removeprefix('dev_')}",
        "gate",
        "load-balance loss",
    ]
    for panel, title in zip(axes, titles, strict=False):
        panel.set(xlabel="step", title=title)
    axes[0].legend(fontsize=7)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


def mean_losses(log: list[dict]) -> dict[int, float]:
    """Step -> the mean loss since the point before; a point has the sum since the epoch began."""
    losses, step = {}, 0
    for entry in log:
        total = 0.0
        for point in entry["curve"]:
            losses[point["step"]] = (point["loss_sum"] - total) / max(1, point["step"] - step)
            step, total = point["step"], point["loss_sum"]
    return losses
