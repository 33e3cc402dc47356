"""What the cached adapter weights cost: a few calls per optimizer step for a whole model."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cached_layers import layers_of
from peft import PeftModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixlora_exp.adapters import set_kernel
from mixlora_exp.adapters.cache_source import Source, adapters_changed
from mixlora_exp.adapters.dora_norms import norms_of
from mixlora_exp.adapters.weight_cache import cached_weights


@pytest.fixture
def model(model_of, dora: bool) -> PeftModel:
    made = model_of(dtype=torch.bfloat16, use_dora=dora)
    set_kernel(made, "exact")
    return made


class Operations(TorchDispatchMode):
    """Counts what is computed within."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None):
        if not function.is_view and "empty" not in function.__name__:
            self.seen[function._schema.name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


def test_all_weights_are_cast_together(model, batch, dora) -> None:
    """A and B of the whole model by one call each, once per optimizer step."""
    model.train()(**batch)
    layer, *_ = layers_of(model)
    adapters_changed()
    with Operations() as counted:
        cached_weights(layer, "default", torch.bfloat16, next(iter(layer.cache_sources("default"))))
    assert counted.seen["_foreach_copy_"] == (4 if dora else 2)
    assert counted.seen["_foreach_div"] == dora
    if not dora:
        assert counted.seen.total() == 2
    with Operations() as counted:
        for layer in layers_of(model):
            for part in layer.cache_sources("default"):
                cached_weights(layer, "default", torch.bfloat16, part)
    assert counted.seen.total() == 0


class CastFrom(TorchDispatchMode):
    """Notes what is cast within, of some tensors."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.pointers = {tensor.data_ptr() for tensor in tensors}
        self.seen = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None):
        if function is torch.ops.aten._to_copy.default:
            self.seen += args[0].data_ptr() in self.pointers
        return function(*args, **(kwargs or {}))


def test_no_pass_casts_them(model, batch) -> None:
    """Neither forward nor backward, once they are made."""
    model.train()(**batch)
    weights = [p for n, p in model.named_parameters() if "lora_" in n and "router" not in n]
    with CastFrom(weights) as counted:
        model(**batch).loss.backward()
    assert counted.seen == 0
    for layer in layers_of(model):
        layer.weight_cache._layers.clear()  # As a replica, which has none.
    with CastFrom(weights) as counted:
        model(**batch)
    assert counted.seen > 0


def test_norms_on_a_gpu_take_a_product_each(monkeypatch) -> None:
    """Counted with tensors that have no values: those of a model of 32 layers, four projections of
    one shape and a feed-forward block with experts each."""

    def sources(count: int, inputs: int, outputs: int, *experts: int) -> list[Source]:
        def of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        return [
            Source(
                of(outputs, inputs, dtype=torch.bfloat16),
                of(*experts, 16, inputs),
                of(*experts, outputs, 16),
                2.0,
                of(*experts, outputs),
            )
            for _ in range(count)
        ]

    wide = sources(64, 4096, 11008, 8)
    found = [*sources(128, 4096, 4096), *wide, *sources(32, 11008, 4096, 8)]
    squares = [torch.empty(len(one.weight), device="meta") for one in found]
    # There is none for tensors without values.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    with Operations() as counted:
        norms = norms_of(found, squares)
    assert [norm.shape for norm in norms] == [one.magnitude.shape for one in found]
    assert counted.seen.pop("mm") == len(found)
    assert counted.seen.total() < 0.7 * len(found)
