"""Each call that writes fails once, in every way: afterwards the same command ends the same."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import write_by_write

from mixlora_exp.config.paths import ROOT
from mixlora_exp.system.exit_codes import guarded

ALL = "SOAK_WRITES" in os.environ
SUPPORT = ROOT / "tests" / "support"
PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "gguf", "accelerate")
# Drawing up the tables once takes longer than all the others.
QUICK = ["--quick", "--stages", "train", "collect", "convert"]


def sources() -> str:
    """Of all code and configurations that are tried, also of what decides no result, and of the
    packages that write files."""
    places = (ROOT / "src", SUPPORT)
    files = sorted(p for place in places for p in place.rglob("*") if p.suffix in (".py", ".yaml"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files))
    digest.update(" ".join(f"{name}{version(name)}" for name in PACKAGES).encode())
    return digest.hexdigest()[:10]


def test_failing_writes(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """A sample of the calls; `make soak` tries all, and goes on where it was stopped."""
    folder = tmp_path
    if ALL:
        folder = ROOT / "outputs" / f"soak-writes-{sources()}"
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
    if ALL:
        assert not list(left_out(tried))


def left_out(tried: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Of a report of all calls: commands, calls and ways that are not in it."""
    for stage in write_by_write.STAGES:
        calls = {one["number"]: one["call"] for one in tried if one["stage"] == stage}
        ways = {(one["number"], one["way"]) for one in tried if one["stage"] == stage}
        if not {"write", "fsync"} <= {call.partition(" ")[0] for call in calls.values()}:
            yield f"{stage}: a kind of call"
        for number in range(1, max(calls, default=0) + 1):
            for way in write_by_write.WAYS:
                cut = way == "short" and not calls.get(number, "").startswith("write ")
                if not cut and (number, way) not in ways:
                    yield f"{stage}, call {number}, {way}"


def test_a_report_that_lacks_a_call_or_a_command_is_found_out() -> None:
    calls = ("open a", "write a", "fsync a")
    whole = [
        {"stage": stage, "number": number, "way": way, "call": call}
        for stage in write_by_write.STAGES
        for number, call in enumerate(calls, 1)
        for way in write_by_write.WAYS
        if way != "short" or call == "write a"
    ]
    assert not list(left_out(whole))
    assert list(left_out(whole[1:])) == [f"train, call 1, {whole[0]['way']}"]
    without = [one for one in whole if one["stage"] != "merge"]
    assert list(left_out(without)) == ["merge: a kind of call"]


def careless(work: Path) -> int:
    """Writes in place, and takes what is there for done."""

    def write(_: object) -> None:
        if not (work / "text").exists():
            (work / "text").write_bytes(b"whole")

    return guarded(write, [])


def test_a_careless_writer_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the judge is none that accepts everything, and none that injects nothing."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(write_by_write.STAGES, "careless", careless)
    driver = write_by_write.Driver(tmp_path / "runs", ["careless"])
    driver.prepare()
    assert driver.calls["careless"] == ["open /text", "write /text"]
    for number, way in ((1, "SIGKILL"), (2, "ENOSPC"), (2, "EIO")):
        assert "ended differently" in driver.attempt("careless", number, way)
    assert not driver.attempt("careless", 2, "short")
    assert "not met" in driver.attempt("careless", 3, "EIO")
    driver.calls["careless"][1] = "fsync /text"
    assert "not met" in driver.attempt("careless", 2, "short")
