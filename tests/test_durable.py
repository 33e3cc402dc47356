"""Folders that appear whole or not at all, whoever else writes them or is killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixlora_exp.system import durable
from mixlora_exp.system.durable import publishing, write_whole

WRITER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from mixlora_exp.system.durable import publishing

    with publishing(Path(sys.argv[1])) as new:
        (new / "weights").write_text(sys.argv[2])
        print(new, flush=True)
        sys.stdin.readline()
    print("published", flush=True)
    """
)


def writer(folder: Path, text: str) -> tuple[subprocess.Popen[str], Path]:
    """A process that has written to its new folder, and waits for a line before it renames it."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), text],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return process, Path(process.stdout.readline().strip())


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "here"
    with publishing(folder) as new:
        assert new.parent == folder.parent
        assert new.name.startswith(".here.partial-")
        (new / "file").write_text("a")
        (new / "file").chmod(0o600)
        assert not folder.exists()
    assert (folder / "file").read_text() == "a"
    # safetensors makes files for its owner alone.
    assert (folder / "file").stat().st_mode & 0o777 == folder.stat().st_mode & 0o666
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_nothing_is_left_of_what_failed(stop: type[BaseException], tmp_path: Path) -> None:
    def half(new: Path) -> None:
        (new / "file").write_text("half")
        raise stop

    with pytest.raises(stop), publishing(tmp_path / "here") as new:
        half(new)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link to nothing"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_has_the_name_stays(kind: str, when: str, tmp_path: Path) -> None:
    folder = tmp_path / "here"

    def take() -> None:
        if "folder" in kind:
            folder.mkdir()
        if kind == "folder":
            (folder / "theirs").write_text("b")
        if kind == "file":
            folder.write_text("b")
        if kind == "link to nothing":
            folder.symlink_to(tmp_path / "nothing")

    if when == "before":
        take()
    with pytest.raises(FileExistsError, match="already exists"), publishing(folder):
        take()
    assert list(tmp_path.iterdir()) == [folder]
    if "folder" in kind:
        assert os.listdir(folder) == (["theirs"] if kind == "folder" else [])


def test_a_folder_is_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "old").write_text("b")
    with publishing(folder, replace=True) as new:
        (new / "new").write_text("a")
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_of_two_at_once_one_wins(tmp_path: Path) -> None:
    """Neither touches what the other writes."""
    folder = tmp_path / "here"
    (one, its_folder), (two, other_folder) = writer(folder, "one"), writer(folder, "two")
    assert its_folder != other_folder
    assert (its_folder / "weights").read_text() == "one"
    out, _ = two.communicate("\n")
    assert (two.returncode, out) == (0, "published\n")
    _, error = one.communicate("\n")
    assert one.returncode == 1
    assert "FileExistsError" in error.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert (folder / "weights").read_text() == "two"


def test_what_a_killed_one_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    (dead, left), (alive, kept) = writer(folder, "dead"), writer(folder, "alive")
    dead.send_signal(signal.SIGKILL)
    dead.communicate()
    assert left.is_dir()
    assert not folder.exists()
    other = tmp_path / ".there.partial-0123456789abcdef"
    other.mkdir()
    with pytest.raises(RuntimeError, match="stop"), publishing(folder):
        raise RuntimeError("stop")
    assert not left.exists()
    assert other.is_dir(), "of another folder's name"
    assert (kept / "weights").read_text() == "alive", "its process lives"
    alive.communicate("\n")
    assert alive.returncode == 0
    assert (folder / "weights").read_text() == "alive"


def test_a_link_under_a_left_over_s_name_is_not_followed(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").write_text("b")
    (tmp_path / ".here.partial-0123456789abcdef").symlink_to(theirs)
    with publishing(tmp_path / "here"):
        pass
    assert os.listdir(theirs) == ["file"]


@pytest.fixture
def cleaned_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Path]]:
    """Let another process's clean-up find the next so many new folders before they are locked."""

    def prepare(times: int) -> list[Path]:
        made: list[Path] = []
        mkdir = Path.mkdir

        def make(path: Path, *args: Any, **settings: Any) -> None:
            mkdir(path, *args, **settings)
            if f".{durable.PARTIAL}-" in path.name:
                made.append(path)
                if len(made) <= times:
                    durable._remove_abandoned(path.with_name("here"))
                    assert not path.exists()

        monkeypatch.setattr(Path, "mkdir", make)
        return made

    return prepare


def test_a_new_folder_that_another_process_cleans_up_is_made_again(
    cleaned_up: Callable[[int], list[Path]], tmp_path: Path
) -> None:
    made = cleaned_up(3)
    with publishing(tmp_path / "here") as new:
        (new / "file").write_text("a")
    assert len(made) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert (tmp_path / "here" / "file").read_text() == "a"


def test_folders_that_never_stay_are_one_error(
    cleaned_up: Callable[[int], list[Path]], tmp_path: Path
) -> None:
    made = cleaned_up(10**6)
    with (
        pytest.raises(OSError, match="others removed each new folder"),
        publishing(tmp_path / "here"),
    ):
        pass
    assert len(made) == durable.TRIES
    assert list(tmp_path.iterdir()) == []


def test_files_of_killed_writers_are_removed_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    left = tmp_path / ".a.zip.0123abcd.tmp"
    left.write_bytes(b"half")
    others = (tmp_path / ".b.zip.0123abcd.tmp", tmp_path / ".a.zip.tmp")
    for other in others:
        other.write_bytes(b"half")
    seen = []

    def meanwhile(temporary: Path) -> None:
        write_whole(tmp_path / "a.zip", [b"other"])
        seen.append(temporary.read_bytes())

    write_whole(tmp_path / "a.zip", [b"whole"], check=meanwhile)
    assert seen == [b"whole"]
    assert (tmp_path / "a.zip").read_bytes() == b"whole"
    assert not left.exists()
    assert all(other.exists() for other in others)


def test_a_new_file_that_another_process_is_about_to_remove_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has locked it, and not yet removed it."""
    real, taken = durable.fcntl.flock, []

    def flock(stream: Any, how: int) -> None:
        if not taken:
            taken.append(stream)
            raise BlockingIOError
        real(stream, how)

    monkeypatch.setattr(durable.fcntl, "flock", flock)
    names = ["0" * 8, "1" * 8]
    monkeypatch.setattr(durable.secrets, "token_hex", lambda _: names[bool(taken)])
    write_whole(tmp_path / "file", [b"whole"])
    assert taken[0].closed
    assert (tmp_path / "file").read_bytes() == b"whole"


@pytest.mark.parametrize("kind", ["FIFO", "link"])
def test_what_is_no_file_under_a_left_over_s_name_is_not_waited_for(
    kind: str, tmp_path: Path
) -> None:
    odd, elsewhere = tmp_path / ".file.0a1b2c3d.tmp", tmp_path / "elsewhere"
    elsewhere.write_text("x")
    os.mkfifo(odd) if kind == "FIFO" else odd.symlink_to(elsewhere)
    write_whole(tmp_path / "file", [b"whole"])
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert elsewhere.read_text() == "x"


def test_what_is_written_counts_whatever_fails_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a record would be there, and the run end with "nothing was recorded"."""

    def refused(self: Path, missing_ok: bool = False) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "unlink", refused)
    write_whole(tmp_path / "file", [b"whole"])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
