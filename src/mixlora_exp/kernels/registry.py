"""The kernels of the MixLoRA block by name. A kernel is one file of `kernels/mixlora/` that
registers a function; nothing else names it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mixlora_exp.kernels.mixlora.stage import Finish, with_base
from mixlora_exp.kernels.shapes import FeedForward, Routing

__all__ = [
    "FASTEST",
    "KERNELS",
    "BlockSizes",
    "Kernel",
    "kernel",
    "resolve_kernel",
    "saved_by_operations",
]

Block = Callable[[Tensor, Routing, FeedForward], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSizes:
    """What the memory of a block with experts on all three projections depends on: widths D and F,
    rank R, K slots per row, bytes per number of the products, the probability of dropout, and
    whether the experts have DoRA's magnitudes."""

    d: int
    f: int
    rank: int
    slots: int
    width: int
    dropout: float
    dora: bool

    @property
    def scaled(self) -> int:
        """Numbers per slot of the products that DoRA's scale multiplies."""
        return 2 * self.f + self.d if self.dora else 0


def saved_by_operations(sizes: BlockSizes) -> float:
    """Return bytes per row that autograd saves where each slot is a whole expert of plain
    operations: the input of every product and of every activation, and dropout's masks of a byte
    per element."""
    masks = sizes.d + sizes.slots * sizes.f if sizes.dropout else 0
    numbers = 4 * sizes.f + 3 * sizes.d + 3 * sizes.rank + sizes.scaled
    return sizes.slots * sizes.width * numbers + masks


@dataclass(frozen=True, slots=True)
class Kernel:
    """An implementation of the block, `(x (T, D), routing, block) -> y (T, D)`.

    device: the only device type that it runs on, None for all. needs: a package that it imports.
    stage: its part between the frozen products, where these can run over the rows of several
    adapters (`mixlora.stage`); None: each adapter's rows run on their own. linear: how LoRA and
    DoRA layers outside of the block run with it: `fused`, `plain` or `peft`. draws_masks: whether
    it draws its own dropout from `FeedForward.dropout` instead of taking the block's masks. casts:
    whether it casts adapter weights by itself, instead of taking `Experts.low`. per_expert:
    whether it multiplies with the frozen weights once for each expert, for which a quantised base
    would be dequantised as often. saved: bytes per row that it saves for the backward pass, for
    plans; without what the router saves, which is x in float32.
    """

    name: str
    run: Block
    device: str | None = None
    needs: str | None = None
    stage: Callable[..., Any] | None = None
    linear: str = "fused"
    draws_masks: bool = False
    casts: bool = False
    per_expert: bool = False
    saved: Callable[[BlockSizes], float] = saved_by_operations
    installed: bool = True
    """True if the package that it needs is installed; looked for once, as a compiler that follows a
    layer's code must not."""

    def __call__(self, x: Tensor, routing: Routing, block: FeedForward) -> Tensor:
        """Compute the block for rows x (T, D), those without experts included; returns (T, D)."""
        return with_base(self.run(x, routing, block), x, routing, block)

    def staged(
        self, x: Tensor, gate: Tensor, up: Tensor, routing: Routing, block: FeedForward
    ) -> tuple[Tensor, Finish]:
        """Run `stage`, with the rows that the router gives to the block without experts.

        x: (T, D); gate, up: (T, F), the frozen products. Returns the rows for the down projection,
        and a function from their products to the block's output (T, D).
        """
        hidden, finish = self.stage(x, gate, up, routing, block)
        return hidden, lambda y: with_base(finish(y), x, routing, block)

    def runs_on(self, device: str) -> bool:
        """Return whether the kernel can run on a device type with the packages installed."""
        return self.installed and self.device in (None, device)

    @property
    def summary(self) -> str:
        """The first sentence of the kernel function's docstring."""
        return (self.run.__doc__ or "").strip().split("\n")[0].rstrip(".")


KERNELS: dict[str, Kernel] = {}
"""All kernels by name. The configuration reads the same names from the decorators."""

FASTEST = {"cuda": "triton"}
"""The kernel that `auto` chooses, by device type; `exact` elsewhere or where it cannot run."""


def kernel(name: str, **properties: Any) -> Callable[[Block], Block]:
    """Register the decorated function as a kernel; see `Kernel` for the properties.

    Raises:
        ValueError: the name is taken.
    """

    def register(run: Block) -> Block:
        if name == "auto" or name in KERNELS:
            raise ValueError(f"kernel {name!r} is registered twice")
        needs = properties.get("needs")
        there = needs is None or importlib.util.find_spec(needs) is not None
        KERNELS[name] = Kernel(name, run, installed=there, **properties)
        return run

    return register


def resolve_kernel(name: str, device: str = "cpu") -> str:
    """Return the kernel that `auto` stands for on a device type, or `name` itself if it is one.

    Raises:
        ValueError: no kernel has this name.
    """
    if name == "auto":
        best = FASTEST.get(device, "exact")
        return best if KERNELS[best].runs_on(device) else "exact"
    if name not in KERNELS:
        raise ValueError(f"kernel={name} is unknown: choose from auto, {', '.join(KERNELS)}")
    return name
