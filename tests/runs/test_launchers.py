"""Sweeps by Hydra's launchers: several processes, and jobs as a cluster would run them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixlora_exp.cli import execute
from mixlora_exp.results.record import read_record

ROOT = Path(__file__).parents[2]
SMALL = ["experiment=smoke", "data.train_limit=8", "evaluation.batch_check=0"]


def sweep(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), "-m", *SMALL, f"output_dir={folder}", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def methods(folder: Path) -> list[str]:
    paths = folder.glob("*/record.json")
    return sorted(read_record(path)["config"]["method"]["name"] for path in paths)


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(f"hydra_plugins.{package}") is None
    return pytest.mark.skipif(missing, reason=f"the plug-in {package} is not installed")


@needs("hydra_joblib_launcher")
@pytest.mark.parametrize(
    "packed",
    [
        pytest.param([], marks=pytest.mark.slow, id="alone"),
        pytest.param(["trainer.pack_adapters=2"], id="packed"),
    ],
)
def test_two_processes(tmp_path: Path, packed: list[str]) -> None:
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = sweep(tmp_path, *launcher, "method=lora,mixlora", "method.rank=2,4", *packed)
    assert done.returncode == 0, done.stderr
    assert methods(tmp_path) == ["lora", "lora", "mixlora", "mixlora"]


@pytest.mark.slow
@needs("hydra_joblib_launcher")
def test_one_that_fails_in_another_process(tmp_path: Path) -> None:
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = sweep(tmp_path, *launcher, "trainer.learning_rate=1e30,1e-3", "trainer.max_steps=4")
    assert done.returncode == 2
    assert "1 runs failed" in done.stderr.replace("of 2 ", "")
    assert methods(tmp_path) == ["mixlora"]


@needs("hydra_submitit_launcher")
def test_jobs_of_submitit(tmp_path: Path) -> None:
    """Its local executor: a process for each cell, as on a cluster."""
    done = sweep(tmp_path, "hydra/launcher=submitit_local", "method=lora,mixdora")
    assert done.returncode == 0, done.stderr
    assert methods(tmp_path) == ["lora", "mixdora"]


@pytest.mark.slow
@needs("hydra_ray_launcher")
def test_a_local_cluster_of_ray(tmp_path: Path) -> None:
    launcher = ["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"]
    done = sweep(tmp_path, *launcher, "method=lora,mixdora")
    assert done.returncode == 0, done.stderr
    assert methods(tmp_path) == ["lora", "mixdora"]


@needs("hydra_submitit_launcher")
def test_the_settings_for_slurm_compose(capsys) -> None:
    assert execute(["hydra/launcher=slurm", "experiment=smoke", "--cfg", "hydra"]) == 0
    told = capsys.readouterr().out
    assert "SlurmLauncher" in told
    assert "max_num_timeout: 20" in told


def test_a_missing_plug_in_is_told(capsys) -> None:
    if importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is not None:
        pytest.skip("the plug-in is installed")
    assert execute(["-m", *SMALL, "hydra/launcher=ray", "method=lora,dora"]) == 2
    assert "pip install hydra-ray-launcher" in capsys.readouterr().err
