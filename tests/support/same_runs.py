"""Runs that must be the same whatever the number of their processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixlora_exp.records.record import read_record

# The last step of an epoch of 13 has three micro-batches, which neither 2 nor 4 processes share.
UNEVEN = [
    "experiment=smoke", "method=mixlora", "method.dropout=0.2", "data.train_limit=13",
    "trainer.precision=float32", "trainer.batch_size=8", "trainer.micro_batch_size=2",
    "trainer.max_steps=6", "trainer.logging_steps=1", "trainer.save_steps=100",
    "trainer.parallel=ddp", "evaluation.limit=7", "evaluation.batch_tokens=200",
    "evaluation.protocols=[label_logits,answer_text,generate]",
]  # fmt: skip


def record_in(folder: Path) -> tuple[dict[str, Any], Path]:
    (path,) = folder.glob("*/record.json")
    return read_record(path), path.parent


def check_equal(folder: Path, expected: Path, processes: int) -> None:
    """Both runs are the same up to rounding, and have the same predictions."""
    (record, own), (other, alone) = record_in(folder), record_in(expected)
    found, wanted = record["train"], other["train"]
    assert found["processes"] == processes
    assert own.name == alone.name
    for name in ("examples", "steps", "tokens", "not_chosen"):
        assert found[name] == wanted[name], name
    # Gathered weights cannot be told from what autograd keeps, so that it is not counted.
    sharded = processes > 1 and record["config"]["trainer"]["parallel"] == "fsdp"
    kept = found["kept_bytes_per_token"]
    assert kept == (None if sharded else wanted["kept_bytes_per_token"])
    # Rounded to six digits in the record.
    for name in ("step_losses", "step_gradient_norms"):
        assert found["stability"][name] == pytest.approx(wanted["stability"][name], rel=3e-6)
    for entry, same in zip(found["curve"], wanted["curve"], strict=True):
        assert entry == pytest.approx(same, rel=1e-6)
    loads = (one["expert_load"] or [] for one in (found, wanted))
    for layer, same in zip(*loads, strict=True):
        assert layer == pytest.approx(same, rel=1e-9)
    weights = load_file(alone / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(own / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-6)
    log, same = (
        [json.loads(line) for line in (f / "train_log.jsonl").read_text().splitlines()]
        for f in (own, alone)
    )
    assert len(log) == len(found["curve"])
    assert [e.get("expert_load") for e in log] == [e.get("expert_load") for e in same]
    for score, same in zip(record["scores"], other["scores"], strict=True):
        for name in ("task", "protocol", "n", "accuracy", "unparsed", "expert_load"):
            assert score[name] == same[name], name
    for path in (alone / "predictions").iterdir():
        lines, same = (
            [json.loads(line) for line in (f / "predictions" / path.name).read_text().splitlines()]
            for f in (own, alone)
        )
        for line, item in zip(lines, same, strict=True):
            assert line.pop("scores") == pytest.approx(item.pop("scores"), rel=1e-4)
            gold = [each.pop("gold_log_likelihood") or 0.0 for each in (line, item)]
            assert gold[0] == pytest.approx(gold[1], rel=1e-4)
            assert line == item
