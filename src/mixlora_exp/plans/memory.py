"""Estimates the memory of a run from shapes, without weights."""

from __future__ import annotations

from dataclasses import replace

from mixlora_exp.config.schema import (
    FEED_FORWARD_TARGETS,
    Config,
    Head,
    Kernel,
    LoraMethodConfig,
    LossOn,
    MixLoraMethodConfig,
    PeftMethodConfig,
    Precision,
    TrainedMethodConfig,
)
from mixlora_exp.config.schema_mixture import LinearMixtureMethodConfig
from mixlora_exp.models.mixtures import fixed_parameters, kept_by_mixture
from mixlora_exp.models.parameters import count_parameters, router_of, skeleton_of, widths
from mixlora_exp.models.quantization import base_bytes

USABLE = 0.94
"""Usable fraction of a GPU's memory; the rest goes to the CUDA context and fragmentation."""


def kept_per_token(config: Config, width: int, packed: bool = False) -> float:
    """Bytes that a layer saves per token for the backward pass, with `width` bytes per number.

    Counted from the tensors that the kernels save (a test compares it with autograd): inputs and
    outputs of both norms, with a float32 copy in 16-bit precision; queries, keys, values and the
    attention output, which several adapters in one pass (`packed`) save twice; the frozen outputs
    of gate and up. LoRA also saves the activation and the product, DoRA the unscaled output of each
    adapted projection, a mixture its router's input in float32 and, with DoRA, the K outputs of the
    down projection; for mixtures in linear layers see `kept_by_mixture`. A dropout mask has one
    byte per element. What PEFT's other types keep differs and is not known: input and output of
    each target stand for it.
    """
    model, method = config.model, config.method
    assert isinstance(method, (LoraMethodConfig, PeftMethodConfig))
    if isinstance(method, PeftMethodConfig):
        alike = LoraMethodConfig(name="lora", rank=1, alpha=1.0, targets=method.targets)
        extra = width * sum(sum(widths(model)[target]) for target in method.targets)
        return extra + kept_per_token(replace(config, method=alike), width)
    inputs, outputs = ({t: w[side] for t, w in widths(model).items()} for side in (0, 1))
    d, f = inputs["gate_proj"], outputs["gate_proj"]
    heads, kv = outputs["q_proj"], outputs["k_proj"]
    mixed = isinstance(method, MixLoraMethodConfig)
    linear = isinstance(method, LinearMixtureMethodConfig)
    targets = [] if linear else method.targets
    plain = [t for t in targets if not (mixed and t in FEED_FORWARD_TARGETS)]
    experts = [t for t in targets if t not in plain]
    masks = sum(inputs[target] for target in plain)
    if experts:
        masks += d * any(t != "down_proj" for t in experts) + f * ("down_proj" in experts)
    stock = config.kernel.name in (Kernel.peft, Kernel.reference)
    slots = router_of(method).slots if mixed else 1
    norms = 6 if width == 2 else 4
    numbers = norms * d + (3 if packed else 2) * heads + 2 * kv + 2 * f
    numbers += method.rank * len(plain)
    if not mixed or stock:
        numbers += 2 * f * slots
    stock = stock and not linear
    if method.dora:
        numbers += sum(outputs[target] for target in plain)
        numbers += slots * d if "down_proj" in experts else 0
    if stock:
        # With dropout each branch saves its own input; each expert saves its gate and up outputs.
        numbers += (masks if method.dropout else 0) + (2 * slots * f if mixed else 0)
        numbers += sum(outputs[target] for target in experts) * slots if method.dora else 0
    dropped = masks if method.dropout else 0
    router = 4 * d if mixed and width == 2 else 0
    # One float32 number per head (attention's log-sum-exp) and per norm.
    if linear:
        router += kept_by_mixture(model, method, width)
    return (
        numbers * width + router + dropped + 4 * (skeleton_of(model).config.num_attention_heads + 2)
    )


def kept_by_all_layers(config: Config, width: int, packed: bool = False) -> float:
    """Bytes per token of all layers together; see `kept_per_token`."""
    layer, shape = kept_per_token(config, width, packed), skeleton_of(config.model).config
    if config.trainer.gradient_checkpointing:
        # The input of each layer, and all saved tensors of one layer at a time.
        return layer + shape.num_hidden_layers * shape.hidden_size * width
    return layer * shape.num_hidden_layers


def memory_of(config: Config, packed: bool = False) -> dict[str, int]:
    """Estimated memory of a run in bytes, by item: frozen weights; the float32 adapter with its
    gradient, AdamW's two moments and, in 16 bits, its weights in that precision (but for
    `kernel=peft`); tensors saved for the backward pass of one micro-batch. `packed`: as one of
    several adapters on one base model."""
    model, method, longest = config.model, config.method, config.data.cutoff_length
    parameters = count_parameters(model, method)
    # `auto` counts as bf16, since plans are often for another machine.
    width = 4 if config.trainer.precision is Precision.float32 else 2
    if not isinstance(method, TrainedMethodConfig):
        return {"weights": base_bytes(model, width), "adapter_and_optimizer": 0, "activations": 0}
    tokens = config.trainer.micro_batch_size * longest
    kept = kept_by_all_layers(config, width, packed)
    # The loss keeps a few rows of logits at a time, in float32.
    chunk = 2**23 * 4
    answers = longest if config.trainer.loss_on is LossOn.all else 4
    logits = config.trainer.micro_batch_size * answers * skeleton_of(model).config.vocab_size * 8
    if config.trainer.head is not Head.full:
        logits = min(logits, 2 * chunk)
    copies = 2 if width == 2 and config.kernel.name is not Kernel.peft else 0
    return {
        "weights": base_bytes(model, width),
        "adapter_and_optimizer": parameters.trainable * (16 + copies)
        + fixed_parameters(model, method) * (4 + copies),
        "activations": round(tokens * kept + logits),
    }


def many_that_fit(memory: dict[str, int], gib: float) -> int:
    """Number of adapters like this that can train together on one base model in `gib` GiB."""
    each = memory["adapter_and_optimizer"] + memory["activations"]
    return max(0, int((gib * 2**30 * USABLE - memory["weights"]) // each))
