"""Base models in 4 and 8 bits: what they hold, what they take, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from composed import compose
from fake_hub import fake_hub
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixlora_exp.config.recorded import check_recorded
from mixlora_exp.config.resolve import fingerprint, fingerprint_of, to_dict
from mixlora_exp.config.run_names import run_name
from mixlora_exp.config.schema import Quantization
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import is_quantized, matrix_of
from mixlora_exp.models import base_of, load_model
from mixlora_exp.models.quantization import base_bytes, check_quantization
from mixlora_exp.plans.memory import memory_of

KINDS = ["nf4", "int8", "int8_torchao"]
EVERY_LINEAR = 14
"""Projections of the two layers of model=tiny."""


def load(kind: str, *words: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = compose(["model=tiny", f"model.quantization={kind}", "method=none", *words])
    return load_model(config.model, dtype, seed=1)


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: matrix_of(module).float() for name, module in linear.items()}


def test_they_are_refused_by_name_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for kind, package in (("nf4", "bitsandbytes"), ("int8_torchao", "torchao")):
        told = f"model.quantization={kind} needs the package {package}, which is not installed"
        with pytest.raises(UserError, match=told):
            load(kind)
    assert not any(map(is_quantized, load("none").modules()))


@pytest.mark.parametrize("kind", KINDS)
def test_other_devices_are_refused(kind: str) -> None:
    config = compose(["model=tiny", f"model.quantization={kind}"]).model
    with pytest.raises(UserError, match="runs on a CPU or a CUDA GPU, not on mps"):
        check_quantization(config, "mps")


@pytest.mark.parametrize(("kind", "bound"), [("nf4", 0.12), ("int8", 0.01), ("int8_torchao", 0.01)])
def test_weights_are_those_of_the_model_but_for_rounding(kind: str, bound: float) -> None:
    held, plain = matrices(load(kind)), matrices(load("none"))
    assert sum(map(is_quantized, load(kind).modules())) == EVERY_LINEAR
    for name, weight in plain.items():
        error = float((held[name] - weight).norm() / weight.norm())
        assert error < bound, name
        assert (error > 0) is (name != "lm_head"), name


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_and_stored_weights_are_quantised_alike(kind: str, tmp_path: Path) -> None:
    load("none").save_pretrained(tmp_path)
    drawn, stored = load(kind), load(kind, f"model.path={tmp_path}")
    expected = matrices(drawn)
    for name, weight in matrices(stored).items():
        assert torch.equal(weight, expected[name]), name
    assert (
        base_of(stored).fingerprint == base_of(load("none", f"model.path={tmp_path}")).fingerprint
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_the_hub_are_quantised_like_stored_ones(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load("none").save_pretrained(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    expected = load(kind, f"model.path={tmp_path / 'model'}")
    with fake_hub(monkeypatch, str(tmp_path / "cache")) as hub:
        commit = hub.commit("owner/name", files)
        words = ["model.source=hub", "model.hub_id=owner/name", f"model.revision={commit}"]
        found = load(kind, *words)
        assert "model.safetensors" in hub.fetched()
    assert sum(map(is_quantized, found.modules())) == EVERY_LINEAR
    own = matrices(expected)
    for name, weight in matrices(found).items():
        assert torch.equal(weight, own[name]), name
    assert found.config._commit_hash == commit
    # Both have that of the weights as they are stored.
    assert base_of(found).fingerprint == base_of(expected).fingerprint


def bytes_held(weight: Tensor) -> int:
    if hasattr(weight, "qdata"):
        return weight.qdata.nbytes + weight.scale.nbytes
    state, scales = getattr(weight, "quant_state", None), getattr(weight, "SCB", None)
    if state is not None:
        return weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    return weight.nbytes + (0 if scales is None else scales.nbytes)


@pytest.mark.parametrize("model", ["tiny", "tiny_gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_bytes_are_counted_without_weights(kind: str, dtype: torch.dtype, model: str) -> None:
    built = load(kind, f"model={model}", dtype=dtype)
    config = compose([f"model={model}", f"model.quantization={kind}"]).model
    assert base_bytes(config, dtype.itemsize) == sum(map(bytes_held, built.parameters()))


def test_plans_take_the_weights_as_they_are_held() -> None:
    plans = {
        kind: memory_of(compose(["model=llama2_7b", f"model.quantization={kind}"]))
        for kind in ("none", *KINDS)
    }
    weights = {kind: memory["weights"] / 2**30 for kind, memory in plans.items()}
    # 6.48 billion weights of linear layers, and 0.26 in bf16.
    assert weights["none"] == pytest.approx(12.55, abs=0.01)
    assert weights["nf4"] == pytest.approx(3.60, abs=0.01)
    assert weights["int8"] == weights["int8_torchao"] == pytest.approx(6.52, abs=0.01)
    assert all(memory["activations"] == plans["none"]["activations"] for memory in plans.values())


@pytest.fixture
def named() -> Callable[[str], str]:
    return lambda kind: run_name(compose([f"model.quantization={kind}"]))


def test_each_is_another_run(named: Callable[[str], str]) -> None:
    assert len({named(kind) for kind in ("none", *KINDS)}) == 4


def test_a_record_of_before_is_one_without_quantization() -> None:
    config = compose()
    before = to_dict(config)
    del before["model"]["quantization"]
    check_recorded(before)
    assert fingerprint_of(before) == fingerprint(config)
    assert config.model.quantization is Quantization.none
    other = dataclasses.replace(config.model, quantization=Quantization.nf4)
    check_recorded({"model": to_dict(other)})
