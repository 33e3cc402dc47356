"""A failing disk ends a command in one line, whichever write it meets."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

from mixlora_exp.cli.main import main
from mixlora_exp.cli.train import execute
from mixlora_exp.config.paths import RESULTS
from mixlora_exp.errors import UserError
from mixlora_exp.results import figures
from mixlora_exp.runs.ownership import FILES, FOLDERS
from mixlora_exp.runs.state import Run
from mixlora_exp.system.disk_faults import convert_disk_faults
from mixlora_exp.system.exit_codes import guarded

SMALL = ["experiment=smoke", "data.train_limit=4", "trainer.max_steps=1", "method=lora",
         "evaluation.batch_check=0"]  # fmt: skip


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As if the disk had room for files of `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fault(number: int, path: object = None) -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, ["No space left", "free space"]), (errno.EROFS, ["Read-only", "another"]),
     (errno.EIO, ["Input/output error", "check the disk"]), (errno.EACCES, ["permissions"]),
     (errno.ENAMETOOLONG, ["too long for a file", "shorter"]),
     (errno.EEXIST, ["File exists", "remove it"]), (errno.EISDIR, ["directory", "remove it"])],
)  # fmt: skip
def test_a_command_reports_it_in_one_line(number: int, words: list[str], capsys) -> None:
    def command(_: object) -> None:
        raise fault(number, "/a/\x1b[2Jb")

    assert guarded(command, []) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: /a/\\x1b[2Jb: ")
    assert told.count("\n") == 1
    assert all(word in told for word in words)


def test_what_may_be_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(FileNotFoundError), convert_disk_faults("x=1"):
        raise fault(errno.ENOENT, "/a")
    told = pytest.raises(UserError, match="x=1: No space left on device: free space there")
    with told, convert_disk_faults("x=1"):
        raise fault(errno.ENOSPC)


@pytest.mark.parametrize(
    "together",
    [pytest.param(False, id="alone"), pytest.param(True, id="together", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [(os, "mkdir", "trainer"), (Path, "unlink", "failure.json")],
    ids=["mkdir RUN/trainer", "unlink failure.json"],
)
def test_a_run_on_a_failing_disk(
    owner: object, name: str, broken: str, together: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys
) -> None:  # fmt: skip
    entries = ["adapters=[lora,{method:dora}]"] if together else []
    argv = [*SMALL, *entries, f"output_dir={tmp_path}"]
    real: Callable[..., object] = getattr(owner, name)

    def failing(path, *args, **kwargs):
        if Path(path).name == broken:
            raise fault(errno.EIO, str(path))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        code = execute(argv)
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert code == 2
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Input/output error: check the disk" in errors[0]
    assert not list(tmp_path.glob("*/record.json"))
    assert execute(argv) == 0
    assert len(list(tmp_path.glob("*/record.json"))) == 1 + together


@pytest.fixture(scope="module")
def run_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of the folder of the run `SMALL`."""
    folder = tmp_path_factory.mktemp("out")
    assert execute([*SMALL, f"output_dir={folder}"]) == 0
    (record,) = folder.glob("*/record.json")
    return record.parent.name


@pytest.mark.parametrize("kind", ["other", "dangling link"])
@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
def test_something_else_in_a_runs_place(
    name: str, kind: str, run_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """It is refused before a model is loaded, and stays as it was."""
    path = tmp_path / run_name / name
    path.parent.mkdir()
    if kind == "dangling link":
        path.symlink_to(tmp_path / "absent")
    elif name in FOLDERS:
        path.write_text("mine")
    else:
        path.mkdir()

    def loaded(_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Run, "load_base", loaded)
    assert execute([*SMALL, f"output_dir={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert f"{path} is not a" in told
    assert "remove it, or name another output_dir" in told
    assert [entry.name for entry in path.parent.iterdir()] == [name]


def test_a_path_that_is_too_long_as_a_whole(tmp_path: Path, capsys) -> None:
    long = tmp_path.joinpath(*(25 * [200 * "a"]))
    assert execute([*SMALL, f"output_dir={long}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert "too long for a file" in told


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root of results that holds one run of the project's, in its folder."""
    root = tmp_path_factory.mktemp("results")
    (root / "bench").mkdir()
    packed = next((RESULTS / "runs").glob("*.zip"))
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(root / "runs" / packed.stem)
    return root


@pytest.mark.parametrize(
    "words",
    [("collect", "--source={runs}", "--results={disk}", "--force"),
     ("tables", "--results={root}", "--output={disk}/tables"),
     ("report", "--results={root}", "--output={disk}/page"),
     ("report", "--results={root}", "--short={disk}/page.md"),
     ("figures", "--results={root}", "--output={disk}/figures")],
    ids=" ".join,
)  # fmt: skip
def test_a_disk_that_is_read_only(words, one_run: Path, read_only: Path, capsys) -> None:
    places = {"root": one_run, "runs": one_run / "runs", "disk": read_only}
    assert main([word.format(**places) for word in words]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if "Read-only" in line or "cannot" in line]
    assert str(read_only) in line


@pytest.mark.parametrize(
    "words",
    [("report", "--output={out}"), ("report", "--short={out}/page.md"),
     ("figures", "--output={out}"), ("tables", "--output={out}")],
    ids=" ".join,
)  # fmt: skip
def test_what_is_made_of_records_on_a_full_disk(
    words, one_run: Path, tmp_path: Path, capsys
) -> None:
    assert font_manager.fontManager  # Its cache is written by who imports it first.
    argv = [word.format(out=tmp_path) for word in (*words, f"--results={one_run}")]
    with largest_file(100):
        assert main(argv) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert "File too large" in told
    # Nothing half-written has a name that anybody reads.
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]
    assert main(argv) == 0


def test_packing_in_place_on_a_disk_that_is_read_only(
    one_run: Path, tmp_path: Path, capsys
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", disk]
    made = subprocess.run(mount, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"this user may mount no file system: {made.stderr.strip()}")
    try:
        shutil.copytree(one_run, disk, dirs_exist_ok=True)
        words = ["collect", f"--source={disk / 'runs'}", f"--results={disk}", "--force"]
        before = sorted(disk.rglob("*"))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert main(words) == 2
        told = capsys.readouterr().err
        assert "Traceback" not in told
        assert "Read-only" in told
        assert sorted(disk.rglob("*")) == before
        # Packed before, but what was packed could not be removed.
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        kept = shutil.copytree(one_run / "runs", tmp_path / "kept")
        assert main(words) == 0
        shutil.copytree(kept, disk / "runs", dirs_exist_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        capsys.readouterr()
        assert main(words) == 2
        told = capsys.readouterr().err
        assert "Traceback" not in told
        assert "Read-only" in told
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    figures.save(Figure, tmp_path, "one")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["one.png", "one.svg"]
    with largest_file(100):
        for name in ("one", "another"):
            with pytest.raises(UserError, match=f"cannot write .*{name}.png: File too large"):
                figures.save(Figure, tmp_path, name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
