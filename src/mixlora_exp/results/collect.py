"""From the output folder to `results/runs/`: records and predictions of finished runs."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixlora_exp.errors import UserError
from mixlora_exp.results.record import read_record
from mixlora_exp.results.runs import RECORD, LeftOut, check_run

__all__ = ["Collected", "collect"]


@dataclass(slots=True)
class Collected:
    """Names of the runs copied, how many were there, and what was refused."""

    copied: list[str] = field(default_factory=list)
    known: int = 0
    refused: list[LeftOut] = field(default_factory=list)


def _copy(source: Path, target: Path) -> None:
    """The folder appears whole or not at all."""
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        shutil.copy2(source / RECORD, partial / RECORD)
        for name in read_record(source / RECORD)["predictions"].values():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, partial / name)
        partial.replace(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


def _is_random(model: Mapping[str, Any]) -> bool:
    """Whether nothing that was trained before came in: the models of the quick checks."""
    return model["weights"] == "random" or (model["path"] is None and model["source"] == "random")


def collect(source: Path, target: Path) -> Collected:
    """Copy every usable run under `source` that `target` does not hold yet.

    Refused by name: a record that is damaged or made with uncommitted changes, predictions that do
    not give its accuracies, a model with random weights, and a run that `target` holds with another
    content.

    Raises:
        UserError: `source` is no folder, or `target` cannot be written.
    """
    if not source.is_dir():
        raise UserError(f"source={source} is no folder: give the output_dir of the runs")
    found = Collected()
    for path in sorted(source.glob(f"*/{RECORD}")):
        name = path.parent.name
        try:
            run = check_run(path)
            if _is_random(run.record["config"]["model"]):
                raise UserError("a model with random weights: its numbers mean nothing")
            if (target / name).exists():
                theirs = read_record(target / name / RECORD)
                if theirs["content_sha256"] != run.record["content_sha256"]:
                    raise UserError(f"{target / name} holds another result: delete one of the two")
                found.known += 1
                continue
        except UserError as error:
            found.refused.append(LeftOut(name, str(error)))
            continue
        _copy(path.parent, target / name)
        found.copied.append(name)
    return found
