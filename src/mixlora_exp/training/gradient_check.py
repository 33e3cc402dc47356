"""Checks before the first optimizer step that every trained parameter takes part in the loss.

A method whose forward pass is never called trains without an error, and its scores are those of
another method. Here its parameters are found without a gradient, and the run stops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mixlora_exp.errors import UserError
from mixlora_exp.training.router_decisions import Decision

NOISE = 1e-2
"""Standard deviation of what stands in for matrices that begin at zero, such as B: A has no
gradient behind a B of zeros."""


def check_gradients_flow(
    parameters: Mapping[str, nn.Parameter],
    experts: Mapping[str, int],
    loss: Callable[[], Tensor],
    summed: Callable[[Tensor], Tensor] = lambda values: values,
    decisions: Mapping[str, Decision] | None = None,
) -> dict[str, list[int]] | None:
    """Run one forward and backward pass in which every trained parameter must have a gradient.

    Parameters that are zero are filled with noise for it; afterwards all are as before, to the
    bit, and no `grad` is written. Nothing else that a run draws from is used.

    parameters: the trained ones by name. experts: of those that hold a slice for each of E experts
    (E, ...), the number E by name; the part of the name before the last dot is the module's.
    loss: computes the loss of one micro-batch. summed: sums a tensor over the processes. decisions:
    of modules with a router, as `routers_watched` yields them while `loss` is computed.

    Returns by module the experts without any gradient, which no token with an effect on the loss
    was sent to: all of a module that no such token got an expert from, whose router may have no
    gradient then. None if the loss is not finite, which the training loop reports better.

    Raises:
        UserError: a parameter has no gradient, one of zeros alone, or one that is not finite; or an
            expert has gradients in some of its module's parameters and none in others; or no loss
            reaches a router; or no row gets an expert in any module.
    """
    names, own = list(parameters), list(parameters.values())
    device = own[0].device
    with _zeros_filled(own), torch.enable_grad():
        value = loss()
        if not bool(summed((~value.detach().isfinite()).int().reshape(1)).eq(0)):
            return None
        found: Sequence[Tensor | None] = [None] * len(own)
        # Without a graph, as where no layer of the method runs, autograd would raise.
        if value.requires_grad:
            found = torch.autograd.grad(value, own, allow_unused=True)
    sizes = []
    for name, gradient in zip(names, found, strict=True):
        slices = max(experts.get(name, 1), 1)
        # As many in each process, where one may have no gradient and another has.
        none = torch.zeros(slices, device=device)
        sizes.append(none if gradient is None else _sizes(gradient, slices).to(device))
    watched = decisions or {}
    # Processes without a row that predicts a label add zeros.
    sizes += [torch.tensor(decision, device=device).float() for decision in watched.values()]
    counts = [len(size) for size in sizes]
    sums = summed(torch.cat(sizes)).cpu().split(counts)
    totals = dict(zip(names, sums, strict=False))
    decided = {
        module: Decision(*map(bool, values))
        for module, values in zip(watched, sums[len(names) :], strict=True)
    }
    # Rows without a loss of their own may still teach an expert, by the attention of later layers.
    taught = any(totals[name].any() for name in totals if experts.get(name, 0))
    if decided and not taught and not any(found.experts for found in decided.values()):
        raise UserError(_without_experts(next(iter(decided))))
    for name, total in totals.items():
        if not total.isfinite().all():
            raise UserError(_message(name, "a gradient that is not finite"))
        module, _, part = name.rpartition(".")
        # What did not run is not among them.
        decision = decided.get(module, Decision(True, True))
        routes = part.startswith("lora_router")
        if routes and decision.stuck:
            raise UserError(_stuck(name))
        if not total.any() and (decision.router if routes else decision.experts):
            raise UserError(_message(name, "no gradient"))
    return _not_chosen({n: t for n, t in totals.items() if experts.get(n, 0) and len(t) > 1})


def _sizes(gradient: Tensor, slices: int) -> Tensor:
    """Largest absolute value in equal slices of a gradient, (slices,); NaN stays NaN."""
    return gradient.detach().float().abs().reshape(slices, -1).amax(dim=1)


def _not_chosen(totals: Mapping[str, Tensor]) -> dict[str, list[int]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for name, total in totals.items():
        modules.setdefault(name.rpartition(".")[0], {})[name] = total
    found = {}
    for module, parts in modules.items():
        idle = torch.stack([total == 0 for total in parts.values()])
        for name, own in zip(parts, idle & ~idle.all(dim=0), strict=True):
            if own.any():
                expert = int(own.nonzero()[0])
                raise UserError(_message(name, f"no gradient for expert {expert}, which runs"))
        if idle.any():
            found[module] = idle.all(dim=0).nonzero().flatten().tolist()
    return found


def _message(name: str, what: str) -> str:
    return (
        f"method: {name} has {what} on the first micro-batch: the forward pass does not use it, or "
        "cuts it off from the loss, so nothing was trained. Mend the method's forward pass, or set "
        "requires_grad to False for what is meant to stay as it is"
    )


def _without_experts(module: str) -> str:
    return (
        f"method: no row of the first micro-batch has an expert in {module}, nor in any other "
        "module with a router, so no expert was trained: choose a router and options with which "
        "rows get experts, such as a lower threshold or a larger capacity, or mend a router that "
        "gives weights of 0"
    )


def _stuck(name: str) -> str:
    return (
        f"method: {name} learns nothing: each row of the first micro-batch has one expert, whose "
        "weight is 1 whatever the router says, and method.router_loss_coef=0: choose a coefficient "
        "above 0, or a router and options with which rows get more experts"
    )


@contextmanager
def _zeros_filled(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within this context parameters of zeros hold noise, the same in each run."""
    generator = torch.Generator().manual_seed(0)
    filled = [p for p in parameters if not p.detach().any()]
    before = [p.detach().clone() for p in filled]
    with torch.no_grad():
        for parameter in filled:
            noise = torch.randn(parameter.shape, generator=generator) * NOISE
            parameter.copy_(noise)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(filled, before, strict=True):
                parameter.copy_(values)
