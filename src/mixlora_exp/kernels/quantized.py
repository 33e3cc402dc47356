"""Frozen weights held in 4 or 8 bits by bitsandbytes or torchao, as the kernels take them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mixlora_exp.kernels.frozen import Frozen

__all__ = ["QuantizedLinear", "is_quantized", "matrix_of", "stored"]


class QuantizedLinear(Frozen):
    """The weight of a quantised `nn.Linear`, dequantised at each use and not kept: `linear` does it
    once, `input_gradient` once. bias: (out,) or None."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        self._layer, self._dtype, self.bias = layer, dtype, bias

    def weight(self) -> Tensor:
        """Dequantise W (out, in) into the dtype of the products."""
        return matrix_of(self._layer).to(self._dtype)


def is_quantized(layer: nn.Module) -> bool:
    """Return whether a linear layer holds its weight in a form that `matrix_of` dequantises.

    The types go by their names, as in PEFT: neither package need be there.
    """
    weight = getattr(layer, "weight", None)
    # First, since `torch.compile` does not follow what comes next.
    if type(weight) in (nn.Parameter, Tensor):
        return False
    kind = type(weight).__name__
    if kind == "Params4bit":
        # On a CPU such a layer begins with a plain weight.
        return weight.quant_state is not None
    if kind == "Int8Params":
        return weight.dtype == torch.int8
    return _is_of_torchao(weight)


def matrix_of(layer: nn.Linear) -> Tensor:
    """Return the weight W (out, in) as numbers: a quantised one made anew, in the dtype that it was
    quantised from, any other as it is held. bitsandbytes' int8 layer does not know that dtype: it
    is `layer.matrix_dtype` or, without that, float32."""
    weight = layer.weight
    kind = type(weight).__name__
    if not is_quantized(layer):
        return weight
    if kind == "Params4bit":
        return _of_4_bits(weight)
    if kind == "Int8Params":
        # A forward pass of bitsandbytes moves the rows' scales from the weight to its state.
        scale = weight.SCB if layer.state.SCB is None else layer.state.SCB
        matrix = weight.data * (scale.to(weight.device) / 127).unsqueeze(1)
        return matrix.to(getattr(layer, "matrix_dtype", matrix.dtype))
    return weight.dequantize()


def _of_4_bits(weight: Tensor) -> Tensor:
    from bitsandbytes import functional

    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        # As its own forward pass lays it out on some CPUs, which `dequantize_4bit` misreads.
        unpacked = functional._convert_weight_packed_for_cpu_inverse
        weight.data, weight.quant_state = unpacked(weight.data, weight.quant_state)
    state = weight.quant_state
    if weight.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
        return functional.dequantize_4bit(weight.data, state)
    # There bitsandbytes 0.50 takes wrong scales where a block goes on in the next row.
    flat = copy.copy(state)
    flat.shape = torch.Size((1, state.shape.numel()))
    return functional.dequantize_4bit(weight.data, flat).view(state.shape)


def stored(weight: Tensor) -> Tensor:
    """Return the tensor with an address in which a weight's numbers are: itself, unless it is
    torchao's, which only refers to others."""
    return weight.qdata if _is_of_torchao(weight) and hasattr(weight, "qdata") else weight


def _is_of_torchao(weight: Tensor | None) -> bool:
    return type(weight).__module__.startswith("torchao.")
