"""`train.py` as a user starts it: exit codes, records, and one line for a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixlora_exp.cli.train import execute
from mixlora_exp.records.record import read_record

ROOT = Path(__file__).parents[2]
SMOKE = ["experiment=smoke", "data.train_limit=8"]


def train(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *argv]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def records(folder: Path) -> list[Path]:
    return sorted(folder.rglob("record.json"))


def test_a_smoke_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process; `test_launchers.py` starts a whole run as a user does."""
    monkeypatch.chdir(tmp_path)
    assert execute(SMOKE) == 0
    told = capsys.readouterr()
    (path,) = records(tmp_path / "outputs")
    record = read_record(path)
    assert record["config"]["method"]["name"] == "mixlora"
    assert f"Record: outputs/{record['name']}/record.json" in told.out
    assert "generated tasks, not the benchmarks" in told.out
    assert "Traceback" not in told.err
    written = {file.relative_to(path.parent).as_posix() for file in path.parent.rglob("*")}
    assert {
        "record.json",
        "train_log.jsonl",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "predictions/arc_e.label_logits.jsonl",
    } <= written
    assert [entry.name for entry in tmp_path.iterdir()] == ["outputs"]


def test_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert execute(["-m", *SMOKE, "method=lora,mixlora"]) == 0
    found = [read_record(path)["config"]["method"]["name"] for path in records(tmp_path)]
    assert sorted(found) == ["lora", "mixlora"]
    assert "== run 2" in capsys.readouterr().err
    # One run after another in a process gives what each gives alone.
    (alone,) = [path for path in records(tmp_path) if "-mixlora-" in str(path)]
    before = read_record(alone)
    assert execute([*SMOKE, "method=mixlora", "force=true"]) == 0
    again = read_record(alone)
    assert again["scores"] == before["scores"]
    assert [e["loss"] for e in again["train"]["curve"]] == [
        e["loss"] for e in before["train"]["curve"]
    ]


def test_a_value_out_of_range_is_one_line(tmp_path: Path) -> None:
    done = train(*SMOKE, "method.rank=0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: method.rank=0 is not valid")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [[], ["-m"]])
def test_missing_data_is_one_line(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert execute([*flags, *SMOKE, "data=local", "data.path=nowhere"]) == 2
    message = capsys.readouterr().err
    assert "error: data.path=nowhere does not exist" in message
    assert "Traceback" not in message
    assert not records(tmp_path)
    if not flags:
        assert message.count("\n") == 1
