"""Figures of a comparison of runs: learning curves, and expert load by layer and task."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mixlora_exp.errors import shown
from mixlora_exp.results.comparison import Side
from mixlora_exp.results.figures import COLORS, MARKERS

PALETTE = (*COLORS.values(), "#56B4E9", "#D55E00", "#F0E442", "#999999")
SIGNS = (*MARKERS.values(), "v", "P", "X", "*")

Loads = dict[tuple[str, str], list[list[float]]]


def curves_figure(sides: Sequence[Side]) -> Figure | None:
    """Training loss by step: the mean of each side's seeds, and thin lines of the seeds; None if no
    run logged a loss."""
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    ax, drawn = figure.subplots(), False
    for number, side in enumerate(sides):
        color, lines = PALETTE[number % len(PALETTE)], []
        for run in side.runs:
            curve = [entry for entry in (run.record.get("train") or {}).get("curve", ())
                     if entry["loss"] is not None]  # fmt: skip
            if curve:
                lines.append({entry["step"]: entry["loss"] for entry in curve})
                ax.plot(lines[-1].keys(), lines[-1].values(), color=color, linewidth=0.7, alpha=0.5)
        common = sorted(set.intersection(*map(set, lines))) if lines else []
        if common:
            drawn = True
            ax.plot(
                common, [mean(line[step] for line in lines) for step in common], color=color,
                marker=SIGNS[number % len(SIGNS)], markevery=max(1, len(common) // 8),
                label=shown(f"{side.letter} {side.runs[0].method}, runs: {len(lines)}", 60),
            )  # fmt: skip
    if not drawn:
        return None
    ax.set(xlabel="optimizer step", ylabel="training loss")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize=9)
    return figure


def loads_of(side: Side) -> Loads:
    """Return (task, protocol) -> (layers, E): the side's expert load in percent, averaged over
    seeds."""
    found = {}
    for key, score in side.runs[0].scores.items():
        own = [run.scores[key].get("expert_load") for run in side.runs if key in run.scores]
        if score.get("expert_load") and all(own) and len({len(load) for load in own}) == 1:
            found[key] = [
                [100 * mean(shares) for shares in zip(*layers, strict=True)]
                for layers in zip(*own, strict=True)
            ]
    return found


def load_figure(side: Side) -> Figure | None:
    """Return the share of the slots that each expert gets, in percent: a panel a task, a row a
    layer; None without experts."""
    loads = loads_of(side)
    if not loads:
        return None
    columns = min(len(loads), 3)
    rows = -(-len(loads) // columns)
    figure = Figure(figsize=(7.0, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    top = max(share for load in loads.values() for layer in load for share in layer)
    for ax, ((task, protocol), load) in zip(axes, loads.items(), strict=False):
        image = ax.imshow(load, aspect="auto", cmap="cividis", origin="lower", vmin=0, vmax=top)
        ax.set_title(shown(f"{task}\n{protocol}", 60, keep="\n"), fontsize=9)
        ax.set(xlabel="expert", ylabel="layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(visible=False)
    for ax in axes[len(loads) :]:
        ax.set_visible(False)
    figure.colorbar(image, ax=list(axes), label="% of slots")
    return figure
