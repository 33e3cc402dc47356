"""Figures 4 and 5 of the paper with this project's results, and learning curves, as PNG and SVG.

Colours are Okabe and Ito's colour-blind-safe palette, and every series has its own marker or hatch,
so that prints in grey are readable.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, MaxNLocator

from mixlora_exp.results.forest import Contrast
from mixlora_exp.results.paper import METHOD_TITLES
from mixlora_exp.results.series import Curve, Load, Point, SweptLine
from mixlora_exp.results.tables.parts import AVERAGE, Block
from mixlora_exp.system.durable import write_whole

COLORS = {
    "LoRA": "#0072B2",
    "DoRA": "#E69F00",
    "MixLoRA": "#009E73",
    "MixDoRA": "#CC79A7",
}
MARKERS = {"LoRA": "o", "DoRA": "s", "MixLoRA": "^", "MixDoRA": "D"}
DASHES = ("-", "--", ":", "-.")
STYLE = {
    "font.size": 10,
    # Dollar signs in records are literal.
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "svg.fonttype": "none",
    # A constant salt makes the file reproducible.
    "svg.hashsalt": "mixlora-exp",
}
PAPER_SPREAD = {"MixLoRA": 0.0223, "MixDoRA": 0.0328}
"""Standard deviation of the expert load that the paper reports with Figure 5."""


def save(
    make: Callable[[], Figure], folder: Path, name: str, kinds: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Draw a figure and write `<name>.png` and `<name>.svg` to `folder`; returns the paths.

    Raises:
        UserError: a file cannot be written; an existing one is unchanged.
    """
    forms: dict[str, dict[str, Any]] = {
        "png": {"dpi": 160, "metadata": {"Software": None}},
        "svg": {"metadata": {"Date": None}},
    }
    paths = []
    with mpl.rc_context(STYLE):
        figure = make()
        FigureCanvasAgg(figure)
        for form in kinds:
            content = io.BytesIO()
            figure.savefig(content, format=form, **forms[form])
            paths.append(folder / f"{name}.{form}")
            write_whole(paths[-1], [content.getvalue()])
    return paths


def _panels(count: int, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(7.0, height * count), layout="constrained")
    axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    return figure, list(axes)


def _wrapped(text: str, width: int = 88) -> str:
    lines, line = [], ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def sweep_figure(sweeps: Sequence[SweptLine], setting: str) -> Figure:
    """Return figures 4a and 4b: average accuracy over the values of a setting, one panel per
    block."""
    # A single value does not form a line.
    sweeps = [sweep for sweep in sweeps if len(sweep.values) > 1]
    titles = list(dict.fromkeys(sweep.title for sweep in sweeps))
    figure, axes = _panels(max(len(titles), 1))
    for ax, title in zip(axes, titles, strict=False):
        mine = [sweep for sweep in sweeps if sweep.title == title]
        values = sorted(
            {v for sweep in mine for v in sweep.values}, key=lambda v: float(v.split()[0])
        )
        for number, sweep in enumerate(mine):
            method = sweep.label.split(",")[0]
            x = [values.index(value) for value in sweep.values]
            y = [cell.value for cell in sweep.cells]
            style = {
                "color": COLORS[method], "marker": MARKERS[method], "label": sweep.label,
                "linestyle": "--" if sweep.from_paper else DASHES[number % 4],
                "markerfacecolor": "white" if sweep.from_paper else COLORS[method],
            }  # fmt: skip
            bounds = [(c.value - c.low, c.high - c.value) for c in sweep.cells if c.low is not None]
            if len(bounds) == len(y):
                ax.errorbar(x, y, yerr=list(zip(*bounds, strict=True)), capsize=3, **style)
            else:
                ax.plot(x, y, **style)
        ax.set_xticks(range(len(values)), values)
        ax.set(xlabel=setting, ylabel="average accuracy, %")
        ax.set_title(_wrapped(title), fontsize=10)
        ax.legend(fontsize=9)
    return figure


def latency_figure(points: Sequence[Point]) -> Figure:
    """Figure 4c: accuracy over inference time per token, one panel per model and block."""
    found = [point.panel for point in points]
    panels = [panel for panel in dict.fromkeys(found) if found.count(panel) > 1]
    figure, axes = _panels(max(len(panels), 1))
    for ax, panel in zip(axes, panels, strict=False):
        for point in (p for p in points if p.panel == panel):
            bounds = None
            if point.low is not None and point.high is not None:
                bounds = [[point.accuracy - point.low], [point.high - point.accuracy]]
            ax.errorbar(
                [point.latency], [point.accuracy], yerr=bounds, capsize=3, linestyle="",
                marker=MARKERS[point.method], markersize=9, color=COLORS[point.method],
                label=point.method,
            )  # fmt: skip
        ax.set(xlabel="inference, microseconds per token", ylabel="average accuracy, %")
        ax.set_xlim(0, 1.1 * max(point.latency for point in points if point.panel == panel))
        ax.set_title(_wrapped(panel), fontsize=10)
        ax.legend(fontsize=9)
    return figure


