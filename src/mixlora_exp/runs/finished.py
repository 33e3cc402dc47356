"""A run that is finished already: check that its record is what the same command would make."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from mixlora_exp.config.schema import Config
from mixlora_exp.errors import UserError
from mixlora_exp.records.files import RECORD
from mixlora_exp.records.record import read_run
from mixlora_exp.records.required_fields import odd_fields
from mixlora_exp.records.show import print_record
from mixlora_exp.runs.inputs import Inputs, differences
from mixlora_exp.runs.ownership import FAILURE, LOCK
from mixlora_exp.system.console import echo
from mixlora_exp.system.device import processes
from mixlora_exp.system.hashing import file_sha256
from mixlora_exp.system.runlock import RunLock


def finished(path: Path, inputs: Inputs, config: Config, earlier: list[Path] | None = None) -> Path:
    """Print the finished run of `config` in the record at `path`, and return `path`; `UserError` if
    its inputs or its adapter have changed, or halved micro-batches are not permitted."""
    record = read_run(path)
    changed = differences(inputs.identity, record)
    if changed:
        raise UserError(
            f"{path} is a finished run with the same settings but other inputs "
            f"({', '.join(changed)} differ): choose another output_dir, or force=true to replace it"
        )
    weights = path.parent / "adapter" / "adapter_model.safetensors"
    saved = record.get("saved_adapter")
    if saved is not None and weights.is_file() and file_sha256(weights) != saved["sha256"]:
        raise UserError(
            f"{weights} was modified after the run: restore it, or force=true to run it again"
        )
    halved = (record["train"] or {}).get("halved_micro_batch")
    if halved is not None and not config.trainer.auto_micro_batch:
        raise UserError(
            f"{path} is a finished run with micro-batches halved to {halved} for lack of memory: "
            "trainer.auto_micro_batch=true accepts it, force=true runs it again"
        )
    if processes().is_main_process:
        remove_leftovers(path.parent)
    echo(f"Already finished: {path}. force=true runs it again.")
    if earlier is None:
        with odd_fields(path):
            print_record(record)
    else:
        earlier.append(path)
    return path


def remove_leftovers(folder: Path) -> None:
    """Remove from the folder of a finished run what it no longer needs, and what is there only if
    the run was killed after it had written its record, or its disk failed then: checkpoints, the
    note of a failure, partly written files, the lock. Nothing is removed while another process
    holds the run's lock, as one does that repeats the run, or from a folder that cannot be
    written."""
    if not (_leftovers(folder) or os.path.lexists(folder / LOCK)):
        return
    with contextlib.suppress(OSError, UserError):
        lock = RunLock(folder / LOCK)
        if not lock.acquire():
            return
        try:
            # The process that held the lock until now may have begun anew.
            for left in _leftovers(folder) if (folder / RECORD).is_file() else ():
                with contextlib.suppress(OSError):
                    if left.is_dir() and not left.is_symlink():
                        shutil.rmtree(left, ignore_errors=True)
                    else:
                        left.unlink()
        finally:
            lock.discard()


def _leftovers(folder: Path) -> list[Path]:
    named = (folder / name for name in ("checkpoints", "trainer", FAILURE))
    hidden = (path for pattern in (".*.tmp", "*/.*.tmp") for path in folder.glob(pattern))
    return [path for path in (*named, *hidden) if os.path.lexists(path)]
