"""The report's first sentences say what the tables hold."""

from __future__ import annotations

import pytest

from mixlora_exp.results.findings import sentences
from mixlora_exp.results.tables.marks import corrected
from mixlora_exp.results.tables.parts import AVERAGE, AVERAGE_ABOVE, Block, Entry, Row, Table, dash

STUB, COLUMNS = ("method", "setup", ""), ("ARC-e", AVERAGE, AVERAGE_ABOVE)


def versus(value: float, record: str, *, seeds: int = 2, digits: int = 1) -> Entry:
    return Entry(
        "versus", value, low=value - 1, high=value + 1, seeds=seeds, digits=digits, signed=True,
        p=1e-4, records=(record, "lora"),
    )  # fmt: skip


def table(number: int, *rows: Row) -> Table:
    return corrected(Table(number, "", [Block("a model", STUB, COLUMNS, rows, run=True)]))


def test_accuracies_are_counted_and_each_comparison_once() -> None:
    """Of log-likelihoods none is at chance; a line of two tables is one; and where every task is
    above chance, the two averages are one."""
    line = Row(("DoRA", "ST", "minus LoRA"), (versus(3, "a"), *[versus(2, "a")] * 2))
    nats = Row(("DoRA", "ST", "log-likelihood"), tuple(versus(4, "a", digits=3) for _ in COLUMNS))
    other = Row(("MixDoRA", "ST", "minus LoRA"), (versus(1, "b", seeds=1),) * 3)
    first = sentences({1: table(1, line, nats), 2: table(2, line, nats, other)}, [], [])[0]
    # One task and one average of each method.
    assert first.startswith("Of 4 paired comparisons of accuracies 2 have several seeds")
    assert "and 2 of these tell two settings apart" in first


@pytest.mark.parametrize(
    ("setups", "found"),
    [
        (
            ("MT", "ST"),
            "MixLoRA minus LoRA, tasks mixed, is +1.0 [+0.0, +2.0] points (2 seeds): it is better",
        ),
        (("ST",), "MixLoRA minus LoRA, each task alone, is +2.0 [+1.0, +3.0] points"),
        ((), "MixLoRA and LoRA were not compared."),
    ],
)
def test_the_comparison_with_lora_is_of_what_was_run(setups: tuple[str, ...], found: str) -> None:
    values = {"MT": 1.0, "ST": 2.0}
    rows = (Row(("MixLoRA", s, "minus LoRA"), (versus(values[s], s),) * 3) for s in setups)
    assert sentences({2: table(2, *rows)}, [], [])[1].startswith(found)


def test_a_comparison_on_one_task_is_not_left_out() -> None:
    row = Row(("MixLoRA", "ST", "minus LoRA"), (versus(1, "a"), dash, dash))
    said = sentences({1: table(1, row), 2: table(2)}, [], [])[1]
    assert said == "MixLoRA and LoRA were compared on ARC-e, not over all tasks of Table 2."
