"""The page of a comparison on a telephone and on a screen, as a browser lays it out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import needs_browser
from browser import seen as laid_out

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from mixlora_exp.results.comparison import compare_runs, read_given
from mixlora_exp.results.comparison_page import comparison_page
from mixlora_exp.results.differing_items import differing_items
from mixlora_exp.tasks import Item

LONG = "Which_of_these_words_without_a_space_" * 4


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_lies_beside_the_window(
    width: int, tmp_path: Path, write: Callable[..., Path]
) -> None:
    """Two sides fit a telephone whole: a column that has to be pushed into view is not seen."""
    places = []
    for method, share in (("lora", 0.5), ("mixlora", 0.75)):
        words = ["model=smollm2_135m", "task=hellaswag", "data=embedded", f"method={method}"]
        given = {"hellaswag": share}
        places.append(str(write(tmp_path, method, words, given, n=20, protocol="answer_text")))
    compared = compare_runs(read_given(places))

    def asked(run, task: str) -> list[Item]:
        keys = run.predictions[task, "answer_text"]
        return [Item(task, key, f"{LONG} {key}?", (LONG, "b"), 0, ("A", "B")) for key in keys]

    page = comparison_page(compared, differing_items(compared, asked)[0], [])
    free, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert count == 1
    seen = laid_out(free, width, tmp_path)
    assert seen["page"] <= width
    assert seen["images"]
    assert max(seen["images"]) <= width
    assert any("[" in cell["text"] for cell in seen["cells"])
    assert any(LONG in cell["text"] for cell in seen["cells"])
    for cell in seen["cells"]:
        assert cell["left"] >= 0, cell
        assert cell["right"] <= width, cell
        assert cell["size"] >= 12, cell
        assert not cell["clipped"], cell
