"""Dropout of PEFT's LoRA layers, drawn from an adapter's own stream."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mixlora_exp.kernels import DropoutKey, DropoutStream
from mixlora_exp.kernels.mixlora.stock import dropped

__all__ = ["KeyedDropout", "use_dropout_stream"]


class KeyedDropout(nn.Dropout):
    """`nn.Dropout` whose numbers come from a key instead of torch's default generator."""

    def __init__(self, p: float, key: DropoutKey) -> None:
        super().__init__(p)
        self.key = key

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        return dropped(x, self.p, self.key.generator("input", x.device))


def use_dropout_stream(model: nn.Module, adapter: str, stream: DropoutStream) -> None:
    """Let every dropout of `adapter` in `model` be drawn from `stream`.

    A mask then depends on the stream and on the module's place in the base model alone: not on
    other adapters, nor on what else draws random numbers, nor on how often a layer is run.
    """
    for name, module in model.named_modules():
        # Blocks that wrap another are not part of the base model's names.
        key = DropoutKey(stream, name.replace(".base_layer", ""))
        if hasattr(module, "dropout_keys") and adapter in module.lora_router:
            module.dropout_keys[adapter] = key
        elif isinstance(module, LoraLayer) and adapter in module.lora_dropout:
            p = getattr(module.lora_dropout[adapter], "p", 0.0)
            if p:
                keyed = KeyedDropout(p, key)
                keyed.train(module.training)
                module.lora_dropout[adapter] = keyed
