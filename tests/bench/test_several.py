"""The benchmark of several adapters on one base, at tiny size: what it counts and what it tells."""

from __future__ import annotations

import json

import pytest
import torch
from composed import compose

from mixlora_exp.bench.kinds.adapters import benchmark_several
from mixlora_exp.bench.model import base_model, model_config
from mixlora_exp.bench.several_memory import account, resident
from mixlora_exp.bench.several_report import several_markdown
from mixlora_exp.bench.several_steps import AdapterOptions, Joint
from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.errors import UserError
from mixlora_exp.models.parameters import count_parameters
from mixlora_exp.plans.kept import kept_by_layer

TINY = {"model": "tiny", "dtype": "float32", "length": 16, "rounds": 1, "resident": False}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("kind", [*PAPER_METHODS, "mixed"])
def test_memory_per_model_falls_as_the_base_is_shared(kind: str) -> None:
    """Within two points of (base / M + a) / (base + a), and by items that are counted."""
    found = account(AdapterOptions(**TINY, method=kind))
    one = found["rows"]["1"]
    methods = PAPER_METHODS if kind == "mixed" else [kind]
    method = compose([f"method={methods[0]}"]).method
    counted = count_parameters(compose(["model=tiny"]).model, method)
    assert one["bytes"]["base"] == 4 * counted.base
    trained = counted.adapter + counted.magnitude
    assert one["bytes"]["adapter"] == one["bytes"]["gradient"] == 4 * trained
    assert one["bytes"]["adamw"] == 8 * trained
    for count, row in found["rows"].items():
        for use in ("train", "infer", "infer_bf16"):
            assert row[f"{use}_percent"] == pytest.approx(row[f"{use}_expected_percent"], abs=2)
        if kind != "mixed" and count != "1":
            assert row["train"] < one["train"]
            assert row["infer"] < one["infer"]


@pytest.mark.parametrize("method", PAPER_METHODS)
def test_the_plan_of_a_packed_pass_is_what_autograd_keeps(method: str) -> None:
    """Per token and layer, several adapters in one pass."""
    kept = {}
    for layers in (1, 2):
        for length in (16, 48):
            config = AdapterOptions(
                **{**TINY, "length": length}, method=method, dropout=0.0, sequences=2
            )
            base = base_model(model_config("tiny", layers), torch.float32, "cpu", 0)
            base.set_attn_implementation("sdpa")
            kept[layers, length] = Joint(config, base, 2, 1).saved()
    growth = {length: kept[2, length] - kept[1, length] for length in (16, 48)}
    measured = (growth[48] - growth[16]) / (2 * (48 - 16))
    rank = 16 if method.startswith("mix") else 80
    planned = compose(
        [f"method={method}", "model=tiny", "kernel=exact", "method.dropout=0",
         f"method.rank={rank}", f"method.alpha={2 * rank}"]
    )  # fmt: skip
    found = kept_by_layer(planned, width=4, packed=True).per_token
    assert found == pytest.approx(measured, rel=0.05)


def test_the_whole_benchmark() -> None:
    config = AdapterOptions(**TINY, counts=[1, 2], sequences=2)
    found = benchmark_several(config, echo=lambda text: None)
    names = {"alone", "together_1", "together_2", "small_together_2", "small_alone_2"}
    assert set(found["times"]) == names
    assert found["times"]["together_1"]["train_ratio"] == 1.0
    assert found["times"]["small_alone_2"]["train_ratio"] == 1.0
    assert all(row["train_us_per_token"] > 0 for row in found["times"].values())
    json.dumps(found)
    provenance = {"hardware": {"cpu": "a CPU", "gpus": []}, "packages": {"torch": "x"}}
    table = several_markdown({**found, "provenance": provenance})
    assert "57.7, 52.5" in table
    assert "| together 2 |" in table


@pytest.mark.slow
def test_resident_memory_in_a_process_of_its_own() -> None:
    found = resident(AdapterOptions(**TINY, counts=[1, 2], sequences=2), 2)
    assert found["train"] > 0
    assert found["infer"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "qlora"}, "method=qlora is unknown: choose from lora"),
        ({"counts": [1, 3]}, "counts=3 must divide sequences=8"),
        ({"counts": [2, 4]}, "must begin with 1"),
        ({"rounds": 0}, "rounds=0 must be >= 1"),
    ],
)
def test_wrong_settings_are_reported(changes, message) -> None:
    with pytest.raises(UserError, match=message):
        benchmark_several(AdapterOptions(**{**TINY, **changes}))
