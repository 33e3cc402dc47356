"""Each call that writes fails once, in every way: afterwards the same command ends the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mixlora_exp.config.paths import ROOT
from mixlora_exp.records.code_hash import code_sha256

ALL = "SOAK_WRITES" in os.environ
SUPPORT = ROOT / "tests" / "support"
# Drawing up the tables once takes longer than all the others.
QUICK = ["--sample", "5", "--stages", "train", "collect", "convert"]


def test_failing_writes(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """A sample of the calls; `make soak` tries all, and goes on where it was stopped."""
    folder = tmp_path
    if ALL:
        folder = ROOT / "outputs" / f"soak-writes-{code_sha256()[:10]}"
        folder.mkdir(parents=True, exist_ok=True)
    parts = (os.cpu_count() or 1) if ALL else 1
    reports = [folder / f"report-{part}-of-{parts}.jsonl" for part in range(parts)]
    paths = os.pathsep.join([str(ROOT / "src"), str(SUPPORT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(SUPPORT / "write_by_write.py"), str(tmp_path / f"runs-{part}"),
             str(report), f"--part={part}/{parts}", *([] if ALL else QUICK)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for part, report in enumerate(reports)
    ]  # fmt: skip
    for each in running:
        _, told = each.communicate()
        assert each.returncode == 0, told[-2000:]
    tried = [json.loads(line) for report in reports for line in report.read_text().splitlines()]
    for way, count in Counter(one["way"] for one in tried).items():
        record_property(f"writes that failed with {way}", count)
    assert len(tried) >= 5
    assert not [one for one in tried if one["wrong"]]
