"""Sweeps by Hydra's launchers: several processes, and jobs as a cluster would run them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mixlora_exp.cli.train import execute
from mixlora_exp.records.record import read_record
from mixlora_exp.system.runlock import holder_of

ROOT = Path(__file__).parents[2]
SMALL = ["experiment=smoke", "data.train_limit=8", "evaluation.batch_check=0"]


def sweep(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """With another `mixlora_exp` installed, which no process may import."""
    command = [sys.executable, str(ROOT / "train.py"), "-m", *SMALL, f"output_dir={folder}", *argv]
    other = folder / "site-packages"
    other.mkdir()
    (other / "mixlora_exp.py").write_text("raise RuntimeError('the code of another checkout')\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(other)}
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
        pytest.param(["trainer.pack_adapters=2"], marks=pytest.mark.slow, id="packed"),
    ],
)
def test_two_processes(tmp_path: Path, packed: list[str]) -> None:
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = sweep(tmp_path, *launcher, "method=lora,mixlora", "method.rank=2,4", *packed)
    assert done.returncode == 0, done.stderr
    assert methods(tmp_path) == ["lora", "lora", "mixlora", "mixlora"]
    if not packed:
        # Each line says whose it is.
        steps = [line for line in done.stderr.splitlines() if " step " in line]
        assert {line.strip().partition(":")[0] for line in steps} == {
            f"run {n}" for n in range(1, 5)
        }


@pytest.mark.slow
@needs("hydra_joblib_launcher")
def test_one_that_fails_in_another_process(tmp_path: Path) -> None:
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = sweep(tmp_path, *launcher, "trainer.learning_rate=1e30,1e-3", "trainer.max_steps=4")
    assert done.returncode == 2
    assert "1 runs failed" in done.stderr.replace("of 2 ", "")
    assert methods(tmp_path) == ["mixlora"]


@pytest.mark.slow
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


class Sweep:
    """A sweep under way, whose processes can be sent signals: `LONG` runs that save at no step."""

    LONG = ("trainer.max_steps=60", "trainer.logging_steps=1", "trainer.save_steps=1000",
            "trainer.precision=float32")  # fmt: skip

    def __init__(self, folder: Path, *argv: str) -> None:
        self.folder, self.log = folder, folder / "log"
        command = [sys.executable, str(ROOT / "train.py"), "-m", *SMALL, f"output_dir={folder}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *self.LONG, *argv],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

    def in_training(self) -> Path:
        """Waits for a run that has trained a few steps."""
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and self.process.poll() is None:
            for path in self.folder.glob("*/train_log.jsonl"):
                if len(path.read_text().splitlines()) >= 3:
                    return path.parent
            time.sleep(0.05)
        raise AssertionError(self.log.read_text()[-2000:])

    def signal_the_process_of(self, run: Path, number: int) -> None:
        holder = holder_of(run / "lock")
        assert holder is not None
        os.kill(holder["pid"], number)

    def end(self) -> tuple[int, str]:
        code = self.process.wait(300)
        told = self.log.read_text()
        assert "Traceback" not in told
        return code, told


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    with ExitStack() as stack:

        def begin(*argv: str) -> Sweep:
            found = Sweep(tmp_path, *argv)
            stack.callback(found.process.kill)
            return found

        yield begin


JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


@pytest.mark.slow
@needs("hydra_joblib_launcher")
def test_processes_of_joblib_save_on_sigterm(start: Callable[..., Sweep], tmp_path: Path) -> None:
    sweep = start(*JOBLIB, "method=lora", "seed=1,2")
    run = sweep.in_training()
    sweep.process.send_signal(signal.SIGTERM)
    code, told = sweep.end()
    assert code == 75
    assert "0 failed, 0 skipped, " in told
    assert list(run.glob("checkpoints/step-*"))
    again = start(*JOBLIB, "method=lora", "seed=1,2")
    assert again.end()[0] == 0
    assert len((run / "train_log.jsonl").read_text().splitlines()) == 60
    assert methods(tmp_path) == ["lora", "lora"]


@pytest.mark.slow
@needs("hydra_joblib_launcher")
def test_a_process_of_joblib_is_killed(start: Callable[..., Sweep], tmp_path: Path) -> None:
    sweep = start(*JOBLIB, "method=lora", "seed=1,2,3")
    sweep.signal_the_process_of(sweep.in_training(), signal.SIGKILL)
    code, told = sweep.end()
    assert code == 0, told[-2000:]
    assert "a process was killed" in told
    assert "== 3 runs: 3 run now, 0 finished before, 0 failed" in told
    assert methods(tmp_path) == ["lora"] * 3


@pytest.mark.slow
@needs("hydra_submitit_launcher")
def test_a_job_of_submitit_saves_and_is_queued_again(start: Callable[..., Sweep]) -> None:
    sweep = start("hydra/launcher=submitit_local", "method=lora")
    run = sweep.in_training()
    sweep.signal_the_process_of(run, signal.SIGTERM)
    code, told = sweep.end()
    assert code == 0, told[-2000:]
    (log,) = sweep.folder.glob(".hydra/.submitit/*/*_log.err")
    assert log.read_text().count("step 1/60") == 1, "it goes on from its checkpoint"
    assert len((run / "train_log.jsonl").read_text().splitlines()) == 60


@pytest.mark.slow
@needs("hydra_submitit_launcher")
def test_a_job_of_submitit_is_killed(start: Callable[..., Sweep], tmp_path: Path) -> None:
    sweep = start("hydra/launcher=submitit_local", "method=lora,dora")
    sweep.signal_the_process_of(sweep.in_training(), signal.SIGKILL)
    code, told = sweep.end()
    assert code == 2
    assert "== 2 runs: 1 run now, 0 finished before, 1 failed" in told
    assert "its job ended without a result" in told
    assert len(methods(tmp_path)) == 1


@pytest.mark.skipif(shutil.which("srun") is not None, reason="SLURM is here")
@needs("hydra_submitit_launcher")
def test_a_machine_without_slurm_is_reported(tmp_path: Path, capsys) -> None:
    argv = ["-m", *SMALL, f"output_dir={tmp_path}", "hydra/launcher=slurm", "method=lora,dora"]
    assert execute(argv) == 2
    assert "use hydra/launcher=submitit_local" in capsys.readouterr().err


@needs("hydra_submitit_launcher")
def test_the_settings_for_slurm_compose(capsys) -> None:
    assert execute(["hydra/launcher=slurm", "experiment=smoke", "--cfg", "hydra"]) == 0
    told = capsys.readouterr().out
    assert "SlurmLauncher" in told
    assert "max_num_timeout: 20" in told


def test_a_missing_plug_in_is_reported(capsys) -> None:
    if importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is not None:
        pytest.skip("the plug-in is installed")
    assert execute(["-m", *SMALL, "hydra/launcher=ray", "method=lora,dora"]) == 2
    assert "pip install hydra-ray-launcher" in capsys.readouterr().err
