"""Files and folders that are on the disk, and readable for others, before they get their names."""

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

from mixlora_exp.errors import UserError

__all__ = ["publishing", "settle", "sync", "write_whole"]

PARTIAL = "partial"
"""Part of the name of a folder that is being written: `.NAME.partial-0123456789abcdef`."""
TRIES = 100
"""New folders that others may take away before they are locked; one after the other is unlikely."""


def sync(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(
    path: Path, chunks: Iterable[bytes], check: Callable[[Path], None] | None = None
) -> None:
    """Write a file that appears whole, or stays as it was. `check`: looks at the written file
    before it gets its name, and raises OSError or ValueError where that must not happen.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as stream:
                stream.writelines(chunks)
                stream.flush()
                os.fsync(stream.fileno())
            if check is not None:
                check(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        # Windows cannot open a folder, some network file systems cannot sync one.
        with contextlib.suppress(OSError):
            sync(path.parent)
    except (OSError, ValueError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot write {path}: {'the disk is full' if full else reason}; nothing was recorded"
        ) from error


def settle(folder: Path) -> None:
    """Write a folder of files to the disk, each with the permissions that new files have here.

    safetensors makes files that nobody else may read, and runs may be continued by others.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode)
            sync(path)
    sync(folder)


@contextlib.contextmanager
def publishing(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new, empty folder to write to, which gets the name `folder` once the block has ended well.

    It lies beside `folder`, under a hidden name that no other process uses, and is on the disk
    before it is renamed. If the block raises, nothing is left of it; what a process that was
    killed left is removed when the next one publishes the same folder. Of several that publish it
    at once, the first wins. With `replace`, a folder of that name is removed first: for folders
    that one process at a time writes.

    Raises:
        FileExistsError: something has the name already, when the block is entered or when it ends.
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
            # Renaming a folder replaces an empty one without a word.
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
    return FileExistsError(errno.EEXIST, "it exists already", str(folder))


def _locked_folder(folder: Path) -> tuple[Path, int]:
    """A new folder beside `folder`, and the descriptor that holds its lock.

    The lock ends with the process, however that ends. A file system without locks does without.

    Raises:
        OSError: the folder cannot be made, or was taken away each time before it was locked.
    """
    for _ in range(TRIES):
        partial = folder.with_name(f".{folder.name}.{PARTIAL}-{secrets.token_hex(8)}")
        partial.mkdir()
        try:
            lock = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue  # Another process took it for an abandoned one, and has removed it.
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
    """Remove the folders of processes that ended before they could rename or remove them."""
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
            pass  # Its process lives, or nothing can tell.
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)
