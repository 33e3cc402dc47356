"""Creates, saves and loads adapters of all methods."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import PreTrainedModel

from mixlora_exp.adapters.base_check import check_base, named_portably
from mixlora_exp.adapters.config import MixLoraConfig
from mixlora_exp.adapters.files import CONFIG
from mixlora_exp.adapters.initial import start_orthogonally
from mixlora_exp.adapters.load_weights import fill, read_weights
from mixlora_exp.adapters.mixed_adapters import add_guest, not_built, peft_warnings_ignored
from mixlora_exp.adapters.mixtures.config import MixtureConfig
from mixlora_exp.adapters.model import set_kernel
from mixlora_exp.adapters.saved import saved_settings
from mixlora_exp.config.schema import (
    KernelConfig,
    LoraMethodConfig,
    MixLoraMethodConfig,
    PeftMethodConfig,
    TrainedMethodConfig,
)
from mixlora_exp.config.schema_method import MixtureSettings
from mixlora_exp.config.schema_mixture import LinearMixtureMethodConfig, LinearMixtureSettings
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import matrix_of, squared_row_norms
from mixlora_exp.models.base_identity import BaseIdentity, base_of, write_base
from mixlora_exp.system.durable import publishing

__all__ = ["attach_adapter", "attach_together", "load_adapter", "peft_config", "save_adapter"]

START = {"default": True}
"""`method.init_lora_weights` -> PEFT's value, where it has another."""


def peft_config(method: TrainedMethodConfig) -> PeftConfig:
    """Return the PEFT configuration of a method.

    Raises:
        UserError: its router, mixture or PEFT does not know one of its options.
    """
    if isinstance(method, PeftMethodConfig):
        # Importing PEFT imports this module, and that one imports PEFT.
        from mixlora_exp.models.peft_types import config_of

        return config_of(method)
    assert isinstance(method, LoraMethodConfig)
    common = {
        "r": method.rank,
        "lora_alpha": method.alpha,
        "lora_dropout": method.dropout,
        "use_dora": method.dora,
        "use_rslora": method.rslora,
        "target_modules": list(method.targets),
        "rank_pattern": dict(method.rank_pattern),
        "alpha_pattern": dict(method.alpha_pattern),
        "layers_to_transform": method.layers_to_transform,
        "init_lora_weights": START.get(method.init_lora_weights, method.init_lora_weights),
        "task_type": "CAUSAL_LM",
    }
    kinds = (
        (LinearMixtureMethodConfig, LinearMixtureSettings, MixtureConfig),
        (MixLoraMethodConfig, MixtureSettings, MixLoraConfig),
    )
    found = next((kind for kind in kinds if isinstance(method, kind[0])), None)
    if found is None:
        return LoraConfig(**common)
    _, settings, config = found
    mixture = {item.name: getattr(method, item.name) for item in fields(settings)}
    own = {"r": method.rank_of_experts, "lora_alpha": method.alpha_of_experts}
    if (own["r"], own["lora_alpha"]) != (method.rank, method.alpha):
        common |= {"expert_lora": own} if config is MixLoraConfig else own
    try:
        return config(**common, **mixture)
    except ValueError as error:
        raise UserError(f"method: {error}") from error


def attach_together(
    model: PreTrainedModel,
    methods: Mapping[str, tuple[LoraMethodConfig, int]],
    kernel: KernelConfig,
) -> PeftModel:
    """Add new adapters to one base model, by name; each has the weights that `attach_adapter` would
    draw from its seed."""
    adapted: PreTrainedModel | PeftModel = model
    for name, (method, seed) in methods.items():
        with torch.random.fork_rng(devices=[]), peft_warnings_ignored():
            torch.manual_seed(seed)
            adapted = add_guest(adapted, name, peft_config(method))
            if method.init_lora_weights == "orthogonal":
                start_orthogonally(adapted, name)
    _exact_magnitudes(adapted)
    set_kernel(adapted, kernel.name.value)
    return adapted


