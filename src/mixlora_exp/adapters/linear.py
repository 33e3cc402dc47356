"""PEFT's LoRA layer with the fused forward pass; parameters, files and file format stay PEFT's."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as stock
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from mixlora_exp.adapters.norms import NormCache
from mixlora_exp.kernels import dora_norms, draw_mask, squared_row_norms, working_dtype
from mixlora_exp.kernels.linear import lora_linear, lora_linear_reference

__all__ = ["FusedLinear", "ReferenceLinear", "use_linear_kernel"]


class FusedLinear(stock.Linear):
    """`peft.tuners.lora.Linear` whose LoRA and DoRA run through `kernels.linear.lora_linear`.

    What the fused form does not have (several active adapters, `adapter_names`, merged weights,
    other variants, LoRA with bias, layers that are no `nn.Linear`) runs as PEFT does it. Made by
    `use_linear_kernel`, which changes the class of PEFT's layers in place.
    """

    kernel = staticmethod(lora_linear)

    @property
    def norms(self) -> NormCache:
        if "_norms" not in self.__dict__:
            self.__dict__["_norms"] = NormCache()
        return self.__dict__["_norms"]

    def train(self, mode: bool = True) -> FusedLinear:
        # A trainer calls `train()` before every micro-batch: that alone changes nothing.
        if not (mode and self.training):
            self.norms.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> FusedLinear:
        # `to`, `float` and the like may round the weights and give them their old memory back.
        self.norms.clear(frozen=True)
        return super()._apply(*args, **kwargs)

    def _fused_adapter(self, kwargs: dict[str, Any]) -> str | None:
        """The adapter to run fused, None if PEFT's own forward pass is needed."""
        if self.disable_adapters or self.merged or any(v is not None for v in kwargs.values()):
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or type(self.base_layer) is not nn.Linear or self.fan_in_fan_out:
            return None
        (name,) = active
        variant = self.lora_variant.get(name)
        plain = variant is None or type(variant) is DoraLinearVariant
        frozen = not self.base_layer.weight.requires_grad
        return name if plain and frozen and not self.lora_bias[name] else None

    def _norm(self, name: str, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        squared = self.norms.get(
            ("weight", ""), (weight,), lambda: squared_row_norms(weight), frozen=True
        )
        return self.norms.get(
            ("norm", name),
            (weight, a, b),
            lambda: dora_norms(weight, squared, a[None], b[None], self.scaling[name])[0],
            scaling=self.scaling[name],
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args else self._fused_adapter(kwargs)
        if name is None:
            return super().forward(x, *args, **kwargs)
        weight, bias = self.base_layer.weight, self.base_layer.bias
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        dtype = working_dtype(x)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        magnitude = norm = None
        if name in self.lora_variant:
            magnitude = self.lora_magnitude_vector[name].weight
            norm = self._norm(name, weight, a, b)
        p = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
        with torch.autocast(x.device.type, enabled=False):
            y = self.kernel(
                rows,
                weight.to(dtype),
                a,
                b,
                self.scaling[name],
                magnitude=magnitude,
                norm=norm,
                mask=draw_mask(rows.shape, p, rows.device),
            )
            if bias is not None:
                y = y + bias.to(dtype)
        return y.view(*x.shape[:-1], y.shape[-1])


class ReferenceLinear(FusedLinear):
    """The same by plain operations."""

    kernel = staticmethod(lora_linear_reference)


def use_linear_kernel(model: nn.Module, kernel: str) -> None:
    """Let PEFT's LoRA layers of `model` run with `kernel`: PEFT's own forward pass for `peft`,
    plain operations for `reference`, else fused."""
    wanted = {"peft": stock.Linear, "reference": ReferenceLinear}.get(kernel, FusedLinear)
    for module in model.modules():
        # Exact types: quantised and other special layers keep their own.
        if type(module) in (stock.Linear, FusedLinear, ReferenceLinear):
            module.__class__ = wanted
