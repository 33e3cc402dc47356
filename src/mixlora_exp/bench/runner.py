"""Runs a benchmark of any kind, and writes its record and tables."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch

from mixlora_exp.bench import kinds
from mixlora_exp.bench.options import BenchOptions
from mixlora_exp.config.paths import ROOT
from mixlora_exp.errors import UserError
from mixlora_exp.records.record import finish_record, provenance, write_json, write_text
from mixlora_exp.system.device import hardware_names

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of benchmark.

    options: a `BenchOptions` with its own settings, each of which is `name=value` on the command
    line. measure: yields what was measured so far, as JSON; each is written, so that what is
    measured stays, whatever comes next. name: that of the files, of a record. markdown: the tables
    of a record. parse: makes the options of words that are more than the fields of `options`.
    """

    options: type[BenchOptions]
    measure: Callable[[Any], Iterator[dict[str, Any]]]
    name: Callable[[Record], str]
    markdown: Callable[[Record], str] | None = None
    parse: Callable[[Sequence[str]], BenchOptions] | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """Files of a benchmark, its tables (or nothing), and what it found wrong."""

    paths: tuple[Path, ...]
    tables: str
    failed: tuple[str, ...]


def kind_of(name: str) -> Kind:
    """Return the kind of benchmark with this name, from the file of `bench/kinds/` that defines it.

    Raises:
        UserError: there is no such kind.
    """
    known = [module.name for module in iter_modules(kinds.__path__)]
    if name not in known:
        raise UserError(f"kind={name} is unknown: choose from {', '.join(known)}")
    return import_module(f"{kinds.__name__}.{name}").KIND


def split_kind(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the kind that a command line names (`steps` if none), and its other words."""
    chosen = [word.removeprefix("kind=") for word in arguments if word.startswith("kind=")]
    rest = [word for word in arguments if not word.startswith("kind=")]
    return (chosen[-1] if chosen else "steps"), rest


def run_benchmark(arguments: Sequence[str]) -> Written:
    """Carry out `kind=NAME` (`steps` if none is given) with the settings of that kind.

    Raises:
        UserError: a setting is unknown or not valid, or the benchmark cannot be carried out here.
    """
    name, words = split_kind(arguments)
    kind = kind_of(name)
    return measure(kind, (kind.parse or _parsed(kind))(words))


def measure(kind: Kind, options: BenchOptions) -> Written:
    """Run a benchmark with these settings.

    Raises:
        UserError: nothing was measured.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    # At the beginning: the code may be changed while it is measured.
    origin, written = provenance(ROOT, hardware_names()), None
    for found in kind.measure(options):
        record = {**found, "provenance": origin}
        path = ROOT / options.output / f"{options.name or kind.name(record)}.json"
        write_json(path, finish_record(record))
        paths, tables = [path], ""
        if kind.markdown is not None:
            tables = kind.markdown(record)
            paths.append(path.with_suffix(".md"))
            write_text(paths[-1], tables)
        written = Written(tuple(paths), tables, tuple(found.get("failed", ())))
    if written is None:
        raise UserError("nothing was measured")
    return written


def _parsed(kind: Kind) -> Callable[[Sequence[str]], BenchOptions]:
    def parse(words: Sequence[str]) -> BenchOptions:
        if not words:
            return kind.options()
        # Late: a GPU machine may have neither Hydra nor OmegaConf.
        from mixlora_exp.config.command import compose_settings

        return compose_settings(kind.options, words)

    return parse


def machine_slug(record: Record) -> str:
    """Return the first GPU, or `cpu`, as part of a file's name."""
    machine = (record["provenance"]["hardware"].get("gpus") or ["cpu"])[0]
    return re.sub(r"[^a-z0-9]+", "_", machine.lower()).strip("_")


def echo(text: str) -> None:
    """Print progress on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
