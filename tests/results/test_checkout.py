"""The state of the code: what of a checkout makes a result one that no commit gives."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mixlora_exp.records import checkout as checkout_module
from mixlora_exp.records.checkout import git_state

FILES = (
    "src/pack/code.py", "src/pack/page.html", "conf/task/own.yaml", "train.py", "scripts/tool.py",
    "docs/text.md", "tests/test_code.py", "results/table.csv", "pyproject.toml",
)  # fmt: skip


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


def write(path: Path, text: str = "x = 1\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name in FILES:
        write(root / name)
    write(root / ".gitignore", "outputs/\n__pycache__/\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


def test_a_clean_checkout(checkout: Path) -> None:
    found = git_state(checkout)
    assert found["dirty"] is False
    assert len(found["commit"]) == 40
    assert set(found) == {"commit", "dirty"}


@pytest.mark.parametrize(
    "name",
    ["data/arc_e/test.jsonl", "notes.md", "conf/task/riddles.yaml", "conf/experiment/mine.yaml",
     "look.py", "scripts/look.py", "results/runs/a/record.json", "src/pack/notes.txt",
     "outputs/a/record.json", "src/pack/__pycache__/code.py"],
)  # fmt: skip
def test_new_files_that_no_run_is_made_of_change_nothing(name: str, checkout: Path) -> None:
    before = git_state(checkout)
    write(checkout / name, "anything\n")
    assert git_state(checkout) == before


@pytest.mark.parametrize(
    "name", ["docs/text.md", "tests/test_code.py", "results/table.csv", "src/pack/page.html",
             "pyproject.toml"]
)  # fmt: skip
def test_nor_do_changes_of_such_files(name: str, checkout: Path) -> None:
    before = git_state(checkout)
    write(checkout / name, "x = 2\n")
    assert git_state(checkout) == before


@pytest.mark.parametrize(
    "name", ["src/pack/code.py", "conf/task/own.yaml", "train.py", "scripts/tool.py"]
)
@pytest.mark.parametrize("staged", [False, True])
def test_changed_code_is_named_and_kept(name: str, staged: bool, checkout: Path) -> None:
    before = git_state(checkout)
    write(checkout / name, "x = 2\n")
    if staged:
        git(checkout, "add", ".")
    found = git_state(checkout)
    assert (found["commit"], found["dirty"]) == (before["commit"], True)
    assert found["changed"] == [name]
    assert f"+++ b/{name}" in found["diff"]
    assert "-x = 1\n+x = 2" in found["diff"]
    # Put back, it is the commit's again.
    write(checkout / name)
    git(checkout, "add", ".")
    assert git_state(checkout) == before


def test_removed_renamed_and_new_code(checkout: Path) -> None:
    (checkout / "src/pack/code.py").rename(checkout / "src/pack/own code.py")
    write(checkout / "src/pack/deep/more.py", "y = 'é'")
    found = git_state(checkout)
    assert found["changed"] == ["src/pack/code.py", "src/pack/deep/more.py", "src/pack/own code.py"]
    assert "-x = 1" in found["diff"]
    assert "+++ b/src/pack/deep/more.py\n@@ -0,0 +1 @@\n+y = 'é'\n" in found["diff"]
    assert "+++ b/src/pack/own code.py\n" in found["diff"]


def test_a_long_difference_is_cut(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout_module, "LONGEST", 300)
    write(checkout / "src/pack/code.py", "x = 2\n" * 1000)
    found = git_state(checkout)
    assert len(found["diff"]) < 350
    monkeypatch.setattr(checkout_module, "LONGEST", 10**6)
    whole = git_state(checkout)["diff"]
    assert found["diff"] == f"{whole[:300]}\n({len(whole) - 300:,} more characters)\n"
    assert found["diff"].endswith("more characters)\n")


def test_no_program_of_the_settings_is_run(checkout: Path, tmp_path: Path) -> None:
    script = tmp_path / "program"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    script.chmod(0o755)
    git(checkout, "config", "diff.external", str(script))
    git(checkout, "config", "diff.py.textconv", str(script))
    write(checkout / ".git/info/attributes", "*.py diff=py\n")
    write(checkout / "src/pack/code.py", "x = 2\n")
    assert "+x = 2" in git_state(checkout)["diff"]
    assert not (tmp_path / "ran").exists()


def test_commit_does_not_depend_on_the_branch(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = git_state(checkout)
    git(checkout, "checkout", "-q", "-b", "other")
    assert git_state(checkout) == before
    git(checkout, "checkout", "-q", "--detach")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert git_state(checkout) == before


def test_no_checkout_is_none(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert git_state(tmp_path) is None
    assert git_state(checkout / "results") is None
    monkeypatch.chdir(tmp_path)
    assert git_state(tmp_path) is None, "what git answers when it fails is no folder"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(checkout) is None


@pytest.mark.parametrize("failing", ["HEAD", "--name-only", "ls-files"])
def test_what_git_does_not_tell_is_not_guessed(
    failing: str, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkout_module._git

    def run(root: Path, *arguments: str) -> str | None:
        return (
            None
            if failing in arguments and "--show-toplevel" not in arguments
            else real(root, *arguments)
        )

    monkeypatch.setattr(checkout_module, "_git", run)
    assert git_state(checkout) is None


def test_new_code_that_cannot_be_read_is_named(checkout: Path) -> None:
    (checkout / "src/pack/broken.py").symlink_to("nowhere")
    found = git_state(checkout)
    assert (found["dirty"], found["changed"]) == (True, ["src/pack/broken.py"])
    assert found["diff"] == "\n+++ b/src/pack/broken.py: No such file or directory\n"
