"""Measure how many small wrong changes of the code the tests notice, and record it.

`python tests/checks/mutants.py` draws mutants of cosmic-ray by a seed, runs for each one the tests
of its module in a clone of this checkout, and writes `results/mutation.json`.
`results/mutation.yaml` holds reasons: of survivors that no test can or need tell from the original.

`--again` runs those of the record that survived without a reason once more, with today's tests, and
adds what became of them: tests were written for them, so that they are counted apart.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "support")]

import yaml
from caches import move_caches
from mutants_drawn import ROOMS, Mutant, draw, made_again
from mutants_run import measure
from mutants_tests import SEED

from mixlora_exp.records.record import finish_record, provenance, read_record, write_json

PER_ROOM = 52
RECORD = ROOT / "results" / "mutation.json"
REASONS = ROOT / "results" / "mutation.yaml"
# What takes long to import. Nothing of this package: a fork imports that anew.
LIBRARIES = ("torch", "transformers", "peft", "datasets", "accelerate", "hydra", "pandas",
             "scipy.stats", "scipy.optimize", "pytest")  # fmt: skip


def _change(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["file"], row["before"], row["after"]


def _reasons() -> dict[tuple[str, str, str], str]:
    held = yaml.safe_load(REASONS.read_text()) if REASONS.exists() else None
    return {_change(row): row["why"] for row in held or ()}


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    count = {name: sum(row["outcome"] == name for row in rows)
             for name in ("killed", "timed out", "survived")}  # fmt: skip
    noticed = count["killed"] + count["timed out"]
    explained = sum("why" in row for row in rows)
    later = sum(row.get("later", {}).get("outcome") in ("killed", "timed out") for row in rows)
    share = {name: round(number / len(rows), 3) if rows else None for name, number in
             (("score", noticed), ("score with later tests", noticed + later))}  # fmt: skip
    return {"drawn": len(rows), **count, "explained": explained, "killed later": later, **share}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--per-room", type=int, default=PER_ROOM)
    parser.add_argument("--room", choices=ROOMS, action="append", help="default: all but triton")
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--again", action="store_true", help="the record's survivors, once more")
    options = parser.parse_args()
    os.nice(10)
    record = _again(options.out) if options.again else _first(options)
    rows = record["mutants"]
    for room, counted in record["rooms"].items():
        counted |= _summary([row for row in rows if row["room"] == room])
    record["all"] = _summary(rows)
    write_json(options.out, finish_record(record))
    print(record["all"], *(f"{room}: {c}" for room, c in record["rooms"].items()), sep="\n")
    return 0


def _first(options: argparse.Namespace) -> dict[str, Any]:
    """The record of newly drawn mutants."""
    begun, origin = time.monotonic(), provenance(ROOT)
    reasons = _reasons()
    mutants, rows, rooms = [], [], {}
    for room in options.room or [room for room in ROOMS if room != "triton"]:
        drawn, rooms[room] = draw(ROOT, room, options.per_room, options.seed)
        mutants += drawn
    for mutant, outcome, seconds, failed in _measured(mutants):
        row = {
            "room": mutant.room, "file": mutant.file, "line": mutant.line, "name": mutant.name,
            "before": mutant.before, "after": mutant.after, "outcome": outcome,
            "seconds": seconds, "by": failed,
        }  # fmt: skip
        if outcome == "survived" and _change(row) in reasons:
            row["why"] = reasons[_change(row)]
        rows.append(row)
        print(len(rows), json.dumps([*row.values()][1:]), flush=True)
    return {
        "tool": f"cosmic-ray {importlib.metadata.version('cosmic-ray')}",
        "seed": options.seed,
        "seconds": round(time.monotonic() - begun, 1),
        "all": {},
        "rooms": rooms,
        "mutants": sorted(rows, key=lambda row: (row["room"], row["file"], row["line"])),
        "provenance": origin,
    }


def _again(path: Path) -> dict[str, Any]:
    """The record with what became of its survivors that no earlier call has killed; without a place
    in today's files they are `gone`."""
    begun, origin = time.monotonic(), provenance(ROOT)
    record, reasons = read_record(path), _reasons()
    rows, later = {}, []
    for row in record["mutants"]:
        if row["outcome"] == "survived" and _change(row) in reasons:
            row["why"] = reasons[_change(row)]
        elif row["outcome"] == "survived" and row.get("later", {}).get("outcome") != "killed":
            mutant = made_again(ROOT, row)
            row["later"] = {"outcome": "gone"}
            if mutant is not None:
                rows[mutant.key] = row
                later.append(mutant)
    for mutant, outcome, seconds, failed in _measured(later):
        rows[mutant.key]["later"] = {
            "outcome": outcome, "seconds": seconds, "by": failed, "commit": origin["git"]["commit"]
        }  # fmt: skip
        print(mutant.key, rows[mutant.key]["later"], flush=True)
    again = {"seconds": round(time.monotonic() - begun, 1), "provenance": origin}
    record["again"] = [*record.get("again", []), again]
    return record


def _measured(mutants: Sequence[Mutant]) -> Iterator[tuple[Mutant, str, float, str]]:
    """As `measure`, in a clone of this checkout."""
    # The finder that registers the package with PEFT would import the package here.
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != "mixlora_exp._peft_hook"]
    move_caches()
    with contextlib.redirect_stderr(None):
        for name in LIBRARIES:
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        yield from measure(Path(folder), mutants)


if __name__ == "__main__":
    sys.exit(main())
