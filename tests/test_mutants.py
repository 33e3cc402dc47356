"""What `make mutants` is told by hand fits today's files: the tests of each module, and reasons."""

from __future__ import annotations

import runpy
from fnmatch import fnmatch

import pytest
import yaml

from mixlora_exp.config.paths import PACKAGE, ROOT
from mixlora_exp.records.record import read_record

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


def test_every_survivor_of_the_record_has_a_test_or_a_reason() -> None:
    record = read_record(ROOT / "results" / "mutation.json")
    assert record["seed"] == MADE["SEED"], "`make mutants` draws what the record has"
    survivors = [row for row in record["mutants"] if row["outcome"] == "survived"]
    assert len(record["mutants"]) >= 200
    for row in survivors:
        known = row.get("why") or row.get("later", {}).get("outcome") == "killed"
        assert known, f"{row['file']}, line {row['line']}: {row['before']} => {row['after']}"
    noticed = len(record["mutants"]) - len(survivors)
    reasons = sum("why" in row for row in survivors)
    later = len(survivors) - reasons
    assert (noticed + later) / len(record["mutants"]) >= 0.9
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert (
        f"Of {len(record['mutants'])} drawn ones {noticed} were noticed at first, {later} more by "
        f"tests that were written for them, and {reasons} have a reason why no test need tell them"
    ) in " ".join(page.split())
