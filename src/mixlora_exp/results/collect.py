"""Packs records and predictions of finished runs from output folders into `results/runs/`."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from re import fullmatch

from mixlora_exp.errors import UserError
from mixlora_exp.records.files import FORCED, PACKED, RECORD, RunFiles, name_of, pack, record_paths
from mixlora_exp.records.objections import has_random_weights, objections
from mixlora_exp.records.record import read_record
from mixlora_exp.records.required_fields import NAME
from mixlora_exp.results.runs import LeftOut, RecordedRun, check_run
from mixlora_exp.system.durable import sync


@dataclass(slots=True)
class Collected:
    """Names of the packed runs, number of runs packed before, number skipped because their weights
    are random, and refused runs with reasons."""

    packed: list[str] = field(default_factory=list)
    known: int = 0
    random: int = 0
    refused: list[LeftOut] = field(default_factory=list)


def collect(source: Path, target: Path, *, force: bool = False) -> Collected:
    """Pack every usable run in a folder of `source` into `target/NAME.zip`, unless it exists.

    Refused are damaged records, predictions that contradict the record's accuracies, runs whose
    name has other content in `target`, links, and, without `force`, records with `objections`. With
    `force`, the objections are stored with the record and noted under the tables. Without `force` a
    run on random weights (a check of the installation, for example) is skipped.

    If `source` and `target` are the same, packed files replace those in the folders; weights stay.

    Raises:
        UserError: `source` is not a folder.
    """
    if not source.is_dir():
        raise UserError(f"source={source} is not a folder: give the output_dir of the runs")
    found = Collected()
    if source.resolve() == target.resolve():
        _finish_removals(target)
    for path in record_paths(source):
        if path.suffix == PACKED:
            continue
        try:
            match _collect(path, target, force):
                case None:
                    found.random += 1
                case True:
                    found.packed.append(name_of(path))
                case False:
                    found.known += 1
        except UserError as error:
            found.refused.append(LeftOut(name_of(path), str(error)))
    return found


def _collect(path: Path, target: Path, force: bool) -> bool | None:
    """Pack the run whose record is at `path`; returns False if it was packed before, None if its
    weights are random."""
    name, in_place = name_of(path), path.parents[1].resolve() == target.resolve()
    if not fullmatch(NAME, name):
        raise UserError("the folder's name is not a valid name of a run: rename it")
    files = RunFiles(path)
    force = force or (in_place and files.has(FORCED))
    run = check_run(files, force=True)
    if has_random_weights(run.record) and not force:
        return None
    reasons = objections(run.record)
    if reasons and not force:
        raise UserError(f"{'; '.join(reasons)}: --force collects it, marked")
    packed = target / f"{name}{PACKED}"
    held = RunFiles(packed if in_place or packed.exists() else target / name / RECORD)
    new = not held.path.exists()
    if new:
        pack(packed, _files(run, files, reasons))
    elif read_record(held)["content_sha256"] != run.record["content_sha256"]:
        raise UserError(f"{held.path} has another result: delete one of the two")
    if in_place:
        # Check also the predictions before removing them.
        check_run(held, force=True)
        # First, and on disk: without a record, what a kill or a power loss leaves is no run.
        path.unlink()
        with contextlib.suppress(OSError):
            sync(path.parent)
        _remove_packed(path.parent, held)
    return new


def _remove_packed(folder: Path, packed: RunFiles) -> None:
    """Remove the files of a run that are in its packed file, and the folders that are empty then:
    weights and whatever else was not packed stay."""
    for place in (folder / "predictions", folder):
        if not place.is_dir() or place.is_symlink():
            continue
        # Names from the folder: a packed file of a stranger may have others.
        for path in [path for path in place.iterdir() if path.is_file() and not path.is_symlink()]:
            name = path.relative_to(folder).as_posix()
            # Reasons are written anew when they are packed.
            same = packed.has(name) and (name == FORCED or path.read_bytes() == packed.read(name))
            if same:
                path.unlink()
        if not any(place.iterdir()):
            place.rmdir()


def _finish_removals(target: Path) -> None:
    """Remove what an interrupted `collect` left of the folders of packed runs: it removes the
    record first."""
    for path in target.glob(f"*{PACKED}"):
        folder = target / name_of(path)
        if folder.is_dir() and not folder.is_symlink() and not (folder / RECORD).exists():
            with contextlib.suppress(OSError, ValueError, UserError):
                _remove_packed(folder, RunFiles(path))


def _files(run: RecordedRun, files: RunFiles, reasons: list[str]) -> dict[str, bytes]:
    """Return the files to pack, by name: record, predictions, and the objections if there are
    any."""
    names = [RECORD, *run.record["predictions"].values()]
    try:
        kept = {name: files.read(name) for name in names}
    except (OSError, ValueError) as error:
        raise UserError(f"{run.name}: {error}") from error
    if reasons:
        kept[FORCED] = (json.dumps({"reasons": reasons}, indent=2) + "\n").encode()
    return kept
