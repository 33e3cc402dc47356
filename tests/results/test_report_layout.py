"""The committed page's first screen on a telephone and on a screen, as a browser lays it out."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import needs_browser, seen

from mixlora_exp.results.build import RESULTS


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_every_number_of_the_first_screen_is_seen(width: int, tmp_path: Path) -> None:
    """Nothing has to be pushed into view or is too small to read."""
    page = (RESULTS.parent / "docs" / "report.html").read_text(encoding="utf-8")
    found = seen(page, width, tmp_path)
    assert found["page"] <= width
    first = [cell for cell in found["cells"] if cell["first"] and cell["text"].strip()]
    assert sum("[" in cell["text"] for cell in first) >= 6
    for cell in first:
        assert not cell["folded"], cell
        assert cell["left"] >= 0, cell
        assert cell["right"] <= width, cell
        assert cell["size"] >= 12, cell
        assert not cell["clipped"], cell
