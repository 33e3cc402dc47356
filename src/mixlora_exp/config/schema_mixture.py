"""Fields of the group `method` for mixtures of LoRA experts in each linear layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite, sqrt
from typing import Any

from mixlora_exp.config.checks import require
from mixlora_exp.config.choices import (
    BLOCK_OPTIONS,
    FROM_GRADIENT,
    OWN_SCALE,
    TYPED_LOSS,
    Mixture,
    Router,
    RouterLossPooling,
)
from mixlora_exp.config.schema_method import (
    LoraMethodConfig,
    MethodConfig,
    MixLoraMethodConfig,
    MixtureSettings,
    PeftMethodConfig,
    setting,
    word,
)
from mixlora_exp.config.schema_rank import ExpertRank

PER_LAYER = "a whole number >= 1, a list of one for each layer, or text as 2/4/6/8 for equal groups"


def _counts(value: Any) -> list[int] | None:
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
    counts = _counts(value)
    if counts is None:
        raise ValueError(f"{name}={value} must be {PER_LAYER}")
    if isinstance(value, int):
        return counts * layers
    if isinstance(value, str):
        return [counts[layer * len(counts) // layers] for layer in range(layers)]
    if len(counts) != layers:
        raise ValueError(
            f"{name} has {len(counts)} entries, and the model has {layers} layers: give one for "
            "each layer, or text as 2/4/6/8 for equal groups of layers"
        )
    return counts


def _is_per_layer(value: Any, _: Any) -> bool:
    return _counts(value) is not None


def _is_chosen(value: Any, all: LinearMixtureSettings) -> bool:
    """Return whether K <= E, as far as that is known without the number of layers."""
    chosen, experts = _counts(value), _counts(all.num_experts)
    if chosen is None or experts is None:
        return chosen is not None
    if len(chosen) == len(experts):
        return all_below(chosen, experts)
    return max(chosen) <= min(experts) if 1 in (len(chosen), len(experts)) else True


def all_below(chosen: Sequence[int], experts: Sequence[int]) -> bool:
    """Return whether no K is above its E."""
    return all(k <= e for k, e in zip(chosen, experts, strict=True))


@dataclass(kw_only=True)
class LinearMixtureSettings(MixtureSettings):
    """Settings of a mixture in each linear layer in addition to LoRA's: shared by Hydra
    (`LinearMixtureMethodConfig`) and PEFT (`MixtureConfig`)."""

    mixture: Mixture = setting(Mixture.mola, "The method; see its file in kernels/mixtures/.")
    mixture_options: dict[str, float] = setting(
        {}, "Numbers that this method alone has, by name; see its file."
    )
    num_experts: Any = setting(
        8, "Experts per linear layer (E), maybe by layer.", f"must be {PER_LAYER}", _is_per_layer
    )
    top_k: Any = setting(
        2,
        "Experts per token (K), maybe by layer.",
        f"must be {PER_LAYER}, and at most num_experts={{num_experts}}",
        _is_chosen,
    )
    router: Router | None = setting(None, "How experts are chosen; null: as the method does.")
    router_loss_pooling: RouterLossPooling = setting(
        RouterLossPooling.layer,
        "'layer': loss per router, averaged; 'all': statistics of all routers, of equally many "
        "experts.",
        "must be layer, or num_experts and top_k a number each, the same in all layers",
        lambda value, all: (
            word(value) == "layer" or type(all.num_experts) is type(all.top_k) is int
        ),
    )
    router_init_std: float | None = setting(
        None,
        "Standard deviation of the router's initial weights; null: PyTorch's, 1/sqrt(3 in).",
        "must be >= 0 and finite, or null",
        lambda value, _: value is None or (isfinite(value) and value >= 0),
    )

    def check_router(self, own: str | None) -> None:
        """Refuse a router for a method that has none (`own` is None), and several experts; and an
        option that does nothing in a single projection.

        Raises:
            ValueError: there is one.
        """
        if own is not None:
            for name in BLOCK_OPTIONS.get(self.router_name(own), ()):
                if value := self.router_options.get(name):
                    raise ValueError(
                        f"router_options.{name}={value}: a single projection has no feed-forward "
                        "block, on which alone it acts: leave it out"
                    )
            return
        mixture = word(self.mixture)
        for name in ("router", "router_options"):
            if value := getattr(self, name):
                raise ValueError(f"{name}={word(value)}: mixture={mixture} has no router")
        for name in ("num_experts", "top_k"):
            if getattr(self, name) != 1:
                raise ValueError(f"{name}={getattr(self, name)}: mixture={mixture} has 1 expert")

    def router_name(self, own: str) -> str:
        """Return the router's, `own` unless another is chosen."""
        return own if self.router is None else word(self.router)

    def router_settings(self, experts: int, chosen: int, width: int) -> dict[str, Any]:
        """Return the settings of a layer's router with E, K and rows of `width` elements."""
        settings = {item.name: getattr(self, item.name) for item in fields(MixtureSettings)}
        settings |= {"num_experts": experts, "top_k": chosen}
        if self.router_init_std is None:
            settings["router_init_std"] = 1 / sqrt(3 * width)
        return settings

    def experts_by_layer(self, layers: int) -> list[tuple[int, int]]:
        """Return (E, K) of each layer.

        Raises:
            ValueError: a list has another length, or K > E in a layer.
        """
        experts = by_layer("num_experts", self.num_experts, layers)
        chosen = by_layer("top_k", self.top_k, layers)
        for layer, (e, k) in enumerate(zip(experts, chosen, strict=True)):
            if k > e:
                raise ValueError(
                    f"top_k={self.top_k} is {k} in layer {layer}, which has {e} experts "
                    f"(num_experts={self.num_experts}): choose at most as many"
                )
        return list(zip(experts, chosen, strict=True))


