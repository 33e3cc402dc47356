"""Bytes that a decoder layer keeps for the backward pass, from shapes.

Counted from the tensors that the code saves: a test compares them with autograd's, for each kernel
and method, another the sums with peaks that were measured on GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import mean

from mixlora_exp.config.schema import (
    ATTENTION_TARGETS,
    FEED_FORWARD_TARGETS,
    Config,
    LoraMethodConfig,
    MixLoraMethodConfig,
    ModelConfig,
    PeftMethodConfig,
)
from mixlora_exp.config.schema_mixture import LinearMixtureMethodConfig
from mixlora_exp.kernels import KERNELS
from mixlora_exp.kernels.dropout import INDEX_BYTES
from mixlora_exp.kernels.registry import FASTEST, BlockSizes
from mixlora_exp.models.adapted_modules import adapted_projections
from mixlora_exp.models.mixtures import kept_by_mixture
from mixlora_exp.models.parameters import routers_of, skeleton_of, widths

SHARED_INPUTS = (ATTENTION_TARGETS[:3], FEED_FORWARD_TARGETS[:2], FEED_FORWARD_TARGETS[2:])
"""Projections with one input. That of o_proj is kept by the attention anyway."""
ROUTING = 36
"""Bytes of a router's decision per slot."""
MATRICES = ("LOHA", "LOKR", "HIRA")
"""PEFT's types that keep a matrix of the weight's shape per projection, and no output of it."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that a layer keeps: per token in its attention with the norms, per token in its
    feed-forward block, and, whatever the number of tokens, copies of weights."""

    attention: float
    block: float
    weights: float = 0.0

    @property
    def per_token(self) -> float:
        """Bytes per token in attention and feed-forward block together."""
        return self.attention + self.block


@dataclass(frozen=True, slots=True)
class _Layer:
    """Settings that determine the bytes: widths of the projections, bytes per number, the form of
    LoRA layers (`Kernel.linear`), under autocast or not."""

    inputs: dict[str, int]
    outputs: dict[str, int]
    width: int
    dropout: float
    form: str
    autocast: bool

    def linears(self, targets: list[str], ranks: Mapping[str, float], *, dora: bool) -> Kept:
        """LoRA or DoRA on projections outside of a mixture; `attention` holds all of it. ranks: by
        projection, the mean over the layers."""
        inputs = sum(self.inputs[target] for target in targets)
        outputs = sum(self.outputs[target] for target in targets)
        low = sum(ranks[target] for target in targets)
        if self.form != "peft":
            dropped = self.dropout * INDEX_BYTES * inputs
            shared = sum(
                self.inputs[group[0]] for group in SHARED_INPUTS if set(group) & set(targets)
            )
            if self.form == "plain" and self.dropout:
                shared, dropped = inputs, inputs
            numbers = shared + low + (outputs if dora else 0)
            return Kept(self.width * numbers + dropped, 0.0)
        # PEFT casts each projection's input to the adapter's float32, which dropout then copies;
        # autocast makes bf16 of that again.
        own = 2 if self.width == 2 and self.autocast else 4
        copied = self.width == 2 or self.dropout
        found = own * (inputs if copied else 0) + own * low + (inputs if self.dropout else 0)
        if not copied:
            found += own * sum(
                self.inputs[group[0]] for group in SHARED_INPUTS if set(group) & set(targets)
            )
        weights = 0.0
        if dora:
            # Its scale multiplies the frozen product and the low-rank one. With dropout it makes
            # the first anew, from a copy of the weight in the type of the products.
            frozen = own if self.dropout or self.width == 4 else self.width
            found += (frozen + own) * outputs
            if self.dropout and self.width == 2:
                weights = own * sum(self.inputs[t] * self.outputs[t] for t in targets)
        return Kept(found, 0.0, weights)


def kept_by_layer(
    config: Config,
    width: int,
    *,
    packed: bool = False,
    beside_plain: bool = False,
    autocast: bool = True,
) -> Kept:
    """Return what a layer with adapters keeps, on average over these, with `width` bytes per
    number (4: float32, 2: bf16).

    packed: as one of several adapters in a pass; `data.packing` keeps as much. beside_plain: some
    of these have no experts. autocast: whether it
    runs under autocast in bf16, as in training. What PEFT's other types keep is not counted as
    exactly as the rest.
    """
    # The fastest of a GPU for `auto`: plans are often for another machine.
    name = config.kernel.name.value
    kernel = KERNELS[FASTEST["cuda"] if name == "auto" else name]
    method = config.method
    packed = packed or config.data.packing
    if isinstance(method, PeftMethodConfig):
        return _of_peft_type(config.model, method, width, packed)
    assert isinstance(method, LoraMethodConfig)
    kept = _of_lora(config.model, method, width, kernel.linear, packed, autocast)
    if not isinstance(method, MixLoraMethodConfig):
        return kept
    d, f = widths(config.model)["gate_proj"]
    routers = routers_of(config.model, method).values()
    sizes = [
        BlockSizes(
            d=d, f=f, rank=method.rank_of_experts, slots=router.slots, width=width,
            dropout=method.dropout, dora=method.dora,
        )
        for router in routers
    ]  # fmt: skip
    # x in float32: a router that learns keeps it, and in float32 it is that of the experts.
    learns = any(router.trained and router.chooses for router in routers)
    block = 4.0 * d if learns or width == 4 else 0.0
    block += mean(ROUTING * own.slots + kernel.saved(own) for own in sizes)
    # Beside its slots a row without experts keeps gate, its activation, up and twice the output.
    block += width * mean(r.base_share * (2 * d + (0 if r.skips else 3 * f)) for r in routers)
    # Frozen products of gate and up: an adapter without experts keeps those of all rows.
    return replace(kept, block=block + (2 * f * width if beside_plain else 0))


