"""Whole numbers of a setting that may differ by layer: how they are written, and which layer has
which."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

PER_LAYER = "a whole number >= 1, a list of one for each layer, or text as 2/4/6/8 for equal groups"
LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def layer_of(module: str) -> int:
    """Return the layer of a module of this name, the first number in it; 0 without one."""
    found = LAYER.search(module)
    return int(found[1]) if found else 0


def counts(value: Any) -> list[int] | None:
    """Return the numbers that a setting per layer has; None if it is no such setting."""
    if isinstance(value, str):
        words = value.split("/")
        value = [int(word) for word in words if word.isdecimal()] if len(words) > 1 else None
        value = value if value is not None and len(value) == len(words) else None
    found = [value] if type(value) is int else value
    if not isinstance(found, Sequence) or not found:
        return None
    return list(found) if all(type(one) is int and one >= 1 for one in found) else None


def by_layer(name: str, value: Any, layers: int) -> list[int]:
    """Return a setting's number for each of `layers` layers. A whole number: the same for all; a
    list: one each; text as `2/4/6/8`: groups of consecutive layers, the layer l of L has entry
    floor(l G / L) of G.

    Raises:
        ValueError: it is none of these, or of another length.
    """
    found = counts(value)
    if found is None:
        raise ValueError(f"{name}={value} must be {PER_LAYER}")
    if isinstance(value, int):
        return found * layers
    if isinstance(value, str):
        return [found[layer * len(found) // layers] for layer in range(layers)]
    if len(found) != layers:
        raise ValueError(
            f"{name} has {len(found)} entries, and the model has {layers} layers: give one for "
            "each layer, or text as 2/4/6/8 for equal groups of layers"
        )
    return found


def may_fit(chosen: Any, experts: Any) -> bool:
    """Return whether no K is above its E, as far as that is known without the number of layers."""
    k, e = counts(chosen), counts(experts)
    if k is None or e is None:
        return False
    if len(k) == len(e):
        return all(one <= other for one, other in zip(k, e, strict=True))
    return max(k) <= min(e) if 1 in (len(k), len(e)) else True
