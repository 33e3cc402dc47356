"""docs/reliability.md: its figures are those of the records, and the tests that it names exist."""

from __future__ import annotations

import ast
import re
from collections import Counter

from soak_summary import GROUPS, summary, table, with_table

from mixlora_exp.config.paths import ROOT
from mixlora_exp.records.record import read_record

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
RECORD = read_record(ROOT / "results" / "soak.json")
SWEEP = read_record(ROOT / "results" / "soak-sweep.json")


def test_figures_are_those_of_the_records() -> None:
    assert table(RECORD, SWEEP) in PAGE, "python tests/checks/soak.py --page"
    assert with_table(PAGE, table(RECORD, SWEEP)) == PAGE


def test_the_record_is_of_a_whole_soak_that_passed() -> None:
    assert RECORD["exit_code"] == 0
    assert {test["outcome"] for test in RECORD["tests"].values()} == {"passed"}
    counted: Counter[str] = Counter()
    for test in RECORD["tests"].values():
        counted.update(test.get("counted", {}))
    wanted = {"command lines": 500, "data files": 200, "adapter folders": 200, "records": 100,
              "checkpoints": 50, "kills in record": 6,
              "writes that failed with EIO": 400}  # fmt: skip
    assert {what: counted[what] for what, least in wanted.items() if counted[what] < least} == {}
    assert all(SWEEP["same"].values())


def test_the_record_has_all_that_the_soak_runs() -> None:
    listed = ast.parse((ROOT / "tests" / "checks" / "soak.py").read_text(encoding="utf-8"))
    (tests,) = (
        ast.literal_eval(node.value)
        for node in listed.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TESTS"
    )
    files = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for place in map(ROOT.joinpath, tests)
        for path in ([place] if place.is_file() else place.glob("test_*.py"))
    }
    recorded = {name.partition("::")[0] for name in RECORD["tests"]}
    assert files - recorded == set(), "make soak"


def test_another_record_gives_another_table() -> None:
    tests = {
        "tests.faults.test_kills::test_a": {"outcome": "passed", "counted": {"kills in a": 2}},
        "tests.faults.test_kills::test_b": {"outcome": "failure", "counted": {"kills in a": 1}},
        "tests.fuzz.test_odd_data::test_c": {"outcome": "passed", "counted": {"data files": 1200}},
    }
    assert summary(tests) == {"kills": "3: kills in a 3", "odd inputs": "1200: data files 1200"}
    rows = table({**RECORD, "tests": tests}, SWEEP)
    for cell in ("| 3 |", "| 1,200 |", "| 2 of 3 passed |", "| not in this record |"):
        assert cell in rows
    page = with_table(PAGE, rows)
    assert page != PAGE
    assert with_table(page, table(RECORD, SWEEP)) == PAGE


def test_what_the_page_names_exists() -> None:
    """Functions that stand beside a link to their file, and the folders that the soak counts."""
    named = re.findall(r"\[`(test_\w+)`\]\(\.\./(\S+?)\)", PAGE)
    assert len(named) >= 8
    for name, path in named:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"
    for start, _ in GROUPS.values():
        path = ROOT / start.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file()
