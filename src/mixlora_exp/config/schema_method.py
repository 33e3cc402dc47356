"""Fields of the group `method`: the base model alone, LoRA and DoRA, MixLoRA and MixDoRA."""

from __future__ import annotations

from dataclasses import dataclass, field

from mixlora_exp.config.checks import MISSING, require, require_name, require_positive
from mixlora_exp.config.choices import RouterLoss, RouterLossPooling, RouterPrecision

__all__ = [
    "ATTENTION_TARGETS",
    "FEED_FORWARD_TARGETS",
    "LoraMethodConfig",
    "MethodConfig",
    "MixLoraMethodConfig",
]

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD_TARGETS = ("gate_proj", "up_proj", "down_proj")


@dataclass(slots=True, kw_only=True)
class MethodConfig:
    """The base model alone (`method=none`); the parent of all methods."""

    name: str = MISSING

    def __post_init__(self) -> None:
        require_name("method.name", self.name)


@dataclass(slots=True, kw_only=True)
class LoraMethodConfig(MethodConfig):
    """LoRA, or with `dora` DoRA, on the target projections (Table 3)."""

    rank: int = MISSING
    alpha: float = MISSING
    dropout: float = 0.05
    dora: bool = False
    train_magnitude: bool = True
    """With `dora`: whether the magnitude is trained."""
    targets: list[str] = field(default_factory=lambda: [*ATTENTION_TARGETS, *FEED_FORWARD_TARGETS])

    def __post_init__(self) -> None:
        # `super()` without arguments fails in a dataclass with slots: the class is made anew.
        MethodConfig.__post_init__(self)
        require(self.rank >= 1, "method.rank", self.rank, "must be >= 1")
        require_positive("method.alpha", self.alpha)
        require(0 <= self.dropout < 1, "method.dropout", self.dropout, "must be in [0, 1)")
        known = (*ATTENTION_TARGETS, *FEED_FORWARD_TARGETS)
        require(bool(self.targets), "method.targets", self.targets, "name at least one projection")
        for target in self.targets:
            require(target in known, "method.targets", target, f"choose from {', '.join(known)}")
        require(
            len(set(self.targets)) == len(self.targets),
            "method.targets", self.targets, "a projection is named twice",
        )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class MixLoraMethodConfig(LoraMethodConfig):
    """MixLoRA: LoRA experts behind a top-k router in the feed-forward block (Section 3.2)."""

    num_experts: int = 8
    top_k: int = 2
    router_loss_coef: float = 1e-3
    router_loss: RouterLoss = RouterLoss.argmax
    router_loss_pooling: RouterLossPooling = RouterLossPooling.layer
    router_init_std: float = 0.02
    router_precision: RouterPrecision = RouterPrecision.float32

    def __post_init__(self) -> None:
        LoraMethodConfig.__post_init__(self)
        require(self.num_experts >= 1, "method.num_experts", self.num_experts, "must be >= 1")
        require(
            1 <= self.top_k <= self.num_experts,
            "method.top_k", self.top_k, f"must be in [1, method.num_experts={self.num_experts}]",
        )  # fmt: skip
        require_positive("method.router_loss_coef", self.router_loss_coef, zero=True)
        require_positive("method.router_init_std", self.router_init_std)
        require(
            any(target in FEED_FORWARD_TARGETS for target in self.targets),
            "method.targets", self.targets,
            "experts need at least one of gate_proj, up_proj, down_proj (else use method=lora)",
        )  # fmt: skip
