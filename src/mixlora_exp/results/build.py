"""Builds tables, figures and the report from committed records.

Composes the default configurations with which records are compared; imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.config.command import compose
from mixlora_exp.config.paths import CONF_DIR, RESULTS
from mixlora_exp.config.resolve import to_dict
from mixlora_exp.config.schema import Config, ModelConfig
from mixlora_exp.errors import UserError
from mixlora_exp.records.objections import objections
from mixlora_exp.records.record import write_text
from mixlora_exp.results.cells import Blocks, Standards, copies, group_runs, require_together
from mixlora_exp.results.findings import contrasts, multi_task
from mixlora_exp.results.paper import METHOD_TITLES
from mixlora_exp.results.runs import (
    DATA_FIELDS,
    EVALUATION_FIELDS,
    MODEL_FIELDS,
    TRAINER_FIELDS,
    TRAINING_DATA_FIELDS,
    LeftOut,
    RecordedRun,
    load_runs,
)
from mixlora_exp.results.self_checks import self_checks
from mixlora_exp.results.tables import step_size
from mixlora_exp.results.tables.latency import load_benchmarks
from mixlora_exp.results.tables.parts import Block, Table
from mixlora_exp.results.tables.registry import PAPER, Sources, make_tables
from mixlora_exp.results.tables.render import csv_text, details, latex, markdown, plain
from mixlora_exp.results.tidy import differences_csv, scores_csv
from mixlora_exp.results.verdicts import verdicts, verdicts_markdown


@dataclass(frozen=True, slots=True)
class Results:
    """The content of `folder`: usable runs, benchmarks and tables, and the records left out."""

    folder: Path
    runs: Sequence[RecordedRun]
    blocks: Blocks
    standards: Standards
    benchmarks: Sequence[Mapping[str, Any]]
    tables: Mapping[int, Table]
    left_out: Sequence[LeftOut]


PRESETS = ("correct", "official")


@cache
def _defaults() -> tuple[dict[str, dict[str, Config]], dict[str, ModelConfig]]:
    """Return the composed default run of each method under each preset, and each model's
    configuration."""
    by_method = {
        preset: {
            m: compose([f"method={m}", "model=llama2_7b", f"preset={preset}"])
            for m in (*PAPER_METHODS, "none")
        }
        for preset in PRESETS
    }
    names = sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml"))
    models = {name: compose([f"model={name}"]).model for name in names}
    return by_method, models


def _standards(
    presets: Mapping[str, Mapping[str, Config]], models: Mapping[str, ModelConfig]
) -> Standards:
    made = {name: _standard(by_method, models) for name, by_method in presets.items()}
    return dataclasses.replace(made.pop("correct"), presets=made)


def _standard(by_method: Mapping[str, Config], models: Mapping[str, ModelConfig]) -> Standards:
    run = to_dict(by_method["mixlora"])
    return Standards(
        methods={name: to_dict(config.method) for name, config in by_method.items()},
        models={
            name: {field: to_dict(model)[field] for field in MODEL_FIELDS}
            for name, model in models.items()
        },
        data={n: run["data"][n] for n in (*DATA_FIELDS, *TRAINING_DATA_FIELDS) if n != "name"},
        trainer={name: run["trainer"][name] for name in TRAINER_FIELDS},
        evaluation={name: run["evaluation"][name] for name in EVALUATION_FIELDS},
    )


def _chosen(
    runs: Sequence[RecordedRun], left_out: Sequence[LeftOut], names: Sequence[str] | None
) -> list[RecordedRun]:
    """Return the runs with the given `names` (None: all), checked to be comparable."""
    if names is None:
        return list(runs)
    by_name = {run.name: run for run in runs}
    reasons = {entry.name: entry.reason for entry in left_out}
    for name in names:
        if name not in by_name:
            reason = reasons.get(name, "it is not among the collected runs")
            raise UserError(f"--runs={name} cannot be used: {reason}; name other runs")
    chosen = [by_name[name] for name in names]
    require_together(chosen)
    return chosen


def _of_other_methods(runs: Sequence[RecordedRun]) -> dict[str, LeftOut]:
    """Return runs, by name, of methods that the paper does not have, such as one with another
    router."""
    known = ", ".join(PAPER_METHODS)
    return {
        run.name: LeftOut(run.name, f"method={run.method} is not in the paper's tables ({known})")
        for run in runs
        if run.method not in METHOD_TITLES
    }


def gather(folder: Path = RESULTS, names: Sequence[str] | None = None) -> Results:
    """Read `folder` (with `runs/` and `bench/`) and build the tables.

    Raises:
        UserError: `names` contains an unknown or unusable run, or runs that cannot share a cell.
    """
    presets, models = _defaults()
    standards = _standards(presets, models)
    runs, left_out = load_runs(folder / "runs")
    dropped = {**_of_other_methods(runs), **copies(runs)}
    left_out = [*left_out, *dropped.values()]
    chosen = _chosen([run for run in runs if run.name not in dropped], left_out, names)
    study = _study(folder) if names is None else []
    blocks = group_runs(chosen)
    benchmarks, unusable = load_benchmarks(folder / "bench")
    sources = Sources(chosen, blocks, standards, benchmarks, presets, models, study)
    reasons = {run.name: objections(run.record) for run in chosen}
    tables = {n: _marked(table, reasons) for n, table in make_tables(sources).items()}
    used = {name for table in tables.values() for name in table.records()}
    known_names = used | {entry.name for entry in blocks.left_out}
    unplaced = [
        LeftOut(run.name, "no table has its trained tasks, method settings or scored tasks")
        for run in chosen
        if run.name not in known_names
    ]
    everything = [*left_out, *blocks.left_out, *unplaced, *unusable]
    # Scores of a comparison that has not ended stand nowhere.
    shown = [*chosen, *study] if step_size.complete(tables[step_size.NUMBER]) else chosen
    return Results(folder, shown, blocks, standards, benchmarks, tables, everything)


def _study(folder: Path) -> list[RecordedRun]:
    """Return runs that lie apart until their comparison is complete (`study/a`)."""
    place = folder / "study" / "a"
    return load_runs(place)[0] if place.is_dir() else []


def _marked(table: Table, reasons: Mapping[str, Sequence[str]]) -> Table:
    """Return the table with a note on each of its runs that was collected with --force."""
    notes = [
        f"Collected by force: {name} ({'; '.join(reasons[name])})."
        for name in sorted(table.records())
        if reasons.get(name)
    ]
    return dataclasses.replace(table, notes=[*table.notes, *notes])


def _progress(block: Block) -> str:
    """Return a block's conditions with the number of its cells that have results, per setup."""
    counts = [f"{setup} {run} of {total}" for setup, (run, total) in block.filled.items()]
    words = block.words or block.heading
    return f"{words} (cells: {', '.join(counts)})" if counts else words


