"""Trackers of a run that was killed and goes on: each step once, with the values of its log."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from mixlora_exp.cli.train import execute
from mixlora_exp.config import compose, fingerprint
from mixlora_exp.records.record import read_record
from mixlora_exp.training.tracking.sinks import TensorBoardSink, read_log
from mixlora_exp.training.tracking.tracking import Tracking, flat
from mixlora_exp.training.trainer import MixLoraTrainer

ROOT = Path(__file__).parents[2]
RUN = ["experiment=smoke", "data.train_limit=16", "trainer.precision=float32",
       "trainer.batch_size=4", "trainer.micro_batch_size=4", "trainer.max_steps=6",
       "trainer.save_steps=2", "trainer.logging_steps=1", "evaluation.batch_check=0"]  # fmt: skip
WANDB = ["tracker=wandb", "tracker.mode=offline"]


class Killed(BaseException):
    pass


def killed_after(step: int, argv: list[str]) -> None:
    """Run until the step after `step` begins."""
    real = MixLoraTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Killed
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixLoraTrainer, "training_step", training_step)
        with pytest.raises(Killed):
            execute(argv)


def chunks_of(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and data of each piece of a log in LevelDB's format, to where it is cut off."""
    size, place = 2**15, 7  # Of a block, and of W&B's own header.
    while place + 7 <= len(content):
        if size - place % size < 7:
            place += size - place % size
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        data = content[place + 7 : place + 7 + length]
        if not kind or len(data) < length:
            return
        yield kind, data
        place += 7 + length


def records_of(path: Path) -> Iterator[Any]:
    """What an offline file of W&B's holds."""
    whole = b""
    for kind, data in chunks_of(path.read_bytes()):
        whole += data
        if kind in (1, 4):  # A record in one piece, or the last of several.
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def history_of(path: Path) -> list[tuple[int, dict[str, Any]]]:
    found = []
    for record in records_of(path):
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            found.append((items["_step"], items))
    return found


def offline_files(folder: Path) -> list[Path]:
    """In the order of their starts, written to their ends."""
    wandb.teardown()
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns)


def check_history(folder: Path) -> list[list[int]]:
    """Every step of the run's log stands in the offline files once, in order, with its values.
    Returns the steps by file."""
    files = [history_of(path) for path in offline_files(folder)]
    sent = [entry for rows in files for entry in rows]
    log = read_log(folder / "train_log.jsonl")
    assert [step for step, _ in sent] == [step for step, _ in log]
    for (_, items), (_, entry) in zip(sent, log, strict=True):
        for name, value in flat(entry).items():
            assert items[name] == value, name
    return [[step for step, _ in rows] for rows in files]


@pytest.mark.slow
def test_wandb_goes_on_with_the_same_run(tmp_path: Path) -> None:
    """Killed after step 3, with a checkpoint of step 2: step 3 is done twice and sent once."""
    argv = [*RUN, *WANDB, f"output_dir={tmp_path}"]
    killed_after(3, argv)
    time.sleep(1.1)  # W&B names its folders by the second.
    assert execute(argv) == 0
    (folder,) = tmp_path.glob("*mixlora*")
    assert check_history(folder) == [[1, 2, 3], [4, 5, 6]]
    starts = [
        record.run
        for path in offline_files(folder)
        for record in records_of(path)
        if record.WhichOneof("record_type") == "run"
    ]
    assert {run.run_id for run in starts} == {fingerprint(compose(RUN))[:32]}
    assert {run.run_group for run in starts} == {"smoke"}


@pytest.mark.slow
def test_wandb_after_a_kill_that_nothing_could_catch(tmp_path: Path) -> None:
    argv = [*RUN, *WANDB, f"output_dir={tmp_path}", "trainer.max_steps=40"]
    process = subprocess.Popen([sys.executable, "-W", "ignore", "train.py", *argv], cwd=ROOT)
    while process.poll() is None and not list(tmp_path.glob("*/checkpoints/step-*4")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2)
    assert execute(argv) == 0
    (folder,) = tmp_path.glob("*mixlora*")
    check_history(folder)


@pytest.mark.slow
def test_wandb_gets_scores_predictions_and_a_figure(tmp_path: Path) -> None:
    argv = [*RUN, *WANDB, f"output_dir={tmp_path}"]
    assert execute(argv) == 0
    (folder,) = tmp_path.glob("*mixlora*")
    (path,) = offline_files(folder)
    names, summary = set(), {}
    for record in records_of(path):
        match record.WhichOneof("record_type"):
            case "artifact":
                names |= {entry.path for entry in record.artifact.manifest.contents}
            case "summary":
                for item in record.summary.update:
                    summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    assert {"record.json", "train_log.jsonl", "scores.table.json", "loss.png"} <= names
    assert {path.name for path in (folder / "predictions").iterdir()} <= names
    for score in read_record(folder / "record.json")["scores"]:
        assert summary[f"score/{score['task']}/{score['protocol']}"] == score["accuracy"]


@pytest.mark.slow
def test_a_forced_run_is_another_run_of_wandbs(tmp_path: Path) -> None:
    """Its steps could not be sent under the same name: a history only grows."""
    argv = [*RUN, *WANDB, f"output_dir={tmp_path}"]
    assert execute(argv) == 0
    time.sleep(1.1)
    assert execute([*argv, "force=true"]) == 0
    (folder,) = tmp_path.glob("*mixlora*")
    first, second = offline_files(folder)
    assert [s for s, _ in history_of(first)] == [s for s, _ in history_of(second)] == [*range(1, 7)]
    assert first.name != second.name


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_has_each_step_once(tmp_path: Path) -> None:
    argv = [*RUN, "tracker=tensorboard", f"output_dir={tmp_path}"]
    killed_after(3, argv)
    assert execute(argv) == 0
    (folder,) = tmp_path.glob("*mixlora*")
    log = read_log(folder / "train_log.jsonl")
    assert scalars(folder, "train/loss") == [
        (step, pytest.approx(entry["loss"])) for step, entry in log
    ]
    assert [step for step, _ in log] == [1, 2, 3, 4, 5, 6]


def write_log(path: Path, steps: int, shift: float = 0.0) -> Path:
    entries = ({"step": n, "loss": n + shift} for n in range(1, steps + 1))
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_what_a_killed_start_did_not_send_is_sent_by_the_next(tmp_path: Path) -> None:
    """Steps 1 and 2 were sent, 3 and 4 were not; 5 was, and is done again."""
    first = TensorBoardSink(tmp_path)
    first.log(1, {"train/loss": 1.0})
    first.log(2, {"train/loss": 2.0})
    del first
    sent = Tracking("tensorboard", lambda: TensorBoardSink(tmp_path))
    sent.begin(4, write_log(tmp_path / "train_log.jsonl", 4))
    sent.log(5, {"loss": 5.5})
    sent.close()
    again = Tracking("tensorboard", lambda: TensorBoardSink(tmp_path))
    again.begin(4, tmp_path / "train_log.jsonl")
    again.log(5, {"loss": 5.0})
    again.close()
    assert scalars(tmp_path, "train/loss") == [(n, float(n)) for n in range(1, 6)]


def test_a_run_that_had_nothing_left_to_train_sends_what_was_not_sent(tmp_path: Path) -> None:
    """Killed while it was scored: no step is done again, and the record comes."""
    log = write_log(tmp_path / "train_log.jsonl", 3)
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"scores": [], "scores_before": None}))
    sent = Tracking("tensorboard", lambda: TensorBoardSink(tmp_path))
    sent.close([record, log])
    assert scalars(tmp_path, "train/loss") == [(n, float(n)) for n in range(1, 4)]
