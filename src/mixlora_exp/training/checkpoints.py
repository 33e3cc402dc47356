"""Checkpoints of one adapter's training: whole or not there, checked when read, newest good first.

A checkpoint has the adapter, its optimizer's state, the learning-rate schedule's, and what the run
has logged. Nothing else determines how training goes on: the order of the data is a function of
seed and epoch, and dropout one of seed, step and module.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mixlora_exp.errors import UserError
from mixlora_exp.hashing import file_sha256

__all__ = ["Checkpoint", "Checkpoints"]

MANIFEST, STATE = "manifest.json", "state.json"
ADAPTER, OPTIMIZER = "adapter.safetensors", "optimizer.safetensors"
PREFIX, PARTIAL = "step-", ".partial-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that was read whole. `state` is what was given to `Checkpoints.save`."""

    path: Path
    step: int
    adapter: dict[str, Tensor]
    moments: dict[str, Tensor]
    state: dict[str, Any]

    @torch.no_grad()
    def restore_weights(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put the weights back; `parameters` are the adapter's by name."""
        for name, parameter in parameters.items():
            parameter.copy_(self.adapter[name])

    def restore(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        scheduler: LRScheduler,
    ) -> None:
        """Put weights, moments and learning rate back; `parameters` are the adapter's by name."""
        self.restore_weights(parameters)
        for name, parameter in parameters.items():
            own = {
                key.rpartition("/")[2]: value
                for key, value in self.moments.items()
                if key.rpartition("/")[0] == name
            }
            if own:
                # A step counter stays where the optimizer keeps it, on the CPU or not.
                optimizer.state[parameter] = {
                    key: value.to(parameter.device) for key, value in own.items()
                }
        schedule = self.state["schedule"]
        scheduler.last_epoch = schedule["last_epoch"]
        scheduler._step_count = schedule["step_count"]
        scheduler._last_lr = list(schedule["last_lr"])
        for group, rate in zip(optimizer.param_groups, schedule["last_lr"], strict=True):
            group["lr"] = rate


def _sync(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoints:
    """The checkpoints of one run, in `folder`; the newest `keep` stay. `identity` says what they
    are of: another one's are not continued. `check` raises where this process may not write."""

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        keep: int = 2,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.identity, self.keep = folder, dict(identity), keep
        self._check_owner = check

    def save(
        self,
        step: int,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        scheduler: LRScheduler,
        state: Mapping[str, Any],
    ) -> Path:
        """Write one after optimizer step `step`: under another name first, onto the disk, then
        renamed.

        Raises:
            UserError: the disk is full or cannot be written; older checkpoints are kept.
        """
        self._check_owner()
        place = self.folder / f"{PREFIX}{step:08d}"
        partial = self.folder / f"{PARTIAL}{os.getpid()}"
        schedule = {
            "last_epoch": scheduler.last_epoch,
            "step_count": scheduler._step_count,
            "last_lr": list(scheduler.get_last_lr()),
        }
        moments = {
            f"{name}/{key}": value.detach().cpu()
            for name, parameter in parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        weights = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file(weights, partial / ADAPTER)
            save_file(moments, partial / OPTIMIZER)
            text = {**state, "step": step, "schedule": schedule, "identity": self.identity}
            (partial / STATE).write_text(json.dumps(text))
            files = {name: file_sha256(partial / name) for name in (ADAPTER, OPTIMIZER, STATE)}
            (partial / MANIFEST).write_text(json.dumps(files))
            for name in (*files, MANIFEST):
                _sync(partial / name)
            _sync(partial)
            shutil.rmtree(place, ignore_errors=True)
            os.replace(partial, place)
            _sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"output_dir: a checkpoint could not be written to {place} ({error}); the older "
                "ones are kept. Free space there and start the same command again to go on."
            ) from error
        for old in self._found()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return place

    def _found(self) -> list[Path]:
        """Newest first, by the step in the name: clocks may go backwards."""
        if not self.folder.is_dir():
            return []
        return sorted(self.folder.glob(f"{PREFIX}*"), reverse=True)

    def newest(self) -> Checkpoint | None:
        """The newest one that is whole; a damaged one is named and passed over.

        Raises:
            UserError: it belongs to other data, code or settings.
        """
        for path in self._found():
            try:
                found = self._read(path)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                sys.stderr.write(f"warning: checkpoint {path} is damaged ({error}) and left out\n")
                continue
            self._check(found)
            return found
        return None

    def _read(self, path: Path) -> Checkpoint:
        manifest = json.loads((path / MANIFEST).read_text())
        for name in (ADAPTER, OPTIMIZER, STATE):
            if file_sha256(path / name) != manifest[name]:
                raise ValueError(f"{name} is not what was written")
        state = json.loads((path / STATE).read_text())
        return Checkpoint(
            path, state["step"], load_file(path / ADAPTER), load_file(path / OPTIMIZER), state
        )

    def _check(self, found: Checkpoint) -> None:
        then = found.state["identity"]
        changed = [k for k in {**then, **self.identity} if then.get(k) != self.identity.get(k)]
        if changed:
            raise UserError(
                f"{found.path} is of a run with other {', '.join(sorted(changed))}, though its "
                "settings are the same: choose another output_dir, or force=true to begin anew"
            )

    def clear(self) -> None:
        """Remove them all, and what an interrupted writer left."""
        shutil.rmtree(self.folder, ignore_errors=True)