def _index(results: Results) -> str:
    """Return the content of `tables/README.md`: which tables have results, and which records no
    table uses."""
    lines = ["# Tables\n\n", "Made by `make tables` from the records; do not edit.\n\n"]
    lines.append("| table | blocks with results of this project |\n| --- | --- |\n")
    for table in results.tables.values():
        run = [plain(_progress(block)) for block in table.blocks if block.run]
        title = f"[{table.number}: {table.title}]({table.name}.md)"
        lines.append(f"| {title} | {'<br>'.join(run) or 'none'} |\n")
    lines.append("\n[Verdicts](verdicts.md) on the paper's figures.\n")
    lines.append("\n## Records that no table uses\n\n")
    entries = dict.fromkeys((entry.name, entry.reason) for entry in results.left_out)
    shown = [(name.replace("`", "'"), plain(reason)) for name, reason in entries]
    lines += [f"- `{name}`: {reason}\n" for name, reason in shown] or ["None.\n"]
    return "".join(lines)


def table_files(results: Results) -> dict[str, str]:
    """Return the content of every file in `tables/`, by name."""
    found = list(verdicts(PAPER, results.tables))
    checked = list(self_checks(PAPER, results.tables))
    files = {"README.md": _index(results), "verdicts.md": verdicts_markdown(found, checked)}
    for table in results.tables.values():
        files[f"{table.name}.md"] = markdown(table)
        if table.summary:
            files[f"{table.name}-details.md"] = details(table)
        files[f"{table.name}.csv"] = csv_text(table)
        files[f"{table.name}.tex"] = latex(table)
    return files


