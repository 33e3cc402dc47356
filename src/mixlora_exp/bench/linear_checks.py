"""Checks the fused LoRA and DoRA of linear layers against float64 on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mixlora_exp.bench.checks import Case, judged
from mixlora_exp.kernels import FrozenLinear, draw_mask, lora
from mixlora_exp.kernels.lora_many import lora_add_reference
from mixlora_exp.kernels.low_rank import LowRankPart

CASES = ("paper's setting", "odd sizes", "rank 10", "rank 32", "MixDoRA", "one token")
"""Names of `checks.CASES` whose sizes, rank and DoRA are taken: three projections of one input, to
D, to F and to 64 columns."""


def _values(case: Case, device: str, seed: int) -> dict[str, Tensor]:
    """Return random values in float64 that fit in bf16, so that no input is rounded on its way."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*shape, generator=generator) * scale
        return made.bfloat16().double().to(device)

    values = {"x": draw(case.tokens, case.hidden)}
    for g, width in enumerate((case.hidden, case.inner, 64)):
        values[f"{g}.weight"] = draw(width, case.hidden, scale=case.hidden**-0.5)
        values[f"{g}.upstream"] = draw(case.tokens, width)
        values[f"{g}.a"] = draw(case.rank, case.hidden, scale=case.hidden**-0.5)
        values[f"{g}.b"] = draw(width, case.rank, scale=case.rank**-0.5)
        if case.dora:
            values[f"{g}.magnitude"] = draw(width, scale=0.3) + 1.5
    return values


def _run(
    fused: bool, case: Case, values: dict[str, Tensor], dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    """Return the outputs and gradients by name, in float64. Adapters are in float32 or better."""
    adapter_dtype, device = torch.promote_types(dtype, torch.float32), values["x"].device
    leaves = {
        name: value.to(dtype if name == "x" else adapter_dtype).detach().requires_grad_()
        for name, value in values.items()
        if not name.endswith(("weight", "upstream"))
    }
    torch.manual_seed(seed)
    hashed, shape = lora.steps_on(device).HASHED, (case.tokens, case.hidden)
    frozen, parts = [], []
    for g in range(3):
        weight, magnitude = values[f"{g}.weight"].to(dtype), leaves.get(f"{g}.magnitude")
        norm = None if magnitude is None else torch.ones_like(magnitude)
        mask = draw_mask(shape, case.dropout, device, hashed=hashed)
        frozen.append(FrozenLinear(weight))
        parts.append(LowRankPart(leaves[f"{g}.a"], leaves[f"{g}.b"], 2.0, magnitude, norm, mask))
    if fused:
        ys = lora.lora_linears(leaves["x"], frozen, parts)
    else:
        each = zip(frozen, parts, strict=True)
        x = leaves["x"]
        ys = [lora_add_reference(base.linear(x), x, part) for base, part in each]
    torch.autograd.backward(list(ys), [values[f"{g}.upstream"].to(dtype) for g in range(len(ys))])
    found = {f"y {g}": y.detach().double() for g, y in enumerate(ys)}
    return found | {name: leaf.grad.double() for name, leaf in leaves.items()}


def linear_errors(case: Case, dtype: torch.dtype, device: str, seeds: int = 3) -> dict[str, Any]:
    """Return the errors of `kernels.lora` against its plain operations in float64, beside those of
    the plain operations in `dtype`; judged as `checks.kernel_errors` judges."""
    sums: dict[str, list[float]] = {}
    for seed in range(seeds):
        values = _values(case, device, seed)
        truth = _run(False, case, values, torch.float64, seed)
        for i, fused in enumerate((True, False)):
            for key, value in _run(fused, case, values, dtype, seed).items():
                error = float((value - truth[key]).norm() / truth[key].norm().clamp(min=1e-30))
                sums.setdefault(key, [0.0, 0.0])[i] += error / seeds
    return {"kernel": "linear", **asdict(case), **judged(sums, dtype)}
