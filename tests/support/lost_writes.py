"""Which states of a folder a power loss may leave: what was not synced may be missing.

A file holds what it held at its last sync, what it holds now, half of that, or as many zeros; a
folder has the entries of its last sync and any of the changes since. A rename is one change.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

Change = dict[str, int | None]
"""New entries of a folder: name -> inode, None where it was removed."""


@dataclass
class Disk:
    """The files below `root`, as they are and as far as they are on disk."""

    root: Path
    honoured: bool = True
    """False: as if nothing was ever synced."""
    now: dict[int, dict[str, int]] = field(default_factory=dict)
    """Entries of each folder by inode."""
    data: dict[int, bytes] = field(default_factory=dict)
    synced_data: dict[int, bytes] = field(default_factory=dict)
    synced: dict[int, dict[str, int]] = field(default_factory=dict)
    pending: dict[int, list[Change]] = field(default_factory=dict)
    kept_open: dict[int, int] = field(default_factory=dict)
    """Descriptors, so that no inode of a removed file is used again."""

    def look(self, *, at_once: bool = False) -> None:
        """Note what changed; `at_once`: as one change of each folder.

        A lock's heartbeat, a thread of its own, may remove a file meanwhile: it is gone then.
        """
        met = set()
        for folder, _, files in os.walk(self.root):
            inode = self._inode(folder)
            met.add(inode)
            entries = {}
            for name in os.listdir(folder):
                with contextlib.suppress(FileNotFoundError):
                    entries[name] = os.lstat(os.path.join(folder, name)).st_ino
            before = self.now.get(inode, {})
            names = entries.keys() | before.keys()
            change: Change = {n: entries.get(n) for n in names if entries.get(n) != before.get(n)}
            parts = [change] if at_once else [{name: new} for name, new in change.items()]
            self.pending.setdefault(inode, []).extend(part for part in parts if part)
            self.now[inode] = entries
            for name in files:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    self.data[self._inode(path)] = Path(path).read_bytes()

        for inode in self.now.keys() - met:
            # What was in a removed folder was removed before it, one after the other.
            gone, self.now[inode] = self.now[inode], {}
            self.pending.setdefault(inode, []).extend({name: None} for name in gone)

    def all_is_on_disk(self) -> None:
        """Take everything that is there now as synced."""
        self.look()
        self.synced = {inode: dict(entries) for inode, entries in self.now.items()}
        self.synced_data = dict(self.data)
        self.pending.clear()

    def _inode(self, path: str) -> int:
        inode = os.stat(path).st_ino
        if inode not in self.kept_open:
            self.kept_open[inode] = os.open(path, os.O_RDONLY)
        return inode

    def close(self) -> None:
        for descriptor in self.kept_open.values():
            os.close(descriptor)

    def sync(self, descriptor: int) -> None:
        self.look()
        inode = os.fstat(descriptor).st_ino
        if not self.honoured:
            return
        if inode in self.now:
            self.synced[inode] = dict(self.now[inode])
            self.pending[inode] = []
        elif inode in self.data:
            self.synced_data[inode] = self.data[inode]

    def after_power_loss(self, draw: Random, target: Path) -> None:
        """Write one of the states that are possible now into the new folder `target`."""
        lost = draw.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        self._write(os.stat(self.root).st_ino, target, draw, lost)

    def _write(self, inode: int, target: Path, draw: Random, lost: float) -> None:
        target.mkdir()
        entries = dict(self.synced.get(inode, {}))
        for change in self.pending.get(inode, []):
            if draw.random() >= lost:
                for name, new in change.items():
                    entries.pop(name, None)
                    if new is not None:
                        entries[name] = new
        for name, inner in entries.items():
            if inner in self.now:
                self._write(inner, target / name, draw, lost)
                continue
            now, old = self.data.get(inner, b""), self.synced_data.get(inner, b"")
            held = (
                now
                if now == old or draw.random() >= lost
                else draw.choice((old, now[: len(now) // 2], bytes(len(now))))
            )
            (target / name).write_bytes(held)


def watch(disk: Disk, patch: Callable[..., None], crashed: Callable[[], None]) -> None:
    """Let `disk` see every sync and rename of this process below its root, and call `crashed`
    before each and after it: there the power may be lost. What `crashed` itself does is not seen.
    `patch(owner, name, value)` replaces a function."""
    sync, moves = os.fsync, {name: getattr(os, name) for name in ("rename", "replace")}
    root, busy = str(disk.root), False

    def around(path: str, act: Callable[[], None], note: Callable[[], None]) -> None:
        nonlocal busy
        if busy or not path.startswith(root) or "/lock" in path:
            act()
            return
        busy = True
        try:
            disk.look()
            crashed()
            act()
            note()
            crashed()
        finally:
            busy = False

    def synced(file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        path = os.readlink(f"/proc/self/fd/{number}")
        around(path, lambda: sync(number), lambda: disk.sync(number))

    def mover(name: str) -> Callable[..., None]:
        def moved(source: Any, target: Any, **more: Any) -> None:
            move = functools.partial(moves[name], source, target, **more)
            around(os.fspath(target), move, lambda: disk.look(at_once=True))

        return moved

    patch(os, "fsync", synced)
    for name in moves:
        patch(os, name, mover(name))
