"""Run every fault test at full length and record the outcome: `python tests/checks/soak.py`.

Thirty kills instead of five, eight processes on a sweep of sixteen cells instead of three on four,
every writing call instead of a sample, all odd inputs of tests/fuzz, runs whose number of processes
changes. Writes `results/soak.json`: what was run, on what, and how it ended, with a line for each
kind of fault; and the figures of docs/reliability.md, which `--page` alone makes of the record that
is there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

TESTED = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTED.parent / "src"), str(TESTED / "support")]

from soak_summary import summary, table, with_table

from mixlora_exp.config.paths import ROOT
from mixlora_exp.records.record import finish_record, provenance, read_record, write_json
from mixlora_exp.system.untrusted import read_json

RESULTS, PAGE = ROOT / "results", ROOT / "docs" / "reliability.md"
KILLS = "30"
TESTS = (
    "tests/faults",
    "tests/fuzz",
    "tests/test_disk_faults.py",
    "tests/runs/test_machine_failures.py",
    "tests/runs/test_search.py",
    "tests/runs/test_search_on_a_full_disk.py",
    "tests/models/test_writing.py",
    "tests/runs/test_kept_scores.py",
    "tests/training/test_interrupts.py",
    "tests/training/test_resume.py",
    "tests/training/test_tracking.py",
    "tests/results/test_record.py",
)


def _outcomes(report: Path) -> dict[str, dict[str, object]]:
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = ("failure", "error", "skipped")
        problem = next((kind for kind in kinds if case.find(kind) is not None), None)
        noted = {p.get("name", ""): int(p.get("value", "0")) for p in case.iter("property")}
        found[f"{case.get('classname')}::{case.get('name')}"] = {
            "outcome": problem or "passed",
            "seconds": round(float(case.get("time", "0")), 1),
            **({"counted": noted} if noted else {}),
        }
    return found


def write_page() -> None:
    """Bring the figures of the page up to date."""
    rows = table(read_record(RESULTS / "soak.json"), read_json(RESULTS / "soak-sweep.json"))
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")


def main() -> int:
    if sys.argv[1:] == ["--page"]:
        write_page()
        return 0
    origin = provenance(ROOT)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable, "-m", "pytest", *TESTS, f"--junitxml={report}", *sys.argv[1:],
        ]  # fmt: skip
        environment = {**os.environ, "SOAK_KILLS": KILLS, "SOAK_FUZZ": "1", "SOAK_WRITES": "1"}
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if not report.exists():
            return code or 1
        tests = _outcomes(report)
    path = RESULTS / "soak.json"
    record = {
        "kills": int(KILLS),
        "exit_code": code,
        "summary": summary(tests),
        "seconds": round(time.monotonic() - begun, 1),
        "tests": tests,
        "provenance": origin,
    }
    write_json(path, finish_record(record))
    write_page()
    print("\n".join(f"{kind}: {line}" for kind, line in record["summary"].items()))
    passed = sum(test["outcome"] == "passed" for test in tests.values())
    print(f"{passed} of {len(tests)} passed; written: {path.relative_to(ROOT)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
