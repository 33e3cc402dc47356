"""The files of a run: loose in its output folder, or packed into one file, `NAME.zip`.

A packed run is a plain ZIP file with `record.json`, `predictions/<task>.<protocol>.jsonl` and
optionally `forced.json`, byte for byte as the run wrote them: the hashes in the record still hold,
and any tool opens it (`unzip -p NAME.zip record.json`); `scripts/show.py` prints it. The first 91
committed runs took 15.7 MB in 404 files, and packed 3.5 MB in 91; building tables takes as long as
before. `.jsonl.gz` would take 3.4 MB, but must be decompressed up to the wanted part. Parquet
would take 2.7 MB, but preserves neither the hashed bytes nor, between writer versions, its own.

Packing uses fixed times, order and attributes: the same content gives the same file (with the same
zlib). Reading is in memory, by exact names, each file within the limit of `system.untrusted` before
it is unpacked; no path from inside a ZIP file is ever written to.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from mixlora_exp.config.paths import OWN_RESULTS, RESULTS
from mixlora_exp.errors import UserError, shown
from mixlora_exp.system.durable import write_whole
from mixlora_exp.system.untrusted import LIMIT, file_limit, line_limit, read_bytes, refuse_links

RECORD = "record.json"
FORCED = "forced.json"
"""File next to a record that was collected with --force despite objections, which it lists."""
PACKED = ".zip"
MOST = 1000
"""Maximum number of files in a packed run; eight tasks under four protocols have 33."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED = 0x1
DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError,
    OverflowError,
)  # fmt: skip
"""Exceptions of `zipfile` for files that are not ZIP files, truncated, or manipulated."""


def record_paths(folder: Path) -> list[Path]:
    """Return paths of the records in `folder`, sorted by name: `NAME.zip` or `NAME/record.json`,
    the packed one first if both exist. Hidden names are skipped: they are still being written."""
    found = [*folder.glob(f"*{PACKED}"), *folder.glob(f"*/{RECORD}")]
    shown = [path for path in found if not name_of(path).startswith(".")]
    return sorted(shown, key=lambda path: (name_of(path), path.suffix != PACKED))


def find_record(run: str) -> Path:
    """Return the record of a run that is given as a packed run, a record, a folder, or by its name
    among the user's collected runs or the project's.

    Raises:
        UserError: there is none.
    """
    given = Path(run).expanduser()
    kept = [root / "runs" / f"{run}{PACKED}" for root in (OWN_RESULTS, RESULTS)]
    whole = given.suffix == PACKED or given.name == RECORD
    for path in (given / RECORD, *([given] if whole else []), *kept):
        if path.is_file():
            return path
    raise UserError(
        f"{run} is not a run: give its folder, its packed file, or a collected one's name"
    )


def name_of(path: Path) -> str:
    """Return the name of the run whose record is at `path`."""
    return path.stem if path.suffix == PACKED else path.parent.name


class RunFiles:
    """The files of the run whose record is at `path`, by their names in the run's folder. Each file
    is read from disk once, a packed run as a whole, and stays in memory as long as this object."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._contents: dict[str, bytes] = {}

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            OSError: it cannot be read or does not exist.
            ValueError: it is a link or in a linked folder, is not a regular file, is too large, or
                the packed run is damaged.
        """
        if name not in self._contents:
            self._contents[name] = self._read(name)
        return self._contents[name]

    def has(self, name: str) -> bool:
        """Return whether the run has a file of this name."""
        if self.path.suffix != PACKED:
            return (self.path.parent / name).is_file()
        try:
            return name in self._archive.namelist()
        except (OSError, ValueError, *DAMAGED):
            return False

    def _read(self, name: str) -> bytes:
        folder = self.path.parent
        if self.path.suffix != PACKED:
            refuse_links(folder / name, folder)
            return read_bytes(folder / name)
        refuse_links(self.path, self.path)
        try:
            return _unpacked(self._archive, name)
        except DAMAGED as error:
            raise ValueError(f"the packed file is damaged ({shown(str(error), 100)})") from error

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        return _opened(self.path)


def pack(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a packed run from its files, by their names in the run's folder.

    The file gets its final name after it was read back and compared; a killed process leaves only a
    hidden file, which readers ignore.

    Raises:
        UserError: the file cannot be written, or differs when read back.
    """
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        # The record first, since it is read most often.
        for name in sorted(files, key=lambda name: (name != RECORD, name)):
            # Constants instead of this machine's time (ZIP's begins in 1980), system, attributes.
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[name], compresslevel=9)

    def read_back(written: Path) -> None:
        with _opened(written) as archive:
            held = {name: _unpacked(archive, name) for name in archive.namelist()}
        if held != files:
            raise OSError("the file read back differs from what was written")

    write_whole(path, [stream.getvalue()], check=read_back)


def _opened(path: Path) -> zipfile.ZipFile:
    # The limit is low, because a directory entry takes many times its bytes in memory.
    content = read_bytes(path, line_limit())
    archive = zipfile.ZipFile(io.BytesIO(content))
    names = archive.namelist()
    if len(names) > MOST or len(set(names)) < len(names):
        raise ValueError(f"the packed file lists more than {MOST} files, or a file twice")
    return archive


def _unpacked(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        entry = archive.getinfo(name)
    except KeyError:
        raise FileNotFoundError(2, "it is not in the packed file", name) from None
    if entry.compress_type not in METHODS or entry.flag_bits & ENCRYPTED:
        raise ValueError(f"{name} is encrypted or compressed with an unsupported method")
    if entry.file_size > file_limit():
        raise ValueError(
            f"{name} has more than {file_limit() / 2**20:g} MiB; {LIMIT}=N (MiB per file) allows "
            "more"
        )
    with archive.open(entry) as stream:
        # `read()` without a size would unpack all data before checking the stated size.
        content = stream.read(entry.file_size + 1)
    if len(content) != entry.file_size:
        raise ValueError(f"{name} is truncated")
    return content
