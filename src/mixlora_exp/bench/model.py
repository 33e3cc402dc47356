"""Random-weight models of a true shape, one per row, which share the frozen weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from enum import Enum
from functools import lru_cache
from typing import get_type_hints

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as transformers_initialization

from mixlora_exp.adapters import MixLoraConfig, MixtureConfig, attach_adapter, set_kernel
from mixlora_exp.adapters.dropout import use_dropout_stream
from mixlora_exp.adapters.mixed_adapters import peft_warnings_ignored
from mixlora_exp.bench.row_registry import BUILDERS, ROWS, BenchRow
from mixlora_exp.config.architecture import read_architecture
from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.config.schema import (
    ATTENTION_TARGETS,
    FEED_FORWARD_TARGETS,
    Config,
    ModelConfig,
    PeftMethodConfig,
)
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import MIXTURES, DropoutStream
from mixlora_exp.models import build_hf_config

CONF = CONF_DIR / "model"


def model_config(name: str, layers: int | None) -> ModelConfig:
    """Return the model `conf/model/<name>.yaml`, cut to `layers`, with random weights.

    Raises:
        UserError: there is no such model, or `layers` is more than it has.
    """
    path = CONF / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONF.glob("*.yaml")))
        raise UserError(f"model={name} is unknown: choose from {known}")
    config = read_architecture([CONF.parent], name)
    if layers is not None:
        if not 1 <= layers <= config["num_hidden_layers"]:
            raise UserError(f"layers={layers} must be in [1, {config['num_hidden_layers']}]")
        config["num_hidden_layers"] = layers
    hints = get_type_hints(ModelConfig)
    values = {}
    for key, value in yaml.safe_load(path.read_text()).items():
        kind = hints[key]
        if isinstance(kind, type) and issubclass(kind, Enum):
            value = kind(value)
        elif kind in (float, float | None) and value is not None:
            value = float(value)  # YAML reads 1e-5 as text.
        values[key] = value
    weights = hints["weights"]
    return ModelConfig(**{**values, "weights": weights("random"), "config": config})


def base_model(config: ModelConfig, dtype: torch.dtype, device: str, seed: int) -> PreTrainedModel:
    """Return a frozen model of that shape on `device`, filled from `seed`."""
    torch.manual_seed(seed)
    # Drawn on the device and in the precision they stay in: seven billion float32 are 28 GB.
    with torch.device(device), transformers_initialization.no_init_weights():
        model = AutoModelForCausalLM.from_config(build_hf_config(config), dtype=dtype)
    with torch.no_grad():
        kind = model.config.model_type
        for called, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
            else:
                # Gemma's norms scale by 1 + weight.
                unit = called.endswith("norm.weight") and "gemma" not in kind
                parameter.fill_(float(unit))
    # Built without its initialisation, which would do this.
    model.tie_weights()
    # `generate`'s defaults and caches have no part in this.
    model.config.use_cache = False
    return model.requires_grad_(False)


def sharing(base: nn.Module) -> nn.Module:
    """Return a copy of the modules that shares the weights."""
    shared = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
    return copy.deepcopy(base, shared)


def peft_config(row: BenchRow, dropout: float) -> LoraConfig:
    """Return a row's adapter, on every projection."""
    common = {
        "r": row.rank,
        "lora_alpha": 2 * row.rank,
        "lora_dropout": dropout,
        "use_dora": row.dora,
        "target_modules": [*ATTENTION_TARGETS, *FEED_FORWARD_TARGETS],
        "task_type": "CAUSAL_LM",
    }
    experts = {"num_experts": row.num_experts, "top_k": row.top_k}
    if row.mixture:
        return MixLoraConfig(**common, **experts, router=row.router)
    if row.linear_mixture:
        router = None if row.num_experts == 1 else row.router
        # Without these initial weights, which take minutes.
        blank = {"inference_mode": MIXTURES[row.method].starts_from_weight}
        return MixtureConfig(mixture=row.method, router=router, **blank, **experts, **common)
    return LoraConfig(**common)


@lru_cache
def settings_of(method: str, kernel: str, dropout: float) -> Config:
    """Return a configuration with a method of conf/method/, and this dropout where its file has
    one."""
    # Imported late: machines of the GPU suite may have no Hydra.
    from mixlora_exp.config.command import compose

    config = compose([f"method={method}", f"kernel={kernel}"])
    if isinstance(own := config.method, PeftMethodConfig):
        changed = {name: dropout for name in own.peft if name.endswith("_dropout")}
        return replace(config, method=replace(own, peft={**own.peft, **changed}))
    return replace(config, method=replace(own, dropout=dropout))


def _with_adapter(model: PreTrainedModel, row: BenchRow, dropout: float, seed: int) -> PeftModel:
    """Return `model` with a row's adapter as it starts."""
    if row.configured:
        config = settings_of(row.method, row.kernel, dropout)
        return attach_adapter(model, config.method, config.kernel, seed)
    torch.manual_seed(seed)
    made: PeftModel = get_peft_model(model, peft_config(row, dropout))
    set_kernel(made, row.kernel)
    return made


def adapted(base: PreTrainedModel, row: BenchRow, dropout: float, seed: int) -> nn.Module:
    """Return the model of a row on the weights of `base`. B is not left at zero, so that no product
    of the row is with zeros. Rows `base` and `floor` have no adapter. Dropout of this project's
    methods is drawn as in training, from `dropout_stream` of the model."""
    model = sharing(base)
    if row.method in ("base", "floor"):
        return model
    # Drawn where they stay: a host takes seconds for the adapters of seven billion weights.
    with peft_warnings_ignored(), base.device:
        made = _with_adapter(model, row, dropout, seed)
    with torch.no_grad():
        if made.peft_config["default"].inference_mode:
            made.peft_config["default"].inference_mode = False
            for name, parameter in made.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter.normal_(0, 0.02)
            made.set_adapter("default")
        for name, parameter in made.named_parameters():
            if name.split(".")[-2] in ("lora_A0", "lora_B0") and not parameter.any():
                # What LoRA-GA takes from a pass over data before its first step.
                parameter.normal_(0, 0.02)
            if not parameter.requires_grad:
                continue
            if "lora_B" in name or (row.configured and not parameter.any()):
                parameter.normal_(0, 0.02)
            if row.adapter_dtype == "base":
                parameter.data = parameter.data.to(base.dtype)
    if not row.stock:
        made.dropout_stream = DropoutStream(seed)
        use_dropout_stream(made, "default", made.dropout_stream)
    return made


def base_of(model: nn.Module) -> nn.Module:
    """Return the base model in a PEFT model, or a model without adapters itself."""
    return model.base_model.model if hasattr(model, "peft_config") else model


def model_of(name: str, base: PreTrainedModel, dropout: float, seed: int) -> nn.Module:
    """Return the model of a registered row on the weights of `base`.

    Raises:
        NotHere: it cannot be made on this machine.
    """
    return BUILDERS.get(name, adapted)(base, ROWS[name], dropout, seed)
