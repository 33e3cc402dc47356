"""Fields of the group `method`: the base model alone, LoRA and DoRA, MixLoRA and MixDoRA, and any
other adapter of PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from math import isfinite, sqrt
from typing import Any

from mixlora_exp.config.by_layer import PER_LAYER, by_layer, counts, layer_of, may_fit
from mixlora_exp.config.checks import MISSING, require, require_name, require_positive
from mixlora_exp.config.choices import (
    OWN_PRECISION,
    PEFT_TYPES,
    RouterLoss,
    RouterLossPooling,
    RouterLossReduction,
    RouterName,
    RouterPrecision,
)
from mixlora_exp.config.schema_modules import ALL_LINEAR, ModuleChoice
from mixlora_exp.config.schema_rank import ExpertRank
from mixlora_exp.config.typed import literal

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD_TARGETS = ("gate_proj", "up_proj", "down_proj")
FEED_FORWARD_BLOCK = "mlp"
"""Module name of a feed-forward block, which the tuner replaces."""


@dataclass(slots=True, kw_only=True)
class MethodConfig:
    """The base model alone (`method=none`); the parent of all methods."""

    name: str = MISSING

    def __post_init__(self) -> None:
        require_name("method.name", self.name)

    @property
    def needs_base_gradient(self) -> bool:
        """True if the adapter starts from the gradient of the loss by the base model's weights."""
        return False


@dataclass(slots=True, kw_only=True)
class TrainedMethodConfig(MethodConfig):
    """The parent of all methods that train an adapter."""

    lora_plus_ratio: float = 1.0
    """LoRA+: how many times `trainer.learning_rate` the rate of B is (`models/parameter_roles.py`
    says which parameters go with B); 1: all parameters have one rate."""
    targets: list[str] = field(default_factory=lambda: [*ATTENTION_TARGETS, *FEED_FORWARD_TARGETS])

    def __post_init__(self) -> None:
        # `super()` without arguments fails in a dataclass with slots, which replaces the class.
        MethodConfig.__post_init__(self)
        require_positive("method.lora_plus_ratio", self.lora_plus_ratio)
        known = (*ATTENTION_TARGETS, *FEED_FORWARD_TARGETS)
        if self.targets == [ALL_LINEAR]:
            self.targets = [*known]
        require(bool(self.targets), "method.targets", self.targets, "name at least one projection")
        for target in self.targets:
            way = f"choose from {', '.join(known)}; [{ALL_LINEAR}] alone is all of them"
            require(target in known, "method.targets", target, way)
        require(
            len(set(self.targets)) == len(self.targets),
            "method.targets", self.targets, "a projection is named twice",
        )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class LoraMethodConfig(ModuleChoice, TrainedMethodConfig):
    """LoRA, or DoRA with `dora=true`, on the target projections (Table 3)."""

    rank: int = MISSING
    alpha: float = MISSING
    dropout: float = 0.05
    rslora: bool = False
    """rsLoRA: scale by alpha / sqrt(rank) in place of alpha / rank."""
    lora_fa: bool = False
    """LoRA-FA: A is not trained, and B's gradient is corrected for it; LoRA alone."""
    dora: bool = False
    train_magnitude: bool = True
    """With `dora`: train the magnitude."""

    def __post_init__(self) -> None:
        TrainedMethodConfig.__post_init__(self)
        require(self.rank >= 1, "method.rank", self.rank, "must be >= 1")
        require_positive("method.alpha", self.alpha)
        require(0 <= self.dropout < 1, "method.dropout", self.dropout, "must be in [0, 1)")
        plain = type(self) is LoraMethodConfig and not self.dora
        require(plain or not self.lora_fa, "method.lora_fa", self.lora_fa, "only LoRA has it")
        single = type(self) is LoraMethodConfig
        self.check_modules(plain=single, drawn=not hasattr(self, "mixture"))


@dataclass(slots=True, kw_only=True)
class PeftMethodConfig(TrainedMethodConfig):
    """An adapter of PEFT by its type and fields; see `models/peft_types.py` for what is served."""

    peft_type: str = MISSING
    """PEFT's name of the type, such as VERA, ADALORA, LOHA, LOKR, HIRA; the class name of its
    configuration, as VeraConfig, and other cases become this name."""
    peft: Any = None
    """Fields of PEFT's configuration of this type; those left out have PEFT's defaults."""

    def __post_init__(self) -> None:
        TrainedMethodConfig.__post_init__(self)
        short = self.peft_type.upper().removesuffix("CONFIG")
        self.peft_type = short if short in PEFT_TYPES else self.peft_type
        self.peft = {} if self.peft is None else self.peft
        # A field of type dict would take no further entries on the command line.
        named = isinstance(self.peft, dict) and all(isinstance(name, str) for name in self.peft)
        require(named, "method.peft", self.peft, "give fields by name, as {r: 8}")


def setting(default: Any, help: str, rule: str = "", valid: Callable[..., bool] | None = None):
    """Return a field with its help and valid range. `valid(value, settings)` checks the value."""
    kind = {"default_factory": dict} if default == {} else {"default": default}
    return field(**kind, metadata={"help": help, "rule": rule, "valid": valid})


