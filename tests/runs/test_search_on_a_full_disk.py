"""A search on a disk that is really full: no trial fails of it, and with room again the same
command ends with the trials of an undisturbed search."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna", reason="the package optuna is not installed")

from mixlora_exp.cli.search import run as search  # noqa: E402
from mixlora_exp.records.outcome import outcomes  # noqa: E402
from mixlora_exp.sweeps.study import ended, open_study  # noqa: E402
from mixlora_exp.system.exit_codes import guarded  # noqa: E402

WORDS = ["experiment=smoke", "method=mixlora", "data.train_limit=16", "trainer.max_steps=3",
         "trainer.save_steps=1", "evaluation.limit=4", "trials=3"]  # fmt: skip
SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.97)
"""Sizes of the disk, as parts of what an undisturbed search uses at most."""


def script(folder: Path) -> int:
    return guarded(search, [*WORDS, f"output_dir={folder}"])


def results(folder: Path) -> tuple:
    study = open_study(folder / "search.db", 5)
    trials = [(t.params, t.value, t.state.name, t.intermediate_values) for t in ended(study)]
    return trials, outcomes(folder)


def used(folder: Path) -> int:
    """Bytes in whole pages, as a tmpfs counts them."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(-(-size // 4096) * 4096 for size in sizes)


@pytest.fixture
def disk(tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", folder]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"this user may mount no file system: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_with_room_again_it_has_the_trials_of_an_undisturbed_search(
    disk: Path, tmp_path: Path, capsys, record_property
) -> None:
    assert script(tmp_path / "whole") == 0
    whole, most = results(tmp_path / "whole"), used(tmp_path / "whole")
    full = 0
    for share in SHARES:
        for left in disk.iterdir():
            subprocess.run(["rm", "-rf", left], check=True)
        size = f"remount,size={int(share * most)}"
        subprocess.run(["mount", "-o", size, disk], check=True)
        capsys.readouterr()
        code = script(disk)
        told = capsys.readouterr().err
        assert code in (0, 2)
        assert "Traceback" not in told
        if code == 2:
            full += 1
            *_, last = told.splitlines()
            assert last.startswith("error: ")
            assert "disk" in last or "No space" in last, last
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        assert script(disk) == 0
        assert results(disk) == whole, share
    record_property("searches that met a full disk", full)
    assert full >= 3, "the disk was hardly full"
