"""The controls of a comparison's page, used in a browser: what they show and in which order."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import dom_of, needs_browser

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from mixlora_exp.results.comparison import compare_runs, read_given
from mixlora_exp.results.comparison_page import comparison_page

# Sets each control in turn as a user does and notes the items that are shown, by their last word.
DRIVER = """<script>
const [, task, kind, order] = document.querySelectorAll("#controls select");
const search = document.querySelector("#controls input");
const tried = [];
const shown = () => [...document.querySelectorAll("#list article p:first-child")]
  .map((p) => p.textContent.split(", ").pop());
for (const [field, value] of STEPS) {
  const control = {task, kind, order, search}[field];
  control.value = value;
  control.dispatchEvent(new Event("input"));
  tried.push([shown(), document.getElementById("count").textContent]);
}
document.body.append(Object.assign(document.createElement("pre"),
  {id: "tried", textContent: JSON.stringify(tried)}));
</script>"""


def entry(key: str, task: str, right: tuple[int, int], scores: tuple[float, float]) -> dict:
    """An item of two options whose first is right. right, scores: by side, the seeds on which it
    is right and the likelihood of the right option."""
    sides = {
        side: {"chosen": [0] * n + [1] * (2 - n), "right": n, "scores": [score, -1.0], "text": ""}
        for side, n, score in zip("ab", right, scores, strict=True)
    }
    return {
        "pair": "B - A", "task": task, "protocol": "answer_text", "id": key, "context": "",
        "question": f"What is {key}?", "options": ["this", "that"], "answer": 0, **sides,
    }  # fmt: skip


ENTRIES = [
    entry("snow", "arc_e", (0, 2), (-4.0, -1.0)),
    entry("rain", "arc_e", (2, 0), (-1.0, -5.0)),
    entry("wind", "piqa", (1, 1), (-2.0, -1.0)),
    entry("hail", "piqa", (0, 1), (-3.0, -2.5)),
]
STEPS = [
    (("order", "up"), ["snow", "wind", "hail", "rain"]),
    (("order", "down"), ["rain", "hail", "wind", "snow"]),
    (("order", "id"), ["hail", "rain", "snow", "wind"]),
    (("kind", "gained"), ["hail", "snow"]),
    (("task", "piqa, answer_text"), ["hail"]),
    (("kind", "other"), ["wind"]),
    (("kind", "lost"), []),
    (("task", ""), ["rain"]),
    (("kind", ""), ["hail", "rain", "snow", "wind"]),
    (("search", "IS WIND"), ["wind"]),
    (("search", "no such text"), []),
]


@pytest.mark.slow
@needs_browser
def test_filters_and_orders_show_what_they_say(tmp_path: Path, write: Callable[..., Path]) -> None:
    places = []
    for method in ("lora", "mixlora"):
        words = ["model=smollm2_135m", "task=arc_e", "data=embedded", f"method={method}"]
        places.append(str(write(tmp_path, method, words, {"arc_e": 0.5}, n=4)))
    page = comparison_page(compare_runs(read_given(places)), ENTRIES, [])
    # The page permits no script but its own: without that, and with the driver's.
    free, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert count == 1
    driver = DRIVER.replace("STEPS", json.dumps([step for step, _ in STEPS]))
    path = tmp_path / "page.html"
    path.write_text(free.replace("</body>", f"{driver}</body>"), encoding="utf-8")
    (held,) = re.findall(r'<pre id="tried">(.*?)</pre>', dom_of(path), re.S)
    tried: list[Any] = json.loads(html.unescape(held))
    for (step, expected), (shown, told) in zip(STEPS, tried, strict=True):
        assert (step, shown) == (step, expected)
        assert told == f"{len(expected)} of {len(expected)} items shown"
