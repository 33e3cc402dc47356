"""PEFT adapters: the MixLoRA/MixDoRA tuner, and the four methods built from configuration."""

from __future__ import annotations

from mixlora_exp.adapters.register import register

register()

from mixlora_exp.adapters.build import attach_adapter, attach_together, load_adapter, save_adapter  # noqa: E402
from mixlora_exp.adapters.config import MixLoraConfig  # noqa: E402
from mixlora_exp.adapters.hosting import load_adapters  # noqa: E402
from mixlora_exp.adapters.layer import MixLoraFeedForward  # noqa: E402
from mixlora_exp.adapters.model import MixLoraModel, RouterReport, set_kernel  # noqa: E402

__all__ = [
    "MixLoraConfig",
    "MixLoraFeedForward",
    "MixLoraModel",
    "RouterReport",
    "attach_adapter",
    "attach_together",
    "load_adapter",
    "load_adapters",
    "save_adapter",
    "set_kernel",
]
