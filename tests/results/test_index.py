"""The index of all records: made from them alone, as often as wanted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from mixlora_exp.errors import UserError
from mixlora_exp.results.index import build_index, write_index
from mixlora_exp.results.runs import load_runs

RUNS = Path(__file__).parents[2] / "results" / "runs"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "runs"
    for path in sorted(RUNS.glob("*-lora-*/record.json"))[:3]:
        shutil.copytree(path.parent, folder / path.parent.name)
    return folder


def test_a_row_for_every_score(few: Path) -> None:
    table, left_out = build_index(few)
    runs, _ = load_runs(few)
    assert len(table) == sum(len(run.scores) for run in runs)
    assert not left_out
    for run in runs:
        for (task, protocol), score in run.scores.items():
            places = (table.run == run.name) & (table.task == task) & (table.protocol == protocol)
            row = table[places]
            assert row["accuracy"].item() == score["accuracy"]
            assert row["n"].item() == score["n"]


def test_made_again_it_is_the_same(few: Path) -> None:
    path = few.parent / "index.parquet"
    rows, _ = write_index(few, path)
    first = pd.read_parquet(path)
    path.unlink()
    write_index(few, path)
    assert len(first) == rows
    pd.testing.assert_frame_equal(pd.read_parquet(path), first)
    assert [p.name for p in few.parent.iterdir() if p.is_file()] == ["index.parquet"]


def test_a_damaged_record_is_left_out(few: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(few, folder)
    path = next(iter(sorted(folder.glob("*/record.json"))))
    path.write_text(path.read_text()[:-200])
    table, left_out = build_index(folder)
    assert [entry.name for entry in left_out] == [path.parent.name]
    assert path.parent.name not in set(table["run"])


def test_a_place_that_cannot_be_written_is_told(few: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_index(few, tmp_path / "missing" / "index.parquet")
