"""Print docs/scaling.md as the plans have it today: `python tests/checks/scaling_page.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from mixlora_exp.plans.scaling import page

if __name__ == "__main__":
    sys.stdout.write(page())
