"""Decisions of routers, for the gradient check: must the loss reach experts and router?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional

from mixlora_exp.adapters.mixed_adapters import routed_layers_of
from mixlora_exp.adapters.routed_layer import RoutedLayer
from mixlora_exp.kernels.loss import IGNORED


class Decision(NamedTuple):
    """The parts of one module with a router that the loss of a micro-batch must reach.

    `experts`: a row that predicts a label has an expert. `router`: such a row's loss, or the
    router's own, depends on the router. `stuck`: neither does, and no other row would change that,
    as each has one expert with the weight 1.
    """

    experts: bool
    router: bool
    stuck: bool = False


def predicting(batch: Mapping[str, Tensor]) -> Tensor:
    """Return (rows,) bool: which rows of the flattened batch predict a label."""
    labels = functional.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:] != IGNORED
    if "logits_to_keep" not in batch:
        return labels.flatten()
    rows = torch.zeros(batch["input_ids"].shape, dtype=torch.bool, device=labels.device)
    rows[:, batch["logits_to_keep"]] = labels
    return rows.flatten()


@contextmanager
def routers_watched(model: PeftModel, adapter: str, rows: Tensor) -> Iterator[dict[str, Decision]]:
    """Within this context a forward pass in training fills the yielded `Decision`s by module, named
    as in `plain_parameters_of`. A router's own loss does not reach a router that the task's loss
    depends on: it would hide that the forward pass cuts this router off.

    rows: (T,) bool, as of `predicting`.
    """
    found: dict[str, Decision] = {}
    layers = routed_layers_of(model, adapter)
    for name, layer in layers.items():
        coefficient = model.peft_config[adapter].router_loss_coef
        layer.statistics = _watched(layer, name, rows, coefficient, found)
    try:
        yield found
    finally:
        for layer in layers.values():
            del layer.statistics


def _watched(
    layer: RoutedLayer, name: str, rows: Tensor, coefficient: float, found: dict[str, Decision]
) -> Callable[..., dict[str, Tensor]]:
    """Return `layer.statistics`, which runs once for each pass and adapter, with a note in
    `found`."""
    own = layer.statistics

    def statistics(adapter: str, mask: Tensor | None, types: Tensor | None) -> dict[str, Tensor]:
        router, held = layer.router[adapter], layer.routings[adapter].filled.sum(dim=1)
        seen = int((held * rows.to(held.device)).max())
        most = int((held if mask is None else held * mask).max())
        learns = router.learns_with(seen)
        needed = seen > 0 and (learns or coefficient > 0)
        stuck = seen > 0 and coefficient == 0 and not router.learns_with(most)
        found[name] = Decision(seen > 0, needed, stuck)
        values = own(adapter, mask, types)
        return {part: v.detach() for part, v in values.items()} if learns else values

    return statistics
