"""After a power loss any write that was not synced may be missing: no order of them leaves a wrong
checkpoint or record that is accepted."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from random import Random

import pytest
import torch
from lost_writes import Disk, watch

from mixlora_exp.cli.train import execute
from mixlora_exp.errors import UserError
from mixlora_exp.records.files import RunFiles
from mixlora_exp.records.record import read_run
from mixlora_exp.results.runs import check_run
from mixlora_exp.system.hashing import file_sha256
from mixlora_exp.training.checkpoints import Checkpoints

RUN = ["experiment=smoke", "method=lora", "data.train_limit=8", "trainer.max_steps=2",
       "trainer.save_steps=1", "trainer.logging_steps=1", "trainer.precision=float32",
       "evaluation.limit=4", "evaluation.batch_check=0"]  # fmt: skip
DRAWS = 16 if "SOAK_WRITES" in os.environ else 4
"""States drawn at each moment."""


def wrong_record(folder: Path) -> str:
    """What is wrong with the record in a run's folder, if it is accepted."""
    if not (folder / "record.json").exists():
        return ""
    try:
        record = read_run(folder / "record.json")
    except UserError:
        return ""
    try:
        check_run(RunFiles(folder / "record.json"), force=True)
    except UserError as error:
        return str(error)
    weights = folder / "adapter" / "adapter_model.safetensors"
    if not weights.is_file():
        return "the adapter is missing"
    if file_sha256(weights) != record["saved_adapter"]["sha256"]:
        return "the adapter is another one"
    log = folder / "train_log.jsonl"
    lines = log.read_bytes().splitlines() if log.is_file() else []
    if len(lines) != record["train"]["steps"] or not all(line.strip(b"\0") for line in lines):
        return "the log is not whole"
    return ""


def accepted(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    """The weights of the checkpoint that a run would go on from, by its step."""
    found = Checkpoints(folder, {}, replace=False)
    found._changed = lambda _: []  # type: ignore[method-assign]
    newest = found.newest()
    return {} if newest is None else {newest.step: {**newest.adapter, **newest.moments}}


@pytest.mark.parametrize("honoured", [True, False], ids=["synced", "if nothing was synced"])
def test_power_losses(
    honoured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, record_property
) -> None:
    """Twice in one folder, the second time with force=true, which replaces everything."""
    torch.set_num_threads(1)
    (tmp_path / "out").mkdir()
    disk, draw = Disk(tmp_path / "out", honoured), Random(0)
    wrong: set[str] = set()
    checkpoints: dict[int, dict[str, torch.Tensor]] = {}
    states = 0

    def crashed() -> None:
        nonlocal states
        for folder in (tmp_path / "out").glob("*/checkpoints"):
            # What this process itself would read is what a run wrote.
            checkpoints.update(accepted(folder))
        for _ in range(DRAWS):
            states += 1
            target = tmp_path / f"state{states}"
            disk.after_power_loss(draw, target)
            for run in target.iterdir():
                if what := wrong_record(run):
                    wrong.add(what)
                for step, tensors in accepted(run / "checkpoints").items():
                    known = checkpoints.get(step, {})
                    same = known.keys() == tensors.keys() and all(
                        torch.equal(tensor, known[name]) for name, tensor in tensors.items()
                    )
                    if not same:
                        wrong.add(f"the checkpoint of step {step}")

    with monkeypatch.context() as patch:
        watch(disk, patch.setattr, crashed)
        for words in ([], ["force=true"]):
            assert execute([*RUN, f"output_dir={tmp_path / 'out'}", *words]) == 0
    disk.look()
    crashed()
    disk.close()
    capsys.readouterr()
    if honoured:
        record_property("states after a power loss", states)
    assert len(checkpoints) == 2
    # Without syncs the same judge finds what must not be: it is no judge that accepts everything.
    assert bool(wrong) is not honoured, wrong


def test_a_file_that_goes_meanwhile_is_gone(tmp_path: Path) -> None:
    """As a lock's heartbeat does, which no run waits for."""
    (tmp_path / "lock").mkdir()
    disk, stop = Disk(tmp_path), threading.Event()

    def beat() -> None:
        while not stop.is_set():
            (tmp_path / "lock" / ".new").write_text("1")
            (tmp_path / "lock" / ".new").replace(tmp_path / "lock" / "1")

    beating = threading.Thread(target=beat)
    beating.start()
    while not (tmp_path / "lock" / "1").exists():
        time.sleep(0.001)
    try:
        for _ in range(100):
            disk.look()
    finally:
        stop.set()
        beating.join()
        disk.close()
    disk.look()
    assert set(disk.now[(tmp_path / "lock").stat().st_ino]) == {"1"}


def test_what_was_in_a_removed_folder_may_be_gone_without_it(tmp_path: Path) -> None:
    (tmp_path / "disk" / "run").mkdir(parents=True)
    for name in ("first", "second"):
        (tmp_path / "disk" / "run" / name).write_text(name)
    disk = Disk(tmp_path / "disk")
    disk.all_is_on_disk()
    shutil.rmtree(tmp_path / "disk" / "run")
    disk.look()
    left = set()
    for number in range(60):
        disk.after_power_loss(Random(number), tmp_path / f"state{number}")
        run = tmp_path / f"state{number}" / "run"
        left.add(tuple(sorted(p.name for p in run.iterdir())) if run.exists() else None)
    disk.close()
    assert left == {None, (), ("first",), ("second",), ("first", "second")}
