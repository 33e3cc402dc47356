"""The scoring benchmark: the same items for every way of scoring, and the same accuracies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixlora_exp.bench.runner import run_benchmark
from mixlora_exp.config.schema import TASK_NAMES
from mixlora_exp.errors import UserError

pytest.importorskip("lm_eval", reason="lm-eval is not installed")


def test_every_way_scores_the_same_items(tmp_path: Path) -> None:
    run_benchmark(
        ["kind=eval", "model=tiny", "limit=3", "rounds=1", "batch_sizes=[4]", f"output={tmp_path}"]
    )
    record = json.loads((tmp_path / "eval-tiny-none-float32-embedded.json").read_text())
    assert record["items"] == dict.fromkeys(TASK_NAMES, 3)
    assert "| lm_eval | ours |" in (tmp_path / "eval-tiny-none-float32-embedded.md").read_text()
    for protocol in ("lm_eval", "label_logits"):
        summary, rows = record["summary"][protocol], record["protocols"][protocol]
        assert summary["same_accuracies"]
        assert set(rows) == {"ours", "lm-eval's loop, batch size 4"}
        seconds = {name: row["seconds"][0] for name, row in rows.items()}
        other = "lm-eval's loop, batch size 4"
        assert summary["times_as_fast"][other] == pytest.approx(
            seconds[other] / seconds["ours"], rel=1e-2
        )
    assert record["provenance"]["git"] is not None


def test_mistakes_are_reported() -> None:
    with pytest.raises(UserError, match="dtype=int8 is not valid"):
        run_benchmark(["kind=eval", "dtype=int8"])
    with pytest.raises(UserError, match=r"did you mean limit\?.*there are: threads, output"):
        run_benchmark(["kind=eval", "limits=3"])
