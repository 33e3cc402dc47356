"""What `make mutants` is told by hand fits today's files: the tests of each module, and reasons."""

from __future__ import annotations

import runpy
from fnmatch import fnmatch

import pytest
import yaml

from mixlora_exp.config.paths import PACKAGE, ROOT

MADE = runpy.run_path(str(ROOT / "tests" / "checks" / "mutants_tests.py"))
TESTS, LEFT_OUT = MADE["TESTS"], MADE["LEFT_OUT"]
FILES = [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]
REASONS = yaml.safe_load((ROOT / "results" / "mutation.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("pattern", TESTS)
def test_a_pattern_is_of_files_and_names_tests_that_exist(pattern: str) -> None:
    taken = [file for file in FILES if next((p for p in TESTS if fnmatch(file, p)), "") == pattern]
    assert taken, "no file, or an earlier pattern takes all of them"
    for test in (*TESTS[pattern], *LEFT_OUT):
        path, _, function = test.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert f"def {function}(" in text if function else "def test_" in text, test


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: reason["before"].strip())
def test_a_reason_is_of_a_line_that_is_there(reason: dict[str, str]) -> None:
    lines = (ROOT / reason["file"]).read_text(encoding="utf-8").splitlines()
    assert reason["before"].strip() in map(str.strip, lines)
