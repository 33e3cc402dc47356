"""The walk's router against its formula, token by token in float64; run in the walk's copy."""

from __future__ import annotations

import torch
from torch import Tensor

from mixlora_exp.kernels import DropoutKey, DropoutStream, make_router

T, D, E, K = 13, 6, 5, 2
REAL = torch.arange(T) % 4 != 1


def key(rows: int, step: int = 3) -> DropoutKey:
    stream = DropoutStream(seed=7)
    stream.begin(step, torch.arange(rows) // 4, torch.arange(rows) % 4)
    return DropoutKey(stream, "layer")


def by_formula(x: Tensor, g: Tensor, n: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (T, E) and the loss."""
    weights, loads = [], []
    for t in range(T):
        clean, spread = g @ x[t], (1 + (n @ x[t]).exp()).log() + 0.01
        h = clean + drawn[t] * spread
        kept = h.detach().argsort(descending=True)[:K].tolist()
        share = torch.stack([h[e].exp() if e in kept else 0 * h[e] for e in range(E)])
        weights.append(share / share.sum())
        own = []
        for e in range(E):
            others = torch.cat([h[:e], h[e + 1 :]]).sort(descending=True).values
            z = (clean[e] - others[K - 1]) / spread[e]
            own.append(0.5 * (1 + torch.erf(z / 2**0.5)))
        loads.append(torch.stack(own))
    loss = 0.0
    for values in (torch.stack(weights)[REAL].mean(0), torch.stack(loads)[REAL].mean(0)):
        mean = values.sum() / E
        loss = loss + ((values - mean) ** 2).sum() / (E - 1) / (mean**2 + 1e-10)
    return torch.stack(weights), loss


def check(training: bool) -> None:
    router = make_router("noisy_top_k", {"num_experts": E, "top_k": K}, {})
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=torch.float64) for s in ((T, D), (E, D), (E, D))]
    drawn = torch.zeros(T, E)
    if training:
        # As drawn, in float32.
        drawn = 2**0.5 * (2 * key(T).uniform("router", E) - 1).erfinv().double()
    found = []
    for formula in (True, False):
        x, g, n = own = [leaf.clone().requires_grad_() for leaf in leaves]
        if formula:
            weights, loss = by_formula(x, g, n, drawn)
        else:
            held = {"": g, "noise": n}
            routing = router.route_masked(x, held, REAL, training=training, key=key(T))
            weights = torch.zeros(T, E, dtype=torch.float64)
            weights = weights.scatter(1, routing.experts, routing.weights)
            statistics = router.statistics(routing, REAL)
            loss = router.auxiliary_loss({name: s[None] for name, s in statistics.items()})
        total = (weights * torch.arange(T * E).cos().view(T, E)).sum() + 3 * loss
        grads = torch.autograd.grad(total, own)
        assert all(grad.abs().max() > 0 for grad in grads)
        found.append([weights, loss, *grads])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def check_noise() -> None:
    """Normal, and a function of the rows' names alone."""
    router = make_router("noisy_top_k", {"num_experts": 64, "top_k": 2}, {})
    rows = 400
    held = {"": torch.zeros(64, 3), "noise": torch.zeros(64, 3)}
    x = torch.ones(rows, 3)
    h = router.route_masked(x, held, None, training=True, key=key(rows)).logits
    noise = (h / (torch.tensor(2.0).log() + 0.01)).flatten()
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    assert abs(float((noise.abs() < 1).float().mean()) - 0.6827) < 0.02
    again = router.route_masked(x[:40], held, None, training=True, key=key(40)).logits
    assert torch.equal(again, h[:40])
    other = router.route_masked(x, held, None, training=True, key=key(rows, step=4)).logits
    assert not torch.equal(other, h)


if __name__ == "__main__":
    check(training=False)
    check(training=True)
    check_noise()
