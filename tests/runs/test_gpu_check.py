"""`make gpu-check`, here with a tiny model on whatever device there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixlora_exp.cli.main import main
from mixlora_exp.records.record import read_record

ROOT = Path(__file__).resolve().parents[2]


def gpu_check(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_goes_on_and_all_methods_train(tmp_path: Path) -> None:
    path = tmp_path / "new" / "check.json"
    done = gpu_check("model=tiny", "trainer.precision=float32", f"--record={path}", "--seconds=900")
    assert done.returncode == 0, done.stderr
    assert "resuming after step 10 of 20" in done.stderr
    record = read_record(path)
    assert record["steps_after_the_kill"] == list(range(11, 21))
    assert record["scored_items"] == 16
    assert all(record["passed"].values())
    methods = {each["method"]: each["steps"] for each in record["trainings"]}
    assert methods == {"mixlora": 20, "lora": 5, "dora": 5, "mixdora": 5}
    for each in record["trainings"]:
        assert each["tokens_per_second"] > 0
        assert each["peak_memory_bytes"] > each["planned_memory_bytes"] > 0
        assert f"{each['method']:<8}" in done.stdout
    assert record["seconds"]["total"] < 900
    assert record["provenance"]["packages"]["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cpu_is_refused(tmp_path: Path, capsys) -> None:
    assert main(["gpu-check", f"--record={tmp_path / 'check.json'}"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("error: model=llama2_7b needs a CUDA GPU")
    assert not list(tmp_path.iterdir())
