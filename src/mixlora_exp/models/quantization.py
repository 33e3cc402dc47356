"""Frozen base models in four or eight bits (`model.quantization`), by bitsandbytes or torchao."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mixlora_exp.config.choices import Quantization
from mixlora_exp.config.schema_model import ModelConfig
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import is_quantized
from mixlora_exp.models.skeleton import skeleton_of
from mixlora_exp.models.weight_only import WeightOnly

PACKAGES = {
    Quantization.nf4: "bitsandbytes",
    Quantization.int8: "bitsandbytes",
    Quantization.int8_torchao: "torchao",
}
DEVICES = ("cpu", "cuda")
BLOCK, BLOCKS = 64, 256
"""NF4: weights that share a scale in 8 bits, and such scales that share one in float32."""


def is_installed(chosen: Quantization) -> bool:
    """Return whether the package of a quantisation other than `none` is installed."""
    return importlib.util.find_spec(PACKAGES[chosen]) is not None


def check_quantization(config: ModelConfig, device: str | None = None) -> None:
    """Check that this machine can quantise the model. device: the type that it will be on, where
    that is known.

    Raises:
        UserError: the package is not installed, or does not serve the device.
    """
    chosen = config.quantization
    if chosen is Quantization.none:
        return
    if not is_installed(chosen):
        package = PACKAGES[chosen]
        raise UserError(
            f"model.quantization={chosen.value} needs the package {package}, which is not "
            f"installed: run `pip install {package}`, or use model.quantization=none"
        )
    if device not in (None, *DEVICES):
        raise UserError(
            f"model.quantization={chosen.value} runs on a CPU or a CUDA GPU, not on {device}: use "
            "model.quantization=none"
        )


def quantization_options(
    config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Return the options of transformers' `from_pretrained` that quantise the weights as they are
    read, all linear layers but the output projection. Empty for `none`."""
    chosen = config.quantization
    if chosen is Quantization.none:
        return {}
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if chosen is Quantization.nf4:
        found = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif chosen is Quantization.int8:
        found = BitsAndBytesConfig(load_in_8bit=True)
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        found = TorchAoConfig(Int8WeightOnlyConfig())
    return {"quantization_config": found, "device_map": {"": device}}


def quantized(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model whose quantised layers, if it has any, compute as `WeightOnly`; the same
    object."""
    for module in model.modules():
        if not is_quantized(module):
            continue
        if type(module) is nn.Linear:
            # transformers made it, and its name and hooks stay: there is no layer to replace.
            module.__class__ = WeightOnly
        else:
            from mixlora_exp.models.bitsandbytes_layers import WeightOnly4bit, WeightOnly8bit

            eight = hasattr(module, "state")
            module.__class__ = WeightOnly8bit if eight else WeightOnly4bit
            module.matrix_dtype = dtype
    return model


def base_bytes(config: ModelConfig, width: int) -> int:
    """Return bytes of the base model's weights, with `width` bytes per number that is not
    quantised."""
    built = skeleton_of(config)
    total = sum(parameter.numel() for parameter in built.parameters()) * width
    if config.quantization is Quantization.none:
        return total
    head = built.get_output_embeddings()
    for module in built.modules():
        if isinstance(module, nn.Linear) and module is not head:
            rows, count = module.out_features, module.weight.numel()
            if config.quantization is Quantization.nf4:
                blocks = -(-count // BLOCK)
                own = -(-count // 2) + blocks + 4 * -(-blocks // BLOCKS)
            else:
                own = count + 4 * rows
            total += own - count * width
    return total
