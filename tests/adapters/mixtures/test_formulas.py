"""Each method against its formula, expert by expert and token by token, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from small_mixtures import METHODS
from torch import Tensor

from mixlora_exp.adapters.mixtures.layer import MixtureLinear

NAMES = ("q_proj", "down_proj")


def weights_of(method: str, layer: MixtureLinear, x: Tensor) -> Tensor:
    """(E,) of one row x (in,)."""
    logits = layer.lora_router["default"] @ x
    p = logits.softmax(0)
    if method in ("loramoe", "hydralora"):
        return p
    if method == "adamole":
        v, c = (layer.get_parameter(f"lora_router_threshold{end}.default") for end in ("", "_bias"))
        above = (p - (v @ x + c).sigmoid() / len(p)).relu()
        return above / above.sum()
    chosen = logits.argsort(descending=True)[:2]
    return torch.zeros_like(p).index_put((chosen,), p[chosen] / p[chosen].sum())


def by_formula(method: str, layer: MixtureLinear, x: Tensor) -> Tensor:
    """(..., out) of x (..., in), without dropout."""
    base = layer.get_base_layer()
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        y = base.weight @ row + (0 if base.bias is None else base.bias)
        if method == "moslora":
            rows.append(y + 2 * b[0] @ layer.lora_mixer["default"] @ a[0] @ row)
            continue
        if method in ("pissa", "lora_ga"):
            a0, b0 = layer.lora_A0["default"], layer.lora_B0["default"]
            rows.append(y + 2 * (b[0] @ a[0] - b0[0] @ a0[0]) @ row)
            continue
        s = math.sqrt(3 * base.in_features / 3) if method == "goat" else 2.0
        for e, w in enumerate(weights_of(method, layer, row)):
            y = y + w * s * b[e] @ (a[0 if method == "hydralora" else e] @ row)
            if method == "goat":
                a0, b0 = layer.lora_A0["default"], layer.lora_B0["default"]
                y = y - s / len(b) * b0[e] @ a0[e] @ row
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_all_gradients(mixed_of, method: str, name: str) -> None:
    model = mixed_of(method, torch.float64)
    layers = [m for m in model.modules() if isinstance(m, MixtureLinear)]
    assert len(layers) == 14
    layer = [m for key, m in model.named_modules() if key.endswith(f"1.{_home(name)}.{name}")][0]
    layer.get_base_layer().bias = torch.nn.Parameter(
        torch.randn(layer.get_base_layer().out_features, dtype=torch.float64), requires_grad=False
    )
    inputs = torch.randn(2, 5, layer.get_base_layer().in_features, dtype=torch.float64)
    trained = {key: p for key, p in layer.named_parameters() if p.requires_grad}
    found, expected = [], []
    out = torch.randn(2, 5, layer.get_base_layer().out_features, dtype=torch.float64)
    for results, run in ((found, layer), (expected, lambda x: by_formula(method, layer, x))):
        x = inputs.clone().requires_grad_()
        y = run(x)
        results += [y, *torch.autograd.grad((y * out).sum(), [x, *trained.values()])]
    for key, one, other in zip(["y", "x", *trained], found, expected, strict=True):
        assert other.norm() > 0, key
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=key)


def _home(name: str) -> str:
    return "mlp" if name == "down_proj" else "self_attn"
