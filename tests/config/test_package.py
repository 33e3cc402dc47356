"""What is installed: a wheel has the configuration and the facts, and its commands run anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
from mixlora_exp.cli.main import main
from mixlora_exp.config.paths import CONF_DIR, ROOT
from mixlora_exp.tasks.embedded import rows
assert str(CONF_DIR).startswith(sys.argv[1]), CONF_DIR
assert str(ROOT) == sys.argv[2], ROOT
assert len(rows("arc_e", "test", 0)) == 96
assert main(["train", "--cfg", "job", "experiment=smoke", "preset=only_order"]) == 0
assert main(["tables", "--check", "--runs", "x"]) == 2
assert main(["compare", *sys.argv[3:]]) == 0
"""
RUNS = [
    ROOT / "results" / "runs" / f"smollm2_135m-{name}.zip"
    for name in ("lora-multi-local-s42-06bdc0710e", "mixlora-multi-local-s42-2da95b57e2")
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77", reason="the build needs setuptools 77")
    folder = tmp_path_factory.mktemp("wheel")
    # In a copy: a build leaves files beside the sources.
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "conf"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps",
         "--no-index", f"--wheel-dir={folder}", str(source)],
        check=True,
    )  # fmt: skip
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_a_wheel_has_all_that_is_read(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "conf").rglob("*.json")]:
        assert f"mixlora_exp/conf/{path.relative_to(ROOT / 'conf')}" in names
    source = ROOT / "src"
    for suffix in ("py", "txt", "j2", "csv"):
        found = [p for p in source.rglob(f"*.{suffix}") if ".egg-info" not in str(p)]
        assert {str(p.relative_to(source)) for p in found} <= names
    (points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert b"mixlora-exp = mixlora_exp.cli.main:main" in zipfile.ZipFile(wheel).read(points)


@pytest.mark.slow
def test_its_commands_run_without_a_checkout(wheel: Path, tmp_path: Path) -> None:
    installed, here = tmp_path / "installed", tmp_path / "here"
    zipfile.ZipFile(wheel).extractall(installed)
    here.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(installed), str(here), *map(str, RUNS)], cwd=here,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "order: fixed" in done.stdout
    assert "needs --output=DIR" in done.stderr
