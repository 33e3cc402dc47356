"""The Triton kernels as tests run them: on a GPU as they are, elsewhere by Triton's interpreter."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mixlora_exp.kernels import DropMask, FeedForward, FrozenLinear, Routing, known_activation

triton = pytest.importorskip("triton")
tl = triton.language

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
DEVICE = torch.device("cuda" if GPU else "cpu")
PACKAGE = "mixlora_exp.kernels.triton"


def load(*names: str) -> list[ModuleType]:
    """The modules of that package: as they are on a GPU, elsewhere copies of them that Triton
    interprets, which other tests do not see."""
    full = [f"{PACKAGE}.{name}" for name in names]
    if GPU:
        return [importlib.import_module(name) for name in full]
    interpret_library()
    before = forget()
    put_back(_copies)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            # Triton imports it when a kernel first runs, and then it must find this variable.
            importlib.import_module("triton.experimental.gluon")
            return [importlib.import_module(name) for name in full]
    finally:
        _copies.update(forget())
        put_back(before)


_copies: dict[str, ModuleType] = {}
"""Made once in a process: who registers an operator anew frees the one that a copy made before
holds, and calling that is undefined."""


def put_back(modules: dict[str, ModuleType]) -> None:
    for name, module in modules.items():
        sys.modules[name] = module
        setattr(sys.modules[PACKAGE], name.rpartition(".")[2], module)


def interpret_library() -> None:
    """Triton's own functions, which were made for the compiler if it has been imported before."""
    from triton.runtime.interpreter import InterpretedFunction

    for module in (tl.standard, tl):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))


def forget() -> dict[str, ModuleType]:
    """Take the package's Triton modules out of it; returns them."""
    package = importlib.import_module(PACKAGE)
    found = [name for name in sys.modules if name.startswith(f"{PACKAGE}.")]
    for name in found:
        if hasattr(package, name.rpartition(".")[2]):
            delattr(package, name.rpartition(".")[2])
    return {name: sys.modules.pop(name) for name in found}


(
    triton_block,
    triton_columns,
    triton_hidden,
    triton_order,
    triton_router,
    triton_scaled,
    triton_tiles,
) = load("block", "columns", "hidden", "order", "router", "scaled", "tiles")


def on_device(block: FeedForward) -> FeedForward:
    """The block on the GPU if there is one, its activation by name."""
    made = {}
    for role, projection in block.projections.items():
        experts, bias = projection.experts, projection.bias
        if experts is not None:
            names = ("a", "b", "magnitude", "norm")
            parts = {name: getattr(experts, name) for name in names}
            moved = {name: None if t is None else t.to(DEVICE) for name, t in parts.items()}
            experts = replace(experts, **moved)
        bias = None if bias is None else bias.to(DEVICE)
        frozen = FrozenLinear(projection.frozen.weight().to(DEVICE), bias)
        made[role] = replace(projection, frozen=frozen, experts=experts)
    for name in ("x_mask", "hidden_mask"):
        mask = getattr(block, name)
        made[name] = mask and DropMask.rebuilt(mask.elements.to(DEVICE), mask.described)
    if callable(block.activation):
        made["activation"] = known_activation(block.activation)
    return replace(block, **made)


def fused(x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
    """`mixlora_triton` on the GPU if there is one, for inputs on the CPU; never its fallback."""
    block = on_device(block)
    parts = (routing.logits, routing.probabilities, routing.experts, routing.weights)
    x = x.to(DEVICE)
    routing = Routing(*(p.to(DEVICE) for p in parts))
    assert triton_block.supports(x, routing, block)
    return triton_block.fused_block(x, routing, block).cpu()
