"""Bytes of a step are counted from its tensors: each storage once, while it lives."""

from __future__ import annotations

import json

import pytest
import torch

from mixlora_exp.bench.kinds.bytes import KIND, BytesOptions, measure
from mixlora_exp.bench.live_bytes import LiveBytes
from mixlora_exp.bench.runner import run_benchmark
from mixlora_exp.errors import UserError

SMALL = {"model": "tiny", "batch": 2, "length": 16, "answer": 4, "dtype": "float32"}


def test_the_most_that_live_at_once() -> None:
    before = torch.ones(1000)
    with LiveBytes() as memory:
        x = before + 1
        view = x.view(10, 100)[2:]
        before.mul_(2)
        y = (x * 2).exp_()
        del x
        assert memory.live == 8000, "a view keeps what it is of"
        del view
        assert memory.live == 4000
        z = y + 1
        del y
        z.add_(1)
    assert (memory.peak, memory.live) == (8000, 4000)
    del z
    assert memory.live == 0


def test_a_backward_pass_frees_what_it_read() -> None:
    weight = torch.ones(100, 100, requires_grad=True)
    x = torch.ones(50, 100)
    with LiveBytes() as memory:
        kept = (x @ weight).sigmoid()
        loss = kept.sum()
        del kept
        # The sigmoid's result is kept, the product is not.
        assert memory.live == 4 * (50 * 100 + 1)
        loss.backward()
    # The gradient, the sum and its gradient, a number that `loss` was given.
    assert memory.live == 4 * (100 * 100 + 1)
    assert weight.grad.shape == weight.shape


def rows_of(**changes) -> dict:
    *_, record = measure(BytesOptions(**{**SMALL, **changes}))
    return record["rows"]


# Each method twice; the record's test counts each once.
@pytest.mark.slow
def test_methods_are_counted_alike_each_time() -> None:
    rows = rows_of()
    assert list(rows) == ["lora_peft", "dora_peft", "lora", "dora", "mixlora", "mixdora"]
    for name, row in rows.items():
        assert 0 < row["kept_bytes"] < row["peak_bytes"], name
        assert (row["held_bytes"] > 0) == (name in ("dora", "mixdora")), name
    assert rows["mixlora"]["kept_bytes"] < rows["lora_peft"]["kept_bytes"]
    assert rows_of(rows=["mixlora"])["mixlora"] == rows["mixlora"]


def test_twice_the_batch_is_less_than_twice_the_peak() -> None:
    one, two = (rows_of(rows=["lora"], batch=size)["lora"]["peak_bytes"] for size in (2, 4))
    assert one < two < 2 * one


def test_record_and_table(tmp_path) -> None:
    words = ["model=tiny", "batch=1", "length=8", "answer=2", f"output={tmp_path}"]
    written = run_benchmark(["kind=bytes", *words, "rows=[mixlora]"])
    assert written.paths[0].name == "bytes-tiny-2layers-1x8-bfloat16-loss_on_answer.json"
    record = json.loads(written.paths[0].read_text())
    assert list(record["rows"]) == ["lora_peft", "mixlora"]
    ratio = record["rows"]["mixlora"]["peak_bytes"] / record["rows"]["lora_peft"]["peak_bytes"]
    assert f"({ratio:.2f})" in written.tables
    assert "the last 2 tokens of each sequence" in written.tables


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch=0 must be >= 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be in"),
        ({"rows": ["mixlora_triton"]}, "rows=mixlora_triton is not valid"),
        ({"rows": ["none"]}, "rows=none is not valid"),
    ],
)
def test_mistakes(change, message) -> None:
    with pytest.raises(UserError, match=message):
        list(KIND.measure(BytesOptions(**{**SMALL, **change})))
