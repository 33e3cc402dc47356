"""Fields of the group `method` for mixtures of LoRA experts in each linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from mixlora_exp.config.checks import require
from mixlora_exp.config.choices import (
    BLOCK_OPTIONS,
    FROM_GRADIENT,
    OWN_SCALE,
    TYPED_LOSS,
    MixtureName,
    RouterName,
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


@dataclass(kw_only=True)
class LinearMixtureSettings(MixtureSettings):
    """Settings of a mixture in each linear layer in addition to LoRA's: shared by Hydra
    (`LinearMixtureMethodConfig`) and PEFT (`MixtureConfig`)."""

    mixture: MixtureName = setting(
        MixtureName.mola, "The method; see its file in kernels/mixtures/."
    )
    mixture_options: dict[str, float] = setting(
        {}, "Numbers that this method alone has, by name; see its file."
    )
    router: RouterName | None = setting(None, "How experts are chosen; null: as the method does.")
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

REFUSED: dict[type[MethodConfig], tuple[str, ...]] = {
    MixLoraMethodConfig: ("rank_pattern", "alpha_pattern", "lora_fa"),
    LinearMixtureMethodConfig: ("rank_pattern", "alpha_pattern", "lora_fa", "dora", "expert_alpha"),
}
"""Fields that a schema inherits and of which it accepts the default alone."""


def method_class(recorded: Mapping[str, Any]) -> type[MethodConfig]:
    """Return the schema of a method that is given as plain fields, as in a record."""
    if recorded.get("name") == "none":
        return MethodConfig
    if "peft_type" in recorded:
        return PeftMethodConfig
    if "mixture" in recorded:
        return LinearMixtureMethodConfig
    return MixLoraMethodConfig if "num_experts" in recorded else LoraMethodConfig
