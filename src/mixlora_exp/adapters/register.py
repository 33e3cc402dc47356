"""Adds `MIXLORA` to PEFT's types, so that PEFT itself builds, saves and loads these adapters.

PEFT stores its types in an enum without a public way to add one; only this file modifies it.
"""

from __future__ import annotations

from peft import mapping
from peft.utils import PeftType

__all__ = ["register"]

NAME = "MIXLORA"


def _extend_enum() -> None:
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    # `type.__setattr__` bypasses the enum's guard; needed before the member is in its maps.
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    PeftType._member_names_.append(NAME)


def register() -> None:
    """Register the configuration and the tuner as `PeftType.MIXLORA`; idempotent."""
    _extend_enum()
    from mixlora_exp.adapters.config import MixLoraConfig
    from mixlora_exp.adapters.model import MixLoraModel

    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MIXLORA] = MixLoraConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MIXLORA] = MixLoraModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.MIXLORA] = MixLoraModel.prefix
