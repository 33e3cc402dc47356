"""The page of a comparison on a telephone and on a screen, as a browser lays it out."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import dom_of, needs_browser

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from mixlora_exp.results.comparison import compare_runs, read_given
from mixlora_exp.results.comparison_page import comparison_page
from mixlora_exp.results.differing_items import differing_items
from mixlora_exp.tasks import Item

LONG = "Which_of_these_words_without_a_space_" * 4
SEEN = """<script>
const cells = [...document.querySelectorAll("td, th")].map((cell) => {
  const box = cell.getBoundingClientRect();
  const clipped = cell.scrollWidth > cell.clientWidth + 1;
  return {text: cell.textContent, left: box.left, right: box.right, clipped,
          size: parseFloat(getComputedStyle(cell).fontSize)};
});
parent.postMessage({width: innerWidth, page: document.documentElement.scrollWidth,
  images: [...document.images].map((one) => one.getBoundingClientRect().right), cells}, "*");
</script>"""
# A window of the browser has at least 500 pixels, a frame in it any number.
FRAME = """<!DOCTYPE html><pre id="seen"></pre><script>addEventListener("message",
  ({data}) => { document.getElementById("seen").textContent = JSON.stringify(data); });</script>
<iframe src="page.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>"""


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
    path = tmp_path / "page.html"
    path.write_text(free.replace("</body>", f"{SEEN}</body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    (held,) = re.findall(r'<pre id="seen">(.*?)</pre>', dom_of(frame), re.S)
    seen = json.loads(html.unescape(held))
    assert seen["width"] == width
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
