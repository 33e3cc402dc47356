"""A headless browser that opens a page and gives back what stands in it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page in")


def dom_of(path: Path) -> str:
    """Return the page as its scripts leave it."""
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    done = subprocess.run(
        [*words, "--virtual-time-budget=3000", path.as_uri()],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout.decode()


SEEN = """<script>
const cells = [...document.querySelectorAll("td, th, .forest .line > span")].map((cell) => {
  const box = cell.getBoundingClientRect();
  const clipped = cell.scrollWidth > cell.clientWidth + 1 && cell.clientWidth > 0;
  return {text: cell.textContent, left: box.left, right: box.right, clipped,
          size: parseFloat(getComputedStyle(cell).fontSize),
          folded: box.width === 0, first: cell.closest(".first, .forest") !== null};
});
parent.postMessage({width: innerWidth, page: document.documentElement.scrollWidth,
  images: [...document.images].map((one) => one.getBoundingClientRect().right), cells}, "*");
</script>"""
# A window of the browser has at least 500 pixels, a frame in it any number.
FRAME = """<!DOCTYPE html><pre id="seen"></pre><script>addEventListener("message",
  ({data}) => { document.getElementById("seen").textContent = JSON.stringify(data); });</script>
<iframe src="page.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>"""


def seen(page: str, width: int, folder: Path) -> dict[str, Any]:
    """Return where the cells of a page lie in a window of `width` pixels, and the page's width."""
    path = folder / "page.html"
    path.write_text(page.replace("</body>", f"{SEEN}</body>"), encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    (held,) = re.findall(r'<pre id="seen">(.*?)</pre>', dom_of(frame), re.S)
    found = json.loads(html.unescape(held))
    assert found["width"] == width
    return found
