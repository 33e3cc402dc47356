"""After a power loss within `collect`, `convert` or `merge` what has its final name is whole, no
run is lost, and `collect` given again ends as undisturbed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

import pytest
from lost_writes import Disk, watch
from official_format import as_official
from write_by_write import convert, merge, train

from mixlora_exp.cli.main import main
from mixlora_exp.errors import UserError
from mixlora_exp.records.files import RunFiles, name_of, record_paths
from mixlora_exp.results.runs import check_run

DRAWS = 48 if "SOAK_WRITES" in os.environ else 12
"""States drawn at each moment."""
Content = Mapping[str, bytes]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its adapter in the official format, and unpacked results."""
    work = tmp_path_factory.mktemp("trained")
    assert train(work) == 0
    (run,) = (work / "out").iterdir()
    as_official(run / "adapter", work / "official")
    (work / "results" / "bench").mkdir(parents=True)
    for name in ("record.json", "predictions"):
        place = work / "results" / "runs" / run.name / name
        place.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (run / name).is_dir() else shutil.copy)(run / name, place)
    return work


def collect(work: Path) -> int:
    """Pack in place, which removes what was packed."""
    results = work / "results"
    return main(["collect", f"--source={results / 'runs'}", f"--results={results}", "--force"])


def files(folder: Path) -> Content:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def readable(results: Path) -> list[str]:
    """Names of the runs whose record and predictions are whole, in their folder or packed."""
    names = set()
    for path in record_paths(results / "runs"):
        with contextlib.suppress(UserError):
            names.add(check_run(RunFiles(path), force=True).name)
    return sorted(names)


def wrong_results(state: Path, finished: Path) -> str:
    """What is wrong with the results, and with those that the command leaves when given again."""
    names = readable(finished / "results")
    assert len(names) == 1
    if readable(state / "results") != names:
        return "the run is lost"
    if collect(state):
        return "it does not end when given again"
    visible = [name_of(path) for path in record_paths(state / "results" / "runs")]
    if visible != names or files(state / "results") != files(finished / "results"):
        return "it ends otherwise when given again"
    return ""


def wrong_folder(name: str) -> Callable[[Path, Path], str]:
    """What is wrong with the folder of this name, if it is there."""

    def wrong(state: Path, finished: Path) -> str:
        there = (state / name).exists() and files(state / name) != files(finished / name)
        return f"{name} is not whole" if there else ""

    return wrong


COMMANDS = {
    "collect": (collect, wrong_results),
    "convert": (convert, wrong_folder("converted")),
    "merge": (merge, wrong_folder("merged")),
}


@pytest.mark.parametrize("honoured", [True, False], ids=["synced", "if nothing was synced"])
@pytest.mark.parametrize("name", COMMANDS)
def test_power_losses(
    name: str, honoured: bool, trained: Path, tmp_path: Path, monkeypatch, capsys, record_property
) -> None:
    command, wrong_with = COMMANDS[name]
    work, finished, count = tmp_path / "work", tmp_path / "finished", 0
    for folder in (work, finished):
        shutil.copytree(trained, folder)
    assert command(finished) == 0
    disk, draw = Disk(work, honoured), Random(0)
    disk.all_is_on_disk()
    wrong: set[str] = set()

    def crashed() -> None:
        nonlocal count
        for _ in range(DRAWS):
            count += 1
            state = tmp_path / f"state{count}"
            disk.after_power_loss(draw, state)
            wrong.add(wrong_with(state, finished))

    with monkeypatch.context() as patch:
        watch(disk, patch.setattr, crashed)
        assert command(work) == 0
    disk.look()
    crashed()
    disk.close()
    capsys.readouterr()
    if honoured:
        record_property("states after a power loss", count)
    assert count >= 5 * DRAWS
    wrong.discard("")
    # Without syncs the same judge finds what must not be: it is no judge that accepts everything.
    assert bool(wrong) is not honoured, wrong
