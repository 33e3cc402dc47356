"""The hash of the code that determines results."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixlora_exp import hashing

CODE = """
import sys, types
package = types.ModuleType("mixlora_exp"); package.__path__ = [sys.argv[1]]
sys.modules["mixlora_exp"] = package
from mixlora_exp.hashing import code_sha256
print(code_sha256())
"""


def test_every_python_gives_the_same() -> None:
    others = {
        path
        for minor in range(11, 16)
        if (path := shutil.which(f"python3.{minor}")) and minor != sys.version_info.minor
    }
    found = set()
    for python in others:
        command = [python, "-c", CODE, str(hashing.PACKAGE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found.add(done.stdout.strip())
    if not found:
        pytest.skip("there is no other Python here that works")
    assert found == {hashing.code_sha256()}


def test_fields_that_a_python_does_not_know_yet_change_nothing() -> None:
    tree = ast.parse("def f(a): return [None, 0, 'x']")
    before = hashing._dump(tree)
    for node in ast.walk(tree):
        node._fields = (*node._fields, "of_a_later_python")
        node.of_a_later_python = []
    assert hashing._dump(tree) == before


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ("x = 1  # why", True),
        ("x = (1)", True),
        ("x = 2", False),
        ("x = None", False),
        ("y = 1", False),
    ],
)
def test_what_counts_as_a_change(changed: str, same: bool) -> None:
    assert (hashing._meaning(changed) == hashing._meaning("x = 1")) == same


def test_documentation_is_none() -> None:
    documented = 'def f():\n    "What it does."\n    return 1'
    assert hashing._meaning(documented) == hashing._meaning("def f():\n    return 1")


def test_all_that_decides_results_is_covered() -> None:
    names = {name for name, _ in hashing._determining()}
    needed = {"experiment.py", "together.py", "scored.py", "inputs.py", "runtime.py",
              "config/schema.py", "kernels/exact.py", "training/trainer.py", "data/local.py",
              "evaluation/label_logits.py", "adapters/layer.py", "tasks/arc.py"}  # fmt: skip
    assert needed <= names
    assert not {name for name in names if name.startswith(("results/", "bench/"))}
    for name in hashing.BESIDE:
        assert Path(hashing.PACKAGE / name).exists(), name
