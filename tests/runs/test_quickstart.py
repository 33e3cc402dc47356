"""`make quickstart`, for real: weights, training, and the gain that it is there to show."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

from mixlora_exp.cli.train import execute
from mixlora_exp.records.record import read_record


@pytest.mark.slow
def test_quickstart_gains_ten_points(tmp_path: Path) -> None:
    assert execute(["experiment=quickstart", f"output_dir={tmp_path}"]) == 0
    (path,) = tmp_path.glob("*/record.json")
    record = read_record(path)

    def average(when: str, kind: str) -> float:
        scores = [s for s in record[when] if s["protocol"] == "answer_text"]
        assert len(scores) == 8
        return mean(s[kind] for s in scores)

    for kind in ("accuracy", "accuracy_normalized"):
        assert average("scores", kind) - average("scores_before", kind) >= 0.1
    assert all(len(s["expert_load"]) == 30 for s in record["scores"])
    assert {s["protocol"] for s in record["scores"]} == {"answer_text", "label_logits"}
