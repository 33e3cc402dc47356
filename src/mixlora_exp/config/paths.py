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
"""The project's committed records and tables: one root of results, as `results=DIR` names them."""
OWN_RESULTS = Path("my-results")
"""Default root of a user's results, in the working directory; git ignores it."""


def share_code() -> None:
    """Let Python processes that are started from here import the code of this checkout, whatever
    else is installed, also where they do not inherit `sys.path`."""
    if (CHECKOUT / "pyproject.toml").is_file():
        own, given = str(CHECKOUT / "src"), os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join([own, *(p for p in given if p not in ("", own))])
