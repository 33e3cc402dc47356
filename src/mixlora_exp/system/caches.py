"""The folder of this program's caches."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the user's cache folder for this program; `XDG_CACHE_HOME` moves it. It need not
    exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mixlora_exp"


def keep_compiled_code() -> None:
    """Let torch keep what it compiles in `cache_folder`, unless the user has chosen a folder; its
    own choice is a folder for temporary files."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
