"""The state of the code that a run used: the commit, and uncommitted changes.

Only files that determine what a run computes count: the package, the scripts, and the repository's
configuration. Data folders, notes and a user's own experiment files do not count: the record
contains the values that a run takes from them.
"""

from __future__ import annotations

import difflib
import os
import subprocess
from pathlib import Path
from typing import Any

CHANGED = (
    ":(glob)src/**/*.py",
    ":(glob)src/**/*.txt",
    ":(glob)*.py",
    ":(glob)scripts/**/*.py",
    ":(glob)conf/**",
)
"""Tracked files that count if they differ from the commit."""
NEW = (":(glob)src/**/*.py",)
"""Untracked files that count, because Python imports them."""
LONGEST = 100_000
"""Maximum number of characters of a diff."""


def git_state(root: Path) -> dict[str, Any] | None:
    """Return the `commit` of the checkout at `root`, whether the code differs from it (`dirty`),
    and in that case the names of the files (`changed`) and the `diff`, truncated to 100,000
    characters.

    None if `root` is not the top of a checkout, since a surrounding checkout is not of this code.
    """
    root = root.resolve()
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    # These options keep git from running programs named in a user's settings.
    diff = ("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames")
    changed = _git(root, *diff, "--name-only", "-z", "--", *CHANGED)
    new = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *NEW)
    if commit is None or changed is None or new is None:
        return None
    names = [name for name in f"{changed}\0{new}".split("\0") if name]
    if not names:
        return {"commit": commit, "dirty": False}
    text = (_git(root, *diff, "--", *CHANGED) or "") if changed else ""
    text += "".join(_added(root, name) for name in new.split("\0") if name)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}\n({len(text) - LONGEST:,} more characters)\n"
    return {"commit": commit, "dirty": True, "changed": names, "diff": text}


def _added(root: Path, name: str) -> str:
    """Return the diff of an untracked file."""
    try:
        content = (root / name).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"\n+++ b/{name}: {error.strerror}\n"
    lines = difflib.unified_diff([], content.splitlines(), "/dev/null", f"b/{name}", lineterm="")
    return "\n" + "\n".join(lines) + "\n"


def _git(root: Path, *arguments: str) -> str | None:
    # In a git hook, GIT_ variables would redirect git to another repository than `root`.
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # Reading must not write to the index.
    command = ["git", "-C", str(root), "-c", f"safe.directory={root}", *arguments]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", errors="replace",
            timeout=60, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
