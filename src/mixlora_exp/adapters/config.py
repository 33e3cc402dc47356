"""PEFT configuration of MixLoRA and MixDoRA, as it stands in `adapter_config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peft import LoraConfig
from peft.utils import PeftType
from transformers.activations import ACT2FN

__all__ = ["MixLoraConfig", "in_order", "saved_config"]

# Options of LoraConfig that have no meaning for experts yet; set, they must not be ignored.
_UNSUPPORTED = (
    "rank_pattern", "alpha_pattern", "layer_replication", "layers_to_transform", "lora_bias",
    "fan_in_fan_out", "exclude_modules", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "arrow_config", "eva_config", "corda_config", "loftq_config",
    "lora_ga_config", "use_bdlora", "velora_config", "monteclora_config", "kasa_config",
    "use_qalora",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExpertLora:
    """LoRA as each expert has it; `scaling` is alpha / r, or alpha / sqrt(r) with rsLoRA."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_dora: bool
    use_rslora: bool

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass
class MixLoraConfig(LoraConfig):
    """LoRA experts behind a top-k router in the feed-forward block, plain LoRA in attention.

    `target_modules` names projections; those of `feed_forward_targets` become experts of the block
    that holds them, the others get PEFT's LoRA. `r`, `lora_alpha`, `lora_dropout`, `use_dora` and
    `use_rslora` hold for both, unless `expert_lora` gives the experts their own. With `use_dora`
    every LoRA carries a magnitude (MixDoRA).

    Raises:
        ValueError: a value is out of range, or an option of LoraConfig is set that experts lack.
    """

    num_experts: int = field(default=8, metadata={"help": "Experts per feed-forward block (E)."})
    top_k: int = field(default=2, metadata={"help": "Experts per token (K)."})
    router_loss_coef: float = field(
        default=1e-3, metadata={"help": "Coefficient of the load-balance loss, Eq. (8)."}
    )
    router_loss: str = field(
        default="argmax",
        metadata={"help": "What F_i of Eq. (9) counts: 'argmax', or 'topk' (all K chosen)."},
    )
    router_loss_pooling: str = field(
        default="layer",
        metadata={"help": "'layer': loss per layer, averaged; 'all': statistics of all layers."},
    )
    router_init_std: float = field(
        default=0.02, metadata={"help": "Standard deviation of the router's initial weights."}
    )
    expert_lora: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Where experts differ from attention: r, lora_alpha, lora_dropout, use_dora, "
            "use_rslora."
        },
    )
    act_fn: str | None = field(
        default=None,
        metadata={"help": "Activation of the experts, by transformers' name; None: the base's."},
    )
    router_precision: str = field(
        default="float32",
        metadata={"help": "'float32', or 'bfloat16': the router's product rounds to it."},
    )
    feed_forward: str = field(default="mlp", metadata={"help": "Name of the feed-forward block."})
    feed_forward_targets: list[str] = field(
        default_factory=lambda: ["gate_proj", "up_proj", "down_proj"],
        metadata={"help": "Names of its gate, up and down projection, in this order."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MIXLORA
        if self.target_modules is None:
            self.target_modules = {
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                *self.feed_forward_targets,
            }
        for name in _UNSUPPORTED:
            value = getattr(self, name, None)
            # Not its truth: `layers_to_transform=0` asks for the first layer alone.
            if value or (value == 0 and value is not False):
                raise ValueError(f"MixLoraConfig does not support {name}={value!r}")
        if self.bias != "none":
            raise ValueError(f"MixLoraConfig does not support bias={self.bias!r}, only 'none'")
        if not isinstance(self.init_lora_weights, bool):
            raise ValueError(
                "MixLoraConfig supports init_lora_weights True and False, "
                f"not {self.init_lora_weights!r}"
            )
        if isinstance(self.target_modules, str):
            raise ValueError(
                f"MixLoraConfig needs target_modules as a list, not {self.target_modules!r}"
            )
        if not self.expert_targets:
            raise ValueError(
                f"target_modules={sorted(self.target_modules)} names none of "
                f"{self.feed_forward_targets}: without experts this is LoRA, use LoraConfig"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} must be in [1, num_experts={self.num_experts}]")
        unknown = set(self.expert_lora or ()) - set(ExpertLora.__dataclass_fields__)
        if unknown:
            raise ValueError(f"expert_lora does not know {', '.join(sorted(unknown))}")
        for where, lora in (("", self._of_attention), ("expert_lora.", self.experts)):
            if lora.r < 1:
                raise ValueError(f"{where}r={lora.r} must be >= 1")
            if not 0 <= lora.lora_dropout < 1:
                raise ValueError(f"{where}lora_dropout={lora.lora_dropout} must be in [0, 1)")
        if self.act_fn is not None and self.act_fn not in ACT2FN:
            raise ValueError(f"act_fn={self.act_fn!r} is not an activation of transformers")
        if self.router_loss_coef < 0:
            raise ValueError(f"router_loss_coef={self.router_loss_coef} must be >= 0")
        if self.router_loss not in ("argmax", "topk"):
            raise ValueError(f"router_loss={self.router_loss!r} is not 'argmax' or 'topk'")
        if self.router_precision not in ("float32", "bfloat16"):
            raise ValueError(
                f"router_precision={self.router_precision!r} is not 'float32' or 'bfloat16'"
            )
        if self.router_loss_pooling not in ("layer", "all"):
            raise ValueError(
                f"router_loss_pooling={self.router_loss_pooling!r} is not 'layer' or 'all'"
            )

    def to_dict(self) -> dict[str, Any]:
        return in_order(super().to_dict())

    @property
    def _of_attention(self) -> ExpertLora:
        names = ExpertLora.__dataclass_fields__
        return ExpertLora(**{name: getattr(self, name) for name in names})

    @property
    def experts(self) -> ExpertLora:
        """The LoRA settings of each expert."""
        return replace(self._of_attention, **(self.expert_lora or {}))

    @property
    def expert_targets(self) -> list[str]:
        """The feed-forward projections that get experts, in the order gate, up, down."""
        return [name for name in self.feed_forward_targets if name in self.target_modules]


def in_order(entries: Mapping[str, Any]) -> dict[str, Any]:
    """`entries` with sets as sorted lists: a set of names has another order in each process."""
    return {
        name: sorted(value) if isinstance(value, set | frozenset) else value
        for name, value in entries.items()
    }


def saved_config(config: LoraConfig) -> dict[str, Any]:
    """The configuration as it stands in a saved adapter's file."""
    return in_order(config.to_dict())
