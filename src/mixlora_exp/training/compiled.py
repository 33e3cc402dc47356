"""Training with compiled decoder layers (`trainer.compile`).

Each decoder layer is compiled for itself, by `torch.compile(fullgraph=True)` and for static shapes:
batches are padded to multiples of `BUCKET` tokens, so that few lengths are compiled, and all layers
of a model share the code. Nothing within a micro-batch is read by the host.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mixlora_exp.adapters.routed_layer import RoutedLayer
from mixlora_exp.adapters.weight_cache import prepare_compiled
from mixlora_exp.config.choices import Compile
from mixlora_exp.config.schema import Config
from mixlora_exp.kernels import working_dtype
from mixlora_exp.system.caches import keep_compiled_code

BUCKET = 64
"""Lengths of compiled batches are multiples of this: up to 512 tokens, eight of them."""
GRAPHS = 128
"""Most graphs that the layers, which share their code, are compiled to: one for each length, with
and without the first layer's frozen input, gradients, and a layer's parts under checkpointing.
torch stops at 8."""
STATIC = "sdpa_static"


def pad_to(config: Config) -> int:
    """Return the number of tokens that a batch's length is padded to a multiple of."""
    return 1 if config.trainer.compile is Compile.off else BUCKET


def _static_mask(*args: Any, **kwargs: Any) -> Any:
    """transformers' mask for SDPA, always made: deciding to leave it out needs a host read."""
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


@contextmanager
def _static_attention(base: PreTrainedModel) -> Iterator[None]:
    """Within this context the attention masks of `base` need no host read of the batch."""
    before = base.config._attn_implementation
    if before == "sdpa":
        ALL_ATTENTION_FUNCTIONS.register(STATIC, ALL_ATTENTION_FUNCTIONS["sdpa"])
        ALL_MASK_ATTENTION_FUNCTIONS.register(STATIC, _static_mask)
        base.config._attn_implementation = STATIC
    try:
        yield
    finally:
        base.config._attn_implementation = before


REFUSALS = (
    torch._dynamo.exc.TorchDynamoException,
    torch._dynamo.exc.FailOnRecompileLimitHit,
    torch._inductor.exc.InductorError,
)
"""Errors of the compiler alone, which come before a layer runs."""


class Refusal:
    """Why the compiler refused one of a model's layers; None if it did not."""

    reason: str | None = None


class _Compiled:
    """A decoder layer's call: compiled, or eager after a line with the compiler's reason. refusal:
    of all layers of the model."""

    def __init__(self, layer: nn.Module, refusal: Refusal) -> None:
        self._eager, self._refusal = layer._call_impl, refusal
        self._routed = [part for part in layer.modules() if isinstance(part, RoutedLayer)]
        self._call = torch.compile(self._eager, fullgraph=True, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._refusal.reason is not None:
            return self._eager(*args, **kwargs)
        try:
            found = self._call(*args, **kwargs)
        except REFUSALS as error:
            # The first lines: what the compiler met, and its message about it.
            reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:3])
            self._refusal.reason = reason
            sys.stderr.write(
                f"trainer.compile: the decoder layers run eagerly, because the compiler refuses "
                f"them: {type(error).__name__}: {reason}\n"
            )
            return self._eager(*args, **kwargs)
        for part in self._routed:
            part.detach_recomputed()
        return found


@contextmanager
def compiled_layers(
    base: PreTrainedModel, how: Compile, *, adapters: int = 1, checkpointing: bool = False
) -> Iterator[Refusal]:
    """Within this context the decoder layers of `base` run compiled, as `how` says; with gradient
    checkpointing their attention and feed-forward do.

    `graph` compiles as `layer` does; what records the pass is `captured`. Several adapters in one
    pass run eagerly: their packed batches have too many different lengths. Compiled code is kept in
    the user's cache folder. Yields what the compiler refuses.
    """
    refusal = Refusal()
    if how is Compile.off:
        yield refusal
        return
    if adapters > 1:
        sys.stderr.write(
            f"trainer.compile={how.value}: {adapters} adapters train together without it, since "
            "their packed batches have too many lengths\n"
        )
        yield refusal
        return
    keep_compiled_code()
    layers: list[nn.Module] = decoder_layers(base)
    if checkpointing:
        # A layer checkpoints inside its call, where a compiled layer could not store its routing:
        # its parts are compiled instead.
        layers = [part for layer in layers for part in layer.children()]
    for layer in layers:
        layer._compiled_call_impl = _Compiled(layer, refusal)
    # What is made of the adapters' weights once per optimizer step, as eager layers have it.
    hook = base.register_forward_pre_hook(_bring_up_to_date)
    try:
        with (
            torch._dynamo.config.patch(recompile_limit=GRAPHS),
            # Else the backward pass is compiled within it, where nothing else could be run instead.
            torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
            _static_attention(base),
        ):
            yield refusal
    finally:
        hook.remove()
        prepare_compiled(base, None)
        for layer in layers:
            layer._compiled_call_impl = None


def _bring_up_to_date(base: PreTrainedModel, inputs: Any) -> None:
    # Before a recording this was done outside of it.
    if not (base.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        bring_up_to_date(base)


def bring_up_to_date(base: PreTrainedModel) -> list[int]:
    """Make anew what compiled or recorded layers read of the adapters' weights, as far as these
    have changed; returns the addresses of the copies."""
    return prepare_compiled(base, working_dtype(base.get_input_embeddings().weight))


def decoder_layers(base: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers: the longest `ModuleList` of transformers' model."""
    (longest,) = sorted(
        (m for m in base.modules() if isinstance(m, nn.ModuleList)), key=len, reverse=True
    )[:1]
    return list(longest)
