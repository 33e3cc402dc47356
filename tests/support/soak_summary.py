"""What the soak's record counts, one line for each kind of fault, and the table of the page
about reliability that is made of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

Tests = Mapping[str, Mapping[str, Any]]
GROUPS = {
    "kills": ("tests.faults.test_kills", "SIGKILL in training and while a file is written"),
    "failing writes": (
        "tests.faults.test_failing_writes",
        "a writing call fails (full disk, I/O error, short write) or is the last before SIGKILL",
    ),
    "power losses": (
        "tests.faults.test_lost_writes",
        "writes that were not synced are missing, in a drawn order",
    ),
    "full disks": (
        "tests.runs.test_search_on_a_full_disk",
        "a search of hyperparameters meets a disk that is full, of seven sizes",
    ),
    "odd inputs": (
        "tests.fuzz",
        "odd command lines, data, adapters, records, benchmarks, checkpoints and lock files",
    ),
    "elastic": (
        "tests.faults.test_elastic",
        "a run goes on with another number of processes (2, 1, 4, 2)",
    ),
}
"""By name the tests that count, and what they do."""
CONTROL = "if nothing was synced"
"""In the name of the test that has to find wrong states, which are no tries of what is promised."""
HEAD = "| what is done to a run | how often | by |\n| --- | --- | --- |\n"


def summary(tests: Tests) -> dict[str, str]:
    """For each group with counts one line: the total, and what it consists of."""
    found = {}
    for group, (start, _) in GROUPS.items():
        counts: Counter[str] = Counter()
        for name, test in tests.items():
            if name.startswith(start) and CONTROL not in name:
                counts.update(test.get("counted", {}))
        if counts:
            parts = ", ".join(f"{what} {count}" for what, count in counts.items())
            found[group] = f"{counts.total()}: {parts}"
    return found


def table(record: Mapping[str, Any], sweep: Mapping[str, Any]) -> str:
    """The rows of the page, of results/soak.json and results/soak-sweep.json."""
    lines = summary(record["tests"])
    rows = []
    for group, (start, what) in GROUPS.items():
        total = lines.get(group, "").partition(":")[0]
        path = start.replace(".", "/") + (".py" if "test_" in start else "")
        often = f"{int(total):,}" if total else "not in this record"
        rows.append(f"| {what} | {often} | [{path}](../{path}) |")
    signals = Counter(kill["signal"] for kill in sweep["kills"])
    often = ", ".join(f"{count} {signal}" for signal, count in signals.items())
    done = f"{sum(sweep['same'].values())} of {len(sweep['same'])} cells the same to the bit"
    what = "a sweep of SmolLM2 135M is killed and started again"
    commit = sweep["provenance"]["git"]["commit"][:7]
    rows.append(f"| {what} (commit {commit}) | {often}: {done} | "
                "[record](../results/soak-sweep.json) |")  # fmt: skip
    outcomes = Counter(test["outcome"] for test in record["tests"].values())
    passed = f"{outcomes['passed']} of {outcomes.total()} passed"
    commit, hardware = record["provenance"]["git"]["commit"], record["provenance"]["hardware"]
    where = f"commit {commit[:7]}, {hardware['cpu']}, {hardware['cpu_cores']} cores"
    rows.append(f"| all tests of the soak ({where}) | {passed} | [record](../results/soak.json) |")
    return HEAD + "\n".join(rows) + "\n"


def with_table(page: str, rows: str) -> str:
    """The page with these rows in place of those that it has."""
    return re.sub(re.escape(HEAD) + r"(\|.*\n)*", lambda _: rows, page)
