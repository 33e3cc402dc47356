"""The scripts for clusters: what they ask SLURM for, and the commands that they start."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.config.command import compose
from mixlora_exp.runs.parallel import refusal

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "scripts" / "cluster"
SHELL = sorted(FOLDER.glob("*.sh"))
WORDS = ["method=mixlora", "model=llama2_7b", "task=multi"]
OPTIONS = {
    "job-name", "nodes", "ntasks", "gpus-per-node", "cpus-per-task", "mem", "time", "signal",
    "requeue", "open-mode", "output",
}  # fmt: skip


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `python` that notes its arguments and ends with the code in a file, also on SIGTERM, and a
    `scontrol`."""
    python = f"""#!/bin/bash
echo "$@" >> {tmp_path}/started
trap 'echo term >> {tmp_path}/signals; exit $(cat {tmp_path}/code)' TERM
if [ -e {tmp_path}/wait ]; then for _ in $(seq 100); do sleep 0.1; done; fi
exit $(cat {tmp_path}/code)
"""
    (tmp_path / "python").write_text(python)
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/scontrol.log\n')
    (tmp_path / "code").write_text("0")
    for name in ("python", "scontrol"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", str(tmp_path / "python"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(ROOT))
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    return tmp_path


def script(name: str, *words: str) -> subprocess.Popen:
    return subprocess.Popen(["bash", str(FOLDER / name), *words])


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_they_parse_and_ask_slurm_for_known_things(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    asked = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", path.read_text(), re.MULTILINE)
    assert {name for name, _ in asked} == OPTIONS
    assert len(asked) == len(re.findall("^#SBATCH", path.read_text(), re.MULTILINE))
    assert dict(asked)["signal"] == "B:TERM@300"
    # SLURM reads options up to the first command only.
    lines = path.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_the_command_in_their_head_composes(path: Path) -> None:
    usage = re.search(r"^#   sbatch .*$", path.read_text(), re.MULTILINE)[0]
    _, _, words = usage.partition(f"{path.name} ")
    if words.endswith(".txt"):
        assert (ROOT / words).is_file()
    else:
        config = compose(words.split())
        assert config.method.name == "mixlora"
        assert refusal(config, 4 if path.name == "slurm_node.sh" else 1) is None


def test_each_line_of_the_list_composes(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(FOLDER / "ray_runs.py"))["main"]
    assert main([str(FOLDER / "runs.txt"), "--dry-run"]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [compose(command[2:]).method.name for command in commands] == [
        *PAPER_METHODS,
    ]  # fmt: skip
    assert {tuple(command[:2]) for command in commands} == {(sys.executable, "train.py")}


def test_ray_starts_a_run_again_that_asks_for_it(cluster: Path) -> None:
    execute = runpy.run_path(str(FOLDER / "ray_runs.py"))["execute"]
    (cluster / "code").write_text("75")
    assert execute([str(cluster / "python"), "train.py"]) == 75
    assert len((cluster / "started").read_text().splitlines()) == 20
    (cluster / "code").write_text("2")
    assert execute([str(cluster / "python"), "train.py"]) == 2
    assert len((cluster / "started").read_text().splitlines()) == 21


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_a_run_is_requeued_if_it_asks_for_it(cluster: Path, code: int, requeued: bool) -> None:
    (cluster / "code").write_text(str(code))
    assert script("slurm_run.sh", *WORDS).wait() == code
    assert (cluster / "started").read_text().split() == ["train.py", *WORDS]
    assert (cluster / "scontrol.log").is_file() is requeued
    if requeued:
        assert (cluster / "scontrol.log").read_text() == "requeue 7\n"


def test_a_job_of_an_array_takes_its_line(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = cluster / "runs.txt"
    file.write_text("method=lora seed=1\nmethod=dora data.forms=[label,text] seed=$(id)\n")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert script("slurm_array.sh", str(file)).wait() == 0
    started = (cluster / "started").read_text().strip()
    assert started == "train.py method=dora data.forms=[label,text] seed=$(id)"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert script("slurm_array.sh", str(file)).wait() == 2


def test_a_node_starts_a_process_for_each_gpu(cluster: Path) -> None:
    assert script("slurm_node.sh", *WORDS).wait() == 0
    started = (cluster / "started").read_text().split()
    expected = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "train.py"]
    assert started == [*expected, *WORDS]


@pytest.mark.parametrize("code", [1, 2])
def test_a_node_that_fails_by_itself_is_not_requeued(cluster: Path, code: int) -> None:
    (cluster / "code").write_text(str(code))
    assert script("slurm_node.sh", *WORDS).wait() == code
    assert not (cluster / "scontrol.log").exists()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("slurm_run.sh", 75),
        # torchrun ends with 1 where its processes end with 75.
        ("slurm_node.sh", 1),
    ],
)
def test_slurm_s_signal_reaches_the_run_and_the_job_is_requeued(
    cluster: Path, name: str, code: int
) -> None:
    (cluster / "wait").touch()
    (cluster / "code").write_text(str(code))
    job = script(name, *WORDS)
    until = time.monotonic() + 60
    while not (cluster / "started").is_file() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)  # Until both have set their traps.
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == code
    assert (cluster / "signals").read_text() == "term\n"
    assert (cluster / "scontrol.log").read_text() == "requeue 7\n"
