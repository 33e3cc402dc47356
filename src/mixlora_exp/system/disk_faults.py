"""Failures of a disk, reported in one line: any read or write may meet one, and none is a bug."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from mixlora_exp.errors import UserError, shown

WAYS_OUT = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or ask for a larger quota",
    errno.EROFS: "name another folder",
    errno.EACCES: "change the permissions, or name another folder",
    errno.EPERM: "change the permissions, or name another folder",
    errno.EIO: "check the disk",
    errno.ENXIO: "check the disk",
    errno.ESTALE: "check the network file system",
    errno.ENAMETOOLONG: "give a shorter one",
    errno.ENOTDIR: "a part of this path is a file: name another folder",
    errno.EEXIST: "remove it, or name another folder",
    errno.EISDIR: "a folder is where a file should be: remove it, or name another folder",
    errno.ELOOP: "its links form a circle",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs",
}
"""Ways out by the number of the error."""


def disk_fault(error: OSError) -> str | None:
    """Return one line with the file, the reason and the way out; None for other errors, which may
    be bugs or have a way out of their own."""
    if error.errno not in WAYS_OUT:
        return None
    if error.errno == errno.ENAMETOOLONG:
        reason = "this name is too long for a file"
    else:
        reason = error.strerror or str(error)
    named = error.filename2 or error.filename
    where = f"{shown(str(named), 160)}: " if named else ""
    return f"{where}{reason}: {WAYS_OUT[error.errno]}"


@contextlib.contextmanager
def convert_disk_faults(what: str) -> Iterator[None]:
    """Within this context failures of the disk become a `UserError` that begins with `what`."""
    try:
        yield
    except OSError as error:
        message = disk_fault(error)
        if message is None:
            raise
        raise UserError(f"{what}: {message}") from error
