"""A compiled or recorded row with other gradients than the eager one has no time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stand_in_recorder import StandIn
from torch import Tensor, nn

from mixlora_exp.bench.gradients import Difference, largest_difference
from mixlora_exp.bench.kinds import steps
from mixlora_exp.bench.options import StepOptions
from mixlora_exp.bench.report import markdown
from mixlora_exp.bench.row_registry import ROWS, BenchRow
from mixlora_exp.config.choices import Compile

OWN = "mixdora_compiled_here"
NAMES = ["lora_peft", "lora_peft_compiled", "floor_compiled", OWN]


@pytest.fixture
def compiled_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """Let another function stand in for the compiler, which takes a minute."""
    own = BenchRow(method="mixdora", kernel="exact", compile=Compile.layer)
    monkeypatch.setitem(ROWS, OWN, own)

    def use(stand_in: Callable) -> None:
        monkeypatch.setattr(torch, "compile", lambda call, **options: stand_in(call))

    return use


def rows_of(names: list[str], **changes: Any) -> tuple[dict[str, Any], str]:
    settings = {"model": "tiny", "batch": 2, "length": 16, "dtype": "float32", "memory": False}
    options = StepOptions(**{**settings, **changes}, rounds=1, rows=names)
    *_, record = steps.benchmark_parts(options, echo=lambda text: None)
    origin = {"hardware": {"cpu": "c", "gpus": []}, "packages": {"torch": "t"}}
    return record["rows"], markdown({**record, "provenance": origin})


def without_attention(call: Callable) -> Callable:
    """A decoder layer whose gradient does not get through attention, as torch 2.11 compiled it."""
    projection: nn.Module = call.__self__.self_attn.o_proj

    def run(*args: Any, **kwargs: Any) -> Any:
        hook = projection.register_forward_pre_hook(lambda module, given: (given[0].detach(),))
        try:
            return call(*args, **kwargs)
        finally:
            hook.remove()

    return run


def test_equal_gradients_are_told_and_the_row_is_measured(compiled_by) -> None:
    """With dropout: the masks of both passes are the same, or PEFT's, which cannot be, are off."""
    compiled_by(lambda call: call)
    rows, _ = rows_of(NAMES, dropout=0.3)
    for name in NAMES[1:]:
        assert rows[name]["rounds"] == 1, rows[name]
        assert rows[name]["gradient_difference"]["relative"] < 1e-6
    assert "gradient_difference" not in rows["lora_peft"]


def test_a_dropped_gradient_is_reported_in_place_of_a_time(compiled_by) -> None:
    compiled_by(without_attention)
    rows, table = rows_of(NAMES, dropout=0.3)
    assert rows["lora_peft"]["rounds"] == 1
    for name in NAMES[1:]:
        assert not {"rounds", "train_us_per_token", "train_forward_us_per_token"} & set(rows[name])
        assert rows[name]["error"].startswith("wrong gradients: ")
        assert rows[name]["error"].endswith("of the eager step's (allowed: 0.001)")
        assert f"| {name} | {rows[name]['error']} |" in table
    assert "input is off by " in rows["floor_compiled"]["error"]
    for name in ("lora_peft_compiled", OWN):
        (parameter,) = [w for w in rows[name]["error"].split() if w.startswith("base_model")]
        assert ".self_attn." in parameter
        assert " is off by 1 of" in rows[name]["error"], "missing altogether"


def half_of_attention(call: Callable) -> Callable:
    """A decoder layer of whose gradient half gets through attention."""
    projection: nn.Module = call.__self__.self_attn.o_proj

    def halved(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        return ((given[0] + given[0].detach()) / 2,)

    def run(*args: Any, **kwargs: Any) -> Any:
        hook = projection.register_forward_pre_hook(halved)
        try:
            return call(*args, **kwargs)
        finally:
            hook.remove()

    return run


def test_half_a_gradient_is_no_rounding_of_16_bits(compiled_by) -> None:
    """Also where the routers' choices follow the rounding."""
    compiled_by(lambda call: call)
    rows, _ = rows_of(NAMES, dtype="bfloat16")
    assert all(rows[name]["rounds"] == 1 for name in NAMES[1:])
    compiled_by(half_of_attention)
    rows, _ = rows_of(["lora_peft", "lora_peft_compiled", OWN], dtype="bfloat16")
    for name, most in (("lora_peft_compiled", "0.2"), (OWN, "0.45")):
        assert rows[name]["error"].endswith(f"of the eager step's (allowed: {most})")


class Forgetful(StandIn):
    """Replays a recording on inputs of long ago: nothing is added to the gradients."""

    def record(self, compute: Callable) -> tuple:
        replay, results = super().record(compute)
        replay()
        return (lambda: None), results


@pytest.mark.parametrize(("made", "right"), [(StandIn, True), (Forgetful, False)])
def test_a_recorded_step_is_judged_by_its_replay(compiled_by, monkeypatch, made, right) -> None:
    compiled_by(lambda call: call)
    name = "mixlora_graph_here"
    own = BenchRow(method="mixlora", kernel="exact", compile=Compile.graph)
    monkeypatch.setitem(ROWS, name, own)
    monkeypatch.setattr(steps, "_why_not", lambda *arguments: None)
    monkeypatch.setattr(steps, "CudaRecorder", lambda device: made())
    rows, _ = rows_of(["lora_peft", name], dropout=0.0)
    assert (rows[name].get("rounds") == 1) == right
    assert rows[name].get("error", "").startswith("wrong gradients" if not right else "")


@pytest.mark.parametrize(
    ("found", "name", "relative"),
    [
        pytest.param({"a": [3.0, 4.0], "b": [1.0]}, "a", 0.0, id="equal"),
        pytest.param({"a": [3.0, 4.5], "b": [1.0]}, "a", 0.1, id="by norms"),
        pytest.param({"a": [3.0, 4.0]}, "b", 1.0, id="missing"),
        pytest.param({"a": [3.0, 4.0], "b": [1.0], "c": [0.5]}, "c", float("inf"), id="too many"),
        pytest.param({"a": [3.0, float("nan")], "b": [1.0]}, "a", float("inf"), id="NaN"),
        pytest.param({"a": [3.0, 4.0], "b": [1.0], "c": [0.0]}, "a", 0.0, id="zeros"),
    ],
)
def test_the_largest_difference(found, name, relative) -> None:
    def tensors(values: dict[str, list[float]]) -> dict[str, Tensor]:
        return {key: torch.tensor(value) for key, value in values.items()}

    made = largest_difference(tensors(found), tensors({"a": [3.0, 4.0], "b": [1.0]}))
    assert made.relative == pytest.approx(relative)
    assert made == Difference(name, made.relative) or relative == 0
