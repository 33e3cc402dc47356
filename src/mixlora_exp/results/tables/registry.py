"""Registry of the tables: each registers itself with number and title.

`build.py` builds all registered tables, `results/tables/README.md` lists them, and the scripts
write them, without naming any of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from mixlora_exp.config.paths import RESULTS
from mixlora_exp.config.resolve import to_dict
from mixlora_exp.config.schema import Config, ModelConfig
from mixlora_exp.results import tables
from mixlora_exp.results.cells import Blocks, Standards
from mixlora_exp.results.runs import RecordedRun
from mixlora_exp.results.tables.marks import corrected
from mixlora_exp.results.tables.parts import Block, Table

PAPER = RESULTS / "paper"
"""Folder of the paper's figures, for `results.paper.read_paper`."""


@dataclass(frozen=True, slots=True)
class Sources:
    """The data from which tables are built.

    runs: usable runs, sorted by name. blocks: the same runs, grouped into comparable ones.
    standards: the defaults with which runs are compared. benchmarks: the records in
    `results/bench`. defaults: composed configurations by preset (`correct`, `official`) and method.
    models: configurations by name, for every model that has a title. study: runs of a comparison
    that is shown once all of them are there.
    """

    runs: Sequence[RecordedRun]
    blocks: Blocks
    standards: Standards
    benchmarks: Sequence[Mapping[str, Any]]
    defaults: Mapping[str, Mapping[str, Config]]
    models: Mapping[str, ModelConfig]
    study: Sequence[RecordedRun] = ()

    def composed(self, preset: str = "correct") -> dict[str, dict[str, Any]]:
        """Return the defaults under a preset as dictionaries, by method; the base model is
        `none`."""
        return {name: to_dict(config) for name, config in self.defaults[preset].items()}


Brief = Callable[[Sequence[Block]], Sequence[Block]]
"""Blocks -> what stands on the table's first page; the rest is in its details."""
Made = (
    tuple[Sequence[Block], Sequence[str]]
    | tuple[Sequence[Block], Sequence[str], Brief]
    | tuple[Sequence[Block], Sequence[str], Brief, str]
)
"""Blocks of lines, notes in plain text, what to show first if that is not all, and a legend of that
page if it is not the usual one."""
Maker = Callable[[Sources], Made]
_MAKERS: dict[int, tuple[str, Maker]] = {}


def table(number: int, title: str) -> Callable[[Maker], Maker]:
    """Decorator that registers a function which builds a table; see `docs/extending/table.md`. The
    paper's tables have the numbers 1 to 9.

    Raises:
        ValueError: another table has this number.
    """

    def register(make: Maker) -> Maker:
        if number in _MAKERS:
            raise ValueError(f"table {number} is {_MAKERS[number][0]!r}: choose another number")
        _MAKERS[number] = title, make
        return make

    return register


def registered() -> dict[int, tuple[str, Maker]]:
    """Return the title and function of each table, by number; imports the files in this folder."""
    for module in iter_modules(tables.__path__):
        import_module(f"{tables.__name__}.{module.name}")
    return dict(sorted(_MAKERS.items()))


def make_tables(sources: Sources) -> dict[int, Table]:
    """Return all tables, by number."""
    return {n: _made(n, title, make(sources)) for n, (title, make) in registered().items()}


def _made(number: int, title: str, made: Made) -> Table:
    blocks, notes, *more = made
    found = corrected(Table(number, title, blocks, notes))
    # Of the marked blocks.
    if not more:
        return found
    legend = more[1] if len(more) > 1 else ""
    return dataclasses.replace(found, summary=more[0](found.blocks), legend=legend)