def word(value: Any) -> Any:
    """Return an enumeration's value, which files have in its place."""
    return getattr(value, "value", value)


@dataclass(kw_only=True)
class MixtureSettings:
    """Settings of MixLoRA in addition to LoRA's: the single definition of names, defaults, help and
    ranges, shared by Hydra (`MixLoraMethodConfig`) and PEFT (`MixLoraConfig`)."""

    num_experts: Any = setting(
        8, "Experts per feed-forward block or projection (E), maybe by layer."
    )
    top_k: Any = setting(
        2,
        "Experts per token (K), maybe by layer; routers that choose their number do not read it.",
        "must be in [1, num_experts={num_experts}]",
        lambda value, all: may_fit(value, all.num_experts),
    )
    router: RouterName = setting(RouterName.top_k, "How experts are chosen.")
    router_options: dict[str, Any] = setting(
        {}, "What this router alone has, by name; see its file in kernels/routers/."
    )
    router_loss_coef: float = setting(
        1e-3,
        "Coefficient of the router's loss, Eq. (8).",
        "must be >= 0 and finite",
        lambda value, _: isfinite(value) and value >= 0,
    )
    router_loss: RouterLoss = setting(
        RouterLoss.argmax, "What F_i of Eq. (9) counts: 'argmax', or 'topk' (all K chosen)."
    )
    router_loss_pooling: RouterLossPooling = setting(
        RouterLossPooling.layer,
        "'layer': loss per router, averaged; 'all': statistics of all routers, of equally many "
        "experts.",
        "must be layer, or num_experts and top_k a number each, the same in all layers",
        lambda value, all: word(value) == "layer" or all.alike,
    )
    router_loss_reduction: RouterLossReduction = setting(
        RouterLossReduction.mean,
        "Of the routers' losses: 'mean', or 'sum' for parity with an original.",
        "needs router_loss_pooling=layer",
        lambda value, all: word(value) == "mean" or word(all.router_loss_pooling) == "layer",
    )
    router_init_std: float = setting(
        0.02,
        "Standard deviation of the router's initial weights.",
        "must be >= 0 and finite",
        lambda value, _: isfinite(value) and value >= 0,
    )
    router_precision: RouterPrecision = setting(
        RouterPrecision.float32,
        "'float32', or 'bfloat16': the router's product rounds to it, where the router reads it.",
        f"needs router={' or '.join(OWN_PRECISION)}: no other reads it",
        lambda value, all: word(value) == "float32" or word(all.router) in (None, *OWN_PRECISION),
    )

    def fault(self) -> tuple[str, Any, str] | None:
        """Return the name, value and violated rule of the first setting out of its range; None if
        all hold."""
        for name in ("num_experts", "top_k"):
            if counts(value := getattr(self, name)) is None:
                return name, value, f"must be {PER_LAYER}"
        for item in fields(self):
            # PEFT's own fields have no rule.
            value, valid = getattr(self, item.name), item.metadata.get("valid")
            if valid is not None and not valid(value, self):
                return (
                    item.name,
                    word(value),
                    item.metadata["rule"].format(num_experts=literal(self.num_experts)),
                )
        return None

    @property
    def alike(self) -> bool:
        """True if E and K are each given as one number for all layers."""
        return type(self.num_experts) is type(self.top_k) is int

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

    def settle(self, layers: int) -> None:
        """Replace text by lists of one number for each layer of the model.

        Raises:
            ValueError: a list has another length, or K > E in a layer.
        """
        pairs = self.experts_by_layer(layers)
        for name, own in zip(("num_experts", "top_k"), zip(*pairs, strict=True), strict=True):
            if isinstance(getattr(self, name), str):
                setattr(self, name, list(own))

    def experts_at(self, module: str) -> tuple[int, int]:
        """Return (E, K) at a module's name in the model, whose first number is the layer."""
        experts, chosen = (
            value if isinstance(value, int) else value[layer_of(module)]
            for value in (self.num_experts, self.top_k)
        )
        return experts, chosen

    def router_settings(self, experts: int, chosen: int, width: int) -> dict[str, Any]:
        """Return the settings of a layer's router with E, K and rows of `width` elements."""
        settings = {item.name: getattr(self, item.name) for item in fields(MixtureSettings)}
        settings |= {"num_experts": experts, "top_k": chosen}
        if self.router_init_std is None:
            settings["router_init_std"] = 1 / sqrt(3 * width)
        return settings


@dataclass(kw_only=True)
class MixLoraMethodConfig(MixtureSettings, ExpertRank, LoraMethodConfig):
    """MixLoRA: LoRA experts behind a router in the feed-forward block (Section 3.2)."""

    def __post_init__(self) -> None:
        LoraMethodConfig.__post_init__(self)
        self.check_rank()
        if (fault := self.fault()) is not None:
            name, value, rule = fault
            require(False, f"method.{name}", value, rule)
        require(
            any(target in FEED_FORWARD_TARGETS for target in self.targets),
            "method.targets", self.targets,
            "experts need at least one of gate_proj, up_proj, down_proj (else use method=lora)",
        )  # fmt: skip
