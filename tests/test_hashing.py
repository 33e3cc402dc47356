"""The hash of the code that determines results."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixlora_exp.records import code_hash

CODE = """
import sys, types
package = types.ModuleType("mixlora_exp"); package.__path__ = [sys.argv[1]]
sys.modules["mixlora_exp"] = package
from mixlora_exp.records.code_hash import code_sha256
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
        command = [python, "-c", CODE, str(code_hash.PACKAGE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found.add(done.stdout.strip())
    if not found:
        pytest.skip("there is no other Python here that works")
    assert found == {code_hash.code_sha256()}


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """Two of the files that decide results, and what they import."""
    names = ("config/schema_data.py", "config/checks.py", "tasks/row_fields.py", "tasks/arc.py")
    return {n: (code_hash.PACKAGE / n).read_text(encoding="utf-8") for n in names}


def replaced(sources: dict[str, str], name: str, old: str, new: str) -> dict[str, str]:
    assert old in sources[name]
    return {**sources, name: sources[name].replace(old, new)}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("config/schema_data.py", "must be >= 16", "is too short: at least 16 tokens"),
        ("config/checks.py", "is not valid", "cannot be"),
        ("tasks/row_fields.py", "is missing; the row has", "is not there; found are"),
        ("tasks/arc.py", "from __future__", '"""What ARC asks."""\n\nfrom __future__'),
    ],
)
def test_another_message_or_docstring_is_the_same_code(
    name: str, old: str, new: str, sources: dict[str, str]
) -> None:
    assert code_hash._hash(replaced(sources, name, old, new)) == code_hash._hash(sources)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("config/schema_data.py", "cutoff_length >= 16", "cutoff_length >= 8"),
        ("tasks/arc.py", "Which of these is correct?", "Which of these is right?"),
        ("tasks/row_fields.py", "raise ValueError", "raise KeyError"),
    ],
)
def test_another_rule_or_prompt_is_other_code(
    name: str, old: str, new: str, sources: dict[str, str]
) -> None:
    assert code_hash._hash(replaced(sources, name, old, new)) != code_hash._hash(sources)


def test_all_that_decides_results_is_covered() -> None:
    names = {name for name, _ in code_hash._determining()}
    needed = {"runs/run.py", "runs/together.py", "runs/predictions.py", "runs/inputs.py",
              "models/precision.py", "config/schema_data.py", "kernels/mixlora/exact.py",
              "training/trainer.py", "data/local.py", "evaluation/label_logits.py",
              "adapters/layer.py", "tasks/arc.py"}  # fmt: skip
    assert needed <= names
    assert not {name for name in names if name.startswith(("results/", "bench/", "system/"))}
    for name in code_hash.BESIDE:
        assert Path(code_hash.PACKAGE / name).exists(), name
