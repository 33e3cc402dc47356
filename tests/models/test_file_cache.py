"""A file is read again when it changed, and only then."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from opens import opens_below

from mixlora_exp.models.file_cache import LARGE, SETTLED, content


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_bytes(b"one")
    time.sleep(2 * SETTLED / 1e9)
    return tmp_path / "config.json"


def test_an_unchanged_file_is_read_once(file: Path) -> None:
    with opens_below(file.parent) as opened:
        assert [content(file) for _ in range(3)] == [b"one"] * 3
    assert opened == {"config.json": 1}


def replaced(file: Path) -> None:
    (file.parent / "new").write_bytes(b"two")
    os.replace(file.parent / "new", file)


def with_its_old_time(file: Path) -> None:
    before = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [lambda f: f.write_bytes(b"two"), replaced, with_its_old_time])
def test_a_change_of_the_same_size_shows_at_once(
    change: Callable[[Path], object], file: Path
) -> None:
    assert content(file) == b"one"
    change(file)
    assert content(file) == b"two"
    file.write_bytes(b"six")  # Perhaps within the same tick of the file system's clock.
    assert content(file) == b"six"


def test_a_missing_file_is_no_memory(file: Path) -> None:
    assert content(file) == b"one"
    file.unlink()
    with pytest.raises(FileNotFoundError):
        content(file)


def test_a_large_file_is_not_kept(file: Path) -> None:
    file.write_bytes(bytes(LARGE + 1))
    time.sleep(2 * SETTLED / 1e9)
    with opens_below(file.parent) as opened:
        assert len(content(file)) == len(content(file)) == LARGE + 1
    assert opened == {"config.json": 2}
