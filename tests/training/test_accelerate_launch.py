"""Processes that `accelerate launch` starts, and what its configuration may not say."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ranks import train_in
from same_runs import UNEVEN, check_equal

from mixlora_exp.cli.train import execute
from mixlora_exp.config.paths import ROOT
from mixlora_exp.runs import state

START = "accelerate launch "


def launched(options: list[str], words: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    """`accelerate launch OPTIONS train.py WORDS`, with no configuration but a given one."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options]
    environment = {**os.environ, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--main_process_port=0", "train.py", *words], env=environment, cwd=ROOT,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_of_the_docs_trains_what_one_process_does(tmp_path: Path) -> None:
    lines = (ROOT / "docs" / "processes.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(START))
    before, _, after = line.removeprefix(START).partition(" train.py ")
    assert "trainer.parallel=ddp" in after
    done = launched(shlex.split(before), [*UNEVEN, f"output_dir={tmp_path / 'two'}"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert train_in(1, [*UNEVEN, f"output_dir={tmp_path / 'one'}"]) == [0]
    check_equal(tmp_path / "two", tmp_path / "one", 2)


CONFIGURATION = {
    "compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2,
    "machine_rank": 0, "use_cpu": False,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"distributed_type": "MULTI_GPU", "mixed_precision": "bf16"},
            "ACCELERATE_MIXED_PRECISION=bf16, which accelerate's configuration sets",
        ),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}},
            "processes under FSDP (ACCELERATE_USE_FSDP=true) are not supported",
        ),
    ],
)
def test_its_own_configuration_is_refused(
    settings: dict[str, object], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump({**CONFIGURATION, **settings}))
    out = tmp_path / "out"
    done = launched([f"--config_file={path}"], [*UNEVEN, f"output_dir={out}"], tmp_path)
    assert done.returncode == 1
    lines = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert len(lines) == 1, done.stderr[-3000:]
    assert lines.pop().startswith(f"error: {told}")
    assert not out.exists()


@pytest.mark.parametrize("dry_run", ["false", "true"])
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "would override trainer.precision: add --mixed_"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "would override trainer.compile: add --dynamo_"),
    ],
)
def test_what_would_change_the_computation_is_told_in_one_line(
    name: str, value: str, told: str, dry_run: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Of one process too."""
    monkeypatch.setattr(state, "load_model", lambda *a, **k: pytest.fail("too late"))
    monkeypatch.setenv(name, value)
    argv = ["experiment=smoke", f"dry_run={dry_run}", f"output_dir={tmp_path}"]
    assert execute(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {name}={value.lower()}, which accelerate's configuration sets")
    assert told in line
    assert not list(tmp_path.iterdir())


def test_what_it_leaves_alone_is_not_refused(tmp_path: Path, monkeypatch) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.setenv(name, "NO")
    assert execute(["experiment=smoke", "dry_run=true", f"output_dir={tmp_path}"]) == 0
