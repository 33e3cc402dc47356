"""What else may go wrong in the middle of a run: memory, data, disks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mixlora_exp.cli.train import execute
from mixlora_exp.records import record as record_file
from mixlora_exp.records.record import read_record
from mixlora_exp.runs import run as experiment
from mixlora_exp.runs import scoring, state
from mixlora_exp.tasks import embedded
from mixlora_exp.training.trainer import MixLoraTrainer

SMALL = [
    "experiment=smoke",
    "data.train_limit=16",
    "trainer.precision=float32",
    "trainer.batch_size=8",
    "trainer.micro_batch_size=4",
    "trainer.max_steps=4",
    "trainer.save_steps=1",
    "evaluation.batch_check=0",
]


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def records(folder: Path) -> list[dict]:
    return [read_record(path) for path in sorted(folder.glob("*/record.json"))]


def train_until(monkeypatch: pytest.MonkeyPatch, step: int, error: Callable[[], BaseException]):
    """Let training fail in the step after `step`."""
    real = MixLoraTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise error()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MixLoraTrainer, "training_step", training_step)


def test_out_of_memory_in_one_cell_of_a_sweep(tmp_path, monkeypatch, capsys) -> None:
    """The others go on, and the reason is kept."""
    real = MixLoraTrainer.training_step

    def training_step(self, model, *args, **kwargs):
        if "mixlora" in self.args.output_dir:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, model, *args, **kwargs)

    monkeypatch.setattr(MixLoraTrainer, "training_step", training_step)
    argv = ["-m", *SMALL, f"output_dir={tmp_path}", "method=mixlora,lora,dora"]
    assert execute(argv) == 2
    assert "trainer.auto_micro_batch=true" in capsys.readouterr().err
    assert {r["config"]["method"]["name"] for r in records(tmp_path)} == {"lora", "dora"}
    (path,) = tmp_path.glob("*mixlora*/failure.json")
    assert "out of memory on the device" in json.loads(path.read_text())["error"]


@pytest.mark.parametrize("adapters", [[], ["adapters=[lora,mixlora]"]], ids=["one", "two"])
@pytest.mark.parametrize(("module", "place"), [(state, "load_model"), (experiment, "Scorer")])
def test_a_device_that_is_too_small_is_told_in_a_line(
    module, place: str, adapters: list[str], tmp_path, monkeypatch, capsys
) -> None:
    """While the model is loaded, and while it is scored."""

    def too_small(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, place, too_small)
    argv = [*SMALL, *adapters, "evaluation.before_training=true", f"output_dir={tmp_path}"]
    assert execute(argv) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory on the device while the model was loaded or sco")
    assert "dry_run=true tells what fits which card" in line
    assert not records(tmp_path)


def test_a_micro_batch_that_does_not_fit_is_halved_once(tmp_path, monkeypatch) -> None:
    """With the same examples and normalisation in a step, and told in the record."""
    assert execute([*SMALL, f"output_dir={tmp_path / 'two'}", "trainer.micro_batch_size=2"]) == 0
    real = MixLoraTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["default"]["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MixLoraTrainer, "training_step", training_step)
    argv = [*SMALL, f"output_dir={tmp_path / 'auto'}", "trainer.auto_micro_batch=true"]
    assert execute(argv) == 0
    (halved,), (two,) = records(tmp_path / "auto"), records(tmp_path / "two")
    assert halved["train"]["halved_micro_batch"] == 2
    assert two["train"]["halved_micro_batch"] is None
    assert halved["train"]["stability"] == two["train"]["stability"]
    assert halved["config"]["trainer"]["micro_batch_size"] == 4


def test_a_micro_batch_of_one_cannot_be_halved(tmp_path, monkeypatch) -> None:
    train_until(monkeypatch, 0, lambda: torch.OutOfMemoryError("CUDA out of memory"))
    argv = [*SMALL, "trainer.auto_micro_batch=true", "trainer.micro_batch_size=1"]
    assert execute([*argv, f"output_dir={tmp_path}"]) == 2


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        path = tmp_path / "data" / "arc_e" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = embedded.rows("arc_e", split, seed=0)[:16]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def test_data_that_changed_meanwhile_is_refused(tmp_path, data, monkeypatch, capsys) -> None:
    argv = [*SMALL, "data=local", f"data.path={data}", f"output_dir={tmp_path / 'out'}"]
    with monkeypatch.context() as patch:
        train_until(patch, 2, Killed)
        with pytest.raises(Killed):
            execute(argv)
    train = data / "arc_e" / "train.jsonl"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:-1]))
    assert execute(argv) == 2
    assert "other data" in capsys.readouterr().err
    assert execute([*argv, "force=true"]) == 0


def test_code_that_changed_meanwhile_is_refused(tmp_path, monkeypatch, capsys) -> None:
    """Code that determines results, not comments."""
    argv = [*SMALL, f"output_dir={tmp_path}"]
    with monkeypatch.context() as patch:
        train_until(patch, 2, Killed)
        with pytest.raises(Killed):
            execute(argv)
    with monkeypatch.context() as patch:
        patch.setattr("mixlora_exp.runs.inputs.code_sha256", lambda: "0" * 64)
        assert execute(argv) == 2
        assert "other code" in capsys.readouterr().err
    assert execute(argv) == 0
    with monkeypatch.context() as patch:
        patch.setattr("mixlora_exp.runs.inputs.code_sha256", lambda: "0" * 64)
        assert execute(argv) == 2
        assert "code differ" in capsys.readouterr().err


def test_a_disk_that_is_full_when_recording(tmp_path, monkeypatch, capsys) -> None:
    """No record, a message, and the same command ends the run without training again."""
    argv = [*SMALL, f"output_dir={tmp_path}"]
    real = record_file.write_whole

    def full(path: Path, chunks, *rest) -> None:
        def fails() -> Iterator[bytes]:
            raise OSError(28, "No space left on device")
            yield b""

        real(path, fails() if path.name == "record.json" else chunks, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(record_file, "write_whole", full)
        assert execute(argv) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not records(tmp_path)
    train_until(monkeypatch, 0, lambda: AssertionError("trained again"))
    assert execute(argv) == 0
    assert len(records(tmp_path)) == 1


def files(folder: Path) -> dict[str, bytes]:
    """All that a run wrote, without its lock."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
    return {name: content for name, content in named.items() if "/lock/" not in name}


