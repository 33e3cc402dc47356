"""The questions that a run was scored on, read again: of the data that were scored, or none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixlora_exp.cli.main import main
from mixlora_exp.errors import UserError
from mixlora_exp.runs.questions import scored_items

Start = Callable[..., Any]


def test_the_items_are_those_of_the_predictions_in_their_order(finished: Start) -> None:
    run = finished("method=none")
    items = scored_items(run.record, "arc_e")
    lines = run.predictions("arc_e/label_logits")
    assert [item.id for item in items] == [line["id"] for line in lines]
    assert [item.answer for item in items] == [line["answer"] for line in lines]


def test_other_data_are_refused(finished: Start, tmp_path: Path) -> None:
    record = json.loads(json.dumps(finished("method=none").record))
    with pytest.raises(UserError, match="does not exist"):
        scored_items(record, "arc_e", tmp_path / "nowhere")
    record["data"]["arc_e/test"][0]["sha256"] = "0" * 64
    with pytest.raises(UserError, match="not those that were scored"):
        scored_items(record, "arc_e")


def test_the_command_writes_a_page_with_questions(
    finished: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    # Other random weights, which answer otherwise.
    first = finished("method=none")
    second = finished("method=none", "model.config={num_hidden_layers: 1}")
    page = tmp_path / "page.html"
    assert main(["compare", str(first.folder), str(second.folder), f"html={page}"]) == 0
    assert "no questions" not in capsys.readouterr().out
    content = page.read_text(encoding="utf-8")
    asked = {item.question for item in scored_items(first.record, "arc_e")}
    assert any(json.dumps(question)[1:-1] in content for question in asked)
