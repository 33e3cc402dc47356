"""Projections of one block that are called with the same input, one by one: computed at once.

The model calls q, k and v (or gate and up) one by one. The first that is called with some input
computes all, in one function with one gradient for that input, and the others hand out what is
theirs when they are called with the same tensor. Nothing is told to the model: which projections
belong together is known by their names, and a block that does otherwise computes one by one from
then on.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mixlora_exp.config.schema_method import ATTENTION_TARGETS, FEED_FORWARD_TARGETS
from mixlora_exp.kernels import working_dtype

GROUPS = (ATTENTION_TARGETS[:3], FEED_FORWARD_TARGETS[:2])
"""Names of projections that share their input, in the order in which models call them."""


class SharesInput(Protocol):
    """A layer that can compute others with it, as `adapters.linear.FusedLinear`."""

    siblings: tuple[Siblings, str] | None

    def compute(self, x: Tensor, layers: Sequence[SharesInput], adapter: str) -> list[Tensor]:
        """Compute the outputs, each (T, out), of layers for the input x (..., in)."""

    def joins(self, other: SharesInput, adapter: str) -> bool:
        """Return whether this layer can be computed when `other` is called."""


@dataclass(slots=True)
class _Waiting:
    """Outputs by name that were computed and not yet used, of one call's input and state."""

    siblings: Siblings
    x: Tensor
    state: tuple
    outputs: dict[str, Tensor]


class _Pending(threading.local):
    """The outputs that wait to be taken, at most one group's in a thread."""

    waiting: _Waiting | None = None


PENDING = _Pending()


class Siblings:
    """The layers of one block that share their input, in the order in which they are called.

    It knows them by weak references. A copy of the block, or one read from a file, finds its own
    when they are called.
    """

    def __init__(self, layers: Mapping[str, SharesInput]) -> None:
        self.names = tuple(layers)
        self.shares = True
        self._layers = {name: weakref.ref(layer) for name, layer in layers.items()}
        self._traced: dict[str, Tensor] = {}
        self._traced_input: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        own = {"names": self.names, "shares": self.shares, "_layers": {}}
        return {**own, "_traced": {}, "_traced_input": None}

    def output(self, name: str, layer: SharesInput, x: Tensor, adapter: str) -> Tensor:
        """Return the output (T, out) of projection `name` for x (..., in), as of
        `SharesInput.compute`. The first call computes all projections that share this input."""
        if getattr(layer, "_is_replica", False):
            return layer.compute(x, [layer], adapter)[0]
        if torch.compiler.is_compiling():
            return self._traced_output(name, layer, x, adapter)
        waiting, PENDING.waiting = PENDING.waiting, None
        version = 0 if x.is_inference() else x._version
        state = version, torch.is_grad_enabled(), working_dtype(x), adapter
        if waiting is not None:
            same = waiting.siblings is self and waiting.x is x and waiting.state == state
            if same and name in waiting.outputs:
                y = waiting.outputs.pop(name)
                PENDING.waiting = waiting if waiting.outputs else None
                return y
            # Some were made for nothing.
            waiting.siblings.shares = False
        group = {name: layer, **self._followers(name, layer, adapter)}
        made = layer.compute(x, list(group.values()), adapter)
        outputs = dict(zip(group, made, strict=True))
        y = outputs.pop(name)
        if outputs:
            PENDING.waiting = _Waiting(self, x, state, outputs)
        return y

    def _traced_output(self, name: str, layer: SharesInput, x: Tensor, adapter: str) -> Tensor:
        """Compute as `output`, in a form that a compiler follows: no thread's own state, and no
        look at the input's version, so that a compiled block must not change the input in place
        between these calls."""
        if self._traced_input is x and name in self._traced:
            y = self._traced.pop(name)
            if not self._traced:
                self._traced_input = None
            return y
        if self._traced:
            # Some were made for nothing.
            self.shares = False
        group = {name: layer, **self._followers(name, layer, adapter)}
        outputs = dict(zip(group, layer.compute(x, list(group.values()), adapter), strict=True))
        y = outputs.pop(name)
        self._traced, self._traced_input = outputs, x if outputs else None
        return y

    def _followers(self, name: str, layer: SharesInput, adapter: str) -> dict[str, SharesInput]:
        """Return the layers that will be called next with the same input, as far as known."""
        known = self._layers.get(name)
        if known is None or known() is not layer:
            self._layers[name] = weakref.ref(layer)
        found = {}
        for other in self.names[self.names.index(name) + 1 :] if self.shares else ():
            there = self._layers[other]() if other in self._layers else None
            if there is not None and there.joins(layer, adapter):
                found[other] = there
        return found


def find_siblings(model: nn.Module, kind: type[SharesInput]) -> None:
    """Let layers of this exact type that share their input know of each other, and no others."""
    for module in model.modules():
        if isinstance(module, kind):
            module.siblings = None
    for block in model.modules():
        for names in GROUPS:
            children = {name: block._modules.get(name) for name in names}
            layers = {name: child for name, child in children.items() if type(child) is kind}
            if len(layers) > 1:
                siblings = Siblings(layers)
                for name, layer in layers.items():
                    layer.siblings = siblings, name
