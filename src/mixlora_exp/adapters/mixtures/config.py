"""PEFT configuration of the mixtures in linear layers, stored in `adapter_config.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import LoraConfig
from peft.utils import PeftType

from mixlora_exp.adapters.config import check_settings, check_supported, in_order
from mixlora_exp.adapters.own_types import LORA_MIXTURE
from mixlora_exp.config.schema_method import (
    ATTENTION_TARGETS,
    FEED_FORWARD_BLOCK,
    FEED_FORWARD_TARGETS,
)
from mixlora_exp.config.schema_mixture import LinearMixtureSettings
from mixlora_exp.kernels import Mixture, Router, make_mixture, make_router

__all__ = ["MixtureConfig"]


@dataclass
class MixtureConfig(LinearMixtureSettings, LoraConfig):
    """LoRA experts in each projection that `target_modules` names, by one of the methods of
    kernels/mixtures/, but for those in `lora_targets`, which get one LoRA without a router; `r` is
    the rank of each expert and LoRA.

    Raises:
        ValueError: a value is out of range, or an option of LoraConfig is set that experts do not
            support.
    """

    feed_forward: ClassVar[str] = FEED_FORWARD_BLOCK
    feed_forward_targets: ClassVar[tuple[str, ...]] = FEED_FORWARD_TARGETS
    lora_targets: list[str] = field(
        default_factory=list,
        metadata={"help": "Those of target_modules that get a LoRA in place of experts."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MIXLORA
        if self.target_modules is None:
            self.target_modules = {*ATTENTION_TARGETS, *self.feed_forward_targets}
        check_supported(self, unsupported=("use_dora",), init=(True,))
        check_settings(self, LinearMixtureSettings)
        plain = self.lora_targets
        if not isinstance(plain, list) or not set(map(str, plain)) < set(self.target_modules):
            raise ValueError(
                f"lora_targets={plain!r:.200} must be a list of some of target_modules="
                f"{sorted(self.target_modules)}, which leaves one for the experts"
            )
        if self.r < 1:
            raise ValueError(f"r={self.r} must be >= 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} must be in [0, 1)")
        self.check_router(self.make_mixture().router)

    def make_mixture(self) -> Mixture:
        """Return the method with its options.

        Raises:
            ValueError: an entry of `mixture_options` is unknown to the method or out of range.
        """
        return make_mixture(self.mixture, self.mixture_options)

    def make_router(self, experts: int, chosen: int, width: int) -> Router:
        """Return the router of a layer with E and K, for rows of `width` elements.

        Raises:
            ValueError: an entry of `router_options` is unknown to the router or out of range.
        """
        name = self.router_name(str(self.make_mixture().router))
        settings = self.router_settings(experts, chosen, width)
        return make_router(name, settings, self.router_options)

    @property
    def mergeable(self) -> bool:
        """True if one matrix represents the adapter for all inputs."""
        return self.make_mixture().mergeable

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of `adapter_config.json`, with this kind's own type and sets as sorted
        lists."""
        return {**in_order(super().to_dict()), "peft_type": LORA_MIXTURE}
