"""Linear layers that share an input, as eager code on a CPU computes them, against plain code."""

from __future__ import annotations

import pytest
import torch

from mixlora_exp.kernels import FrozenLinear, draw_mask, eager_linear
from mixlora_exp.kernels.dropout import DropMask
from mixlora_exp.kernels.lora import lora_linears, steps_on
from mixlora_exp.kernels.lora_many import lora_add_reference
from mixlora_exp.kernels.low_rank import LowRankPart

CPU = torch.device("cpu")


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("masks", ["none", "sparse", "bool"])
@pytest.mark.parametrize("count", [1, 3])
def test_values_and_gradients_are_those_of_plain_code(fresh_seed, dora, masks, count) -> None:
    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    x, parts, frozen, trained = leaf(9, 6), [], [], []
    for width in range(5, 5 + count):
        mask = None if masks == "none" else draw_mask((9, 6), 0.4, CPU)
        if masks == "bool":
            mask = DropMask(mask.kept(), mask.scale, mask.shape)
        frozen.append(FrozenLinear(torch.randn(width, 6, dtype=torch.float64)))
        a, b, magnitude = leaf(2, 6), leaf(width, 2), leaf(width) if dora else None
        norm = torch.rand(width, dtype=torch.float64) + 0.5 if dora else None
        parts.append(LowRankPart(a, b, 0.7, magnitude, norm, mask))
        trained += [a, b, *([magnitude] if dora else [])]
    assert steps_on(CPU) is eager_linear
    made = lora_linears(x, frozen, parts)
    pairs = zip(frozen, parts, strict=True)
    wanted = [lora_add_reference(base.linear(x), x, part) for base, part in pairs]
    upstream = [torch.randn_like(y) for y in wanted]
    before = [y.clone() for y in upstream]
    torch.testing.assert_close(list(made), wanted)
    found = torch.autograd.grad(made, [x, *trained], upstream)
    assert all(map(torch.equal, upstream, before))
    torch.testing.assert_close(found, torch.autograd.grad(wanted, [x, *trained], upstream))
