"""Fields of the group `method` that tell modules apart: the layers that have an adapter, ranks and
scales of single projections, and how A and B start."""

from __future__ import annotations

from dataclasses import dataclass, field
from re import fullmatch
from typing import Any

from mixlora_exp.config.checks import require, require_positive
from mixlora_exp.config.typed import literal

ALL_LINEAR = "all-linear"
"""An entry of `method.targets` that stands for all projections."""
LAYERS = "give numbers of layers from 0, as [0,1,2], or a range in text, as 8-15"
STARTS = ("default", "gaussian", "orthogonal")
OWN_METHODS = {"pissa": "use method=pissa", "lora_ga": "use method=lora_ga"}
"""PEFT's starts that are methods here."""


def _entry(value: Any) -> list[int] | None:
    """Return the layers of one entry: a number, or a range in text as `8-15`; None if it is
    neither."""
    if type(value) is int and value >= 0:
        return [value]
    ends = fullmatch(r"(\d{1,5})-(\d{1,5})", value) if isinstance(value, str) else None
    first, last = (int(ends[1]), int(ends[2])) if ends else (1, 0)
    return list(range(first, last + 1)) or None


def _layers(value: Any) -> list[int] | None:
    """Return the sorted layers of `method.layers_to_transform`; None if it is not valid."""
    entries = [_entry(one) for one in (value if isinstance(value, list) else [value])]
    found = {layer for entry in entries if entry is not None for layer in entry}
    return sorted(found) if entries and None not in entries else None


def is_at(key: str, path: str) -> bool:
    """Return whether a key of a pattern names the module at `path`, of which it is the end, as in
    PEFT."""
    return path == key or path.endswith(f".{key}")


@dataclass(kw_only=True)
class ModuleChoice:
    """Part of the group `method` for LoRA and its mixtures, which have `rank` and `targets`."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """LoRA, DoRA: the rank of single projections in place of `rank`, by the end of the module's
    name: q_proj, or layers.0.self_attn.q_proj."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """LoRA, DoRA: the same for `alpha`."""
    layers_to_transform: Any = None
    """Layers that have an adapter, from 0: a list, or a range in text as 8-15; null: all."""
    init_lora_weights: str = "default"
    """How A starts, B being zero: default (uniform, He et al.) or gaussian (standard deviation
    1 / rank). orthogonal: A and B are drawn so that B A = 0; LoRA and DoRA of even ranks."""

    def check_modules(self, *, plain: bool, drawn: bool) -> None:
        """Raise a `UserError` that names the field unless all values are valid; make a list of
        `layers_to_transform`. plain: the method is LoRA or DoRA. drawn: A is drawn at random."""
        for name, instead in (("rank_pattern", "expert_rank"), ("alpha_pattern", "expert_alpha")):
            pattern = getattr(self, name)
            why = f"only LoRA and DoRA have it: method.{instead} is that of experts alone"
            require(plain or not pattern, f"method.{name}", pattern, why)
            for key, value in pattern.items():
                self._check_key(f"method.{name}", key, value, pattern)
        for key, rank in self.rank_pattern.items():
            valid = type(rank) is int and rank >= 1
            require(valid, f"method.rank_pattern.{key}", rank, "must be a whole number >= 1")
        for key, alpha in self.alpha_pattern.items():
            number = isinstance(alpha, (int, float))
            require(number, f"method.alpha_pattern.{key}", alpha, "must be a number")
            require_positive(f"method.alpha_pattern.{key}", alpha)
        if self.layers_to_transform is not None:
            found = _layers(self.layers_to_transform)
            given = self.layers_to_transform
            require(found is not None, "method.layers_to_transform", given, LAYERS)
            self.layers_to_transform = found
        self._check_start(plain=plain, drawn=drawn)

    def _check_key(self, name: str, key: str, value: Any, pattern: dict[str, Any]) -> None:
        valid = fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.]*", key) is not None
        require(
            valid and key.rpartition(".")[2] in self.targets, f"{name}.{key}", value,
            f"its name must end in one of method.targets={literal(self.targets)}",
        )  # fmt: skip
        other = next((one for one in pattern if one != key and is_at(one, key)), None)
        # Which of them counts would depend on their order, which files do not keep.
        require(other is None, f"{name}.{key}", value, f"{other} names it as well: leave one out")

    def _check_start(self, *, plain: bool, drawn: bool) -> None:
        name, start = "method.init_lora_weights", self.init_lora_weights
        way = OWN_METHODS.get(start, f"choose from {', '.join(STARTS)}")
        if start not in STARTS and start not in OWN_METHODS:
            way += " (others of PEFT write into the base weights, or read data)"
        require(start in STARTS, name, start, way)
        require(
            drawn or start == "default", name, start, "this method has a start of its own"
        )  # fmt: skip
        if start == "orthogonal":
            require(plain, name, start, "experts have default or gaussian")
            odd = [rank for rank in (self.rank, *self.rank_pattern.values()) if rank % 2]
            require(not odd, name, start, f"it needs even ranks, and there is {odd[:1]}")

    def adapts(self, layer: int) -> bool:
        """Return whether a layer has an adapter."""
        return self.layers_to_transform is None or layer in self.layers_to_transform

    def rank_at(self, path: str) -> int:
        """Return the rank of a LoRA at a module's name in the model."""
        found = (rank for key, rank in self.rank_pattern.items() if is_at(key, path))
        return next(found, self.rank)
