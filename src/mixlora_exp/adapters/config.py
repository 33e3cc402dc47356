"""PEFT configuration of MixLoRA and MixDoRA, stored in `adapter_config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, get_args, get_type_hints

from peft import LoraConfig
from peft.utils import PeftType
from transformers.activations import ACT2FN

from mixlora_exp.config.by_layer import counts
from mixlora_exp.config.schema_method import (
    ATTENTION_TARGETS,
    FEED_FORWARD_BLOCK,
    FEED_FORWARD_TARGETS,
    MixtureSettings,
)
from mixlora_exp.kernels import Router, make_router

__all__ = ["MixLoraConfig", "check_settings", "check_supported", "in_order", "saved_config"]

# Options of LoraConfig that experts do not support; they must be refused, not ignored.
_UNSUPPORTED = (
    "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias",
    "fan_in_fan_out", "exclude_modules", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "arrow_config", "eva_config", "corda_config", "loftq_config",
    "lora_ga_config", "use_bdlora", "velora_config", "monteclora_config", "kasa_config",
    "use_qalora",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExpertLora:
    """LoRA settings of each expert."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_dora: bool
    use_rslora: bool


def scaling_of(lora: LoraConfig | ExpertLora) -> float:
    """Return the factor s of B A x: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    return lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)


@dataclass
class MixLoraConfig(MixtureSettings, LoraConfig):
    """LoRA experts behind a top-k router in the feed-forward block, plain LoRA in attention.

    `target_modules` names projections; those in `feed_forward_targets` get experts, the others
    PEFT's LoRA. `r`, `lora_alpha`, `lora_dropout`, `use_dora` and `use_rslora` apply to both,
    unless `expert_lora` has separate values for the experts. With `use_dora` every LoRA has a
    magnitude (MixDoRA). Experts, top-k and router have the paper's values by default, LoRA's fields
    PEFT's; the paper's are `r=16, lora_alpha=32, lora_dropout=0.05` (Table 3).

    Raises:
        ValueError: a value is out of range, or an option of LoraConfig is set that experts do not
            support.
    """

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
    feed_forward: str = field(
        default=FEED_FORWARD_BLOCK, metadata={"help": "Name of the feed-forward block."}
    )
    feed_forward_targets: list[str] = field(
        default_factory=lambda: list(FEED_FORWARD_TARGETS),
        metadata={"help": "Names of its gate, up and down projection, in this order."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MIXLORA
        if self.target_modules is None:
            self.target_modules = {*ATTENTION_TARGETS, *self.feed_forward_targets}
        check_supported(self, init=(True, False, "gaussian"))
        if not self.expert_targets:
            raise ValueError(
                f"target_modules={sorted(self.target_modules)} names none of "
                f"{self.feed_forward_targets}: without experts this is LoRA, use LoraConfig"
            )
        check_settings(self, MixtureSettings)
        # Checks the router's options. One that depends on E may not hold in all layers, of which
        # only the model knows the number: each makes its own router.
        experts, chosen = counts(self.num_experts) or [], counts(self.top_k) or []
        self.make_router(max(experts), min(chosen), width=1)
        unknown = set(self.expert_lora or ()) - set(ExpertLora.__dataclass_fields__)
        if unknown:
            raise ValueError(f"expert_lora has the unknown fields {', '.join(sorted(unknown))}")
        for where, lora in (("", self._of_attention), ("expert_lora.", self.experts)):
            if lora.r < 1:
                raise ValueError(f"{where}r={lora.r} must be >= 1")
            if not 0 <= lora.lora_dropout < 1:
                raise ValueError(f"{where}lora_dropout={lora.lora_dropout} must be in [0, 1)")
        if self.act_fn is not None and self.act_fn not in ACT2FN:
            raise ValueError(f"act_fn={self.act_fn!r} is not an activation of transformers")

    def make_router(self, experts: int, chosen: int, width: int) -> Router:
        """Return the router of a block with E and K, for rows of `width` elements.

        Raises:
            ValueError: an entry of `router_options` is unknown to the router or out of range.
        """
        settings = self.router_settings(experts, chosen, width)
        return make_router(self.router, settings, self.router_options)

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of `adapter_config.json`, sets as sorted lists."""
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


def check_supported(
    config: LoraConfig,
    unsupported: tuple[str, ...] = (),
    init: tuple[bool | str, ...] = (True, False),
) -> None:
    """Refuse options of LoraConfig that experts do not support, these and `unsupported`; init:
    values of `init_lora_weights`.

    Raises:
        ValueError: one is set.
    """
    owner = type(config).__name__
    for name in (*_UNSUPPORTED, *unsupported):
        value = getattr(config, name, None)
        if value:
            raise ValueError(f"{owner} does not support {name}={value!r}")
    if config.bias != "none":
        raise ValueError(f"{owner} does not support bias={config.bias!r}, only 'none'")
    start = config.init_lora_weights
    # `1 == True`.
    if not any(start is value or (isinstance(start, str) and start == value) for value in init):
        raise ValueError(
            f"{owner} supports init_lora_weights {' and '.join(map(str, init))}, "
            f"not {config.init_lora_weights!r}"
        )
    if isinstance(config.target_modules, str):
        raise ValueError(f"{owner} needs target_modules as a list, not {config.target_modules!r}")


def check_settings(config: MixtureSettings, owner: type[MixtureSettings]) -> None:
    """Check the fields of `owner` in a configuration; enumerations are stored by value, as in the
    file.

    Raises:
        ValueError: one is out of range.
    """
    kinds = get_type_hints(owner)
    for item in fields(owner):
        value = getattr(config, item.name)
        for kind in (kinds[item.name], *get_args(kinds[item.name])):
            if value is None or not (isinstance(kind, type) and issubclass(kind, Enum)):
                continue
            words = [choice.value for choice in kind]
            word = value.value if isinstance(value, Enum) else value
            if word not in words:
                raise ValueError(f"{item.name}={word!r} is not {' or '.join(map(repr, words))}")
            setattr(config, item.name, word)
    if (fault := config.fault()) is not None:
        raise ValueError("{}={} {}".format(*fault))


def in_order(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return `entries` with sets as sorted lists, since the order of a set differs between
    processes."""
    return {
        name: sorted(value) if isinstance(value, set | frozenset) else value
        for name, value in entries.items()
    }


def saved_config(config: LoraConfig) -> dict[str, Any]:
    """Return the configuration in the form of a saved adapter's file."""
    return in_order(config.to_dict())