def attach_adapter(
    model: PreTrainedModel, method: TrainedMethodConfig, kernel: KernelConfig, seed: int
) -> PeftModel:
    """Add a new adapter of `method` to `model`; `seed` fixes its initial weights."""
    with torch.random.fork_rng(devices=[]), peft_warnings_ignored():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, peft_config(method))
        if getattr(method, "init_lora_weights", "") == "orthogonal":
            start_orthogonally(adapted, "default")
    _exact_magnitudes(adapted)
    if isinstance(method, LoraMethodConfig):
        frozen = [] if method.train_magnitude else ["lora_magnitude"]
        frozen += ["lora_A"] if method.lora_fa else []
        for name, parameter in adapted.named_parameters():
            if any(part in name for part in frozen):
                parameter.requires_grad_(False)
    else:
        # Importing PEFT imports this module, and that one imports PEFT.
        from mixlora_exp.models.peft_types import freeze_what_is_not_saved

        freeze_what_is_not_saved(adapted)
    set_kernel(adapted, kernel.name.value)
    return adapted


@torch.no_grad()
def _exact_magnitudes(model: PeftModel) -> None:
    """Set the magnitudes of PEFT's own DoRA layers to the row norms of W in float32.

    On a bf16 base PEFT rounds them to bf16, so that a new adapter would change the base's outputs.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for magnitude in module.lora_magnitude_vector.values():
                norms = squared_row_norms(matrix_of(module.get_base_layer())).sqrt()
                magnitude.weight.copy_(norms)


def save_adapter(model: PeftModel, folder: Path, adapter: str = "default") -> None:
    """Write one adapter to `folder` atomically, with the identity of its base model (see
    `models.base_identity`).

    The bytes depend only on the adapter, not on its name in the model, on other adapters, or on the
    process.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    try:
        # Only one process at a time works on a run, so replacing is safe.
        with publishing(folder, replace=True) as new, peft_warnings_ignored():
            # `save_embedding_layers=False`: the base is frozen, and "auto" would ask the hub.
            model.save_pretrained(
                new, safe_serialization=True, save_embedding_layers=False,
                selected_adapters=[adapter],
            )  # fmt: skip
            if adapter != "default":
                # PEFT writes every adapter except `default` to a subfolder.
                for path in (new / adapter).iterdir():
                    path.rename(new / path.name)
                (new / adapter).rmdir()
            base = base_of(model.get_base_model())
            _settle_config(new / CONFIG, model.peft_config[adapter], base)
            # PEFT's template, which depends on the other adapters in the model.
            (new / "README.md").unlink(missing_ok=True)
            if base is not None:
                write_base(new, base)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"output_dir: cannot write the adapter to {folder} ({error}); nothing was "
            "recorded. Free space there, or choose another output_dir."
        ) from error


def _settle_config(path: Path, config: PeftConfig, base: BaseIdentity | None) -> None:
    """Sort the fields of the written file that are sets in `config`, and name the base model."""
    names = {name: sorted(value) for name, value in vars(config).items() if isinstance(value, set)}
    entries = {**json.loads(path.read_text()), **names}
    entries |= named_portably(entries, base)
    path.write_text(json.dumps(entries, indent=2, sort_keys=True))


def _take_off(base: PreTrainedModel) -> None:
    """Remove the layers that PEFT had added to a base model before it raised an exception."""

    def next_layer() -> tuple[str, BaseTunerLayer] | None:
        layers = ((n, m) for n, m in base.named_modules() if isinstance(m, BaseTunerLayer))
        return next(layers, None)

    while (found := next_layer()) is not None:
        base.set_submodule(found[0], found[1].base_layer)
    if hasattr(base, "peft_config"):
        del base.peft_config


def load_adapter(
    base: PreTrainedModel, folder: Path, kernel: KernelConfig, *, accept: bool = False
) -> PeftModel:
    """Load an adapter from disk onto its base model, in evaluation mode. `accept`: even if it was
    trained on other base weights.

    Raises:
        UserError: a file is missing, truncated or not an adapter, or does not fit `base`.
    """
    settings = saved_settings(folder)
    weights = read_weights(folder)
    check_base(base, folder, settings, accept)
    try:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]].from_pretrained(str(folder))
        config.inference_mode, config.base_model_name_or_path = True, None
        with torch.random.fork_rng(devices=[]), peft_warnings_ignored():
            model = get_peft_model(base, config)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        _take_off(base)
        raise UserError(not_built(folder, error)) from error
    try:
        with peft_warnings_ignored():
            fill(model, "default", weights, folder)
    except UserError:
        # The caller keeps the base model without this adapter.
        model.unload()
        raise
    set_kernel(model, kernel.name.value)
    return model.eval()
