"""The command line: runs, sweeps, exit codes, and what Hydra shows."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixlora_exp.cli.train import execute
from mixlora_exp.config.schema import Config
from mixlora_exp.errors import UserError

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "train.py")
HEADER = "# @package _global_\n"
Refused = Callable[[list[str]], str]


def fail_with(error: BaseException, when: int = 1) -> None:
    """Let the stand-in raise `error` for the run with seed `when`."""

    def run(config: Config, **_: Any) -> None:
        calls.append(config.seed)
        if config.seed == when:
            raise error

    calls: list[int] = []
    sys.modules["mixlora_exp.runs.run"].run = run
    sys.modules["mixlora_exp.runs.run"].calls = calls


def test_single_run(ran: list[Config]) -> None:
    assert execute(["experiment=smoke", "method=mixdora", "seed=7"]) == 0
    assert [(c.model.name, c.method.name, c.seed) for c in ran] == [("tiny", "mixdora", 7)]
    assert type(ran[0]) is Config
    assert not list(Path.cwd().iterdir()), "Hydra writes nothing of its own"


def test_sweep(ran: list[Config]) -> None:
    assert execute(["seed=range(1,3)", "-m", "model=glob(tiny*)", "task=arc_e"]) == 0
    seen = [(c.seed, c.model.name, c.task.name) for c in ran]
    assert seen == [(s, m, "arc_e") for s in (1, 2) for m in ("tiny", "tiny_gemma")]
    assert [p.as_posix() for p in Path().rglob("*") if p.is_file()] == [
        "outputs/.hydra/multirun.yaml"
    ]


SWEEP_FILE = HEADER + (
    "defaults: [override /model: tiny]\n"
    "hydra: {mode: MULTIRUN, sweeper: {params: {method.rank: '2,4', seed: '1,2'}}}\n"
)


def test_sweep_in_an_experiment_file(
    ran: list[Config], tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "more" / "experiment"
    folder.mkdir(parents=True)
    (folder / "ranks.yaml").write_text(SWEEP_FILE, encoding="utf-8")
    flags = [f"--config-dir={folder.parent}", "experiment=ranks"]
    assert execute([*flags, "seed=5"]) == 0
    assert [(c.method.rank, c.seed, c.model.name) for c in ran] == [(2, 5, "tiny"), (4, 5, "tiny")]
    capsys.readouterr()
    text = SWEEP_FILE.replace("'2,4'", "'2,0'")
    (folder / "ranks.yaml").write_text(text, encoding="utf-8")
    message = refused([*flags, "seed=5"])
    assert "method.rank=0" in message
    assert "cell 2 of 2" in message
    assert len(ran) == 2


def test_user_error_of_a_run(ran: list[Config], refused: Refused) -> None:
    fail_with(UserError("data.path=x: there is no such folder"))
    assert "data.path=x" in refused(["seed=1"])


def test_user_error_in_a_sweep(ran: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(UserError("data.path=x: there is no such folder"), when=2)
    assert execute(["-m", "seed=1,2,3"]) == 2
    assert sys.modules["mixlora_exp.runs.run"].calls == [1, 2, 3]
    message = capsys.readouterr().err
    assert "1 of 3 runs failed:\n  seed=2: data.path=x" in message
    assert "Traceback" not in message


def test_crash_keeps_its_traceback(ran: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        execute(["seed=1"])
    assert execute(["-m", "seed=1,2"]) == 1
    assert sys.modules["mixlora_exp.runs.run"].calls == [1, 1, 2]
    message = capsys.readouterr().err
    assert "Traceback" in message
    assert "1 of 2 runs failed:\n  seed=1: RuntimeError: broken" in message


@pytest.mark.parametrize("flags", [[], ["-m"]])
def test_interrupt(flags: list[str], ran: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(KeyboardInterrupt())
    assert execute([*flags, "seed=1"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--help"], ["method: ", "mixdora, mixlora", "experiment=smoke", "learning_rate: 0.0002"]),
        (["--help", "method=lora"], ["rank: 80"]),
        (["--cfg", "job", "seed=7"], ["seed: 7", "name: mixlora"]),
        (["seed=7", "--cfg", "job"], ["seed: 7"]),
        (["--cfg", "job", "-p", "method"], ["rank: 16"]),
        (["--hydra-help"], ["Hydra"]),
        (["--version"], ["mixlora-exp 0."]),
    ],
    ids=lambda value: " ".join(value),
)
def test_hydra_shows(
    argv: list[str], words: list[str], ran: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    before = list(sys.argv)
    assert execute(argv) == 0
    out = capsys.readouterr().out
    for word in words:
        assert word in out
    assert not ran
    assert sys.argv == before


def python(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, *argv]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_script_refuses_quickly(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python(TRAIN, "trainer.max_step=3", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    assert done.returncode == 2
    assert done.stderr.startswith("error: trainer.max_step is not a setting")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_script_shows_information(tmp_path: Path) -> None:
    done = python(TRAIN, "--info", "defaults", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "method/mixlora" in done.stdout


def test_configuration_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from mixlora_exp.cli.train import execute\n"
        "assert execute(['model=nope']) == 2\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
