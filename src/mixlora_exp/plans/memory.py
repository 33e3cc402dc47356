"""The memory that a run needs, estimated from shapes without weights."""

from __future__ import annotations

from mixlora_exp.config import Config
from mixlora_exp.config.schema import (
    FEED_FORWARD_TARGETS,
    Head,
    Kernel,
    LoraMethodConfig,
    LossOn,
    MixLoraMethodConfig,
    Precision,
)
from mixlora_exp.models import architecture_of
from mixlora_exp.models.parameters import count_parameters, widths

__all__ = ["kept_per_token", "many_that_fit", "memory_of"]

USABLE = 0.94
"""Of a card's memory: the rest goes to the driver's context and to gaps between allocations."""


def kept_per_token(config: Config, width: int, packed: bool = False) -> float:
    """Bytes that a layer keeps per token for the backward pass, `width` bytes to a number.

    Counted from what the kernels save (a test holds it against what autograd does): both norms'
    input and output, and in 16 bits a copy in float32; queries, keys, values and the heads' output,
    which several adapters in one pass hold twice; the frozen products of gate and up. LoRA keeps
    the activation and the product as well, DoRA the output of each adapted projection before its
    scale, a mixture its router's input in float32 and, with DoRA, the K outputs of the down
    projection. A mask of dropout has a byte per element.
    """
    model, method = config.model, config.method
    assert isinstance(method, LoraMethodConfig)
    inputs, outputs = ({t: w[side] for t, w in widths(model).items()} for side in (0, 1))
    d, f = inputs["gate_proj"], outputs["gate_proj"]
    heads, kv = outputs["q_proj"], outputs["k_proj"]
    mixed = isinstance(method, MixLoraMethodConfig)
    plain = [t for t in method.targets if not (mixed and t in FEED_FORWARD_TARGETS)]
    experts = [t for t in method.targets if t not in plain]
    masks = sum(inputs[target] for target in plain)
    if experts:
        masks += d * any(t != "down_proj" for t in experts) + f * ("down_proj" in experts)
    stock = config.kernel.name in (Kernel.peft, Kernel.reference)
    slots = method.top_k if mixed else 1
    norms = 6 if width == 2 else 4
    numbers = norms * d + (3 if packed else 2) * heads + 2 * kv + 2 * f
    numbers += method.rank * len(plain)
    if not mixed or stock:
        numbers += 2 * f * slots
    if method.dora:
        numbers += sum(outputs[target] for target in plain)
        numbers += slots * d if "down_proj" in experts else 0
    if stock:
        # Under dropout each branch keeps its own input; each expert keeps its gate and up.
        numbers += (masks if method.dropout else 0) + (2 * slots * f if mixed else 0)
        numbers += sum(outputs[target] for target in experts) * slots if method.dora else 0
    dropped = masks if method.dropout else 0
    router = 4 * d if mixed and width == 2 else 0
    # Of attention's softmax and of the norms a number in float32 each.
    return numbers * width + router + dropped + 4 * (architecture_of(model).num_attention_heads + 2)


def memory_of(config: Config, packed: bool = False) -> dict[str, int]:
    """The estimate of a run's memory, in bytes by item: frozen weights, the float32 adapter with
    gradient and AdamW's two moments, and what is kept for the backward pass of one micro-batch.
    `packed`: as one of several adapters on one base."""
    model, method, longest = config.model, config.method, config.data.cutoff_length
    parameters = count_parameters(model, method)
    # `auto` is taken for bf16, since a plan is often made for another machine.
    width = 4 if config.trainer.precision is Precision.float32 else 2
    if not isinstance(method, LoraMethodConfig):
        return {"weights": parameters.base * width, "adapter_and_optimizer": 0, "activations": 0}
    tokens = config.trainer.micro_batch_size * longest
    layer = kept_per_token(config, width, packed)
    shape = architecture_of(model)
    kept = layer * shape.num_hidden_layers
    if config.trainer.gradient_checkpointing:
        # The input of each layer, and one layer at a time in full.
        kept = layer + shape.num_hidden_layers * shape.hidden_size * width
    # The loss holds a few rows of logits at a time, in float32.
    chunk = 2**23 * 4
    answers = longest if config.trainer.loss_on is LossOn.all else 4
    logits = config.trainer.micro_batch_size * answers * shape.vocab_size * 8
    if config.trainer.head is not Head.full:
        logits = min(logits, 2 * chunk)
    return {
        "weights": parameters.base * width,
        "adapter_and_optimizer": parameters.trainable * 16,
        "activations": round(tokens * kept + logits),
    }


def many_that_fit(memory: dict[str, int], gib: float) -> int:
    """Adapters of one kind that train together on one base within `gib` GiB."""
    each = memory["adapter_and_optimizer"] + memory["activations"]
    return max(0, int((gib * 2**30 * USABLE - memory["weights"]) // each))
