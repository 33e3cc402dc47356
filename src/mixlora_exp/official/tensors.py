"""Tensor names of an adapter in the official format and in PEFT's, and their meaning.

`{i}` is a layer, `{p}` a projection, `{e}` an expert. PEFT with this project's tuner holds the
experts of a projection in one tensor; the official format has a tensor for each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixlora_exp.errors import UserError, shown

ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
PROJECTIONS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(ROLES, "mlp"),
}
"""Projections of Llama and Gemma, and the block that holds each."""

PREFIX = "base_model.model.model."
NUMBER = "(0|[1-9][0-9]{0,5})"
# Without leading zeros: two names would be one layer.
PLAIN = re.compile(rf"layers\.{NUMBER}\.(self_attn|mlp)\.(\w+)\.lora_(A\.weight|B\.weight|"
                   r"magnitude_vector)")  # fmt: skip
ROUTER = re.compile(rf"layers\.{NUMBER}\.mlp\.moe_gate\.weight")
EXPERT = re.compile(rf"layers\.{NUMBER}\.mlp\.(\w+)\.experts\.{NUMBER}\.lora_(A\.weight|"
                    r"B\.weight|magnitude_vector)")  # fmt: skip
PARTS = {"A.weight": "A", "B.weight": "B", "magnitude_vector": "magnitude"}
SUFFIXES = {short: long for long, short in PARTS.items()}


@dataclass(slots=True)
class Parts:
    """The tensors of an adapter by kind.

    `single[layer, projection, part]` and, stacked over the experts, `experts[layer, projection,
    part]`; part is `A` (r, in), `B` (out, r) or `magnitude` (out,). `routers[layer]` (E, hidden).
    """

    single: dict[tuple[int, str, str], Tensor] = field(default_factory=dict)
    experts: dict[tuple[int, str, str], Tensor] = field(default_factory=dict)
    routers: dict[int, Tensor] = field(default_factory=dict)

    def has_magnitudes(self, group: str) -> bool:
        """Whether `group`, `single` or `experts`, has DoRA magnitudes."""
        return any(key[2] == "magnitude" for key in getattr(self, group))


def _known(name: str, projection: str, block: str) -> str:
    if PROJECTIONS.get(projection) != block:
        raise UserError(
            f"tensor {shown(name, 200)}: {projection} is not a projection of Llama or Gemma, which "
            "are the models that this project adapts"
        )
    return projection


def _stack(found: dict[tuple[int, str, str], dict[int, Tensor]], experts: int) -> dict:
    stacked = {}
    for (layer, projection, part), tensors in found.items():
        where = f"layer {layer}, {projection}, lora_{part}"
        if sorted(tensors) != list(range(experts)):
            raise UserError(
                f"{where}: there are experts {sorted(tensors)[:8]}, num_experts={experts} asks for "
                f"0 to {experts - 1}: the adapter is truncated or was changed"
            )
        shapes = {tuple(tensor.shape) for tensor in tensors.values()}
        if len(shapes) != 1 or len({tensor.dtype for tensor in tensors.values()}) != 1:
            raise UserError(f"{where}: experts differ in shape or type, {sorted(shapes)[:3]}")
        stacked[layer, projection, part] = torch.stack([tensors[e] for e in range(experts)])
    return stacked


def from_official(tensors: Mapping[str, Tensor], experts: int | None) -> Parts:
    """Sort tensors with the official names; `experts`: how many there must be, None for LoRA.

    Raises:
        UserError: a tensor has an unknown name, or an expert is missing.
    """
    parts = Parts()
    prefix = PREFIX if experts is None else "mixlora."
    found: dict[tuple[int, str, str], dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        rest = name.removeprefix(prefix) if name.startswith(prefix) else ""
        if match := EXPERT.fullmatch(rest):
            layer, projection, expert, part = match.groups()
            _known(name, projection, "mlp")
            entry = found.setdefault((int(layer), projection, PARTS[part]), {})
            entry[int(expert)] = tensor
        elif match := PLAIN.fullmatch(rest):
            layer, block, projection, part = match.groups()
            parts.single[int(layer), _known(name, projection, block), PARTS[part]] = tensor
        elif match := ROUTER.fullmatch(rest):
            parts.routers[int(match[1])] = tensor
        else:
            raise UserError(f"tensor {shown(name, 200)} is unknown: it cannot be imported")
    if experts is not None:
        parts.experts = _stack(found, experts)
    elif found or parts.routers:
        raise UserError("the adapter has experts or routers, but peft_type=LORA has none")
    return parts


def to_peft(parts: Parts) -> dict[str, Tensor]:
    """The tensors with the names that PEFT and this project's tuner give them."""
    named = {
        f"{PREFIX}layers.{layer}.{PROJECTIONS[p]}.{p}.lora_{SUFFIXES[part]}": tensor
        for (layer, p, part), tensor in parts.single.items()
    }
    for (layer, p, part), tensor in parts.experts.items():
        named[f"{PREFIX}layers.{layer}.mlp.lora_{part}_{ROLES[p]}"] = tensor
    for layer, tensor in parts.routers.items():
        named[f"{PREFIX}layers.{layer}.mlp.lora_router"] = tensor
    return named


def check_shapes(parts: Parts, targets: list[str], rank: dict[str, int], experts: int) -> None:
    """Check that every layer has every projection with A (r, in), B (out, r) and, if any of its
    group has one, a magnitude (out,); experts' tensors have a leading dimension E.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    layers = {key[0] for key in (*parts.single, *parts.experts)} | set(parts.routers)
    if layers != set(range(len(layers))):
        raise UserError(
            f"the tensors are of layers {sorted(layers)[:8]}, not of 0 to {len(layers) - 1}: the "
            "adapter is truncated or was changed"
        )
    sizes: dict[tuple[str, str], int] = {}
    for group, front, names in (
        (parts.experts, (experts,), [t for t in targets if t in ROLES and experts]),
        (parts.single, (), [t for t in targets if t not in ROLES or not experts]),
    ):
        kind = "experts" if front else "single"
        r = rank[kind]
        wanted = ("A", "B", "magnitude") if parts.has_magnitudes(kind) else ("A", "B")
        expected = {(layer, name, part) for layer in layers for name in names for part in wanted}
        if set(group) != expected:
            layer, name, part = sorted(set(group) ^ expected)[0]
            state = "missing" if (layer, name, part) in expected else "not among target_modules"
            raise UserError(f"lora_{part} of layer {layer}, {name} is {state}")
        for (layer, name, part), tensor in group.items():
            shape = tuple(tensor.shape)
            size = shape[-1] if part == "A" else shape[len(front)] if len(shape) > len(front) else 0
            should = {"A": (*front, r, size), "B": (*front, size, r)}.get(part, (*front, size))
            side = (name, "in" if part == "A" else "out")
            if shape != should or sizes.setdefault(side, size) != size:
                raise UserError(
                    f"lora_{part} of layer {layer}, {name} is {shape}, which does not fit r={r}"
                    + (f", num_experts={experts}" if front else "")
                    + " and the other layers"
                )
    for layer, router in parts.routers.items():
        hidden = sizes.get(("gate_proj", "in"), sizes.get(("up_proj", "in"), router.shape[-1]))
        if tuple(router.shape) != (experts, hidden):
            raise UserError(
                f"the router of layer {layer} has shape {tuple(router.shape)}, "
                f"not {(experts, hidden)}"
            )
    if experts and set(parts.routers) != layers:
        raise UserError(f"a router is missing: {len(parts.routers)} for {len(layers)} layers")
