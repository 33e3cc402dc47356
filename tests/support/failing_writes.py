"""Lets one call of a process that writes to a folder fail, be cut short, or be its last.

Calls are counted in their order: opening a file for writing, writing to it, syncing, renaming,
linking, creating and removing files and folders, and safetensors' and tokenizers' own writing of a
whole file.

Outside of it are: the files of locks, which a thread writes; calls relative to a folder's
descriptor (`dir_fd`), as `shutil.rmtree` makes them; `os.write` to a descriptor; and the single
writes inside safetensors and tokenizers, whose file fails as a whole.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import pathlib
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

WAYS = ("EIO", "ENOSPC", "short", "SIGKILL")
RENAMING = ("rename", "replace", "link")
PATHS = ("mkdir", "unlink", "remove", "rmdir", "chmod", "truncate")


@dataclass
class Shim:
    """Counts the writing calls of this process below `folder`; that of `number` (from 1) goes the
    way `way`. `calls`: what they were."""

    folder: str
    number: int = 0
    way: str = "EIO"
    notes: str | None = None
    """A file to which each call is appended, for it may be the last."""
    calls: list[str] = field(default_factory=list)

    def meets(self, name: str, path: Any) -> bool:
        """Note a call; returns whether it is the one."""
        if not isinstance(path, str | os.PathLike):
            return False
        text = os.path.abspath(os.fsdecode(path))
        # Locks are written by another thread, at moments of its own.
        if not text.startswith(self.folder) or "/lock" in text or "/.lock" in text:
            return False
        self.calls.append(f"{name} {text.removeprefix(self.folder)}")
        if self.notes is not None:
            descriptor = REAL_DESCRIPTOR(self.notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            REAL_WRITE(descriptor, f"{self.calls[-1]}\n".encode())
            os.close(descriptor)
        return len(self.calls) == self.number

    def fail(self, path: Any) -> None:
        number = getattr(errno, self.way if self.way.startswith("E") else "ENOSPC")
        raise OSError(number, os.strerror(number), os.fsdecode(path))

    def around(self, name: str, path: Any, act: Callable[[], Any]) -> Any:
        if not self.meets(name, path):
            return act()
        if self.way == "SIGKILL":
            # Also after a call that fails by itself, such as `mkdir` of what is there.
            with contextlib.suppress(OSError):
                act()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.fail(path)


REAL_OPEN, REAL_DESCRIPTOR, REAL_WRITE = io.open, os.open, os.write


class _Raw(io.FileIO):
    """A file opened for writing whose writes are counted."""

    shim: Shim

    def write(self, data: Any) -> int:
        if not self.shim.meets("write", self.name):
            return super().write(data)
        view = memoryview(data).cast("B")
        if self.way_is("SIGKILL"):
            super().write(view)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.way_is("short"):
            # What a system call may always do: the caller has to write the rest.
            return super().write(view[: max(1, len(view) // 2)])
        return self.shim.fail(self.name)

    def way_is(self, way: str) -> bool:
        return self.shim.way == way


def install(shim: Shim) -> None:
    """Replace the functions for the rest of this process."""

    def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        writes = set(mode) & set("wax+")
        if not writes or not isinstance(file, str | os.PathLike) or kwargs.get("opener"):
            return REAL_OPEN(file, mode, buffering, *args, **kwargs)

        def act() -> Any:
            raw = _Raw(file, mode.replace("b", "").replace("t", ""))
            raw.shim = shim
            binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return binary
            named = dict(zip(("encoding", "errors", "newline"), args, strict=False)) | kwargs
            named = {k: v for k, v in named.items() if k in ("encoding", "errors", "newline")}
            named["encoding"] = named.get("encoding") or "utf-8"
            text = io.TextIOWrapper(binary, **named)
            text.mode = mode
            return text

        return shim.around("open", file, act)

    builtins.open = io.open = opened
    if hasattr(pathlib, "io"):
        pathlib.io.open = opened

    def descriptor_of(path: Any, flags: int, *args: Any, **more: Any) -> int:
        def act() -> int:
            return REAL_DESCRIPTOR(path, flags, *args, **more)

        if not flags & (os.O_CREAT | os.O_TRUNC) or more.get("dir_fd") is not None:
            return act()
        return shim.around("os.open", path, act)

    os.open = descriptor_of
    for name in RENAMING:
        real = getattr(os, name)

        def renamed(
            source: Any, target: Any, *args: Any, _name=name, _real=real, **more: Any
        ) -> Any:
            return shim.around(_name, target, lambda: _real(source, target, *args, **more))

        setattr(os, name, renamed)
    for name in PATHS:
        real = getattr(os, name)

        def changed(path: Any, *args: Any, _name=name, _real=real, **more: Any) -> Any:
            if more.get("dir_fd") is not None:
                return _real(path, *args, **more)
            return shim.around(_name, path, lambda: _real(path, *args, **more))

        setattr(os, name, changed)
    sync = os.fsync

    def synced(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        path = os.readlink(f"/proc/self/fd/{number}")
        shim.around("fsync", path, lambda: sync(descriptor))

    os.fsync = synced

    serialize = safetensors.torch.serialize_file

    def serialized(tensors: Any, filename: Any, *args: Any, **more: Any) -> None:
        try:
            shim.around("save", filename, lambda: serialize(tensors, filename, *args, **more))
        except OSError as error:
            # As safetensors does: half a file is there.
            serialize(tensors, filename, *args, **more)
            os.truncate(filename, Path(filename).stat().st_size // 2)
            raise SafetensorError(f"I/O error: {error.strerror}") from None

    safetensors.torch.serialize_file = serialized
    # Imported here: most of what is tried reads no tokenizer.
    from transformers import TokenizersBackend

    save = TokenizersBackend._save_pretrained

    def saved(self: Any, save_directory: Any, *args: Any, **more: Any) -> Any:
        path = Path(save_directory) / "tokenizer.json"
        try:
            return shim.around("save", path, lambda: save(self, save_directory, *args, **more))
        except OSError as error:
            # As tokenizers does: half a file is there, and the exception has no type of its own.
            save(self, save_directory, *args, **more)
            os.truncate(path, path.stat().st_size // 2)
            raise Exception(f"{error.strerror} (os error {error.errno})") from None

    TokenizersBackend._save_pretrained = saved
