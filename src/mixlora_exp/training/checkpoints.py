"""Checkpoints of one adapter's training: written atomically, verified by hash when read.

A checkpoint contains the adapter, the optimizer's state and the log so far. Nothing else is needed
to resume: the learning rate is a function of the step, the data order of seed and epoch, and
dropout of seed, step and module.
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

MANIFEST, STATE = "manifest.json", "state.json"
ADAPTER, OPTIMIZER = "adapter.safetensors", "optimizer.safetensors"
PREFIX, PARTIAL, DAMAGED = "step-", ".partial-", "damaged-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read and verified. `state` is the one given to `Checkpoints.save`."""

    path: Path
    step: int
    adapter: dict[str, Tensor]
    moments: dict[str, Tensor]
    state: dict[str, Any]

    @torch.no_grad()
    def restore_weights(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copy the weights into `parameters`, the adapter's parameters by name."""
        for name, parameter in parameters.items():
            parameter.copy_(self.adapter[name])

    def restore_moments(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
        """Restore the optimizer's state of each parameter (the learning rate follows from the
        step)."""
        for name, parameter in parameters.items():
            own = {
                key.rpartition("/")[2]: value
                for key, value in self.moments.items()
                if key.rpartition("/")[0] == name
            }
            if own:
                # Like the optimizer, which keeps all state on the parameter's device when fused.
                optimizer.state[parameter] = {
                    key: value.to(parameter.device) for key, value in own.items()
                }


def _name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


class Checkpoints:
    """The checkpoints of one run in `folder`, of which the newest `keep` are kept.

    `identity` describes the run's inputs: checkpoints with another identity are refused, or removed
    with `replace`. `check_owner` raises if this process must not write.
    """

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
        """Write a checkpoint after optimizer step `step`: under a temporary name, synced to disk,
        then renamed. Returns its path; None if a weight is not finite, which is not saved.

        Raises:
            UserError: the disk is full or cannot be written; older checkpoints are kept.
        """
        self.check_owner()
        finite = [parameter.detach().isfinite().all() for parameter in parameters.values()]
        # The host asks the device once, not once per parameter.
        if not torch.stack(finite).all():
            return None
        place = self.folder / _name(step)
        partial = self.folder / f"{PARTIAL}{os.getpid()}"
        moments = {
            f"{name}/{key}": value.detach().cpu()
            for name, parameter in parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        weights = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
        try:
            # Also those of killed processes: only one process at a time works on a run.
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
                f"output_dir: cannot write a checkpoint to {place} ({error}); older checkpoints "
                "are kept. Free space there and start the same command again to resume."
            ) from error
        for old in self._found()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return place

    def _found(self) -> list[Path]:
        """Checkpoint folders, newest first by the step in the name (clocks can go backwards)."""
        if not self.folder.is_dir():
            return []
        return sorted(self.folder.glob(f"{PREFIX}*"), reverse=True)

    def newest(self, micro_batch_size: int | None = None) -> Checkpoint | None:
        """Return the newest undamaged checkpoint, or None. Damaged ones are reported, renamed and
        skipped.

        If `micro_batch_size` is given and the checkpoint was trained with another size, all are
        removed: the router loss is computed per micro-batch, so the objective would change.

        Raises:
            UserError: the checkpoint belongs to other data, code or settings, or this user has no
                permission to read it.
        """
        for path in self._found():
            try:
                found = self._read(path)
            except PermissionError as error:
                raise UserError(
                    f"{path} cannot be read ({error.strerror}): have its owner change the "
                    "permissions, or choose another output_dir"
                ) from error
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                aside = self._set_aside(path)
                what = shown(f"{path} is damaged ({error}); skipped and renamed to {aside}")
                sys.stderr.write(f"warning: checkpoint {what}\n")
                continue
            changed = self._changed(found)
            if not changed:
                then = found.state.get("micro_batch_size", micro_batch_size)
                if micro_batch_size in (None, then):
                    return found
                sys.stderr.write(
                    f"warning: {found.path} was trained with trainer.micro_batch_size={then}, this "
                    f"run has {micro_batch_size}: training starts from the beginning\n"
                )
                self.check_owner()
                self.clear()
                return None
            if not self._replace:
                raise UserError(
                    f"{found.path} belongs to a run with the same settings but other "
                    f"{', '.join(changed)}: choose another output_dir, or force=true to start "
                    "from the beginning"
                )
            self.clear()
            return None
        return None

    def fall_back(self, step: int) -> Checkpoint | None:
        """Return the newest undamaged checkpoint of at most `step` optimizer steps. Removes later
        ones: resuming from weights that already caused non-finite values would fail again."""
        self.check_owner()
        for path in self._found():
            if int(path.name.removeprefix(PREFIX)) > step:
                shutil.rmtree(path, ignore_errors=True)
        return self.newest()

    def _set_aside(self, path: Path) -> Path:
        """Rename a damaged checkpoint so that it is ignored; only the last such one is kept."""
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
                raise ValueError(f"{name} does not match its hash")
        state = read_json(path / STATE, finite=False)
        if type(state["step"]) is not int or path.name != _name(state["step"]):
            raise ValueError(f"it is of step {shown(repr(state['step']), 40)}")
        if not isinstance(state["identity"], dict):
            raise TypeError("its identity is not an object")
        return Checkpoint(
            path, state["step"], load_file(path / ADAPTER), load_file(path / OPTIMIZER), state
        )

    def _changed(self, found: Checkpoint) -> list[str]:
        """Return names of the inputs that differ between the run that wrote `found` and this
        one."""
        then = found.state["identity"]
        return sorted(k for k in {**then, **self.identity} if then.get(k) != self.identity.get(k))

    def clear(self) -> None:
        """Remove all checkpoints, including partly written ones."""
        shutil.rmtree(self.folder, ignore_errors=True)
