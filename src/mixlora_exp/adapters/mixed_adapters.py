"""Hosts plain LoRA and DoRA adapters in the MixLoRA tuner, so that one base model can have any mix.

PEFT refuses adapters of different types in one model. A hosted ("guest") adapter has this tuner's
type in memory, and PEFT's LoRA type on disk, with the files of any LoRA.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import nn
from transformers import PreTrainedModel

from mixlora_exp.adapters.base_check import check_base
from mixlora_exp.adapters.config import MixLoraConfig, in_order
from mixlora_exp.adapters.load_weights import fill, read_weights
from mixlora_exp.adapters.mixtures.config import MixtureConfig
from mixlora_exp.adapters.own_types import LORA_MIXTURE, MIXLORA
from mixlora_exp.adapters.routed_layer import RoutedLayer
from mixlora_exp.adapters.saved import saved_settings
from mixlora_exp.config.schema_method import (
    ATTENTION_TARGETS,
    FEED_FORWARD_BLOCK,
    FEED_FORWARD_TARGETS,
)
from mixlora_exp.errors import UserError

__all__ = [
    "GuestConfig",
    "add_guest",
    "check_shareable",
    "expert_parameters_of",
    "guest_config",
    "load_adapters",
    "not_built",
    "parameters_of",
    "peft_warnings_ignored",
    "plain_parameters_of",
    "routed_layers_of",
]


@dataclass
class GuestConfig(LoraConfig):
    """A LoRA (or DoRA) without experts, hosted by the MixLoRA tuner; saved as plain LoRA."""

    feed_forward: ClassVar[str] = FEED_FORWARD_BLOCK
    feed_forward_targets: ClassVar[tuple[str, ...]] = FEED_FORWARD_TARGETS
    router_loss_coef: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MIXLORA

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of the file, with PEFT's LoRA type and sets as sorted lists."""
        return {**in_order(super().to_dict()), "peft_type": PeftType.LORA}


CHANGES_BASE = {
    "modules_to_save": (), "bias": ("none",), "trainable_token_indices": (),
    "init_lora_weights": (True, "gaussian", "orthogonal"),
}  # fmt: skip
"""Settings that change the base model when an adapter is loaded -> the values that do not."""

# Settings not supported when several adapters share one base model: they change the base model,
# modules other than linear layers, or the forward pass of a layer.
UNSERVED = (
    "lora_bias", "modules_to_save", "layer_replication", "exclude_modules", "target_parameters",
    "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "eva_config",
    "corda_config", "loftq_config", "lora_ga_config", "use_bdlora", "velora_config",
    "monteclora_config", "kasa_config", "use_qalora", "fan_in_fan_out",
)  # fmt: skip
SERVED_TARGETS = {*ATTENTION_TARGETS, *FEED_FORWARD_TARGETS}


def _check_guest(config: LoraConfig) -> None:
    """Refuse settings that a guest cannot have."""
    for name in UNSERVED:
        value = getattr(config, name, None)
        if value or value == 0 and value is not False:
            raise ValueError(
                f"{name}={value!r} is not supported when several adapters share one base model"
            )
    if config.bias != "none":
        raise ValueError(
            f"bias={config.bias!r} is not supported when several adapters share one base model"
        )
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base model, which several "
            "adapters share"
        )


def _check_targets(config: LoraConfig) -> None:
    """Refuse targets that cannot distinguish the rows of several adapters, such as the output
    projection."""
    targets = config.target_modules
    served = SERVED_TARGETS | set(getattr(config, "feed_forward_targets", ()))
    if isinstance(targets, str) or not set(targets or ()) <= served:
        shown = targets if isinstance(targets, str) else sorted(targets)
        raise ValueError(
            f"target_modules={shown!r} is not supported when several adapters share one base "
            f"model: choose from {', '.join(sorted(served))}"
        )


def guest_config(config: LoraConfig) -> LoraConfig:
    """Return `config` for the MixLoRA tuner: unchanged if it has experts, otherwise as a
    `GuestConfig`.

    Raises:
        ValueError: it has a setting that several adapters on one base model cannot have.
    """
    _check_targets(config)
    if isinstance(config, (MixLoraConfig, MixtureConfig, GuestConfig)):
        return config
    _check_guest(config)
    values = {item.name: getattr(config, item.name) for item in fields(config) if item.init}
    return GuestConfig(**values)


def add_guest(model: PreTrainedModel | PeftModel, name: str, config: LoraConfig) -> PeftModel:
    """Add an adapter of any method to a model that may already have others.

    The first one turns the base model into a `PeftModel` with this tuner.

    Raises:
        ValueError: the name is taken, or the model has adapters of another tuner.
    """
    config = guest_config(config)
    if any(name in key.split(".") for key, _ in model.named_parameters()):
        taken = isinstance(model, PeftModel) and name in model.peft_config
        why = "already exists" if taken else "is the name of a module"
        raise ValueError(f"adapter name {name!r} {why}: choose another one")
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        return model
    return get_peft_model(model, config, adapter_name=name)


