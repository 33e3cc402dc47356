"""Folders of the configuration and the results, in a checkout and in an installed package."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = (PACKAGE / "conf").resolve()
"""`conf/`: in a checkout through a symlink in the package, otherwise the installed copy."""
CHECKOUT = PACKAGE.parents[1]
ROOT = CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else Path.cwd()
"""Parent of `results/`: the checkout, or the working directory if there is none."""
RESULTS = ROOT / "results"
