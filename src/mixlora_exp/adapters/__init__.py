"""PEFT adapters: the tuner of mixtures, and the methods built from configuration."""

from __future__ import annotations

from mixlora_exp.adapters.register import register

register()

from mixlora_exp.adapters.build import attach_adapter, attach_together, load_adapter, save_adapter  # noqa: E402
from mixlora_exp.adapters.config import MixLoraConfig  # noqa: E402
from mixlora_exp.adapters.layer import MixLoraFeedForward  # noqa: E402
from mixlora_exp.adapters.mixed_adapters import load_adapters  # noqa: E402
from mixlora_exp.adapters.mixtures.config import MixtureConfig  # noqa: E402
from mixlora_exp.adapters.model import MixLoraModel, set_kernel  # noqa: E402
from mixlora_exp.adapters.router_report import RouterReport  # noqa: E402
from mixlora_exp.adapters.token_routing import TokenRouting, routing_of  # noqa: E402

__all__ = [
    "MixLoraConfig",
    "MixLoraFeedForward",
    "MixLoraModel",
    "MixtureConfig",
    "RouterReport",
    "TokenRouting",
    "attach_adapter",
    "attach_together",
    "load_adapter",
    "load_adapters",
    "routing_of",
    "save_adapter",
    "set_kernel",
]
