"""Figures and the report: complete, the same each time, and a page that needs no network."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from mixlora_exp.results import figures, series
from mixlora_exp.results.build import (
    RESULTS,
    Results,
    draw_figures,
    draw_pictures,
    gather,
    page_text,
    write_report,
)
from mixlora_exp.results.forest import Contrast, forest
from mixlora_exp.results.tables.parts import Entry

Write = Callable[..., Path]
SMALL = ("model=smollm2_135m", "task=multi", "data=local", "data.path=d")
FIVE = ("arc_e", "arc_c", "boolq", "obqa", "piqa")
# Elements without an end tag.
VOID = {"meta", "img", "br", "link", "hr", "input", "wbr"}


@pytest.fixture
def results(tmp_path: Path, write: Write) -> Path:
    for method, value in (("lora", 0.35), ("mixlora", 0.5)):
        accuracy = dict.fromkeys(FIVE, value)
        for seed in (1, 2):
            overrides = [*SMALL, f"method={method}", f"seed={seed}"]
            write(tmp_path / "runs", f"{method}-{seed}", overrides, accuracy, n=400)
    write(tmp_path / "runs", "r4", [*SMALL, "method=mixlora", "method.rank=4"], accuracy)
    git = {"commit": "c", "dirty": True}
    write(tmp_path / "runs", "dirty<b>", [*SMALL, "method=lora", "seed=7"], accuracy, git=git)
    (tmp_path / "bench").mkdir()
    return tmp_path


def test_figures_are_drawn_and_the_same_each_time(results: Path, tmp_path: Path) -> None:
    names = draw_figures(gather(results), tmp_path / "one")
    assert names == ["figure4a", "figure4b", "figure4c", "figure5-1", "learning_curves", "forest"]
    draw_figures(gather(results), tmp_path / "two")
    for name in names:
        for suffix in ("png", "svg"):
            first, second = (tmp_path / d / f"{name}.{suffix}" for d in ("one", "two"))
            assert first.stat().st_size > 2000
            assert first.read_bytes() == second.read_bytes()


def test_learning_curves_are_of_like_conditions(tmp_path: Path, write: Write) -> None:
    """Another rank, switch or loss is no part of a band; another step size is one of its own."""
    accuracy = dict.fromkeys(FIVE, 0.5)
    (tmp_path / "bench").mkdir()
    cases = {
        "a": ["seed=1"],
        "b": ["seed=2"],
        "long": ["seed=1", "method.alpha=160"],
        "rank": ["method.rank=4"],
        "official": ["preset=official"],
        "loss": ["trainer.loss_on=all"],
        "decay": ["trainer.weight_decay=0.5"],
    }
    for name, words in cases.items():
        write(tmp_path / "runs", name, [*SMALL, "method=mixlora", *words], accuracy)
    found = gather(tmp_path)
    curves = series.learning_curves(found.runs, found.standards)
    assert sorted(curve.step_size for curve in curves) == [
        "alpha 160, rate 2e-4", "alpha 32, rate 2e-4", "alpha 32, rate 2e-4",
    ]  # fmt: skip
    (ax,) = figures.curves_figure(curves).axes
    labels = sorted(text.get_text() for text in ax.get_legend().get_texts())
    assert labels == [
        "MixLoRA, alpha 160, rate 2e-4, runs: 1",
        "MixLoRA, alpha 32, rate 2e-4, runs: 2",
    ]


def test_figures_show_what_the_tables_say(results: Path) -> None:
    found = gather(results)
    sweeps = series.sweeps(found.tables[8], "r=")
    paper = next(s for s in sweeps if s.from_paper and s.label.startswith("MixLoRA"))
    assert paper.values == ("2", "4", "8", "16", "32")
    assert [cell.value for cell in paper.cells] == [71.3, 71.8, 72.3, 73.2, 69.9]
    ours = next(s for s in sweeps if not s.from_paper)
    assert ours.values == ("4", "16")
    assert [cell.value for cell in ours.cells] == pytest.approx([50, 50])
    (load,) = series.loads(found.blocks, found.standards)
    # Mean over the two layers of (1/4 each) and (0.1, 0.2, 0.3, 0.4).
    assert load.by_task[0] == pytest.approx((0.175, 0.225, 0.275, 0.325))
    assert load.spread[0] == pytest.approx(0.0559017, abs=1e-6)
    points = series.latency_points(RESULTS / "paper", found.tables, [])
    assert {p.method: (p.latency, p.accuracy) for p in points}["MixLoRA"] == (442.2, 77.6)


class Page(HTMLParser):
    """Checks nesting, and keeps links, images and identifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.ids: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.links += [values["href"]] if "href" in values else []
        self.sources += [values["src"]] if "src" in values else []
        if "id" in values:
            assert values["id"] not in self.ids
            self.ids.add(values["id"])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_and_leads_to_the_records(results: Path) -> None:
    path = write_report(gather(results), results)
    content = path.read_text()
    page = Page()
    page.feed(content)
    assert page.open == []
    # Nothing is loaded from elsewhere.
    assert all(source.startswith("data:image/svg+xml") for source in page.sources)
    assert not re.search(r"<script|@import|url\(|<link", content)
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        elif "/tables/" in link:
            assert re.fullmatch(r"\.\./tables/table\d+\.(md|csv|tex)", link)
        else:
            assert (path.parent / link).is_file(), link
    assert {f"../runs/{name}/record.json" for name in ("lora-1", "mixlora-2", "r4")} <= set(
        page.links
    )
    text = " ".join(page.text)
    assert "MixLoRA minus LoRA, tasks mixed, is +15.0" in text, "a finding, made from the data"
    assert "steps are 5 times as long (alpha 160 to 32):" in text
    assert "LLaMA-2 7B: 0 of 30 rows (Tables 1, 2, 8, 9)" in text, "one line a model"
    # The first screen: findings, a table and the forest plot; the rest is folded.
    first = content.partition("<details")[0]
    assert first.count("<table>") == 1
    assert 'id="forest"' in first
    assert first.count("<li>") >= 3
    assert "data.train_limit" not in first, "conditions are in words"
    plot = first.partition('id="forest"')[2]
    assert 'aria-labelledby="forest-caption"' in plot
    assert '<span class="figures">+15.0 [' in plot, "its figures are text"
    assert len(re.findall(r'alt="[^"]{40,}"', content)) == content.count("<img ")
    assert "dirty<b>" in text, "names are escaped, not markup"
    for number in range(1, 10):
        assert f"table{number}" in page.ids
    # A figure of ours is a link to a record that has it.
    assert re.search(r'<a href="#record-\d+"[^>]*>35\.0</a>', content)
    assert content == write_report(gather(results), results).read_text()


