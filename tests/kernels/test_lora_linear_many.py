"""Batched LoRA and DoRA of several adapters: each one's rows as it would compute them alone."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mixlora_exp.kernels import draw_mask
from mixlora_exp.kernels.lora.linear import lora_add_reference
from mixlora_exp.kernels.lora.many import LowRankPart, lora_add_many

CPU = torch.device("cpu")


def draw(count: int, tokens: int, size: tuple[int, int], rank: int, dora: bool, p: float):
    """Leaves in float64 and the parts they make; every other adapter has no dropout."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    frozen, x = leaf(count * tokens, size[1]), leaf(count * tokens, size[0])
    parts = []
    for number in range(count):
        drawn = p if number % 2 == 0 else 0.0
        parts.append(
            LowRankPart(
                leaf(rank, size[0]),
                leaf(size[1], rank),
                0.5 + number,
                leaf(size[1]) if dora else None,
                torch.rand(size[1], dtype=torch.float64) + 0.5 if dora else None,
                draw_mask((tokens, size[0]), drawn, CPU),
            )
        )
    return frozen, x, parts


def leaves_of(frozen, x, parts):
    own = [t for part in parts for t in (part.a, part.b, part.magnitude) if t is not None]
    return [frozen, x, *own]


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.7], ids=["no dropout", "sparse", "bool"])
@pytest.mark.parametrize(("count", "tokens"), [(1, 5), (2, 7), (4, 3), (3, 1), (2, 0)])
def test_is_each_adapter_by_itself(fresh_seed, count, tokens, dora, p) -> None:
    torch.manual_seed(fresh_seed)
    frozen, x, parts = draw(count, tokens, (12, 20), 3, dora, p)
    y = lora_add_many(frozen, x, parts)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves_of(frozen, x, parts), upstream)
    expected = torch.cat(
        [
            lora_add_reference(
                frozen[i * tokens : (i + 1) * tokens],
                x[i * tokens : (i + 1) * tokens],
                part.a,
                part.b,
                part.scaling,
                magnitude=part.magnitude,
                norm=part.norm,
                mask=part.mask,
            )
            for i, part in enumerate(parts)
        ]
    )
    truth = torch.autograd.grad(expected, leaves_of(frozen, x, parts), upstream)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_nothing_leaks_from_a_broken_adapter(fresh_seed, dora) -> None:
    """Neither into the others' outputs nor into their gradients, by a bit."""
    torch.manual_seed(fresh_seed)
    frozen, x, parts = draw(3, 5, (12, 20), 2, dora, 0.3)
    results = []
    for broken in (False, True):
        if broken:
            with torch.no_grad():
                parts[1].a.fill_(float("nan"))
        y = lora_add_many(frozen, x, parts)
        own = leaves_of(frozen, x, [parts[0], parts[2]])
        results.append([y, *torch.autograd.grad(y.sum(), own)])
    (y, dfrozen, dx, *sound), (bad_y, bad_dfrozen, bad_dx, *others) = results
    assert bad_y[5:10].isnan().any()
    for one, other in ((y, bad_y), (dfrozen, bad_dfrozen), (dx, bad_dx)):
        assert torch.equal(one[:5], other[:5])
        assert torch.equal(one[10:], other[10:])
    assert all(torch.equal(one, other) for one, other in zip(sound, others, strict=True))


def test_in_the_base_s_precision(fresh_seed) -> None:
    """bf16 rows and float32 adapters, as trained: gradients come back in each one's own."""
    torch.manual_seed(fresh_seed)
    frozen, x, parts = draw(2, 6, (12, 20), 3, True, 0.0)
    rounded = [
        LowRankPart(
            part.a.detach().float().requires_grad_(),
            part.b.detach().float().requires_grad_(),
            part.scaling,
            part.magnitude.detach().float().requires_grad_(),
            part.norm.float(),
            None,
        )
        for part in parts
    ]
    y = lora_add_many(frozen.detach().bfloat16(), x.detach().bfloat16(), rounded)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    for part in rounded:
        assert {t.grad.dtype for t in (part.a, part.b, part.magnitude)} == {torch.float32}
    exact = lora_add_many(frozen, x, parts)
    # Ten roundings lie between a factor and the sum, and terms of both signs may cancel: the bound
    # is that many half units in the last place of the sum of the terms' absolute values.
    whole = [
        LowRankPart(p.a.abs(), p.b.abs(), p.scaling, p.magnitude.abs(), p.norm, None) for p in parts
    ]
    bound = 10 * torch.finfo(torch.bfloat16).eps / 2 * lora_add_many(frozen.abs(), x.abs(), whole)
    assert ((y.double() - exact).abs() <= bound).all()


def test_a_checkpointed_pass_keeps_no_mask() -> None:
    """What is computed again need not be kept meanwhile."""
    frozen, x, parts = draw(2, 50, (12, 20), 2, False, 0.5)
    seen = []

    def run(frozen, x):
        drawn = [
            LowRankPart(p.a, p.b, p.scaling, None, None, draw_mask((50, 12), 0.7, CPU))
            for p in parts
        ]
        seen.extend(weakref.ref(part.mask.elements) for part in drawn)
        return lora_add_many(frozen, x, drawn)

    y = checkpoint(run, frozen, x, use_reentrant=False, preserve_rng_state=True)
    gc.collect()
    assert len(seen) == 2
    assert not any(ref() is not None for ref in seen)
    y.sum().backward()
