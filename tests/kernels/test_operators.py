"""Each operator of this project is what it is registered as: it changes nothing but what it names,
its results are fresh, and shapes, dtypes and strides are known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import DEVICE, GPU, load, on_device, triton_block, triton_router

from mixlora_exp.kernels import DropoutStream, FrozenLinear, lora
from mixlora_exp.kernels.dropout import HashMask, _kept
from mixlora_exp.kernels.low_rank import LowRankPart

linear_launch, hashing = load("linear_launch", "hashing")
SPACE = "mixlora" if GPU else "mixlora_interpreted"


class Taken(TorchDispatchMode):
    """Notes our operators as they are called, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in (SPACE, "mixlora"):
            self.calls[function._schema.name] = (function, args)
        return function(*args, **(kwargs or {}))


def block(block_of: Callable, plain, dora: bool) -> None:
    made = block_of(replace(plain, dora=dora, experts=3), 0, torch.float32)
    masks = made.masks(0.3, hashed=True)
    leaves = {n: v.to(DEVICE, torch.float32).requires_grad_() for n, v in made.values.items()}
    held = on_device(made.block(leaves, torch.float32, torch.float32, masks=masks))
    routing = triton_router.route_triton(leaves["x"], leaves["router"], 2)
    triton_block.fused_block(routing.rows, routing, held).sum().backward()


def linears() -> None:
    """A group of three, of which one has DoRA and one no dropout."""
    keys = torch.arange(20, device=DEVICE)
    parts = []
    for i, width in enumerate((24, 33, 48)):
        a, b, magnitude, norm = (
            torch.rand(shape, device=DEVICE) for shape in ((9, 40), (width, 9), (width,), (width,))
        )
        for trained in (a, b, magnitude):
            trained.requires_grad_()
        mask = HashMask.of(keys, i, 0.3, 40) if i else None
        dora = (magnitude, norm) if i == 1 else (None, None)
        parts.append(LowRankPart(a, b, 1.7, *dora, mask))
    x = torch.randn(20, 40, device=DEVICE, requires_grad=True)
    frozen = [FrozenLinear(torch.randn(w, 40, device=DEVICE)) for w in (24, 33, 48)]
    sum(y.sum() for y in lora.lora_linears(x, frozen, parts)).backward()


def masks() -> None:
    hashing.kept_matrix(torch.arange(20, device=DEVICE), 7, 33, 1 << 20)
    stream = DropoutStream(3)
    stream.begin(0, torch.arange(20) // 7, torch.arange(20) % 7)
    _kept(stream.rows.runs, torch.tensor(7), 20, 33, 0.3)


def test_operators_are_what_they_are_registered_as(block_of, plain, monkeypatch) -> None:
    """All that are registered, of blocks and linear layers, LoRA and DoRA."""
    monkeypatch.setattr(lora, "steps_on", lambda device: linear_launch)
    with Taken() as taken:
        for dora in (False, True):
            block(block_of, plain, dora)
        linears()
        masks()
    # Those of tests are not ours.
    ours = {
        n for n in OPDEFS if n.startswith((f"{SPACE}::", "mixlora::kept")) and "::test" not in n
    }
    assert ours == taken.calls.keys()
    assert len(ours) == 19
    for function, args in taken.calls.values():
        copies = torch.utils._pytree.tree_map_only(Tensor, torch.clone, args)
        with torch.no_grad():
            torch.library.opcheck(function, copies, test_utils=["test_schema", "test_faketensor"])
