"""Checkpoints of one adapter's training: whole or not there, checked when read, newest good first.

A checkpoint has the adapter, its optimizer's state and what the run has logged. Nothing else
determines how training resumes: the learning rate is a function of the step, the order of the data
one of seed and epoch, and dropout one of seed, step and module.
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

from mixlora_exp.errors import UserError, shown
from mixlora_exp.system.durable import settle, sync
from mixlora_exp.system.hashing import file_sha256
from mixlora_exp.system.untrusted import read_json

__all__ = ["Checkpoint", "Checkpoints"]

MANIFEST, STATE = "manifest.json", "state.json"
ADAPTER, OPTIMIZER = "adapter.safetensors", "optimizer.safetensors"
PREFIX, PARTIAL, DAMAGED = "step-", ".partial-", "damaged-"


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

    def restore_moments(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
        """Put what the optimizer knew of each weight back; the learning rate is a function of the
        step."""
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


class Checkpoints:
    """The checkpoints of one run, in `folder`; the newest `keep` stay. `identity` says what they
    are of: another one's are not continued, and with `replace` they are removed. `check_owner`
    raises where this process may not write."""

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        keep: int = 2,
        check_owner: Callable[[], None] = lambda: None,
        replace: bool = False,
    ) -> None:
        self.folder, self.identity, self.keep = folder, dict(identity), keep
        self.check_owner, self._replace = check_owner, replace

    def save(
        self,
        step: int,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        state: Mapping[str, Any],
    ) -> Path | None:
        """Write one after optimizer step `step`: under another name first, onto the disk, then
        renamed. Weights that are not finite are not kept: None.

        Raises:
            UserError: the disk is full or cannot be written; older checkpoints are kept.
        """
        self.check_owner()
        if not all(parameter.isfinite().all() for parameter in parameters.values()):
            return None
        place = self.folder / f"{PREFIX}{step:08d}"
        partial = self.folder / f"{PARTIAL}{os.getpid()}"
        moments = {
            f"{name}/{key}": value.detach().cpu()
            for name, parameter in parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        weights = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
        try:
            # Those of processes that were killed, too: one at a time works on a run.
            for left in self.folder.glob(f"{PARTIAL}*"):
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file(weights, partial / ADAPTER)
            save_file(moments, partial / OPTIMIZER)
            text = {**state, "step": step, "identity": self.identity}
            (partial / STATE).write_text(json.dumps(text))
            files = {name: file_sha256(partial / name) for name in (ADAPTER, OPTIMIZER, STATE)}
            (partial / MANIFEST).write_text(json.dumps(files))
            settle(partial)
            shutil.rmtree(place, ignore_errors=True)
            os.replace(partial, place)
            sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"output_dir: a checkpoint could not be written to {place} ({error}); the older "
                "ones are kept. Free space there and start the same command again to resume."
            ) from error
        for old in self._found()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return place

    def _found(self) -> list[Path]:
        """Newest first, by the step in the name: clocks may go backwards."""
        if not self.folder.is_dir():
            return []
        return sorted(self.folder.glob(f"{PREFIX}*"), reverse=True)

    def newest(self, micro_batch_size: int | None = None) -> Checkpoint | None:
        """The newest one that is whole; a damaged one is named, set aside and passed over.

        Where a size is given, those of training in micro-batches of another size are removed: the
        router loss is taken over a micro-batch, and one run has one objective.

        Raises:
            UserError: it belongs to other data, code or settings, or may not be read.
        """
        for path in self._found():
            try:
                found = self._read(path)
            except PermissionError as error:
                raise UserError(
                    f"{path} is somebody else's and cannot be read ({error.strerror}): have its "
                    "permissions changed, or choose another output_dir"
                ) from error
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                aside = self._set_aside(path)
                what = shown(f"{path} is damaged ({error}); it is left out, as {aside}")
                sys.stderr.write(f"warning: checkpoint {what}\n")
                continue
            changed = self._changed(found)
            if not changed:
                then = found.state.get("micro_batch_size", micro_batch_size)
                if micro_batch_size in (None, then):
                    return found
                sys.stderr.write(
                    f"warning: {found.path} was trained in micro-batches of {then}, this run takes "
                    f"{micro_batch_size}: training begins anew\n"
                )
                self.check_owner()
                self.clear()
                return None
            if not self._replace:
                raise UserError(
                    f"{found.path} is of a run with other {', '.join(changed)}, though its "
                    "settings are the same: choose another output_dir, or force=true to begin anew"
                )
            self.clear()
            return None
        return None

    def fall_back(self, step: int) -> Checkpoint | None:
        """The newest that is whole of at most `step` optimizer steps. Later ones are removed: to go
        on from weights that were broken already would end in the same way."""
        self.check_owner()
        for path in self._found():
            if int(path.name.removeprefix(PREFIX)) > step:
                shutil.rmtree(path, ignore_errors=True)
        return self.newest()

    def _set_aside(self, path: Path) -> Path:
        """Give a damaged one a name under which it does not count; one such is kept."""
        self.check_owner()
        for older in self.folder.glob(f"{DAMAGED}*"):
            shutil.rmtree(older, ignore_errors=True)
        aside = path.with_name(DAMAGED + path.name)
        try:
            os.replace(path, aside)
        except OSError:
            return path
        return aside

    def _read(self, path: Path) -> Checkpoint:
        manifest = read_json(path / MANIFEST)
        for name in (ADAPTER, OPTIMIZER, STATE):
            if file_sha256(path / name) != manifest[name]:
                raise ValueError(f"{name} is not what was written")
        state = read_json(path / STATE, finite=False)
        return Checkpoint(
            path, state["step"], load_file(path / ADAPTER), load_file(path / OPTIMIZER), state
        )

    def _changed(self, found: Checkpoint) -> list[str]:
        """Names of what differs between the run that wrote it and this one."""
        then = found.state["identity"]
        return sorted(k for k in {**then, **self.identity} if then.get(k) != self.identity.get(k))

    def clear(self) -> None:
        """Remove them all, and what an interrupted writer left."""
        shutil.rmtree(self.folder, ignore_errors=True)