def test_nothing_run_gives_a_page_too(tmp_path: Path) -> None:
    for name in ("runs", "bench"):
        (tmp_path / name).mkdir()
    content = write_report(gather(tmp_path), tmp_path).read_text()
    assert "MixLoRA and LoRA were not compared." in content


def test_the_committed_page_is_what_the_records_give(committed: Results) -> None:
    path = RESULTS.parent / "docs" / "report.html"
    content = path.read_text(encoding="utf-8")
    assert content == page_text(committed, path), "make report"
    page = Page()
    page.feed(content)
    assert page.open == []
    assert page.sources == []
    assert not re.search(r"<script|@import|url\(|<link", content)
    for link in page.links:
        held = link[1:] in page.ids if link.startswith("#") else (path.parent / link).is_file()
        assert held, link
    first = content.partition("<details")[0]
    assert (first.count("<table>"), first.count("<li>")) == (1, 3)
    words = re.sub(r"<[^>]+>", " ", first.partition("</style>")[2])
    assert not re.search(r"\w+\.\w+=|_", words), "conditions are in words"


def test_the_committed_pictures_are_what_the_records_give(
    committed: Results, tmp_path: Path
) -> None:
    """Labels and figures; places of glyphs are left to the library's version."""
    held = RESULTS.parent / "docs" / "pictures"
    names = draw_pictures(committed, tmp_path)
    assert {f"{name}.svg" for name in names} == {path.name for path in held.iterdir()}

    def words(path: Path) -> list[str]:
        return re.findall(r">([^<>\n]+)</text>", path.read_text(encoding="utf-8"))

    for name in names:
        found = words(tmp_path / f"{name}.svg")
        assert len(found) > 5
        assert found == words(held / f"{name}.svg"), "make report"


def test_pictures_without_records_are_removed(results: Path, tmp_path: Path) -> None:
    for name in ("forest", "step_sizes", "step_size_forest", "other"):
        (tmp_path / f"{name}.svg").write_text("old", encoding="utf-8")
    assert draw_pictures(gather(results), tmp_path) == ["forest"]
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["forest.svg", "other.svg"]
    assert (tmp_path / "forest.svg").stat().st_size > 2000


def test_the_forest_plot_puts_figures_where_they_belong() -> None:
    def contrast(label: str, value: float, low: float, high: float, seeds: int) -> Contrast:
        return Contrast(label, Entry("versus", value, low=low, high=high, seeds=seeds))

    plot = forest([contrast("a", -4, -9, 1, 1), contrast("b", 8, 5, 9, 3)])
    assert plot is not None
    # From -10 to 10 points.
    first, second = plot.lines
    assert (first.left, first.width, first.at, first.one_seed) == (5, 50, 30, True)
    assert (second.left, second.width, second.at, second.one_seed) == (75, 20, 90, False)
    assert plot.zero == 50
    assert plot.ticks == [("-10", 0), ("-5", 25), ("0", 50), ("+5", 75), ("+10", 100)]
    assert forest([]) is None
