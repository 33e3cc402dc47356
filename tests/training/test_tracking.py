"""Trackers: what they get, and that nothing they do stops a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixlora_exp.cli.train import execute
from mixlora_exp.config import compose, fingerprint
from mixlora_exp.records.record import read_record
from mixlora_exp.training.tracking import tracking
from mixlora_exp.training.tracking.tracking import Tracking, flat

SMALL = ["experiment=smoke", "data.train_limit=8", "trainer.logging_steps=1",
         "evaluation.batch_check=0"]  # fmt: skip


class Sink:
    """Keeps what it gets; fails or hangs where it is told to."""

    def __init__(self, where: str = "", how: str = "") -> None:
        self.where, self.how = where, how
        self.entries: list = []
        self.files: Sequence[Path] | None = None
        self.release = threading.Event()
        self._maybe("make")

    def _maybe(self, where: str) -> None:
        if where != self.where:
            return
        if self.how == "fail":
            raise ConnectionError("no route to host")
        self.release.wait(20)

    def begin(self, step, entries) -> None:
        self.begun = (step, entries)

    def log(self, step, values) -> None:
        self._maybe("log")
        self.entries.append((step, values))

    def close(self, files) -> None:
        self._maybe("close")
        self.files = files


def test_entries_and_files_arrive_in_order(tmp_path: Path) -> None:
    sink = Sink()
    sent = Tracking("fake", lambda: sink)
    (tmp_path / "a").write_text("")
    for step in range(5):
        sent.log(step, {"loss": 1.0 / (step + 1)})
    sent.close([tmp_path / "a", tmp_path / "missing"])
    assert sink.entries == [(step, {"train/loss": 1.0 / (step + 1)}) for step in range(5)]
    assert sink.files == [tmp_path / "a"]


def test_figures_by_name() -> None:
    assert flat({"loss": 1, "expert_load": [[0.25, 0.75], [0.5, 0.5]], "text": "no"}) == {
        "train/loss": 1,
        "expert_load/layer0/expert0": 0.25,
        "expert_load/layer0/expert1": 0.75,
        "expert_load/layer1/expert0": 0.5,
        "expert_load/layer1/expert1": 0.5,
    }


@pytest.mark.parametrize("where", ["make", "log", "close"])
@pytest.mark.parametrize("how", ["fail", "hang"])
def test_nothing_it_does_stops_a_run(where: str, how: str, capsys) -> None:
    """Each call returns at once, and one warning is told."""
    made: list[Sink] = []

    def make() -> Sink:
        made.append(Sink.__new__(Sink))
        made[0].__init__(where, how)
        return made[0]

    sent = Tracking("fake", make, grace=0.3)
    begun = time.monotonic()
    for step in range(2000):
        sent.log(step, {"loss": 1.0})
    sent.close()
    assert time.monotonic() - begun < 5
    told = capsys.readouterr().err
    assert told.count("warning: tracker=fake is left out") == 1
    made[0].release.set()


def test_a_run_whose_tracker_hangs_ends_with_its_record(tmp_path: Path, monkeypatch) -> None:
    sinks = []

    def hanging(*args) -> Sink:
        sinks.append(Sink("log", "hang"))
        return sinks[0]

    monkeypatch.setattr(tracking, "WandbSink", hanging)
    monkeypatch.setattr(Tracking, "__init__", quick(Tracking.__init__))
    assert execute([*SMALL, "tracker=wandb", f"output_dir={tmp_path}"]) == 0
    (path,) = tmp_path.glob("*/record.json")
    assert read_record(path)["status"] == "finished"
    sinks[0].release.set()


def quick(real):
    def init(self, name, make, grace=0.2) -> None:
        real(self, name, make, 0.2)

    return init


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
    wanted = {"train/loss", "train/router_loss", "train/grad_norm", "train/learning_rate",
              "expert_load/layer0/expert0"}  # fmt: skip
    assert wanted <= names
    assert {"train/tokens_per_second", "train/memory_gib"} <= names
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    (table,) = events.Tensors("scores/text_summary")
    assert "|label_logits|" in table.tensor_proto.string_val[0].decode()
    assert [image.step for image in events.Images("loss")] == [2]


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path) -> None:
    """Under the run's fingerprint, grouped by the experiment; a second run is its own."""
    for method in ("lora", "mixlora"):
        argv = [*SMALL, "tracker=wandb", "tracker.mode=offline", f"method={method}"]
        assert execute([*argv, f"output_dir={tmp_path}"]) == 0
        identity = fingerprint(compose([*SMALL, f"method={method}"]))[:32]
        (folder,) = tmp_path.glob(f"*-{method}-*")
        assert list(folder.glob(f"wandb/offline-run-*-{identity}/*.wandb"))
        assert (folder / "record.json").is_file()
