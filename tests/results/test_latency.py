"""Time and memory in Table 6 and Figure 4c: one base for both, and records by rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from table_cells import PAPER, bench_record

from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.results import series
from mixlora_exp.results.build import gather

Write = Callable[..., Path]
Times = Mapping[str, float]


def bench_row(method: str, kernel: str, dtype: str, times: Times, memory: float) -> dict[str, Any]:
    """A row whose rounds take as long as `times` says; the ratios are what an older benchmark took
    them to be."""
    samples = [{"round": k, **{f"{n}_s": (1 + k) * t for n, t in times.items()}} for k in range(3)]
    ratios = {f"{name}_ratio": 0.99 for name in (*times, "train")}
    ratios["train_ratio_quartiles"] = [0.98, 1.0]
    return {
        "method": method, "kernel": kernel, "num_experts": 8, "top_k": 2, "adapter_dtype": dtype,
        "head": "full", "rounds": 3, "samples": samples, "train_peak_memory_bytes": memory,
        **{f"{name}_us_per_token": time for name, time in times.items()}, **ratios,
    }  # fmt: skip


def times(forward: float) -> Times:
    return {
        "train_forward": forward, "train_backward": 2 * forward, "infer_forward": forward / 2,
    }  # fmt: skip


def rows_of(*methods: str, slower: float = 1.0) -> dict[str, Any]:
    names = {"lora_peft": ("lora", "peft"), **{m: (m, "exact") for m in methods}}
    return {
        name: bench_row(*kind, "float32", times(slower * (1 + i)), 1e9)
        for i, (name, kind) in enumerate(names.items())
    }


def test_one_base_serves_time_and_memory(results: Path) -> None:
    rows = {
        "lora_peft": bench_row("lora", "peft", "float32", times(10.0), 4e9),
        "lora_peft_bf16": bench_row("lora", "peft", "base", times(8.0), 2e9),
        "mixlora_bf16": bench_row("mixlora", "exact", "base", times(5.0), 1e9),
    }
    bench_record(results / "bench", "one", rows)
    found = gather(results).tables[6].blocks[1]
    shown = {row.label[0]: row.cells for row in found.rows}
    cells = shown["MixLoRA (exact kernel), bf16 adapters"]
    percent = [c.value for c, n in zip(cells, found.columns, strict=True) if "% of LoRA" in n]
    # Forward, backward, memory, inference, its memory (not measured), the whole step.
    assert percent == pytest.approx([50.0, 50.0, 25.0, 50.0, None, 50.0])


def test_benchmarks_of_one_shape_stand_under_one_another(results: Path) -> None:
    bench_record(results / "bench", "one", rows_of("mixlora"))
    bench_record(results / "bench", "two", rows_of("mixlora"), rounds=12)
    bench_record(results / "bench", "wide", rows_of("mixlora"), length=256)
    _, first, second = gather(results).tables[6].blocks
    assert first.heading.endswith("30 layers, 8 x 128 tokens, bfloat16")
    assert second.heading.endswith("30 layers, 8 x 256 tokens, bfloat16")
    measured = list(dict.fromkeys(row.label[1] for row in first.rows))
    assert len(measured) == 2
    assert len(first.rows) == 4
    assert measured[0].endswith(", commit=oooooooo, record=one, rounds=16")


def test_the_summary_stands_first_with_time_and_memory(results: Path) -> None:
    rows = rows_of("lora", "mixlora")
    rows["mixlora"]["train_peak_memory_bytes"] = 5e8
    rows["lora"]["train_ratio"], rows["mixlora"]["train_ratio"] = 2.0, 3.0
    bench_record(results / "bench", "full", rows)
    bench_record(results / "bench", "few", rows_of("mixlora", slower=2.0), rounds=99)
    bench_record(results / "bench", "still", rows_of("lora", "mixlora", slower=3.0), dropout=0.0)
    table = gather(results).tables[6]
    first_page, printed = table.summary
    assert printed == table.blocks[0], "then the paper's"
    (line,) = first_page.rows
    shape = "SmolLM2 135M: 30 layers, 8 x 128 tokens, bfloat16"
    assert line.label == (shape, "a cpu, 2 threads", "no autocast, loss on all")
    cells = dict(zip(first_page.columns, line.cells, strict=True))
    assert cells["LoRA, time"].value == pytest.approx(200.0)
    assert cells["MixLoRA, time"].value == pytest.approx(300.0)
    assert (cells["MixLoRA, memory"].value, cells["PEFT's LoRA, GB"].value) == (50.0, 1.0)
    assert cells["DoRA, time"].value is None
    assert cells["LoRA, time"].records == ("bench/full.json",)


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({"loss_on": "all", "answer": 8}, "autocast, loss on all"),
        ({"loss_on": "answer", "answer": 8}, "autocast, loss on the last 8"),
        ({"loss_on": "answer", "answer": 8, "dtype": "float32"}, "no autocast, loss on the last 8"),
    ],
)
def test_the_summary_tells_kinds_of_step_apart(
    results: Path, settings: dict[str, Any], step: str
) -> None:
    bench_record(results / "bench", "before", rows_of("lora"))
    bench_record(results / "bench", "since", rows_of("lora", "mixlora"), **settings)
    rows = {row.label[2]: row for row in gather(results).tables[6].summary[0].rows}
    assert list(rows) == sorted(["no autocast, loss on all", step])
    assert rows[step].cells[2].records == ("bench/since.json",)


def latencies(results: Path) -> dict[str, float]:
    found = gather(results)
    points = series.latency_points(PAPER, found.tables, found.benchmarks)
    return {p.method: p.latency for p in points if "SmolLM2" in p.panel}


def test_figure_4c_takes_a_record_that_has_lora(add: Write, results: Path) -> None:
    for method in PAPER_METHODS:
        add(method, 0.4, f"method={method}")
    bench_record(results / "bench", "a-again", rows_of("dora", "mixlora", "mixdora"))
    assert latencies(results) == {}
    bench_record(results / "bench", "b", rows_of("lora", "mixlora", slower=10.0))
    assert latencies(results) == pytest.approx({"LoRA": 10.0, "MixLoRA": 15.0})
    # One that has more of the methods goes before it, wherever its name sorts.
    bench_record(results / "bench", "0", rows_of("lora", "dora", "mixlora", slower=20.0), length=64)
    assert latencies(results) == pytest.approx({"LoRA": 20.0, "DoRA": 30.0, "MixLoRA": 40.0})
    # So does a GPU's, with two of them.
    bench_record(
        results / "bench", "z", rows_of("lora", "mixlora", slower=30.0), gpus=("NVIDIA H100",)
    )
    assert latencies(results) == pytest.approx({"LoRA": 30.0, "MixLoRA": 45.0})


def test_records_from_before_autocast_say_so(results: Path) -> None:
    rows = {"lora_peft": bench_row("lora", "peft", "float32", times(10.0), 4e9)}
    rows["mixlora"] = {**bench_row("mixlora", "exact", "float32", times(5.0), 1e9), "head": "auto"}
    bench_record(results / "bench", "before", rows)
    before = gather(results).tables[6].blocks[1]
    assert [row.label[0] for row in before.rows][1] == "MixLoRA (exact kernel), loss in chunks"
    assert any("Without autocast" in note for note in before.notes)
    rows = {name: {**row, "autocast": True} for name, row in rows.items()}
    bench_record(results / "bench", "before", rows, loss_on="answer", answer=8)
    after = gather(results).tables[6].blocks[1]
    assert [row.label[0] for row in after.rows][1] == "MixLoRA (exact kernel)"
    assert not any("Without autocast" in note for note in after.notes)
