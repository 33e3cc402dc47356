"""The paper's printed figures (`results/paper/*.csv`), and contradictions between them."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mixlora_exp.tasks import TASKS

METHOD_TITLES = {
    "none": "base model",
    "lora": "LoRA",
    "dora": "DoRA",
    "mixlora": "MixLoRA",
    "mixdora": "MixDoRA",
}
WITH_EXPERTS = ("mixlora", "mixdora")
"""The methods with experts: the only ones whose settings Tables 8 and 9 vary."""
MODEL_TITLES = {
    "gemma_2b": "Gemma 2B",
    "llama2_7b": "LLaMA-2 7B",
    "llama2_13b": "LLaMA-2 13B",
    "llama3_8b": "LLaMA-3 8B",
    "smollm2_135m": "SmolLM2 135M",
}
TASK_TITLES = {task.name: task.title for task in TASKS.values()}
BOOLQ_TRUE = 2033
"""Rows of BoolQ's validation split, of 3,270, whose answer is true."""
TOLERANCE = 0.1 + 1e-9
"""Rounding of an average printed to one decimal: half a unit for it, and half for its figures."""


@dataclass(frozen=True, slots=True)
class PaperTable:
    """A table of the paper: its lines as printed, by column. `differences`: in Table 2, the printed
    differences between multi-task and single-task training, by method."""

    number: int
    lines: tuple[Mapping[str, str], ...]
    differences: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task columns, in the paper's order."""
        return tuple(name for name in self.lines[0] if name in TASKS)

    def line(self, **wanted: str) -> Mapping[str, str] | None:
        """Return the line with these values, or None if the paper has none."""
        for line in self.lines:
            if all(line.get(name) == value for name, value in wanted.items()):
                return line
        return None


def read_paper(folder: Path, number: int) -> PaperTable:
    """Read table `number` from `folder`."""
    differences = {}
    if number == 2:
        lines = _lines(folder / "table2_differences.csv")
        differences = {line["method"]: line for line in lines}
    return PaperTable(number, _lines(folder / f"table{number}.csv"), differences)


def _lines(path: Path) -> tuple[Mapping[str, str], ...]:
    with path.open(newline="", encoding="utf-8") as stream:
        return tuple(csv.DictReader(stream))


def _mean(line: Mapping[str, str], tasks: Sequence[str]) -> float:
    return sum(float(line[task]) for task in tasks) / len(tasks)


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Two statements of the paper that disagree. `line`, `column`: the entry of the table to mark,
    if there is one."""

    text: str
    line: tuple[str, ...] | None = None
    column: str = ""


def line_id(line: Mapping[str, str]) -> tuple[str, ...]:
    """Return the values that identify a line within a table."""
    names = ("model", "method", "setup", "rank", "router_loss_coef")
    return tuple(line.get(name, "") for name in names)


def contradictions(folder: Path, number: int) -> Iterator[Contradiction]:
    """Yield contradictions of table `number` with itself and the rest of the paper, recomputed from
    the printed figures. Means may differ by `TOLERANCE`."""
    table = read_paper(folder, number)
    if not table.tasks:
        return
    for line in table.lines:
        mean, printed = _mean(line, table.tasks), float(line["avg"])
        if abs(mean - printed) > TOLERANCE:
            names = [line[k] for k in ("setup", "rank", "router_loss_coef") if k in line]
            label = " ".join([METHOD_TITLES[line["method"]], *names])
            text = f"{label}: the average is printed as {printed}, its cells give {mean:.2f}"
            yield Contradiction(text, line_id(line), "avg")
    if number == 2:
        yield from _differences(table)
    yield from _other_tables(folder, table)
    if number in (1, 8, 9):
        yield Contradiction(
            "Section 3.2 sets the router loss coefficient to 1e-2; Table 9 finds 1e-3 best, and "
            "its 1e-3 rows are the setting of Tables 1 and 8"
        )
    yield from _constant_answers(table)
    if number in (1, 5):
        yield Contradiction(
            "the text says that parameter counts are kept equal; on Gemma 2B they are 3.2 % and "
            "4.3 %"
        )


def _constant_answers(table: PaperTable) -> Iterator[Contradiction]:
    """Yield results that a model which always gives the same answer would have."""
    for line in table.lines:
        if float(line["boolq"]) == round(100 * BOOLQ_TRUE / TASKS["boolq"].sizes["test"], 1):
            yield Contradiction(
                f"{METHOD_TITLES[line['method']]}'s BoolQ of {line['boolq']} on "
                f"{MODEL_TITLES[line['model']]} is the majority class of the validation split "
                f"({BOOLQ_TRUE:,} of {TASKS['boolq'].sizes['test']:,} are true)",
                line_id(line),
                "boolq",
            )


def printed_differences(table: PaperTable) -> Iterator[tuple[str, str, str, float]]:
    """Yield (method, column, printed, by its two rows) of each MT minus ST of Table 2."""
    for method, line in table.differences.items():
        single, multi = (table.line(method=method, setup=s) for s in ("ST", "MT"))
        for column in (*table.tasks, "avg"):
            yield method, column, line[column], float(multi[column]) - float(single[column])


def _differences(table: PaperTable) -> Iterator[Contradiction]:
    for method, column, printed, difference in printed_differences(table):
        if abs(difference - float(printed)) > TOLERANCE:
            title = TASK_TITLES.get(column, "average")
            yield Contradiction(
                f"{METHOD_TITLES[method]}, MT minus ST, {title}: printed as {printed}, "
                f"the two rows give {difference:.1f}"
            )


# The setting of Table 3, in the columns of each table.
SETTINGS = {1: {}, 2: {"setup": "ST"}, 8: {"rank": "16"}, 9: {"router_loss_coef": "1e-3"}}


def _other_tables(folder: Path, table: PaperTable) -> Iterator[Contradiction]:
    """Yield results for the setting of Table 3 that differ between the tables which print them."""
    if table.number not in SETTINGS:
        return
    for other_number, setting in SETTINGS.items():
        if other_number == table.number:
            continue
        other = read_paper(folder, other_number)
        for line in table.lines:
            own = SETTINGS[table.number]
            same = other.line(model=line["model"], method=line["method"], **setting)
            if same is None or any(line[name] != value for name, value in own.items()):
                continue
            for task in set(table.tasks) & set(other.tasks):
                if float(line[task]) != float(same[task]):
                    text = (
                        f"{METHOD_TITLES[line['method']]}, {TASK_TITLES[task]}: {line[task]} here, "
                        f"{same[task]} in Table {other_number} at the same setting"
                    )
                    yield Contradiction(text, line_id(line), task)
