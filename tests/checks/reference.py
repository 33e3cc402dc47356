"""Make the reference losses anew: `make reference REASON="why they change"`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent / "src"), str(TESTS / "support")]


def main() -> int:
    reason = " ".join(os.environ.get("REASON", "").split())
    if not reason:
        sys.stderr.write('error: say why the losses change: make reference REASON="..."\n')
        return 2
    from reference_losses import remake  # Imports torch, which takes seconds.

    return remake(reason)


if __name__ == "__main__":
    sys.exit(main())
