"""Training in several processes: what is told of all of them, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from ranks import examples_of, train_in
from same_runs import UNEVEN, check_equal

from mixlora_exp.adapters.router_report import RouterReport
from mixlora_exp.cli.train import execute
from mixlora_exp.runs import parallel, state
from mixlora_exp.runs import run as experiment
from mixlora_exp.system import device as runtime
from mixlora_exp.system.device import SHARDED
from mixlora_exp.training.run_statistics import Track

SMALL = [
    "experiment=smoke", "method=mixlora", "data.train_limit=24", "trainer.precision=float32",
    "trainer.batch_size=8", "trainer.micro_batch_size=2", "trainer.max_steps=6",
    "trainer.logging_steps=1", "trainer.save_steps=100", "evaluation.batch_check=0",
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
def test_a_model_in_pieces_is_refused_before_anything_is_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A run of one adapter and, under every second variable, one of several."""
    adapters = ["adapters=[lora,mixlora]"] if list(SHARDED).index(name) % 2 else []
    monkeypatch.setenv(name, "true")
    for module, what in (
        (state, "load_model"),
        (state, "load_tokenizer"),
        (experiment, "gather_inputs"),
    ):
        monkeypatch.setattr(module, what, lambda *a, **k: pytest.fail("too late"))
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


def two_processes(monkeypatch: pytest.MonkeyPatch, count: int, first: bool = True) -> None:
    """Have this process believe that it is one of several."""
    state = SimpleNamespace(
        num_processes=count, is_main_process=first, wait_for_everyone=lambda: None
    )
    monkeypatch.setattr(parallel, "processes", lambda: state)


@pytest.mark.parametrize("dry_run", ["false", "true"])
@pytest.mark.parametrize(
    ("count", "words", "reason"),
    [
        (2, [], "trainer.parallel=none trains in one process, but 2 were started: add trainer."),
        (
            3,
            ["trainer.parallel=ddp"],
            "trainer.batch_size=8 cannot be shared by 3 processes in micro-batches of "
            "trainer.micro_batch_size=2: start a number of processes that divides 4",
        ),
        (
            2,
            ["trainer.parallel=ddp", "trainer.auto_micro_batch=true"],
            "trainer.auto_micro_batch=true supports one process",
        ),
        (
            2,
            ["trainer.parallel=fsdp", "method=lora_ga"],
            "trainer.parallel=fsdp was not tried with method=lora_ga",
        ),
        (
            2,
            ["trainer.parallel=fsdp", "trainer.compile=layer"],
            "trainer.parallel=fsdp was not tried with trainer.compile=layer",
        ),
        (
            2,
            ["trainer.parallel=fsdp", "model.quantization=nf4"],
            "trainer.parallel=fsdp cannot divide the weights of model.quantization=nf4",
        ),
        (
            2,
            ["trainer.parallel=ddp", "model.quantization=int8_torchao"],
            "model.quantization=int8_torchao: processes cannot exchange such weights",
        ),
    ],
)
def test_what_processes_cannot_share_is_refused_in_one_line(
    count: int, words: list[str], reason: str, dry_run: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    for what in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(state, what, lambda *a, **k: pytest.fail("too late"))
    argv = [*SMALL, *words, f"dry_run={dry_run}", f"output_dir={tmp_path}"]
    two_processes(monkeypatch, count)
    assert execute(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {reason}")
    two_processes(monkeypatch, count, first=False)
    assert execute(argv) == 2
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.iterdir())


def test_one_process_begins_and_two_finish_what_one_does(tmp_path: Path) -> None:
    """Dropout on; the adapter, the figures of the log and all scores are those of one process, and
    the examples of each step and their order are the same. tests/faults/test_elastic.py has more
    processes."""
    alone, notes = tmp_path / "its examples", tmp_path / "examples"
    assert train_in(1, [*UNEVEN, f"output_dir={tmp_path / 'alone'}"], notes=alone) == [0]
    argv = [*UNEVEN, f"output_dir={tmp_path / 'mixed'}"]
    assert train_in(1, argv, stop=1, log=tmp_path / "first", notes=notes) == [75]
    assert "saved after step 2 of 6; the same command" in (tmp_path / "first.0").read_text()
    assert train_in(2, argv, log=tmp_path / "second", notes=notes) == [0, 0]
    assert "resuming after step 2 of 6" in (tmp_path / "second.0").read_text()
    assert "step" not in (tmp_path / "second.1").read_text()
    check_equal(tmp_path / "mixed", tmp_path / "alone", 2)
    assert examples_of(notes) == examples_of(alone)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_two_processes_share_the_work_on_a_quantised_base(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    words = [*UNEVEN, f"model.quantization={kind}"]
    for count, name in ((1, "alone"), (2, "shared")):
        assert train_in(count, [*words, f"output_dir={tmp_path / name}"]) == [0] * count
    check_equal(tmp_path / "shared", tmp_path / "alone", 2)
