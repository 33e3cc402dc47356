"""The page's first screen: what is known, in sentences and differences made from the tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mixlora_exp.results import step_size_findings
from mixlora_exp.results.forest import Contrast
from mixlora_exp.results.paper import METHOD_TITLES
from mixlora_exp.results.runs import RecordedRun
from mixlora_exp.results.tables import step_size
from mixlora_exp.results.tables.parts import (
    AVERAGE,
    AVERAGE_ABOVE,
    NO_TASKS,
    REFERENCE,
    Block,
    Entry,
    Row,
    Table,
)
from mixlora_exp.results.tables.render import rows_not_run
from mixlora_exp.results.verdicts import Verdict

MAIN = 2
"""The table whose first block with results is shown first."""
SETUPS = {"MT": "tasks mixed", "ST": "each task alone"}
TITLES = {"base model": "base", REFERENCE: "chance"}
"""Short titles of lines, for the columns of the first screen."""


NOTES = (
    "Accuracy in percent. Grey with °: not above the last column, by chance or by the most "
    "frequent answer of training. Above chance: the average over the tasks on which more than half "
    "of all trained settings under these conditions are, and so is the difference. Better or worse "
    "stands only with several seeds, after correction for all comparisons of a table.",
)


def _own_steps(tables: Mapping[int, Table]) -> Table | None:
    """Return the comparison at step sizes of each method's own, which comes before Table 2, if all
    of its runs are there."""
    found = tables.get(step_size.NUMBER)
    return found if found is not None and step_size.complete(found) else None


def main_block(tables: Mapping[int, Table]) -> Block | None:
    """Return what stands on the first screen: the comparison at step sizes of each method's own, or
    lines of Table 2's first page: tasks mixed, or each trained alone where no mixture was run."""
    if (own := _own_steps(tables)) is not None:
        return step_size_findings.main_block(own)
    block = next((block for block in tables[MAIN].summary if block.run), None)
    if block is None:
        return None
    chosen = next(
        (s for s in SETUPS if any(row.label[1] == s for row in block.rows)), next(iter(SETUPS))
    )
    rows = tuple(
        Row((TITLES.get(row.label[0], row.label[0]),), row.cells)
        for row in block.rows
        if row.label[1] in (chosen, "-")
    )
    heading = f"{block.heading}; {SETUPS[chosen]}"
    return dataclasses.replace(
        block, heading=heading, stub=("task",), rows=rows, notes=(*NOTES, *block.notes)
    )


def contrasts(tables: Mapping[int, Table]) -> list[Contrast]:
    """Return the differences of the block that is shown first: those of the comparison at own step
    sizes, or those of `multi_task`."""
    if (own := _own_steps(tables)) is not None:
        return step_size_findings.contrasts(own)
    return multi_task(tables)


def multi_task(tables: Mapping[int, Table]) -> list[Contrast]:
    """Return Table 2's differences to LoRA and to the base model, over the tasks above chance."""
    full = next((block for block in tables[MAIN].blocks if block.run), None)
    if full is None:
        return []
    at, found = full.columns.index(AVERAGE_ABOVE), []
    for row in full.rows:
        entry = row.cells[at]
        if row.label[2] in ("minus LoRA", "minus the base model") and entry.value is not None:
            setup = SETUPS.get(row.label[1], row.label[1])
            found.append(Contrast(f"{row.label[0]} {row.label[2]}, {setup}", entry))
    return sorted(found, key=lambda c: ("base model" in c.label, c.label))


def caption(tables: Mapping[int, Table]) -> str:
    """Return what the differences of `contrasts` are of."""
    if _own_steps(tables) is not None:
        return step_size_findings.CAPTION
    return "Paired differences over the tasks above chance"


def missing(tables: Mapping[int, Table]) -> list[str]:
    """Return a phrase on each model of the paper of whose lines in some tables none was run, and on
    the comparison at own step sizes."""
    rows: dict[str, int] = {}
    places: dict[str, list[str]] = {}
    for number, table in tables.items():
        for block in table.blocks:
            if count := rows_not_run(block):
                rows[block.heading] = rows.get(block.heading, 0) + count
                places.setdefault(block.heading, []).append(str(number))
    found = [
        f"{model}: 0 of {count} rows (Table{'s' * (len(places[model]) > 1)} "
        f"{', '.join(places[model])})"
        for model, count in rows.items()
    ]
    own = tables.get(step_size.NUMBER)
    if own is not None and not step_size.complete(own):
        heading = own.blocks[0].heading.partition(":")[0]
        found.append(f"the comparison at step sizes of each method's own: {heading}")
    return found


