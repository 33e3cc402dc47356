"""The scoring benchmark: the same items for every way of scoring, and the same accuracies."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mixlora_exp.config.schema import TASK_NAMES
from mixlora_exp.errors import UserError

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_eval", ROOT / "scripts" / "bench_eval.py")
    module = sys.modules["bench_eval"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_way_scores_the_same_items(script: ModuleType, tmp_path: Path) -> None:
    script.run(["model=tiny", "limit=3", "rounds=1", "batch_sizes=[4]", f"output={tmp_path}"])
    record = json.loads((tmp_path / "eval-tiny-none-float32-embedded.json").read_text())
    assert record["items"] == dict.fromkeys(TASK_NAMES, 3)
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


def test_mistakes_are_told(script: ModuleType) -> None:
    with pytest.raises(UserError, match="dtype=int8 is not valid"):
        script.run(["dtype=int8"])
    with pytest.raises(UserError, match="did you mean limit.*The fields are model, method"):
        script.run(["limits=3"])
