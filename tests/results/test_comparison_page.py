"""The page of a comparison: whole without a network, and nothing in the data is markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import dom_of, needs_browser

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from mixlora_exp.errors import UserError
from mixlora_exp.results.comparison import Compared, compare_runs, read_given
from mixlora_exp.results.comparison_page import comparison_page
from mixlora_exp.results.differing_items import differing_items
from mixlora_exp.results.runs import RecordedRun
from mixlora_exp.tasks import Item

Write = Callable[..., Path]
EVIL = "</script><script>alert('ran')</script><img src=http://evil.example/x>"


@pytest.fixture
def compared(tmp_path: Path, write: Write) -> Compared:
    places = []
    for method, share in (("lora", 0.5), ("mixlora", 0.75)):
        for seed in (1, 2):
            words = ["model=smollm2_135m", "task=arc_e", "data=embedded", f"method={method}",
                     f"seed={seed}"]  # fmt: skip
            accuracy = {"arc_e": share}
            places.append(str(write(tmp_path, f"{method}-{seed}", words, accuracy, n=20)))
    return compare_runs(read_given(places))


def asked(run: RecordedRun, task: str) -> list[Any]:
    return [
        Item(task, key, f"{EVIL} {key}?", ("first", EVIL), 0, ("A", "B"))
        for key in run.predictions[task, "label_logits"]
    ]


def embedded(page: str) -> list[dict[str, Any]]:
    (held,) = re.findall(r'<script type="application/json" id="items">(.*?)</script>', page, re.S)
    return json.loads(held)


def test_items_that_differ_are_all_there_with_their_questions(compared: Compared) -> None:
    entries, missing = differing_items(compared, asked)
    assert missing == []
    a, b = compared.sides
    for entry in entries:
        rows = [[run.predictions["arc_e", "label_logits"][entry["id"]] for run in side.runs]
                for side in (a, b)]  # fmt: skip
        chosen = [[row["prediction"] for row in own] for own in rows]
        assert [entry[side]["chosen"] for side in "ab"] == chosen
        assert entry["question"] == f"{EVIL} {entry['id']}?"
        assert entry["a"]["scores"] == [0.0, 1.0]
    same = [key for key, row in a.runs[0].predictions["arc_e", "label_logits"].items()
            if key not in {entry["id"] for entry in entries}]  # fmt: skip
    for key in same:
        one, two = ([run.predictions["arc_e", "label_logits"][key]["prediction"]
                     for run in side.runs] for side in (a, b))  # fmt: skip
        assert one == two
    assert entries
    assert same


def test_nothing_in_the_data_is_markup(compared: Compared) -> None:
    entries, _ = differing_items(compared, asked)
    page = comparison_page(compared, entries, [f"why: {EVIL}"])
    assert [one["question"] for one in embedded(page)] == [one["question"] for one in entries]
    # Data, and the page's own: no third script, no image from elsewhere.
    assert page.count("<script") == 2
    assert "<img src=http" not in page
    assert all(place.startswith("data:image/svg") for place in re.findall(r'src="([^"]+)"', page))
    # What the page permits is its own script, by its hash, and no address.
    (own,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    sha = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{sha}'"
        in page
    )
    assert "innerHTML" not in own


def test_the_page_has_scores_differences_and_figures(compared: Compared) -> None:
    page = comparison_page(compared, [], [])
    assert "+25.0 [" in page
    for caption in ("Training loss by", "Expert load of side A", "Expert load of side B"):
        assert f"<figcaption>{caption}" in page
    assert len(re.findall(r'alt="[^"]{40,}"', page)) == page.count("<img ")
    assert page == comparison_page(compared, [], []), "the same each time"


def test_items_without_their_data_have_no_question(compared: Compared) -> None:
    def away(run: RecordedRun, task: str) -> list[Any]:
        raise UserError(f"{task}: data.path=d does not exist")

    entries, missing = differing_items(compared, away)
    assert missing == ["arc_e: data.path=d does not exist"]
    assert {(one["question"], tuple(one["options"])) for one in entries} == {("", ())}
    other, missing = differing_items(compared, lambda run, task: asked(run, task)[1:])
    assert missing == ["arc_e: the data hold other items than were scored"]
    assert len(other) == len(entries)


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_texts_and_runs_nothing_of_them(compared: Compared, tmp_path: Path) -> None:
    entries, _ = differing_items(compared, asked)
    path = tmp_path / "page.html"
    path.write_text(comparison_page(compared, entries, []), encoding="utf-8")
    dom = dom_of(path)
    assert f"{len(entries)} of {len(entries)} items shown" in dom
    assert dom.count("<article>") == len(entries)
    assert "<p>&lt;/script&gt;&lt;script&gt;alert('ran')" in dom
    assert "<script>alert" not in dom
