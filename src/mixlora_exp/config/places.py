"""Where the configuration and the results are, in a checkout and where the package is installed."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = (PACKAGE / "conf").resolve()
"""`conf/` of the checkout, to which a link in the package leads, or an installed copy."""
CHECKOUT = PACKAGE.parents[1]
ROOT = CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else Path.cwd()
"""What holds `results/`: the checkout, or the working directory where there is none."""
RESULTS = ROOT / "results"
