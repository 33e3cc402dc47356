"""Trackers: what they get, and that nothing they do stops a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from composed import compose
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixlora_exp.cli.train import execute
from mixlora_exp.config.resolve import fingerprint
from mixlora_exp.records.record import read_record
from mixlora_exp.training import MixLoraTrainer, tracking

SMALL = ["experiment=smoke", "data.train_limit=8", "trainer.logging_steps=1",
         "evaluation.batch_check=0"]  # fmt: skip


class Service:
    """Keeps what it gets; fails where it is told to."""

    fails = ""

    def __init__(self, *arguments: Any) -> None:
        self.entries: list[tuple[int, dict[str, float]]] = []
        self.rows: list[list[Any]] | None = None
        self._maybe("make")

    def _maybe(self, where: str) -> None:
        if where == self.fails:
            raise ConnectionError("no route to host")

    def begin(self, step: int) -> Service:
        self._maybe("begin")
        return self

    def on_train_begin(self, *arguments: Any, **kwargs: Any) -> None:
        self._maybe("on_train_begin")

    def on_train_end(self, *arguments: Any, **kwargs: Any) -> None:
        self._maybe("on_train_end")

    def on_log(self, args, state, control, logs, **kwargs: Any) -> None:
        self._maybe("on_log")
        self.entries.append((state.global_step, logs))

    def end(self, rows: list[list[Any]]) -> None:
        self._maybe("end")
        self.rows = rows


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> list[Service]:
    """What stands in for W&B, as it is made."""
    made: list[Service] = []

    def make(*arguments: Any) -> Service:
        made.append(Service.__new__(Service))
        made[-1].__init__(*arguments)
        return made[-1]

    monkeypatch.setattr(tracking, "_Wandb", make)
    return made


def test_figures_by_name() -> None:
    assert tracking.flat({"loss": 1, "expert_load": [[0.25, 0.75], [0.5, 0.5]], "text": "no"}) == {
        "loss": 1,
        "expert_load/layer0/expert0": 0.25,
        "expert_load/layer0/expert1": 0.75,
        "expert_load/layer1/expert0": 0.5,
        "expert_load/layer1/expert1": 0.5,
    }


@pytest.mark.parametrize("where", ["make", "begin", "on_train_begin", "on_log", "end"])
def test_nothing_it_does_stops_a_run(
    where: str, services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """One warning is told, however often it fails."""
    monkeypatch.setattr(Service, "fails", where)
    assert execute([*SMALL, "tracker=wandb", f"output_dir={tmp_path}"]) == 0
    told = capsys.readouterr().err
    assert told.count("warning: tracker=wandb failed: no route to host") == 1
    (path,) = tmp_path.glob("*/record.json")
    assert read_record(path)["status"] == "finished"


def test_each_of_several_adapters_has_a_run_of_its_own(services, tmp_path: Path) -> None:
    words = ["tracker=wandb", "adapters=[mixlora,{method:lora,trainer.max_steps:1}]"]
    assert execute([*SMALL, *words, f"output_dir={tmp_path}"]) == 0
    mixlora, lora = services
    assert [step for step, _ in mixlora.entries] == [1, 2]
    assert [step for step, _ in lora.entries] == [1]
    assert "expert_load/layer0/expert0" in mixlora.entries[0][1]
    assert "router_loss" not in lora.entries[0][1]
    assert all(len(service.rows) == 1 for service in services)


def test_a_run_that_goes_on_sends_the_steps_that_are_left(
    services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*SMALL, "trainer.save_steps=1", "trainer.max_steps=4", "tracker=wandb"]
    argv.append(f"output_dir={tmp_path}")
    real: Callable[..., Any] = MixLoraTrainer.training_step

    def interrupt(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MixLoraTrainer, "training_step", interrupt)
        assert execute(argv) != 0
    assert execute(argv) == 0
    first, second = services
    assert [step for step, _ in first.entries] == [1, 2]
    assert [step for step, _ in second.entries] == [3, 4]
    assert first.rows == [], "it has no record"
    assert len(second.rows) == 1


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


@pytest.mark.parametrize("adapters", [[], ["adapters=[mixlora,lora]"]], ids=["one", "two"])
def test_tensorboard_has_every_figure(tmp_path: Path, adapters: list[str]) -> None:
    argv = [*SMALL, "tracker=tensorboard", f"output_dir={tmp_path}", *adapters]
    assert execute(argv) == 0
    (folder,) = tmp_path.glob("*mixlora*/tensorboard")
    events = events_of(folder)
    names = set(events.Tags()["scalars"])
    wanted = {"loss", "router_loss", "grad_norm", "learning_rate", "expert_load/layer0/expert0",
              "tokens_per_second", "memory_gib"}  # fmt: skip
    assert {f"train/{name}" for name in wanted} <= names
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    (table,) = events.Tensors("scores/text_summary")
    assert "|label_logits|" in table.tensor_proto.string_val[0].decode()


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under the run's fingerprint, grouped by the experiment; a second run is its own. Figures,
    scores and files are taken without a complaint."""
    for method in ("lora", "mixlora"):
        argv = [*SMALL, "tracker=wandb", "tracker.mode=offline", f"method={method}"]
        assert execute([*argv, f"output_dir={tmp_path}"]) == 0
        identity = fingerprint(compose([*SMALL, f"method={method}"]))[:32]
        (folder,) = tmp_path.glob(f"*-{method}-*")
        assert list(folder.glob(f"wandb/offline-run-*-{identity}/*.wandb"))
        assert "warning: tracker" not in capsys.readouterr().err
        assert (folder / "record.json").is_file()
