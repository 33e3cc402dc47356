"""docs/extending/table.md, followed in a copy of the repository: its file alone is a table."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixlora_exp.results.tables import registry

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending" / "table.md").read_text(encoding="utf-8")


def make(target: str, copy: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        # Installed is what runs this test.
        ["make", "-o", ".venv/.installed", f"BIN={Path(sys.executable).parent}", target],
        cwd=copy, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_one_file_is_a_table(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("src", "conf", "scripts", "results/paper"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "results" / "bench").mkdir()
    (tmp_path / "results" / "runs").mkdir()
    names = sorted(path.stem for path in (ROOT / "results" / "runs").glob("*-lora-*.zip"))[:3]
    for name in names:
        shutil.copy(ROOT / "results" / "runs" / f"{name}.zip", tmp_path / "results" / "runs")

    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (file,) = re.findall(r"`(\w+\.py)`", PAGE)
    (folder,) = re.findall(r"One file in `(\S+)/`", PAGE)
    (tmp_path / folder / file).write_text(source, encoding="utf-8")
    assert f" of {len(names)} runs written to " in make("tables", tmp_path)
    assert " match the records" in make("check-tables", tmp_path)

    made = tmp_path / "results" / "tables"
    endings = {path.suffix for path in made.glob("table13.*")}
    assert endings == {".md", ".csv", ".tex"}
    assert "[13: Speed of training](table13.md)" in (made / "README.md").read_text()
    with (made / "table13.csv").open(encoding="utf-8") as stream:
        assert {name for row in csv.reader(stream) for name in row} >= set(names)


def test_a_number_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_MAKERS", registry.registered())
    with pytest.raises(ValueError, match="table 11 is 'Stability of training': choose another"):
        registry.table(11, "Mine")(lambda sources: ([], []))