def _of_lora(
    model: ModelConfig,
    method: LoraMethodConfig,
    width: int,
    form: str,
    packed: bool = False,
    autocast: bool = True,
) -> Kept:
    """Return what a layer keeps; of MixLoRA's blocks nothing."""
    sides = widths(model)
    layer = _Layer(
        inputs={t: w[0] for t, w in sides.items()},
        outputs={t: w[1] for t, w in sides.items()},
        width=width,
        dropout=method.dropout,
        form=form,
        autocast=autocast,
    )
    d, f = sides["gate_proj"]
    bare = _of_frozen(model, width, packed)
    attention = bare.attention
    if isinstance(method, LinearMixtureMethodConfig):
        # After dropout only trained routers keep the inputs of gate, up and the attention, and of
        # down; in bf16 it is copies in float32.
        routers = routers_of(model, method).values()
        trained = any(router.trained and router.chooses for router in routers)
        inputs = not method.dropout or (trained and width == 4)
        experts = kept_by_mixture(model, method, width)
        return Kept(attention + experts + inputs * 2 * d * width, (3 + inputs) * f * width)
    ranks = _mean_ranks(model, method)
    inside = [t for t in method.targets if t in FEED_FORWARD_TARGETS]
    if isinstance(method, MixLoraMethodConfig):
        outside = [t for t in method.targets if t not in inside]
        own = layer.linears(outside, ranks, dora=method.dora)
        return Kept(attention + own.attention, 0.0, own.weights)
    own = layer.linears(method.targets, ranks, dora=method.dora)
    block = layer.linears(inside, ranks, dora=method.dora).attention if inside else 0
    return Kept(attention + own.attention - block, bare.block + block, own.weights)


def kept_without_adapter(config: Config, width: int, *, packed: bool = False) -> Kept:
    """Return what a layer without adapters keeps above one that has some; for the arguments see
    `kept_by_layer`."""
    return _of_frozen(config.model, width, packed or config.data.packing)


def _of_frozen(model: ModelConfig, width: int, packed: bool) -> Kept:
    sides = widths(model)
    f = sides["gate_proj"][1]
    heads = skeleton_of(model).config.num_attention_heads
    # Queries, keys, values and the attention's output, which several adapters in one pass, and
    # packed examples, keep twice; a number per head in float32.
    numbers = (3 if packed else 2) * sides["q_proj"][1] + 2 * sides["k_proj"][1]
    attention = width * numbers + 4 * heads + _of_norms(model)
    # The gate, its activation and the up projection.
    return Kept(attention, 3 * f * width)


def _of_norms(model: ModelConfig) -> int:
    """Return what a layer's norms keep per token: their inputs in float32, and a number for each
    row, of which a norm of queries or keys has one per head if it is as wide as a head."""
    layers = skeleton_of(model).named_modules()
    layer = next(module for name, module in layers if name.endswith("layers.0"))
    found = 0
    for name, module in layer.named_modules():
        if type(module).__name__.endswith("Norm"):
            size = module.weight.numel()
            side = {"q_norm": "q_proj", "k_norm": "k_proj"}.get(name.rpartition(".")[2])
            numbers = widths(model)[side][1] if side else size
            found += 4 * numbers + 4 * numbers // size
    return found


def _mean_ranks(model: ModelConfig, method: LoraMethodConfig) -> dict[str, float]:
    """Return the rank of a LoRA on each projection, on average over the layers with adapters."""
    found: dict[str, list[int]] = {}
    for place in adapted_projections(skeleton_of(model), method):
        found.setdefault(place.name, []).append(place.rank)
    return {name: mean(ranks) for name, ranks in found.items()}


def _of_peft_type(model: ModelConfig, method: PeftMethodConfig, width: int, packed: bool) -> Kept:
    """Return what stands for an adapter of PEFT's other types: LoRA of rank 1 and either the output
    of each target or a matrix of its weight's shape; VeRA's projections, cut for each target."""
    sides = widths(model)
    matrices = method.peft_type in MATRICES
    alike = LoraMethodConfig(name="lora", rank=1, alpha=1.0, targets=method.targets, dropout=0.0)
    found = _of_lora(model, alike, width, "peft", packed)
    outputs = 0 if matrices else width * sum(sides[target][1] for target in method.targets)
    weights = 0.0
    if matrices:
        weights = width * sum(sides[t][0] * sides[t][1] for t in method.targets)
    elif method.peft_type == "VERA":
        weights = width * method.peft.get("r", 256) * sum(sum(sides[t]) for t in method.targets)
    return Kept(found.attention + outputs, found.block, weights)
