"""Atomic writing: files and folders are on disk and readable before they get their names."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from mixlora_exp.errors import UserError

PARTIAL = "partial"
"""Part of the name of an incomplete folder: `.NAME.partial-0123456789abcdef`."""
TRIES = 100
"""Attempts to create and lock a folder; losing one to another process's cleanup is rare."""


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(
    path: Path, chunks: Iterable[bytes], check: Callable[[Path], None] | None = None
) -> None:
    """Write a file atomically. `check`: called on the written file before the rename, may raise
    OSError or ValueError to cancel it. What a killed process left of the same file is removed.

    Raises:
        UserError: the file cannot be written; an existing one is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned_files(path)
        temporary, stream = _locked_file(path)
        try:
            with stream:
                stream.writelines(chunks)
                stream.flush()
                os.fsync(stream.fileno())
                if check is not None:
                    check(temporary)
                temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        # Windows cannot open a folder, and some network file systems cannot sync one.
        with contextlib.suppress(OSError):
            sync(path.parent)
    except (OSError, ValueError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot write {path}: {'the disk is full' if full else reason}; nothing was recorded"
        ) from error


def _locked_file(path: Path) -> tuple[Path, BinaryIO]:
    """Return a new, hidden file next to `path`, open for writing and locked as long as it is
    open."""
    for _ in range(TRIES):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        stream = temporary.open("xb")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()  # Another process considers it abandoned and is about to remove it.
            continue
        except OSError:
            pass  # File systems without locks are tolerated.
        if os.fstat(stream.fileno()).st_nlink:
            return temporary, stream
        stream.close()  # Another process considered it abandoned and removed it.
    raise OSError(errno.EAGAIN, "others removed each new file before it was locked", str(path))


def _remove_abandoned_files(path: Path) -> None:
    """Remove incomplete files of processes that have ended."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    for left in [other for other in path.parent.iterdir() if name.fullmatch(other.name)]:
        with contextlib.suppress(OSError):
            # A FIFO would wait for who reads it. To write, as NFS locks nothing else exclusively.
            stream = os.open(left, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(stream)


def settle(folder: Path) -> None:
    """Flush a folder of files to disk, and give them the default permissions of new files.

    safetensors creates files that only their owner can read, but other users may resume a run.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode)
            sync(path)
    sync(folder)


@contextlib.contextmanager
def publishing(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new, empty folder to write to, which is renamed to `folder` if the block succeeds.

    It is next to `folder`, under a unique hidden name, and is flushed to disk before the rename. If
    the block raises, it is removed; the remains of a killed process are removed when the same
    folder is published again. If several processes publish a folder at once, the first one wins.
    `replace`: remove an existing folder first, if only one process at a time writes it.

    Raises:
        FileExistsError: `folder` exists at the beginning or at the end of the block.
        OSError: the folder cannot be written.
    """
    if os.path.lexists(folder) and not replace:
        raise _taken(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    partial, lock = _locked_folder(folder)
    try:
        yield partial
        settle(partial)
        if replace:
            shutil.rmtree(folder, ignore_errors=True)
        elif os.path.lexists(folder):
            # A rename would silently replace an empty folder.
            raise _taken(folder)
        try:
            os.rename(partial, folder)
        except OSError as error:
            raise _taken(folder) if os.path.lexists(folder) else error from None
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _taken(folder: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "it already exists", str(folder))


def _locked_folder(folder: Path) -> tuple[Path, int]:
    """Return a new folder next to `folder`, and the file descriptor that holds its lock.

    The system releases the lock when the process ends. File systems without locks are tolerated.

    Raises:
        OSError: the folder cannot be created, or was removed each time before it was locked.
    """
    for _ in range(TRIES):
        partial = folder.with_name(f".{folder.name}.{PARTIAL}-{secrets.token_hex(8)}")
        partial.mkdir()
        try:
            lock = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue  # Another process considered it abandoned and removed it.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # It is about to.
        except OSError:
            return partial, lock
        else:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(partial), os.fstat(lock)):
                    return partial, lock
        os.close(lock)
    raise OSError(errno.EAGAIN, "others removed each new folder before it was locked", str(partial))


def _remove_abandoned(folder: Path) -> None:
    """Remove incomplete folders of processes that have ended."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.{PARTIAL}-[0-9a-f]{{16}}")
    left: list[Path] = []
    with contextlib.suppress(OSError):
        left = [path for path in folder.parent.iterdir() if name.fullmatch(path.name)]
    for path in left:
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass  # Its process is alive, or its state is unknown.
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)
