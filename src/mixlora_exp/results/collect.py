"""From output folders to `results/runs/`: records and predictions of finished runs, packed."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from re import fullmatch

from mixlora_exp.errors import UserError
from mixlora_exp.records.files import FORCED, PACKED, RECORD, has_file, name_of, pack, read_file
from mixlora_exp.records.record import read_record
from mixlora_exp.records.shape import NAME
from mixlora_exp.results.objections import objections
from mixlora_exp.results.runs import LeftOut, RecordedRun, check_run


@dataclass(slots=True)
class Collected:
    """Names of the runs packed, how many were there, and what was refused."""

    packed: list[str] = field(default_factory=list)
    known: int = 0
    refused: list[LeftOut] = field(default_factory=list)


def collect(source: Path, target: Path, *, force: bool = False) -> Collected:
    """Pack every usable run in a folder of `source` into `target/NAME.zip`, unless it is there.

    Refused by name: a record that is damaged, predictions that do not give its accuracies, a run
    that `target` holds with another content, links, which are not followed, and, without `force`,
    one to which there are `objections`: those stand beside its record and under the tables then.

    With `source` and `target` the same, folders that lie there are replaced by packed files.

    Raises:
        UserError: `source` is no folder.
    """
    if not source.is_dir():
        raise UserError(f"source={source} is no folder: give the output_dir of the runs")
    found = Collected()
    for path in sorted(source.glob(f"*/{RECORD}")):
        try:
            if _collect(path, target, force):
                found.packed.append(name_of(path))
            else:
                found.known += 1
        except UserError as error:
            found.refused.append(LeftOut(name_of(path), str(error)))
    return found


def _collect(path: Path, target: Path, force: bool) -> bool:
    """Pack the run whose record stands at `path`; False if it is there already."""
    name, in_place = name_of(path), path.parents[1].resolve() == target.resolve()
    if not fullmatch(NAME, name):
        raise UserError("the folder's name is none that a run has")
    force = force or (in_place and has_file(path, FORCED))
    run = check_run(path, force=force)
    reasons = objections(run.record)
    if reasons and not force:
        raise UserError(f"{'; '.join(reasons)}: only --force takes it, marked")
    packed = target / f"{name}{PACKED}"
    held = packed if in_place or packed.exists() else target / name / RECORD
    new = not held.exists()
    if new:
        pack(packed, _files(run, reasons))
    elif read_record(held)["content_sha256"] != run.record["content_sha256"]:
        raise UserError(f"{held} holds another result: delete one of the two")
    if in_place:
        # Its predictions too: the folder is about to go.
        check_run(packed, force=True)
        shutil.rmtree(path.parent)
    return new


def _files(run: RecordedRun, reasons: list[str]) -> dict[str, bytes]:
    """What was checked: the record, files by the names that a run gives them, and the reasons
    against it where there are any."""
    names = [RECORD, *run.record["predictions"].values()]
    try:
        files = {name: read_file(run.path, name) for name in names}
    except (OSError, ValueError) as error:
        raise UserError(f"{run.name}: {error}") from error
    if reasons:
        files[FORCED] = (json.dumps({"reasons": reasons}, indent=2) + "\n").encode()
    return files
