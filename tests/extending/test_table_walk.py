"""docs/extending/table.md, carried out: the file that it shows, and nothing else, is a table."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixlora_exp.config.paths import RESULTS, ROOT
from mixlora_exp.results import tables
from mixlora_exp.results.build import gather, table_files
from mixlora_exp.results.tables import registry

GUIDE = ROOT / "docs" / "extending" / "table.md"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose files count as those in `results/tables/`, for one test."""
    monkeypatch.setattr(registry, "_MAKERS", registry.registered())
    monkeypatch.setattr(tables, "__path__", [*tables.__path__, str(tmp_path)])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.startswith(tables.__name__):
            del sys.modules[name]


@pytest.fixture
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results with three of the committed runs."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "bench").mkdir()
    (folder / "runs").mkdir()
    for path in sorted((RESULTS / "runs").glob("*-lora-*.zip"))[:3]:
        shutil.copy(path, folder / "runs")
    return folder


def test_one_file_is_a_table(place: Path, few: Path) -> None:
    before = table_files(gather(few))
    (source,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (name,) = re.findall(r"`(\w+\.py)`", GUIDE.read_text())
    (place / name).write_text(source)
    found = gather(few)
    files = table_files(found)
    assert {n for n in files if n not in before} == {"table12.md", "table12.csv", "table12.tex"}
    assert "[12: Speed of training](table12.md)" in files["README.md"]
    assert all(files[n] == before[n] for n in before if n != "README.md")
    (block,) = found.tables[12].blocks
    assert len(block.rows) == len(found.runs) == 3
    for run, row in zip(found.runs, block.rows, strict=True):
        assert row.cells[1].records == (run.name,)
        assert row.cells[1].value == run.record["train"]["tokens_per_second"]
        assert f"| {run.name} | lora | " in files["table12.md"]


def test_a_number_is_given_once(place: Path) -> None:
    with pytest.raises(ValueError, match="table 11 is 'Stability of training': choose another"):
        registry.table(11, "Mine")(lambda sources: ([], []))
