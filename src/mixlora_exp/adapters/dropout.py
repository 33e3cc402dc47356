"""Dropout of PEFT's LoRA layers, drawn from an adapter's own stream."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mixlora_exp.kernels import DropMask, DropoutKey, DropoutStream, draw_mask
from mixlora_exp.kernels.dropout import drop

__all__ = ["KeyedDropout", "input_mask", "keyed_mask", "use_dropout_stream"]


class KeyedDropout(nn.Dropout):
    """`nn.Dropout` whose numbers come from a key instead of torch's default generator."""

    def __init__(self, p: float, key: DropoutKey) -> None:
        super().__init__(p)
        self.key = key

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of x (..., in) by the key's mask in training mode; else return x."""
        if not self.training or self.p == 0.0:
            return x
        rows = x.reshape(-1, x.shape[-1])
        return drop(rows, input_mask(self, rows)).view(x.shape)


def keyed_mask(
    key: DropoutKey | None,
    part: str,
    shape: tuple[int, int],
    p: float,
    where: Tensor,
    *,
    hashed: bool = False,
) -> DropMask | None:
    """Return the mask of one (rows, width) input of a module, on the device of `where`: from the
    key or, without one, from torch's default generator. None for p = 0. hashed: a `HashMask` on a
    CPU too, for Triton kernels that are interpreted."""
    if key is None:
        return draw_mask(shape, p, where.device, hashed=hashed)
    return key.mask(part, shape, p, where.device, hashed=hashed)


def input_mask(dropout: nn.Module, rows: Tensor, *, hashed: bool = False) -> DropMask | None:
    """Return the mask that a LoRA layer's dropout module draws for its rows (T, in), None for
    none."""
    p = getattr(dropout, "p", 0.0) if dropout.training else 0.0
    key = getattr(dropout, "key", None)
    return keyed_mask(key, "input", tuple(rows.shape), p, rows, hashed=hashed)


def use_dropout_stream(model: nn.Module, adapter: str, stream: DropoutStream) -> None:
    """Let every dropout of `adapter` in `model` be drawn from `stream`.

    A row's mask then depends on the stream's seed, the optimizer step, the row's example and
    position, and the module's place in the base model alone: not on other adapters, other random
    numbers, the batch or process that a row is in, or how often a layer runs.
    """
    device = next(model.parameters()).device
    for name, module in model.named_modules():
        # Blocks that wrap another are not part of the base model's names.
        key = DropoutKey(stream, name.replace(".base_layer", ""), device)
        if hasattr(module, "dropout_keys") and adapter in module.r:
            module.dropout_keys[adapter] = key
        elif isinstance(module, LoraLayer) and adapter in module.lora_dropout:
            p = getattr(module.lora_dropout[adapter], "p", 0.0)
            if p:
                keyed = KeyedDropout(p, key)
                keyed.train(module.training)
                module.lora_dropout[adapter] = keyed
