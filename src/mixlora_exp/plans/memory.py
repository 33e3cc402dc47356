"""Estimates the memory of a run from shapes, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mixlora_exp.config.choices import OWN_DROPOUT, Compile, Parallel, Protocol, Quantization
from mixlora_exp.config.schema import (
    AnswerForm,
    Config,
    Head,
    LoraMethodConfig,
    LossOn,
    MixLoraMethodConfig,
    Precision,
    TrainedMethodConfig,
)
from mixlora_exp.config.schema_mixture import LinearMixtureMethodConfig
from mixlora_exp.models.adapted_modules import adapted_layers
from mixlora_exp.models.mixtures import fixed_parameters
from mixlora_exp.models.parameters import count_parameters, routers_of, skeleton_of, widths
from mixlora_exp.models.quantization import base_bytes
from mixlora_exp.models.skeleton import projections
from mixlora_exp.plans.kept import kept_by_layer, kept_without_adapter
from mixlora_exp.plans.saved_adapter import saved_sizes
from mixlora_exp.system.hub import adapter_folder

USABLE = 0.94
"""Usable fraction of a GPU's memory; the rest goes to the CUDA context and fragmentation."""
CHUNK = 2**23
"""Logits that exist at a time where the loss is computed in chunks."""
LABEL = 4
"""Most tokens per example that carry a loss where the answer is a label."""
GENERATED = {Protocol.generate, Protocol.exact_match, Protocol.answer_pattern}
"""Protocols whose answers the model generates."""
SCORED = 256
"""Positions whose logits exist at a time when answers are scored."""


def number_bytes(config: Config) -> int:
    """Return bytes of a number of the frozen weights; `auto` counts as bf16, since plans are often
    for another machine."""
    return 4 if config.trainer.precision is Precision.float32 else 2


def usable_bytes(gib: float) -> float:
    """Return what a run may take of a card's memory."""
    return gib * 2**30 * USABLE


def kept_by_all_layers(
    config: Config,
    width: int,
    packed: bool = False,
    *,
    beside_plain: bool = False,
    autocast: bool = True,
) -> float:
    """Return bytes per token that all layers together keep for the backward pass, without copies of
    weights; see `kept_by_layer`."""
    kept = kept_by_layer(config, width, packed=packed, beside_plain=beside_plain, autocast=autocast)
    shape = _shape(config)
    if config.trainer.gradient_checkpointing:
        # The input of each layer, and all saved tensors of one layer at a time.
        return kept.per_token + shape.num_hidden_layers * shape.hidden_size * width
    layers, bare = _adapted_layers(config), kept_without_adapter(config, width, packed=packed)
    # No gradient reaches the layers before the first adapter.
    above = shape.num_hidden_layers - layers[0] - len(layers)
    total = kept.per_token * len(layers) + bare.per_token * above
    if packed or not _last_layer_skips(config):
        return total
    last = kept if layers[-1] == shape.num_hidden_layers - 1 else bare
    return total - last.block


def _adapted_layers(config: Config) -> list[int]:
    """Return the numbers of the layers that have an adapter."""
    if isinstance(config.method, LoraMethodConfig):
        return adapted_layers(skeleton_of(config.model), config.method)
    return list(range(_shape(config).num_hidden_layers))


def _last_layer_skips(config: Config) -> bool:
    """Return whether the last layer's block runs at the rows with a loss alone
    (`training.last_layer`)."""
    method, trainer = config.method, config.trainer
    if _positions_with_loss(config) > LABEL or trainer.compile is not Compile.off:
        return False
    if isinstance(method, MixLoraMethodConfig):
        return config.kernel.name.value not in OWN_DROPOUT
    return not isinstance(method, LinearMixtureMethodConfig)


def memory_of(
    config: Config,
    packed: bool = False,
    *,
    beside_plain: bool = False,
    processes: int = 1,
    autocast: bool = True,
) -> dict[str, int]:
    """Return memory that training takes on a device, in bytes, by item, all of which exist at its
    peak.

    weights: the frozen ones, of which with `trainer.parallel=fsdp` each of `processes` keeps its
    part. adapter_and_optimizer: the float32 adapter, the optimizer's state, in 16 bits a copy of
    the adapter in that precision, and gradients; these only in so far as they exist beside the
    activations, which without accumulation they replace. activations: what is kept for the
    backward pass of one micro-batch of the longest examples, and the logits or a layer's
    gradients. dequantized: a matrix of a quantised base while a layer uses it. exchanged:
    gradients on their way between processes.

    packed: as one of several adapters on one base model; see `memory_together`. beside_plain,
    autocast: as `kept_by_layer`.
    """
    model, method = config.model, config.method
    width = number_bytes(config)
    weights = _weights(config, width, processes)
    if not isinstance(method, TrainedMethodConfig):
        return {"weights": weights}
    trained = count_parameters(model, method).trainable
    tokens = config.trainer.micro_batch_size * config.data.cutoff_length
    kept = tokens * kept_by_all_layers(
        config, width, packed, beside_plain=beside_plain, autocast=autocast
    )
    layer = kept_by_layer(config, width, packed=packed, autocast=autocast)
    copied = 1 if config.trainer.gradient_checkpointing else len(_adapted_layers(config))
    activations = kept + layer.weights * copied
    activations += max(_logits(config), 6 * widths(model)["gate_proj"][1] * tokens * width)
    copies = 2 if width == 2 and autocast else 0
    gradients = 4.0 * trained
    if config.trainer.accumulation_steps // processes <= 1 and not packed:
        gradients = max(0.0, gradients - activations)
    items = {
        "weights": weights,
        "adapter_and_optimizer": trained * (4 + config.trainer.optimizer.state_bytes + copies)
        + fixed_parameters(model, method) * (4 + copies)
        + gradients,
        "activations": activations,
        "dequantized": _dequantized(config, width),
        "exchanged": 4 * trained if processes > 1 else 0,
    }
    return {name: round(size) for name, size in items.items() if size}


