"""Adds two types to PEFT's, so that PEFT itself builds, saves and loads these adapters.

PEFT stores its types in an enum without a public way to add one; only this file modifies it.
"""

from __future__ import annotations

from peft import mapping
from peft.utils import PeftType

from mixlora_exp.adapters.own_types import OWN_TYPES

__all__ = ["register"]


def _extend_enum(name: str) -> None:
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    # `type.__setattr__` bypasses the enum's guard; needed before the member is in its maps.
    type.__setattr__(PeftType, name, member)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)


def register() -> None:
    """Register the configurations and the tuner as `PeftType.MIXLORA` and `LORA_MIXTURE`;
    idempotent."""
    for name in OWN_TYPES:
        _extend_enum(name)
    from mixlora_exp.adapters.config import MixLoraConfig
    from mixlora_exp.adapters.mixtures.config import MixtureConfig
    from mixlora_exp.adapters.model import MixLoraModel

    for name, config in zip(OWN_TYPES, (MixLoraConfig, MixtureConfig), strict=True):
        kind = PeftType(name)
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] = MixLoraModel
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind] = MixLoraModel.prefix
