"""The files of a run: loose in its output folder, or packed into one file, `NAME.zip`.

A packed run is a plain ZIP file with `record.json`, `predictions/<task>.<protocol>.jsonl` and maybe
`forced.json`, byte for byte as the run wrote them, so that the hashes in the record still hold and
any tool opens it (`unzip -p NAME.zip record.json`); `scripts/show.py` prints it. The 91 runs
committed first took 15.7 MB in 404 files and take 3.5 MB in 91; the tables take as long as before.
`.jsonl.gz` would be 3.4 MB, but unpacked up to the part that is wanted. Parquet for the predictions
would be 2.7 MB with the record, but keeps neither the bytes that are hashed nor its own from one
version of its writer to the next.

Written with fixed times, order and attributes: same content, same file (of one zlib; others may
compress otherwise, which changes no content). Read in memory, by exact names, each file within
`system.untrusted`'s limit before it is unpacked; nothing is ever written to a path from inside.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from mixlora_exp.errors import shown
from mixlora_exp.system.durable import write_whole
from mixlora_exp.system.untrusted import LIMIT, file_limit, line_limit, read_bytes, refuse_links

RECORD = "record.json"
FORCED = "forced.json"
"""Beside a record that was collected although something speaks against it: what that is."""
PACKED = ".zip"
MOST = 1000
"""Files in a packed run; eight tasks under four protocols are 33."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED = 0x1
DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError,
    OverflowError,
)  # fmt: skip
"""What `zipfile` raises of a file that is none, is cut off, or was made by hand."""


def record_paths(folder: Path) -> list[Path]:
    """Where the records of the runs in `folder` stand, by name: `NAME.zip` or `NAME/record.json`,
    the packed one first where there are both. Hidden names are what is being written."""
    found = [*folder.glob(f"*{PACKED}"), *folder.glob(f"*/{RECORD}")]
    shown = [path for path in found if not name_of(path).startswith(".")]
    return sorted(shown, key=lambda path: (name_of(path), path.suffix != PACKED))


def name_of(path: Path) -> str:
    """The name of the run whose record stands at `path`."""
    return path.stem if path.suffix == PACKED else path.parent.name


def read_file(path: Path, name: str) -> bytes:
    """A file of the run whose record stands at `path`, by its name in the run's folder.

    Raises:
        OSError: it cannot be read, or is not there.
        ValueError: it is a link or lies behind one, is no regular file, is too large, or is packed
            in a file that is damaged.
    """
    if path.suffix != PACKED:
        refuse_links(path.parent / name, path.parent)
        return read_bytes(path.parent / name)
    refuse_links(path, path)
    try:
        with _opened(path) as archive:
            return _unpacked(archive, name)
    except DAMAGED as error:
        raise ValueError(f"the packed file is damaged ({shown(str(error), 100)})") from error


def has_file(path: Path, name: str) -> bool:
    """Whether the run whose record stands at `path` has such a file, of whatever content."""
    if path.suffix != PACKED:
        return (path.parent / name).is_file()
    try:
        with _opened(path) as archive:
            return name in archive.namelist()
    except (OSError, ValueError, *DAMAGED):
        return False


def pack(path: Path, files: Mapping[str, bytes]) -> None:
    """Write files of a run, by their names in its folder, as one packed file. It gets its name
    after it was read back and held what it should; a process that is killed before leaves a hidden
    file that no reader looks at.

    Raises:
        UserError: it cannot be written, or was read back otherwise.
    """
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        # The record first: it is what is looked at.
        for name in sorted(files, key=lambda name: (name != RECORD, name)):
            # 1980 is where ZIP's time begins; system and attributes would be this machine's.
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[name], compresslevel=9)

    def read_back(written: Path) -> None:
        with _opened(written) as archive:
            held = {name: _unpacked(archive, name) for name in archive.namelist()}
        if held != files:
            raise OSError("what was read back is not what was written")

    write_whole(path, [stream.getvalue()], check=read_back)


def _opened(path: Path) -> zipfile.ZipFile:
    # What lists a file takes many times its bytes there once it is read.
    content = read_bytes(path, line_limit())
    archive = zipfile.ZipFile(io.BytesIO(content))
    names = archive.namelist()
    if len(names) > MOST or len(set(names)) < len(names):
        raise ValueError(f"the packed file lists more than {MOST} files, or one of them twice")
    return archive


def _unpacked(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        entry = archive.getinfo(name)
    except KeyError:
        raise FileNotFoundError(2, "it is not in the packed file", name) from None
    if entry.compress_type not in METHODS or entry.flag_bits & ENCRYPTED:
        raise ValueError(f"{name} is packed in a way that no run is")
    if entry.file_size > file_limit():
        raise ValueError(
            f"{name} has more than {file_limit() / 2**20:g} MiB; {LIMIT}=N (MiB a file) allows more"
        )
    with archive.open(entry) as stream:
        # Not `read()`: that unpacks all there is before it cuts it to the size that is stated.
        content = stream.read(entry.file_size + 1)
    if len(content) != entry.file_size:
        raise ValueError(f"{name} is cut off")
    return content