def load_figure(load: Load) -> Figure:
    """Figure 5: share of each expert per task, and per layer."""
    figure = Figure(figsize=(7.0, 7.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(1, 1.1))
    experts, tasks = len(load.by_task[0]), len(load.tasks)
    width = 0.8 / tasks
    colors = [*COLORS.values(), "#56B4E9", "#D55E00", "#F0E442", "#999999"]
    hatches = ("", "//", "..", "xx", "\\\\", "oo", "--", "++")
    for i, (task, shares, spread, within) in enumerate(
        zip(load.tasks, load.by_task, load.spread, load.spread_within, strict=True)
    ):
        places = [e + (i - (tasks - 1) / 2) * width for e in range(experts)]
        top.bar(
            places, [100 * share for share in shares], width, color=colors[i % 8],
            hatch=hatches[i % 8], edgecolor="white", linewidth=0,
            label=f"{task} ({spread:.4f}; {within:.4f})",
        )  # fmt: skip
    top.axhline(100 / experts, color="black", linewidth=0.8, linestyle="--")
    top.set(xlabel="expert", ylabel="share of slots, %", xticks=range(experts))
    top.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    method = load.title.split(",")[0]
    heading = _wrapped(load.title)
    if method in PAPER_SPREAD:
        heading += (
            "\nin brackets the standard deviation across experts: of the means over layers; within "
            f"layers\nthe paper gives {PAPER_SPREAD[method]} and does not say of which"
        )
    top.set_title(heading, fontsize=9)
    image = bottom.imshow(
        [[100 * share for share in layer] for layer in load.by_layer],
        aspect="auto", cmap="cividis", origin="lower",
    )  # fmt: skip
    bottom.set(xlabel="expert", ylabel="layer", xticks=range(experts))
    bottom.grid(visible=False)
    figure.colorbar(image, ax=bottom, label="share of slots, %")
    return figure


def curves_figure(curves: Sequence[Curve]) -> Figure:
    """Training loss by step, one panel per model, data and trained tasks: of each method at
    each step size the mean of its runs, and a band from the lowest to the highest."""
    panels = list(dict.fromkeys(curve.panel for curve in curves))
    figure, axes = _panels(max(len(panels), 1), 2.8)
    for ax, panel in zip(axes, panels, strict=False):
        bands: dict[tuple[str, str, tuple[int, ...]], list[Curve]] = {}
        for curve in (c for c in curves if c.panel == panel):
            key = METHOD_TITLES[curve.method], curve.step_size, curve.steps
            bands.setdefault(key, []).append(curve)
        sizes = list(dict.fromkeys(size for _, size, _ in bands))
        for (title, size, steps), own in bands.items():
            by_step = list(zip(*(curve.losses for curve in own), strict=True))
            ax.fill_between(
                steps, [*map(min, by_step)], [*map(max, by_step)], color=COLORS[title], alpha=0.2
            )
            ax.plot(
                steps, [*map(mean, by_step)], color=COLORS[title], marker=MARKERS[title],
                markevery=max(1, len(steps) // 8), label=f"{title}, {size}, runs: {len(own)}",
                linestyle=DASHES[sizes.index(size) % len(DASHES)],
            )  # fmt: skip
        ax.set(xlabel="optimizer step", ylabel="training loss", yscale="log")
        # The default writes powers of ten as formulas, which are not parsed here.
        ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        ax.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(_wrapped(panel, 64), fontsize=10)
        ax.legend(fontsize=8, loc="upper right")
    return figure


def forest_figure(contrasts: Sequence[Contrast]) -> Figure:
    """Paired differences with their intervals, one line each; open marks are of one seed."""
    figure = Figure(figsize=(7.0, 1.1 + 0.32 * max(len(contrasts), 1)), layout="constrained")
    ax = figure.subplots()
    ax.axvline(0, color="black", linewidth=0.8)
    for place, contrast in enumerate(reversed(contrasts)):
        entry = contrast.entry
        if entry.value is None or entry.low is None or entry.high is None:
            continue
        color = next((c for name, c in COLORS.items() if contrast.label.startswith(name)), "black")
        ax.plot([entry.low, entry.high], [place, place], color=color, linewidth=2)
        ax.plot(
            [entry.value], [place], marker="o", color=color, markersize=7,
            markerfacecolor=color if entry.seeds > 1 else "white",
        )  # fmt: skip
    ax.set_yticks(range(len(contrasts)), [contrast.label for contrast in reversed(contrasts)])
    ax.set_xlabel("difference in points, with its 95 % interval")
    ax.grid(visible=False, axis="y")
    return figure


def step_size_figure(scores: Block) -> Figure:
    """Average accuracy of each method by step size, with its interval; a ring is around the step
    size that held-out rows choose. `scores`: Table 12's, complete."""
    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    ax, at = figure.subplots(), scores.columns.index(AVERAGE)
    rows = [row for row in scores.rows if row.label[1]]
    steps = list(dict.fromkeys(row.label[1] for row in rows))
    methods = list(dict.fromkeys(row.label[0] for row in rows))
    for number, method in enumerate(methods):
        mine = [row for row in rows if row.label[0] == method]
        # Beside one another, so that intervals do not cover each other.
        x = [steps.index(row.label[1]) + 0.08 * (number - (len(methods) - 1) / 2) for row in mine]
        cells = [row.cells[at] for row in mine]
        y = [cell.value or 0.0 for cell in cells]
        low = [v - (c.low if c.low is not None else v) for v, c in zip(y, cells, strict=True)]
        high = [(c.high if c.high is not None else v) - v for v, c in zip(y, cells, strict=True)]
        ax.errorbar(
            x, y, yerr=(low, high), capsize=3, color=COLORS[method], marker=MARKERS[method],
            label=method,
        )  # fmt: skip
        chosen = [n for n, row in enumerate(mine) if row.label[2]]
        ax.plot(
            [x[n] for n in chosen], [y[n] for n in chosen], linestyle="none", marker="o",
            markersize=14, markerfacecolor="none", markeredgecolor=COLORS[method],
        )  # fmt: skip
    ax.set_xticks(range(len(steps)), steps)
    ax.set(xlabel="step size (alpha times learning rate)", ylabel="average accuracy, %")
    ax.legend(fontsize=9)
    return figure
