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


@pytest.mark.parametrize("supported", [True, False])
def test_a_device_s_steps_are_taken_where_they_can(monkeypatch, supported) -> None:
    """What they do not support goes through plain code, in both passes."""
    taken = []

    class Steps:
        """The steps of eager code, which note their names."""

        @staticmethod
        def supports(x, parts) -> bool:
            return supported

        def __getattr__(self, name):
            taken.append(name)
            return getattr(eager_linear, name)

    monkeypatch.setattr("mixlora_exp.kernels.lora.steps_on", lambda device: Steps())
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 6), (5, 2)))
    base, part = FrozenLinear(torch.randn(5, 6, dtype=torch.float64)), LowRankPart(a, b, 0.7)
    (made,) = lora_linears(x, [base], [part])
    torch.testing.assert_close(made, lora_add_reference(base.linear(x), x, part))
    made.sum().backward()
    assert ("low" in taken) is supported
    assert ("gradients_of_a" in taken) is supported
