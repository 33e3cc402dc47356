"""Checks the fused LoRA and DoRA of linear layers against float64 on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mixlora_exp.bench.checks import Case, Errors, drawn_by, judged
from mixlora_exp.kernels import FrozenLinear, draw_mask, lora
from mixlora_exp.kernels.lora_many import lora_add_reference
from mixlora_exp.kernels.low_rank import LowRankPart

CASES = ("paper's setting", "odd sizes", "rank 10", "rank 32", "MixDoRA", "one token")
"""Names of `checks.CASES` whose sizes, rank and DoRA are taken: three projections of one input, to
D, to F and to 64 columns."""


def _values(case: Case, device: str, seed: int) -> dict[str, Tensor]:
    """Return the input, weights and upstream gradients of three projections, by name."""
    draw = drawn_by(seed, device)
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
    errors = Errors(seeds)
    for seed in range(seeds):
        values = _values(case, device, seed)
        truth = _run(False, case, values, torch.float64, seed)
        errors.add(truth, *(_run(fused, case, values, dtype, seed) for fused in (True, False)))
    return {"kernel": "linear", **asdict(case), **judged(errors.mean, dtype)}
