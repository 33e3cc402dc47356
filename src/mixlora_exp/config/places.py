"""Folders of the configuration and the results, in a checkout and in an installed package."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = (PACKAGE / "conf").resolve()
"""`conf/`: in a checkout through a symlink in the package, otherwise the installed copy."""
CHECKOUT = PACKAGE.parents[1]
ROOT = CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else Path.cwd()
"""Parent of `results/`: the checkout, or the working directory if there is none."""
RESULTS = ROOT / "results"


def own_code() -> dict[str, str]:
    """Environment with which another Python process imports the code of this checkout, whatever
    else is installed; empty where the package itself is installed."""
    if not (CHECKOUT / "pyproject.toml").is_file():
        return {}
    source = str(CHECKOUT / "src")
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {"PYTHONPATH": os.pathsep.join([source, *(p for p in given if p not in ("", source))])}