@dataclass(kw_only=True)
class LinearMixtureMethodConfig(LinearMixtureSettings, ExpertRank, LoraMethodConfig):
    """A mixture of LoRA experts in each of the target projections."""

    type1_tasks: list[str] = field(default_factory=list)
    """Training tasks whose sequences are of type 1, those of the others of type 0, for a mixture
    with a loss of types (loramoe)."""

    def __post_init__(self) -> None:
        LoraMethodConfig.__post_init__(self)
        self.check_rank()
        mixture = self.mixture.value
        typed = mixture in TYPED_LOSS
        require(
            self.expert_alpha is None,
            "method.expert_alpha", self.expert_alpha, "all targets have experts: set method.alpha",
        )  # fmt: skip
        require(
            typed or not self.type1_tasks,
            "method.type1_tasks", self.type1_tasks,
            f"only mixture={' or '.join(TYPED_LOSS)} has a loss of types",
        )  # fmt: skip
        require(
            not typed or self.router_loss_coef == 0 or bool(self.type1_tasks),
            "method.router_loss_coef", self.router_loss_coef,
            f"{mixture}'s loss needs the types of tasks: set method.type1_tasks=[...], or 0",
        )  # fmt: skip
        require(not self.dora, "method.dora", self.dora, "mixtures in linear layers have LoRA only")
        require(
            not self.rslora or mixture not in OWN_SCALE,
            "method.rslora", self.rslora, f"mixture={mixture} has a scale of its own",
        )  # fmt: skip
        if (fault := self.fault()) is not None:
            name, value, rule = fault
            require(False, f"method.{name}", value, rule)

    @property
    def needs_base_gradient(self) -> bool:
        """True if the base weights' gradient is taken once, before the first step (LoRA-GA)."""
        return self.mixture.value in FROM_GRADIENT


METHOD_SCHEMAS: dict[str, type[MethodConfig]] = {
    "none_schema": MethodConfig,
    "lora_schema": LoraMethodConfig,
    "mixlora_schema": MixLoraMethodConfig,
    "linear_mixture_schema": LinearMixtureMethodConfig,
    "peft_schema": PeftMethodConfig,
}
"""Schemas of the group `method`, by the names that the files in conf/method/ begin with."""


def method_class(recorded: Mapping[str, Any]) -> type[MethodConfig]:
    """Return the schema of a method that is given as plain fields, as in a record."""
    if recorded.get("name") == "none":
        return MethodConfig
    if "peft_type" in recorded:
        return PeftMethodConfig
    if "mixture" in recorded:
        return LinearMixtureMethodConfig
    return MixLoraMethodConfig if "num_experts" in recorded else LoraMethodConfig
