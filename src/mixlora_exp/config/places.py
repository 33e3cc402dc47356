"""Where the repository's folders are: the package runs from its checkout (editable install)."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CONF_DIR = ROOT / "conf"
RESULTS = ROOT / "results"
