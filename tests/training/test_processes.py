"""Training in several processes: what is told of all of them, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType

from mixlora_exp.adapters.router_report import RouterReport
from mixlora_exp.cli.train import execute
from mixlora_exp.records.record import read_record
from mixlora_exp.runs import run as experiment
from mixlora_exp.system import device as runtime
from mixlora_exp.system.device import SHARDED
from mixlora_exp.training.run_statistics import Track

SMALL = [
    "experiment=smoke", "method=mixlora", "data.train_limit=24", "trainer.precision=float32",
    "trainer.batch_size=8", "trainer.micro_batch_size=2", "trainer.max_steps=6",
    "trainer.logging_steps=2", "trainer.save_steps=100", "evaluation.batch_check=0",
]  # fmt: skip


def report(loss: float, *counts: float) -> RouterReport:
    return RouterReport(torch.tensor(loss), torch.tensor([counts]))


# Of each process: its passes before the interruption and after it. A step has one of each.
PASSES = [
    [(report(1.0, 1, 3), 0.25), (report(2.0, 5, 3), 0.5), (report(4.0, 2, 2), 0.5)],
    [(report(3.0, 2, 8), 0.75), (report(6.0, 0, 6), 0.5), (report(8.0, 9, 1), 0.5)],
]


def note(track: Track, process: int, step: int) -> None:
    found, share = PASSES[process][step]
    track.note_pass(found, 4, share)
    track.watch.add(0.0, 1.0)


def interrupted(process: int, folder: str) -> None:
    """One process of two: an entry, a step more, a restart, a last step, an entry."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=process, world_size=2
    )

    def summed(values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    track = Track(2, summed)
    note(track, process, 0)
    note(track, process, 1)
    first = track.entry(2)
    note(track, process, 2)
    state = json.dumps(track.state())
    # All of them read what the first one wrote.
    states: list[Any] = [None, None]
    torch.distributed.all_gather_object(states, state)
    again = Track(2, summed)
    again.load(json.loads(states[0]), 0.0, first=process == 0)
    once_more = json.loads(json.dumps(again.state()))
    note(again, process, 0)
    found = {"entries": [first, again.entry(4)], "load": again.expert_load()}
    found["kept"] = [once_more[name] == json.loads(states[0])[name] for name in once_more]
    Path(folder, f"{process}.json").write_text(json.dumps(found))


def test_figures_of_two_processes_are_of_both_before_and_after_a_restart(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=interrupted, args=(i, str(tmp_path))) for i in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    one, other = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert one == other
    # By hand: the tokens of both processes, and each step's losses weighed by their shares.
    (first, load), (second, _) = one["entries"]
    assert load == [[0.2857, 0.7143]]
    assert first["router_loss"] == pytest.approx(((0.25 + 2.25) + (1.0 + 3.0)) / 2)
    assert second["router_loss"] == pytest.approx(((2.0 + 4.0) + (0.25 + 2.25)) / 2)
    assert one["load"][0] == pytest.approx([22 / 56, 34 / 56])
    assert all(one["kept"])


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("adapters", [[], ["adapters=[lora,mixlora]"]], ids=["one", "several"])
def test_a_model_in_pieces_is_refused_before_anything_is_loaded(
    name: str, adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv(name, "true")
    for what in ("load_model", "load_tokenizer", "gather_inputs"):
        monkeypatch.setattr(experiment, what, lambda *a, **k: pytest.fail("too late"))
    assert execute([*SMALL, *adapters, f"output_dir={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert f"{SHARDED[name]} ({name}=true)" in line
    assert "torchrun" in line
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(name, "false")
    runtime.processes()


@pytest.mark.parametrize("kind", [k for k in DistributedType if k not in runtime.PLAIN])
def test_so_is_whatever_else_is_not_plain(
    kind: DistributedType, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SimpleNamespace(distributed_type=kind, num_processes=2)
    monkeypatch.setattr(runtime, "PartialState", lambda **_: state)
    with pytest.raises(runtime.UserError, match=kind.value):
        runtime.processes()


def test_halving_is_for_one_process(tmp_path: Path, monkeypatch, capsys) -> None:
    from mixlora_exp.runs import inputs

    monkeypatch.setattr(inputs, "processes", lambda: SimpleNamespace(num_processes=2))
    argv = [*SMALL, "trainer.auto_micro_batch=true", f"output_dir={tmp_path}"]
    assert execute(argv) == 2
    assert "trainer.auto_micro_batch=true supports one process" in capsys.readouterr().err


# What torchrun starts: `stop=N` has the second process alone be asked to end in step N.
WORKER = """
import os, signal, sys
from mixlora_exp.cli.train import execute
from mixlora_exp.training.trainer import MixLoraTrainer
real, stop = MixLoraTrainer.training_step, int(sys.argv[1])
def training_step(self, *args, **kwargs):
    if self.args.process_index == 1 and self.state.global_step == stop:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(self, *args, **kwargs)
MixLoraTrainer.training_step = training_step
sys.exit(execute(sys.argv[2:]))
"""


def launch(folder: Path, output: str, stop: int) -> subprocess.CompletedProcess[str]:
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
               "--master-port=0", "--standalone", str(worker), str(stop), *SMALL,
               f"output_dir={folder / output}"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=500
    )


@pytest.mark.slow
def test_torchrun_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    """One of two is asked to end: both stop after the same step, and nothing counts twice."""
    whole = launch(tmp_path, "whole", -1)
    assert whole.returncode == 0, whole.stderr[-2000:]
    stopped = launch(tmp_path, "run", 2)
    assert stopped.returncode != 0
    assert [p.name for p in (tmp_path / "run").glob("*/checkpoints/*")] == ["step-00000003"]
    again = launch(tmp_path, "run", -1)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "resuming after step 3 of 6" in again.stderr
    records = []
    for name in ("whole", "run"):
        (path,) = (tmp_path / name).glob("*/record.json")
        records.append(read_record(path)["train"])
    one, other = records
    for a, b in zip(other["expert_load"], one["expert_load"], strict=True):
        assert a == pytest.approx(b)
    for a, b in zip(other["curve"], one["curve"], strict=True):
        assert a["router_loss"] == pytest.approx(b["router_loss"], rel=1e-6)
        assert a["expert_load_std"] == pytest.approx(b["expert_load_std"], rel=1e-6)
