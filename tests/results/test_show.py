"""What a run prints at its end: every figure whole, whatever the terminal's width."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from composed import compose
from rich.console import Console

from mixlora_exp.config.resolve import to_dict
from mixlora_exp.config.schema import TASK_NAMES
from mixlora_exp.config.switches import SWITCHES
from mixlora_exp.records import show
from mixlora_exp.records.layout import Column, Sheet, fitted

WIDTHS = pytest.mark.parametrize("width", [60, 80, 120])


def record(*, before: bool, experts: int = 8, names: tuple[str, ...] = TASK_NAMES) -> dict:
    """Of a run scored by three protocols, with figures as wide as they may become."""
    load = [[(e + 1) / 100 for e in range(experts)]] * 2 if experts else None

    def score(task: str, protocol: str, share: float) -> dict[str, Any]:
        text = protocol == "answer_text"
        return {
            "task": task, "protocol": protocol, "n": 10042, "accuracy": share,
            "accuracy_normalized": share / 3 if text else None, "stderr": share / 7,
            "majority_class": share / 5, "chance": share / 11,
            "gold_log_likelihood": None if protocol == "generate" else -1234.5 * share,
            "unparsed": round(900 * share) if protocol == "generate" else None,
            "expert_load": load,
        }  # fmt: skip

    protocols = ("label_logits", "answer_text", "generate")
    scores = [
        score(task, protocol, 1.0 - 0.037 * k)
        for protocol in protocols
        for k, task in enumerate(names)
    ]
    earlier = [{**s, "accuracy": s["accuracy"] / 2} for s in scores]
    train = {
        "steps": 50, "tokens": 10**7, "seconds": 1.0, "tokens_per_second": 1.0, "final_loss": 1.0,
        "peak_memory_bytes": 2**30, "expert_load": load,
    }  # fmt: skip
    config = to_dict(compose(["model=tiny", "data=embedded", "method=mixlora", "preset=official"]))
    return {
        "name": "RUN", "config": config, "scores": scores,
        "scores_before": earlier if before else None,
        "train": train,
    }  # fmt: skip


def printed(monkeypatch: pytest.MonkeyPatch, width: int, made: dict[str, Any]) -> list[str]:
    shown = io.StringIO()
    monkeypatch.setattr(show, "console", Console(file=shown, width=width, soft_wrap=True))
    show.print_record(made)
    return shown.getvalue().splitlines()


def rows_of(lines: list[str]) -> dict[str, list[list[str]]]:
    """Figures by the label of their row, one list per table in which the label comes."""
    found = defaultdict(list)
    for line in lines:
        if line.startswith("│"):
            label, *figures = (cell.strip() for cell in line.strip("│").split("│"))
            found[label].append(figures)
    return found


def expected(score: dict[str, Any], earlier: dict[str, Any] | None) -> list[str]:
    def gained(kind: str) -> str:
        now = f"{100 * score[kind]:.1f}"
        return now if earlier is None else f"{100 * earlier[kind]:.1f} → {now}"

    kinds = ["accuracy"]
    kinds += ["accuracy_normalized"] if score["accuracy_normalized"] is not None else []
    figures = [gained(kind) for kind in kinds]
    figures += [f"{100 * score[k]:.1f}" for k in ("stderr", "majority_class", "chance")]
    gold = score["gold_log_likelihood"]
    figures += ["-" if gold is None else f"{gold:.2f}", str(score["n"])]
    return figures + ([] if score["unparsed"] is None else [str(score["unparsed"])])


@WIDTHS
@pytest.mark.parametrize("before", [False, True], ids=["after", "before and after"])
@pytest.mark.parametrize("experts", [0, 8, 64])
def test_no_figure_is_cut(
    monkeypatch: pytest.MonkeyPatch, width: int, before: bool, experts: int
) -> None:
    made = record(before=before, experts=experts)
    lines = printed(monkeypatch, width, made)
    assert "…" not in "".join(lines)
    framed = [line for line in lines if line.startswith(("│", "┃", "┏", "└"))]
    assert max(map(len, framed)) <= width
    rows = rows_of(lines)
    assert set(rows) == {*TASK_NAMES, "average", *(["training"] if experts else [])}
    loads = [f"{e + 1}" for e in range(experts)]
    for task in TASK_NAMES:
        want = []
        for k, score in enumerate(made["scores"]):
            if score["task"] == task:
                want += expected(score, made["scores_before"][k] if before else None)
        shown = [figure for part in rows[task] for figure in part]
        assert shown[: len(want)] == want
        assert shown[len(want) :][:experts] == loads
    heads = " ".join(line for line in lines if line.startswith("┃"))
    words = ["accuracy", "per char.", "std.", "err.", "major.", "class", "chance", "gold"]
    words += ["log-lik.", " n ", "un-", "parsed", *(["shares"] if experts else [])]
    assert [word for word in words if word not in heads] == []


def test_a_deviation_from_the_preset_is_named_as_it_is_set() -> None:
    made = record(before=False, names=("arc_e",))
    preset = made["config"]["preset"]
    assert show.scores_table(made, "generate").title.splitlines()[-1] == "preset=official"
    preset["name"] = "correct"
    assert "preset" not in show.scores_table(made, "generate").title, "the default is not told"
    preset["name"] = "official"
    kinds = {type(preset[switch]): (switch, dotted) for switch, dotted in SWITCHES.items()}
    for kind, other in ((bool, None), (str, "another")):
        switch, dotted = kinds[kind]
        group, _, field = dotted.partition(".")
        value = not preset[switch] if other is None else other
        made["config"][group][field] = value
        title = show.scores_table(made, "generate").title
        assert f"{dotted}={str(value).lower()}" in title.split("preset=official, ")[1]


def test_loads_and_the_cost_of_training_are_the_record_s(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = record(before=False, names=("arc_e",))
    made["train"] |= {"expert_load": None, "peak_memory_bytes": 3 * 2**29, "final_loss": 1.25}
    for score in made["scores"]:
        # Those of the first protocol are shown.
        first = score["protocol"] == "label_logits"
        score["expert_load"] = [[0.99, 0.01], [0.51, 0.49]] if first else [[0.0, 1.0]] * 2
    assert show.load_table(made) is None
    made["train"]["expert_load"] = [[1.0, 0.0], [1.0, 0.0]]
    shares, rest, spread = show.load_table(made).figures
    assert (shares.cells, rest.cells) == (["75", "100"], ["25", "0"])
    assert spread.cells == ["0.2500", "0.5000"]
    printed(monkeypatch, 200, made)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "Trained 50 steps, 10000000 tokens in 1 s (1 tokens/s), loss 1.250, peak memory 1.50 GiB"
    )
    made["train"]["first_step_seconds"] = 0.3
    printed(monkeypatch, 200, made)
    told = "in 1 s, 0.3 s of them for the first step (1 tokens/s after it), loss 1.250"
    assert told in capsys.readouterr().out.splitlines()[-1]
    made["train"]["steps"] = 1
    printed(monkeypatch, 200, made)
    assert "first step" not in capsys.readouterr().out.splitlines()[-1]


def test_generated_tasks_are_named_as_such() -> None:
    made = record(before=False)
    assert "(generated tasks, not the benchmarks)" in show.scores_table(made, "generate").title
    made["config"]["data"]["name"] = "local"
    assert "generated tasks" not in show.scores_table(made, "generate").title


@WIDTHS
def test_long_names_of_tasks_are_folded(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    name = "the_longest_name_of_a_task_[that]_anybody_would_ever_think_of_" + "x" * 70
    made = record(before=True, names=("arc_e", name))
    lines = printed(monkeypatch, width, made)
    framed = [line for line in lines if line.startswith(("│", "┃", "┏", "└"))]
    assert max(map(len, framed)) <= width
    cells = [line.strip("│").split("│")[0].strip() for line in framed if line[0] == "│"]
    assert name in "".join(cells)
    assert "50.0 → 100.0" in "\n".join(lines)


def test_the_narrowest_terminals_lose_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    made = record(before=True)
    rows = printed(monkeypatch, 10, made)
    assert "…" not in "".join(rows)
    assert any("50.0 → 100.0" in line for line in rows)
    assert any("-1234.50" in line for line in rows)


SCRIPT = """
import json, sys
from mixlora_exp.records.show import print_record
print_record(json.load(sys.stdin))
"""


@pytest.mark.parametrize(
    ("settings", "width", "sign"),
    [
        ({}, 80, "→"),
        ({"TERM": "dumb"}, 80, "→"),
        ({"COLUMNS": "60"}, 60, "→"),
        ({"PYTHONIOENCODING": "ascii"}, 80, "->"),
    ],
    ids=["pipe", "dumb", "columns", "ascii"],
)
def test_pipes_and_logs(settings: dict[str, str], width: int, sign: str) -> None:
    source = str(Path(show.__file__).parents[2])
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(record(before=True)), capture_output=True, text=True, encoding="utf-8",
        env={**environment, "PYTHONPATH": source, "PYTHONIOENCODING": "utf-8", **settings},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    assert f"50.0 {sign} 100.0" in done.stdout
    assert "-1234.50" in done.stdout
    framed = [line for line in done.stdout.splitlines() if line[:1] in ("│", "|", "┃", "+")]
    assert 40 < max(map(len, framed)) <= width


@pytest.mark.parametrize("more", [{}, {"summed": True}])
def test_a_line_separates_a_last_row_that_sums_up(more: dict[str, bool]) -> None:
    sheet = Sheet("", Column("task", ["a", "all"]), [Column("n", ["1", "2"])], **more)
    (table,) = fitted(sheet, 60)
    assert [row.end_section for row in table.rows] == [bool(more), False]
