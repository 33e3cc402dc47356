"""The state of the code that a run was made with: the commit, and what differs from it.

Only files that decide what a run computes count: the package, the programs, and the configuration
that the repository has. A data folder, notes, or an experiment file of the user's do not: what a
run takes from such a file stands in its record.
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
"""Files of the repository that count when they differ from the commit."""
NEW = (":(glob)src/**/*.py",)
"""Files that count although the repository does not have them: Python imports them."""
LONGEST = 100_000
"""Characters of a difference that are kept."""


def git_state(root: Path) -> dict[str, Any] | None:
    """Commit of the checkout at `root`, whether the code is otherwise (`dirty`), and if it is, the
    names of these files (`changed`) and what is otherwise, cut to 100,000 characters (`diff`).
    None outside of a checkout; a folder inside somebody else's checkout is none of this code."""
    root = root.resolve()
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    # No program that a user's settings name is run.
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
    """The difference that a new file makes."""
    try:
        content = (root / name).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"\n+++ b/{name}: {error.strerror}\n"
    lines = difflib.unified_diff([], content.splitlines(), "/dev/null", f"b/{name}", lineterm="")
    return "\n" + "\n".join(lines) + "\n"


def _git(root: Path, *arguments: str) -> str | None:
    # A hook's variables would point git at another repository than `root`.
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # Looking must not write to the index.
    command = ["git", "-C", str(root), "-c", f"safe.directory={root}", *arguments]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", errors="replace",
            timeout=60, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