def parameters_of(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return the parameters of one adapter that can be trained, by their names in the model."""
    owned = {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        for part in module.adapter_layer_names:
            held = getattr(module, part, {})
            fixed = module.frozen_peft_weight_names.get(adapter, ())
            if adapter not in held or part in fixed:
                continue
            found = held[adapter]
            if isinstance(found, nn.Parameter):
                owned[f"{name}.{part}.{adapter}"] = found
            else:
                for inner, parameter in found.named_parameters():
                    owned[f"{name}.{part}.{adapter}.{inner}"] = parameter
    return owned


def plain_parameters_of(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return the parameters of one adapter, by names independent of its name and of other
    adapters."""
    found = parameters_of(model, adapter)
    return {_plain(name, adapter): parameter for name, parameter in found.items()}


def _plain(name: str, adapter: str) -> str:
    return ".".join(part for part in name.split(".") if part not in (adapter, "base_layer"))


def expert_parameters_of(model: nn.Module, adapter: str) -> dict[str, int]:
    """Return the number E of experts of each parameter that holds a slice for each (E, ...), by
    the names of `plain_parameters_of`."""
    found = {}
    for name, module in model.named_modules():
        for part in getattr(module, "expert_parts", ()):
            held, router = getattr(module, part, {}), module.router.get(adapter)
            # One that the experts share has no slices.
            if adapter in held and router and len(held[adapter]) == router.num_experts:
                found[_plain(f"{name}.{part}", adapter)] = router.num_experts
    return found


def routed_layers_of(model: nn.Module, adapter: str) -> dict[str, RoutedLayer]:
    """Return the layers with a router of an adapter, by their names in `plain_parameters_of`."""
    return {
        _plain(name, adapter): module
        for name, module in model.named_modules()
        if isinstance(module, RoutedLayer) and adapter in module.router
    }


@contextmanager
def peft_warnings_ignored() -> Iterator[None]:
    """Suppress PEFT's warnings that do not apply to adapters of this project."""
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers for an attribute by its old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        # AdaLoRA may take all ranks of a projection, and has its own use of `rank_pattern`.
        warnings.filterwarnings("ignore", message=r".*LoRA tensor\(s\) have invalid shape")
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        yield


def check_shareable(folder: Path) -> None:
    """Refuse an adapter that changes its base model, which several adapters would share.

    Raises:
        UserError: it does, or the folder holds no adapter.
    """
    settings = saved_settings(folder)
    for name, harmless in CHANGES_BASE.items():
        value = settings.get(name)
        if value and value not in harmless or value == 0 and value is not False:
            raise UserError(
                f"adapter={folder}: {name}={value!r:.80} changes the base model, which other "
                "adapters cannot share: use it alone"
            )


def load_adapters(
    base: PreTrainedModel, folders: Mapping[str, Path | str], *, accept: bool = False
) -> PeftModel:
    """Load several adapters of any method onto one base model, in evaluation mode; `adapter_names`
    then chooses an adapter per row. `accept`: also those trained on other base weights.

    Raises:
        UserError: a folder holds no adapter, or one that does not fit `base`.
    """
    model: PreTrainedModel | PeftModel = base
    for name, place in folders.items():
        folder = Path(place).expanduser()
        settings = saved_settings(folder)
        check_shareable(folder)
        check_base(base, folder, settings, accept)
        weights = read_weights(folder)
        try:
            kinds = {MIXLORA: MixLoraConfig, LORA_MIXTURE: MixtureConfig, "LORA": LoraConfig}
            if settings["peft_type"] not in kinds:
                known = ", ".join(kinds)
                raise ValueError(f"peft_type={settings['peft_type']} is not one of {known}")
            config = kinds[settings["peft_type"]].from_pretrained(str(folder))
            config.inference_mode, config.base_model_name_or_path = True, None
            with torch.random.fork_rng(devices=[]), peft_warnings_ignored():
                model = add_guest(model, name, config)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(not_built(folder, error)) from error
        fill(model, name, weights, folder)
    assert isinstance(model, PeftModel)
    return model.eval()


def not_built(folder: Path, error: BaseException) -> str:
    """Return the error message for an adapter whose configuration matches no layer of the base
    model."""
    reason = " ".join(str(error).split())[:300].rstrip(".")
    return (
        f"adapter={folder} cannot be loaded: {reason}; give a folder that PEFT wrote, for this "
        "base model"
    )