@pytest.mark.parametrize(
    "together",
    [
        pytest.param(False, id="alone"),
        pytest.param(True, id="among others", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("when", ["at the start", "in training", "in scoring"])
def test_a_run_that_lost_its_lock_writes_nothing(
    tmp_path, monkeypatch, capsys, when, together
) -> None:
    """Whatever it is about to write: what is there is another process's."""
    place = {
        "at the start": (experiment.Run, "begin"),
        "in training": (MixLoraTrainer, "training_step"),
        "in scoring": (scoring, "score_tests"),
    }
    owner, name = place[when]
    real, before = getattr(owner, name), {}

    def lose(*args, **kwargs):
        if not before:
            for lock in tmp_path.glob("*-mixlora-*/lock"):
                (lock / "2").write_text(json.dumps({"host": "elsewhere", "count": 0}))
            before.update(files(tmp_path) or {"": b""})
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, lose)
    entries = ["adapters=[mixlora,lora]"] if together else ["method=mixlora"]
    assert execute([*SMALL, f"output_dir={tmp_path}", *entries]) == 2
    assert "took over this run" in capsys.readouterr().err
    before.pop("", None)
    ours = {name: content for name, content in files(tmp_path).items() if "-mixlora-" in name}
    assert ours == {name: content for name, content in before.items() if "-mixlora-" in name}
    # The other adapter's run is not touched by it.
    assert len(records(tmp_path)) == int(together)


def test_a_forced_run_goes_on_after_a_kill(tmp_path, monkeypatch) -> None:
    argv = [*SMALL, f"output_dir={tmp_path}"]
    assert execute(argv) == 0
    (whole,) = records(tmp_path)
    with monkeypatch.context() as patch:
        train_until(patch, 2, Killed)
        with pytest.raises(Killed):
            execute([*argv, "force=true"])
    assert not records(tmp_path)
    with monkeypatch.context() as patch:
        train_until(patch, 0, lambda: AssertionError("began anew"))
        assert execute([*argv, "force=true"]) == 0
    (again,) = records(tmp_path)
    assert again["scores"] == whole["scores"]
    assert again["train"]["stability"] == whole["train"]["stability"]
    # Once there is a record, it starts from the beginning.
    train_until(monkeypatch, 0, Killed)
    with pytest.raises(Killed):
        execute([*argv, "force=true"])


def test_that_a_micro_batch_was_halved_is_known_after_a_kill(tmp_path, monkeypatch) -> None:
    argv = [*SMALL, f"output_dir={tmp_path}", "trainer.auto_micro_batch=true"]
    sizes = []
    real = MixLoraTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        sizes.append(len(inputs["default"]["input_ids"]))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(sizes) == 8:
            raise Killed
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MixLoraTrainer, "training_step", training_step)
    with pytest.raises(Killed):
        execute(argv)
    assert execute(argv) == 0
    assert sizes[0] == 4
    assert set(sizes[1:]) == {2}
    (record,) = records(tmp_path)
    assert record["train"]["halved_micro_batch"] == 2


def test_an_adapter_that_is_not_what_was_written_is_reported(tmp_path, capsys) -> None:
    argv = [*SMALL, f"output_dir={tmp_path}"]
    assert execute(argv) == 0
    (weights,) = tmp_path.glob("*/adapter/adapter_model.safetensors")
    assert weights.stat().st_mode == (weights.parent / "adapter_config.json").stat().st_mode
    weights.write_bytes(weights.read_bytes()[:-1])
    assert execute(argv) == 2
    assert "was modified after the run" in capsys.readouterr().err


def test_a_failure_is_forgotten_when_the_run_succeeds(tmp_path, monkeypatch) -> None:
    argv = [*SMALL, f"output_dir={tmp_path}"]
    with monkeypatch.context() as patch:
        train_until(patch, 1, lambda: torch.OutOfMemoryError("CUDA out of memory"))
        assert execute(argv) == 2
    assert list(tmp_path.glob("*/failure.json"))
    assert execute(argv) == 0
    assert not list(tmp_path.glob("*/failure.json"))