def memory_together(configs: Sequence[Config]) -> list[dict[str, int]]:
    """Return `memory_of` each of several adapters that train together on one base model."""
    plain = any(not isinstance(config.method, MixLoraMethodConfig) for config in configs)
    return [memory_of(config, packed=True, beside_plain=plain) for config in configs]


def _shape(config: Config):
    return skeleton_of(config.model).config


def _weights(config: Config, width: int, processes: int) -> int:
    """Return bytes of the frozen weights on one device."""
    total = base_bytes(config.model, width)
    if processes == 1 or config.trainer.parallel is not Parallel.fsdp:
        return total
    inside = sum(m.weight.numel() for _, m in projections(skeleton_of(config.model))) * width
    # Two layers are whole at a time: the next one's weights come while the one before computes.
    return round(
        total - inside + inside / processes + 2 * inside / _shape(config).num_hidden_layers
    )


def _dequantized(config: Config, width: int) -> int:
    """Return the largest projection of a quantised base while it is made a matrix, as one is at a
    time. 8 bits become float32 first, which torchao copies even where that is the working type."""
    kind = config.model.quantization
    if kind is Quantization.none:
        return 0
    by_way = {Quantization.nf4: 0, Quantization.int8: 4 if width < 4 else 0}.get(kind, 4)
    return (width + by_way) * max(inner * outer for inner, outer in widths(config.model).values())


def _positions_with_loss(config: Config) -> int:
    """Return the most positions per example that may carry a loss: an answer's text may be the
    whole example."""
    text = AnswerForm.text in config.data.forms
    return config.data.cutoff_length if config.trainer.loss_on is LossOn.all or text else LABEL


def _logits(config: Config) -> float:
    """Return bytes at the loss: logits, their log-softmax and its gradient in float32, of all
    positions with a loss or of a chunk of them."""
    positions = _positions_with_loss(config)
    logits = config.trainer.micro_batch_size * positions * _shape(config).vocab_size
    if config.trainer.head is not Head.full:
        logits = min(logits, CHUNK)
    return 12.0 * logits


def scoring_bytes(config: Config) -> int:
    """Peak memory of scoring on a device, in bytes: weights (whole on each process), the adapter
    (an existing one by its file) with its copy in the working type, one layer's tensors for
    `evaluation.batch_tokens` tokens, logits in float32, and the cache of keys and values where text
    is generated."""
    model, method, width = config.model, config.method, number_bytes(config)
    sides, shape = widths(model), _shape(config)
    tokens = max(config.evaluation.batch_tokens, config.data.cutoff_length)
    d, f = sides["gate_proj"]
    _, slots = _scored_adapter(config)
    if isinstance(method, MixLoraMethodConfig):
        slots = max(router.slots for router in routers_of(model, method).values())
    numbers = 6 * d + (4 + 2 * slots) * f
    if GENERATED & set(config.evaluation.protocols):
        numbers += 2 * sides["k_proj"][1] * shape.num_hidden_layers
    logits = 8 * SCORED * shape.vocab_size
    weights = base_bytes(model, width) + _dequantized(config, width)
    return round(weights + adapter_bytes(config) + tokens * numbers * width + logits)


def adapter_bytes(config: Config) -> int:
    """Bytes of `scoring_bytes` that are the adapter's: each of several that are scored together has
    its own."""
    return _scored_adapter(config)[0] * (6 if number_bytes(config) == 2 else 4)


def _scored_adapter(config: Config) -> tuple[int, int]:
    """Return numbers of the adapter, and slots per token if it is one that exists."""
    model, method = config.model, config.method
    if config.adapter is not None:
        return saved_sizes(adapter_folder(config.adapter), _shape(config).num_hidden_layers)
    if isinstance(method, TrainedMethodConfig):
        return count_parameters(model, method).trainable + fixed_parameters(model, method), 0
    return 0, 0


def loading_bytes(config: Config) -> int:
    """Peak memory of loading the base model, in bytes: random weights are quantised after all of
    them were drawn."""
    model, width = config.model, number_bytes(config)
    total = base_bytes(model, width)
    if model.draws_weights and model.quantization is not Quantization.none:
        total += base_bytes(replace(model, quantization=Quantization.none), width)
    return total


def peak_bytes(config: Config, *, processes: int = 1) -> int:
    """Return memory that a device needs for a run: that of loading, training or scoring."""
    training = sum(memory_of(config, processes=processes).values())
    return max(loading_bytes(config), training, scoring_bytes(config))
