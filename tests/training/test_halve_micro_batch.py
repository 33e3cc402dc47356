"""A second try with smaller micro-batches has the memory of the first, and an objective of its
own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mixlora_exp.cli.train import execute
from mixlora_exp.records.record import read_record
from mixlora_exp.runs import run as experiment
from mixlora_exp.training.trainer import MixLoraTrainer

WORDS = [
    "experiment=smoke", "method=mixdora", "data.train_limit=16", "trainer.precision=float32",
    "trainer.batch_size=8", "trainer.micro_batch_size=4", "trainer.max_steps=4",
    "trainer.save_steps=1", "evaluation.batch_check=0",
]  # fmt: skip
REAL = MixLoraTrainer.training_step
AUTO = "trainer.auto_micro_batch=true"


@pytest.fixture(autouse=True)
def no_chance() -> Iterator[None]:
    """Cycles are collected where the program asks for it, not when it happens to be time."""
    torch.set_num_threads(1)
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, int]]]:
    """From now on, (step, rows) of each micro-batch; one of more than `fits` rows after `good`
    steps does not fit the memory."""

    def watch(fits: int, good: int, see: Callable[[MixLoraTrainer], None]) -> list:
        seen = []

        def training_step(self, model, inputs, *args, **kwargs):
            rows = len(next(iter(inputs.values()))["input_ids"])
            seen.append((self.state.global_step, rows))
            see(self)
            if rows > fits and self.state.global_step >= good:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return REAL(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(MixLoraTrainer, "training_step", training_step)
        return seen

    return watch


def record_of(folder: Path) -> dict:
    (path,) = folder.glob("*/record.json")
    return read_record(path)


def test_nothing_of_the_first_try_is_left_in_memory(
    tmp_path: Path, steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[weakref.ref] = []
    alive: list[int] = []

    def see(trainer: MixLoraTrainer) -> None:
        if trainer.state.global_step == 2 and not left:
            optimizer = trainer.optimizer.optimizer
            moments = [t for state in optimizer.state.values() for t in state.values()]
            assert moments
            found = (trainer, optimizer, *trainer.jobs["default"].parameters.values(), *moments)
            left.extend(map(weakref.ref, found))

    def attach_adapter(*arguments):
        alive.append(sum(reference() is not None for reference in left))
        return attach(*arguments)

    attach = experiment.attach_adapter
    monkeypatch.setattr(experiment, "attach_adapter", attach_adapter)
    steps(fits=2, good=2, see=see)
    assert execute([*WORDS, AUTO, f"output_dir={tmp_path}"]) == 0
    assert len(left) > 50
    assert alive == [0, 0]


def test_a_run_has_one_size(tmp_path: Path, steps, capsys: pytest.CaptureFixture[str]) -> None:
    """What was trained with the larger one is trained again, as the router loss would differ."""
    assert execute([*WORDS, "trainer.micro_batch_size=2", f"output_dir={tmp_path / 'two'}"]) == 0
    seen = steps(fits=2, good=2, see=lambda _: None)
    assert execute([*WORDS, AUTO, f"output_dir={tmp_path / 'auto'}"]) == 0
    assert "restarting with micro-batches of 2" in capsys.readouterr().out.replace("\n", " ")
    assert [rows for step, rows in seen if rows == 2] == [2] * 16
    halved, two = record_of(tmp_path / "auto"), record_of(tmp_path / "two")
    assert halved["train"]["micro_batch_size"] == two["train"]["micro_batch_size"] == 2
    assert halved["train"]["curve"] == two["train"]["curve"]
    assert halved["scores"] == two["scores"]


def test_the_size_is_recorded_in_any_case(tmp_path: Path) -> None:
    words = [*WORDS, "trainer.max_steps=1", f"output_dir={tmp_path}"]
    assert execute([*words, "adapters=[lora,{method:mixlora,trainer.micro_batch_size:2}]"]) == 0
    found = [read_record(path) for path in tmp_path.glob("*/record.json")]
    sizes = {r["config"]["method"]["name"]: r["train"]["micro_batch_size"] for r in found}
    assert sizes == {"lora": 4, "mixlora": 2}


def test_half_of_an_odd_size_divides_the_batch(tmp_path: Path, steps) -> None:
    seen = steps(fits=4, good=0, see=lambda _: None)
    words = [*WORDS, "trainer.batch_size=14", "trainer.micro_batch_size=7", "trainer.max_steps=1"]
    assert execute([*words, AUTO, f"output_dir={tmp_path}"]) == 0
    assert {rows for _, rows in seen[1:]} == {2}
    assert record_of(tmp_path)["train"]["halved_micro_batch"] == 2


@pytest.mark.slow
def test_a_checkpoint_of_another_size_is_not_gone_on_with(tmp_path: Path, steps, capsys) -> None:
    """Neither by one that does not halve, nor by adapters together."""

    def stop(trainer: MixLoraTrainer) -> None:
        (job, *_) = trainer.jobs.values()
        size = job.config.trainer.micro_batch_size
        if size == 2 and trainer.state.global_step == 2:
            raise KeyboardInterrupt

    for number, start in enumerate((["method=mixdora"], ["adapters=[mixdora,lora]"])):
        folder = f"output_dir={tmp_path / str(number)}"
        seen = steps(fits=2, good=0, see=stop)
        assert execute([*WORDS, AUTO, folder]) != 0
        assert seen[-1] == (2, 2)
        steps(fits=4, good=0, see=lambda _: None)
        capsys.readouterr()
        assert execute([*WORDS, *start, folder]) == 0
        assert "trainer.micro_batch_size=2, this run has 4" in capsys.readouterr().err
        paths = (tmp_path / str(number)).glob("*mixdora*/record.json")
        record = read_record(next(paths))
        assert (record["train"]["micro_batch_size"], record["train"]["steps"]) == (4, 4)


def test_a_finished_halved_run_is_not_taken_for_one_that_was_not(
    tmp_path: Path, steps, capsys
) -> None:
    steps(fits=2, good=0, see=lambda _: None)
    words = [*WORDS, "trainer.max_steps=1", f"output_dir={tmp_path}"]
    assert execute([*words, AUTO]) == 0
    assert execute([*words, AUTO]) == 0
    assert execute(words) == 2
    assert "micro-batches halved to 2" in capsys.readouterr().err
