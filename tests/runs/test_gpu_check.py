"""`make gpu-check`, here with a tiny model on whatever device there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixlora_exp.cli.main import main
from mixlora_exp.config.choices import Quantization
from mixlora_exp.models.quantization import is_installed
from mixlora_exp.records.record import read_record

ROOT = Path(__file__).resolve().parents[2]


def gpu_check(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_goes_on_and_all_methods_train(tmp_path: Path) -> None:
    """On an NF4 base too, where it can be made."""
    path = tmp_path / "new" / "check.json"
    done = gpu_check("model=tiny", "trainer.precision=float32", f"--record={path}", "--seconds=900")
    assert done.returncode == 0, done.stderr
    assert "resuming after step 10 of 20" in done.stderr
    record = read_record(path)
    assert record["steps_after_the_kill"] == list(range(11, 21))
    assert record["scored_items"] == 16
    assert all(record["passed"].values())
    methods = [("mixlora", "none", 20), ("lora", "none", 5), ("dora", "none", 5),
               ("mixdora", "none", 5)]  # fmt: skip
    if is_installed(Quantization.nf4):
        methods.append(("mixlora", "nf4", 5))
    told = ("method", "quantization", "steps")
    assert [tuple(each[name] for name in told) for each in record["trainings"]] == methods
    for each in record["trainings"]:
        assert each["tokens_per_second"] > 0
        assert each["peak_memory_bytes"] > each["planned_memory_bytes"] > 0
        assert f"{each['method']:<8}" in done.stdout
    assert record["seconds"]["total"] < 900
    assert record["provenance"]["packages"]["torch"] == torch.__version__


@pytest.mark.slow
@pytest.mark.skipif(not is_installed(Quantization.nf4), reason="needs bitsandbytes")
def test_all_of_it_on_an_nf4_base(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    words = ("model=tiny", "trainer.precision=float32", "model.quantization=nf4")
    done = gpu_check(*words, f"--record={path}", "--seconds=900")
    assert done.returncode == 0, done.stderr
    record = read_record(path)
    assert all(record["passed"].values())
    assert [each["quantization"] for each in record["trainings"]] == ["nf4"] * 4
    assert "mixdora, nf4 " in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cpu_is_refused(tmp_path: Path, capsys) -> None:
    assert main(["gpu-check", f"--record={tmp_path / 'check.json'}"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("error: model=llama2_7b needs a CUDA GPU")
    assert not list(tmp_path.iterdir())