def data_files(results: Results) -> dict[str, str]:
    """Return the content of the tidy files in `results/`, by name."""
    return {
        "scores.csv": scores_csv(results.runs),
        "differences.csv": differences_csv(results.tables),
    }


def write_files(folder: Path, files: Mapping[str, str], check: bool) -> list[str]:
    """Write the files to `folder` and return an empty list; with `check`, only compare and return
    the lines of a diff."""
    found: list[str] = []
    for name, content in files.items():
        path = folder / name
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        if check:
            old, new = (text.splitlines() for text in (before, content))
            found += difflib.unified_diff(old, new, str(path), "regenerated", lineterm="", n=0)
        elif before != content:
            write_text(path, content)
    return found


def draw_figures(results: Results, folder: Path) -> list[str]:
    """Draw the figures for which there are records; returns their names. Removes outdated files."""
    # Imported late: the tables do not need matplotlib.
    from mixlora_exp.results import figures, series

    made = {
        "figure4a": lambda: figures.sweep_figure(
            series.sweeps(results.tables[9], "coef="), "router loss coefficient"
        ),
        "figure4b": lambda: figures.sweep_figure(series.sweeps(results.tables[8], "r="), "rank"),
        "figure4c": lambda: figures.latency_figure(
            series.latency_points(PAPER, results.tables, results.benchmarks)
        ),
    }
    loads = series.loads(results.blocks, results.standards)
    for number, load in enumerate(loads, start=1):
        made[f"figure5-{number}"] = lambda load=load: figures.load_figure(load)
    curves = series.learning_curves(results.runs, results.standards)
    if curves:
        made["learning_curves"] = lambda: figures.curves_figure(curves)
    made |= _first_figures(results)
    for name, make in made.items():
        figures.save(make, folder, name)
    for path in folder.glob("*.*"):
        # Figures of records that no longer exist.
        if path.suffix in (".png", ".svg") and path.stem not in made:
            path.unlink()
    return list(made)


def _first_figures(results: Results) -> dict[str, Callable[[], Any]]:
    """Return what draws the figures of the first screen's differences and scores, by name."""
    from mixlora_exp.results import figures

    made: dict[str, Callable[[], Any]] = {}
    if found := multi_task(results.tables):
        made["forest"] = lambda: figures.forest_figure(found)
    if step_size.complete(own := results.tables[step_size.NUMBER]):
        made["step_size_forest"] = lambda: figures.forest_figure(contrasts(results.tables))
        made["step_sizes"] = lambda: figures.step_size_figure(step_size.scores(own))
    return made


def draw_pictures(results: Results, folder: Path) -> list[str]:
    """Draw the figures of the first screen as SVG alone, for pages that show them; returns their
    names. Removes those for which there are no records any more."""
    from mixlora_exp.results import figures

    made = _first_figures(results)
    for name, make in made.items():
        figures.save(make, folder, name, ("svg",))
    for name in {"forest", "step_size_forest", "step_sizes"} - made.keys():
        (folder / f"{name}.svg").unlink(missing_ok=True)
    return list(made)


def write_report(results: Results, folder: Path) -> Path:
    """Write `report/index.html` and `figures/` to `folder`; returns the path of the page."""
    names = draw_figures(results, folder / "figures")
    path = folder / "report" / "index.html"
    # The page draws the forest plot itself, so that its text does not shrink on a phone.
    drawn = "step_size_forest" if "step_size_forest" in names else "forest"
    figures = [folder / "figures" / f"{name}.svg" for name in names if name != drawn]
    write_text(path, page_text(results, path, figures))
    return path


def page_text(results: Results, path: Path, figures: Sequence[Path] | None = None) -> str:
    """Return the page as it stands at `path`, whose links lead to the records and tables in their
    folder; without `figures` the short one."""
    from mixlora_exp.results.report import page

    judged = list(verdicts(PAPER, results.tables))
    source = quote(Path(os.path.relpath(results.folder, path.parent)).as_posix())
    short = figures is None
    left_out = results.left_out
    return page(
        results.tables, results.runs, figures or (), left_out, judged, source,
        folder=results.folder, short=short,
    )  # fmt: skip