def _marked(tables: Mapping[int, Table]) -> tuple[int, int, int]:
    """Return numbers of comparisons of accuracies, of those with several seeds and above chance,
    and of those marked. A comparison in several tables counts once, and so does an average over all
    tasks if it is that over those above chance."""
    found: dict[tuple[object, ...], list[Entry]] = {}
    for table in tables.values():
        for block in table.blocks:
            for row in block.rows:
                for column, cell in zip(block.columns, row.cells, strict=True):
                    if cell.kind == "versus" and not cell.nats:
                        task = AVERAGE if column == AVERAGE_ABOVE else column
                        figures = cell.value, cell.low, cell.high
                        same = block.words or block.heading, task, cell.records, *figures
                        found.setdefault(same, []).append(cell)
    several = [cells for cells in found.values() if any(c.q is not None for c in cells)]
    return len(found), len(several), sum(any(c.mark for c in cells) for cells in several)


def _steps(entry: Entry, runs: Sequence[RecordedRun]) -> str:
    """Return the settings that decide how far a step of each method moves its layers' outputs,
    which is alpha times the learning rate, whatever the rank; empty unless each method has one of
    them."""
    found: dict[str, set[tuple[float, float]]] = {"lora": set(), "mixlora": set()}
    for run in runs:
        if run.name in entry.records and run.method in found:
            chosen = run.trained["method"]["alpha"], run.trained["trainer"]["learning_rate"]
            found[run.method].add(chosen)
    if any(len(settings) != 1 for settings in found.values()):
        return ""
    (plain, rate), (mixed, other) = (settings.pop() for settings in found.values())
    ratio = plain * rate / (mixed * other)
    rates = "" if rate == other else f", learning rate {rate:g} to {other:g}"
    return (
        f", where LoRA's steps are {ratio:.3g} times as long (alpha {plain:g} to {mixed:g}{rates})"
    )


def sentences(
    tables: Mapping[int, Table], verdicts: Sequence[Verdict], runs: Sequence[RecordedRun]
) -> list[str]:
    """Return three sentences: what was compared, the comparison of MixLoRA with LoRA, and the
    paper."""
    if (own := _own_steps(tables)) is not None:
        return [*step_size_findings.sentences(own), _of_paper(verdicts)]
    total, family, marked = _marked(tables)
    found = [
        f"Of {total:,} paired comparisons of accuracies {family:,} have several seeds and are "
        f"above chance, and {marked or 'none'} of these tell two settings apart after correction "
        "for the number of comparisons in their table."
    ]
    mixture = METHOD_TITLES["mixlora"]
    known = {contrast.label: contrast for contrast in contrasts(tables)}
    labels = (f"{mixture} minus LoRA, {setup}" for setup in SETUPS.values())
    first = next((known[label] for label in labels if label in known), None)
    if first is None:
        tasks = dict.fromkeys(
            column
            for table in tables.values()
            for block in table.blocks
            for row in block.rows
            if row.label[0] == mixture and row.label[-1] == "minus LoRA"
            for column, cell in zip(block.columns, row.cells, strict=True)
            if cell.kind == "versus" and column not in NO_TASKS
        )
        how = "not compared"
        if tasks:
            how = f"compared on {', '.join(tasks)}, not over all tasks of Table {MAIN}"
        found.append(f"{mixture} and LoRA were {how}.")
    else:
        entry, verdict = first.entry, "says nothing about other seeds"
        if entry.seeds > 1:
            verdict = (
                f"is {entry.mark} than LoRA" if entry.mark else "cannot be distinguished from LoRA"
            )
        seeds = "1 seed" if entry.seeds == 1 else f"{entry.seeds} seeds"
        found.append(
            f"{first.label}, is {dataclasses.replace(entry, mark='').show()} points ({seeds})"
            f"{_steps(entry, runs)}: it {verdict}."
        )
    return [*found, _of_paper(verdicts)]


def _of_paper(verdicts: Sequence[Verdict]) -> str:
    run = sum(entry.verdict != "not run" for entry in verdicts)
    doubted = sum(bool(entry.faults) for entry in verdicts)
    return (
        f"Of the paper's {len(verdicts)} printed accuracies {run or 'none'} were run at full size "
        f"here, and {doubted} are in doubt by themselves."
    )
