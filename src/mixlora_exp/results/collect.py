"""From the output folder to `results/runs/`: records and predictions of finished runs."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from re import fullmatch

from mixlora_exp.errors import UserError
from mixlora_exp.records.record import read_record, write_json
from mixlora_exp.records.shape import NAME
from mixlora_exp.results.objections import objections
from mixlora_exp.results.runs import FORCED, RECORD, LeftOut, Run, check_run, read_predictions_file
from mixlora_exp.system.untrusted import read_bytes

__all__ = ["Collected", "collect"]


@dataclass(slots=True)
class Collected:
    """Names of the runs copied, how many were there, and what was refused."""

    copied: list[str] = field(default_factory=list)
    known: int = 0
    refused: list[LeftOut] = field(default_factory=list)


def _copy(run: Run, target: Path, reasons: Sequence[str]) -> None:
    """The folder appears whole or not at all, with the reasons against it where there are any. What
    is written is what was checked: the record, and files by the names that a run gives them."""
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        (partial / RECORD).write_bytes(read_bytes(run.folder / RECORD))
        for name in run.record["predictions"].values():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(read_predictions_file(run.folder, name))
        if reasons:
            write_json(partial / FORCED, {"reasons": reasons})
        partial.replace(target)
    except (OSError, ValueError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {target}: {reason}") from error


def collect(source: Path, target: Path, *, force: bool = False) -> Collected:
    """Copy every usable run under `source` that `target` does not hold yet.

    Refused by name: a record that is damaged, predictions that do not give its accuracies, a run
    that `target` holds with another content, links, which are not followed, and, without `force`,
    one to which there are `objections`: those stand beside its record and under the tables then.

    Raises:
        UserError: `source` is no folder, or `target` cannot be written.
    """
    if not source.is_dir():
        raise UserError(f"source={source} is no folder: give the output_dir of the runs")
    found = Collected()
    for path in sorted(source.glob(f"*/{RECORD}")):
        name = path.parent.name
        try:
            if not fullmatch(NAME, name):
                raise UserError("the folder's name is none that a run has")
            run = check_run(path, force=force)
            reasons = objections(run.record)
            if reasons and not force:
                raise UserError(f"{'; '.join(reasons)}: only force=true takes it, marked")
            if (target / name).exists():
                theirs = read_record(target / name / RECORD)
                if theirs["content_sha256"] != run.record["content_sha256"]:
                    raise UserError(f"{target / name} holds another result: delete one of the two")
                found.known += 1
                continue
        except UserError as error:
            found.refused.append(LeftOut(name, str(error)))
            continue
        _copy(run, target / name, reasons)
        found.copied.append(name)
    return found
