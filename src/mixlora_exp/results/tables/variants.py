"""Which runs belong to which line of Tables 1, 2, 5, 8 and 9."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.results.cells import Standards
from mixlora_exp.results.paper import METHOD_TITLES
from mixlora_exp.results.runs import RecordedRun


@dataclass(frozen=True, slots=True)
class Variant:
    """Identity of a line: method, setup (ST: single-task; otherwise the mixture's name), and the
    value of the setting that the table varies."""

    method: str
    setup: str
    value: str = ""

    @property
    def label(self) -> tuple[str, str]:
        """The line's two labels: method with the varied value, and setup."""
        title = METHOD_TITLES[self.method]
        return (f"{title} {self.value}".strip(), self.setup)


BASE = Variant("none", "-")
Members = Mapping[str, Sequence[RecordedRun]]
"""Task -> the runs of a line, one per seed."""


@dataclass(frozen=True, slots=True)
class AccuracySpec:
    """Selection of runs and lines for one of the tables.

    `setups`: name of a setup -> whether trained tasks belong to it, given the scored task.
    `varied(run, standards)`: the run's value of the setting that the table varies; None for a run
    that does not belong to the table.
    """

    tasks: tuple[str, ...]
    setups: Mapping[str, Callable[[tuple[str, ...], str], bool]]
    varied: Callable[[RecordedRun, Standards], str | None]
    paper_key: Callable[[str, Variant], dict[str, str] | None]
    models: tuple[str, ...]
    values: tuple[str, ...] = ("",)
    default: str = ""
    """The value of Table 3, with which the others are compared."""
    methods: tuple[str, ...] = PAPER_METHODS
    others: bool = True
    """Whether the table includes models that are not in the paper."""
    params: Callable[[str, Variant], tuple[float, float] | None] = lambda model, variant: None


def variants_of(spec: AccuracySpec) -> Iterator[Variant]:
    """Yield the table's lines in their order."""
    for method, value, setup in product(spec.methods, spec.values, spec.setups):
        yield Variant(method, setup, value)


def members_of(
    spec: AccuracySpec, runs: Sequence[RecordedRun], standards: Standards
) -> dict[Variant, dict[str, list[RecordedRun]]]:
    """Return runs by line and task."""
    found: dict[Variant, dict[str, list[RecordedRun]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for task in {task for task, _ in run.scores}:
            if task not in spec.tasks:
                continue
            if run.method == "none":
                found[BASE][task].append(run)
                continue
            value = spec.varied(run, standards)
            for setup, belongs in spec.setups.items():
                if value is not None and belongs(run.mix, task):
                    found[Variant(run.method, setup, value)][task].append(run)
    return found
