"""The walks of docs/extending, followed to the letter in a copy of the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("src", "conf", "tests/kernels", "tests/conftest.py", "tests/support", "pyproject.toml",
          "train.py")  # fmt: skip
BLOCK = re.compile(
    r"(?:^`(?P<path>[\w/.]+)`:\n\n)?"
    r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
"""A block of code, maybe under the file that it is."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in COPIED:
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(
                source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(source, target)
    return tmp_path


def execute(command: str, place: Path) -> str:
    """Run a command in a copy of the repository; returns what it told."""
    environment = {**os.environ, "PYTHONPATH": str(place / "src"), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=place, env=environment, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def follow(walk: str, place: Path, commands: bool = True) -> list[str]:
    """Write the walk's files into a copy and run its commands there; returns what these told."""
    told = []
    for block in BLOCK.finditer((ROOT / "docs" / "extending" / walk).read_text(encoding="utf-8")):
        if block["kind"] == "bash":
            if commands:
                told += [execute(command, place) for command in block["text"].splitlines()]
            continue
        path = place / block["path"]
        assert not path.exists(), f"{path} is no new file"
        path.write_text(block["text"], encoding="utf-8")
    return told


def record(place: Path) -> dict:
    (path,) = place.glob("outputs/**/record.json")
    return json.loads(path.read_text(encoding="utf-8"))


FOUND = """
import sys
import pytest
from mixlora_exp.bench.row_registry import ROWS
from mixlora_exp.config.choices import KernelName
assert "slots" in KernelName.__members__ and "mixlora_slots" in ROWS
case = "slots and in_float64 and same and bias"
sys.exit(pytest.main(["-q", "tests/kernels/test_block_kernels.py", "-k", case]))
"""


def test_a_kernel_s_file_is_all_that_is_needed(copy: Path) -> None:
    """It is a choice, a row of the benchmark, and a parameter of the tests that judge it."""
    page = (ROOT / "docs" / "extending" / "kernel.md").read_text(encoding="utf-8")
    file = next(block for block in BLOCK.finditer(page) if block["kind"] == "python")
    (copy / file["path"]).write_text(file["text"], encoding="utf-8")
    (copy / "found.py").write_text(FOUND, encoding="utf-8")
    assert re.search(r"\b2 passed", execute("python found.py", copy))


@pytest.mark.slow
def test_kernel(copy: Path) -> None:
    judged, dropped, _ = follow("kernel.md", copy)
    assert re.search(r"\d{2} passed", judged)
    assert re.search(r"\d{2} passed", dropped)
    made = record(copy)
    assert (made["status"], made["kernel"]) == ("finished", "slots")


JUDGED_AND_TRAINED = """
import sys
import pytest
from mixlora_exp.cli.train import execute
assert pytest.main(["-q", "tests/kernels/test_routers.py", "-k", "above"]) == 0
sys.exit(execute(["experiment=smoke", "method=mixlora_above"]))
"""


def check_router(judged: str, least: int, made: dict) -> None:
    assert int(re.search(r"(\d+) passed", judged)[1]) >= least
    assert made["status"] == "finished"
    assert made["config"]["method"]["router"] == "above"
    assert made["config"]["method"]["router_options"] == {"share": 0.13}


def test_a_router_s_files_are_all_that_is_needed(copy: Path) -> None:
    """The tests of routers judge it, and it trains: in one process, without the other routers."""
    follow("router.md", copy, commands=False)
    (copy / "tried.py").write_text(JUDGED_AND_TRAINED, encoding="utf-8")
    judged = execute("python tried.py", copy)
    check_router(judged, 6, record(copy))


@pytest.mark.slow
def test_router(copy: Path) -> None:
    judged, _ = follow("router.md", copy)
    check_router(judged, 6, record(copy))


def test_a_method_takes_fewer_than_60_lines() -> None:
    code = "".join(
        block["text"]
        for block in BLOCK.finditer((ROOT / "docs/extending/method.md").read_text("utf-8"))
        if block["kind"] == "python"
    )
    assert len(code.splitlines()) < 60


@pytest.mark.slow
def test_method(copy: Path) -> None:
    """Noisy top-k routing, as its formula has it."""
    judged, _ = follow("method.md", copy)
    assert re.search(r"\b\d passed", judged)
    formula = Path(__file__).with_name("noisy_top_k_formula.py")
    execute(f"python {formula}", copy)
    made = record(copy)
    assert made["status"] == "finished"
    assert made["config"]["method"]["router"] == "noisy_top_k"
