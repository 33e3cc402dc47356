"""Tensor names of an adapter in the official format and in PEFT's, and their meaning.

PEFT with this project's tuner holds the experts of a projection in one tensor; the official format
has a tensor for each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixlora_exp.errors import UserError, shown

ROLE_OF = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
PROJECTIONS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(ROLE_OF, "mlp"),
}
"""Projections of Llama and Gemma, and the block that holds each."""

PREFIX = "base_model.model.model."
NUMBER = "(0|[1-9][0-9]{0,5})"
# Without leading zeros: two names would be one layer.
BLOCK = rf"layers\.{NUMBER}\.(self_attn|mlp)"
PLAIN = re.compile(rf"{BLOCK}\.(\w+)\.lora_(A\.weight|B\.weight|magnitude_vector)")
ROUTER = re.compile(rf"{BLOCK}(?:\.(\w+))?\.moe_gate\.weight")
EXPERT = re.compile(rf"{BLOCK}\.(\w+)\.experts\.{NUMBER}\.lora_(A\.weight|B\.weight|"
                    r"magnitude_vector)")  # fmt: skip
PARTS = {"A.weight": "A", "B.weight": "B", "magnitude_vector": "magnitude"}
SUFFIXES = {short: long for long, short in PARTS.items()}
DAMAGED = "the adapter is truncated or was changed: use another copy"


@dataclass(frozen=True, slots=True)
class Layout:
    """Places of experts and routers in a type of adapter.

    prefix: of all names. experts: projections with experts, if they are adapted; the others have a
    LoRA. linear: there is a router at each of these, else one at each feed-forward block.
    """

    prefix: str
    experts: tuple[str, ...] = ()
    linear: bool = False


LAYOUTS = {
    "LORA": Layout(PREFIX),
    "MIXLORA": Layout("mixlora.", tuple(ROLE_OF)),
    "MOLA": Layout("mola.", tuple(PROJECTIONS), linear=True),
    "LORAMOE": Layout("loramoe.", tuple(ROLE_OF), linear=True),
}
"""Layout of each type of adapter by `peft_type`."""


@dataclass(slots=True)
class Parts:
    """The tensors of an adapter by kind.

    `single[layer, projection, part]` and, stacked over the experts, `experts[layer, projection,
    part]`; part is `A` (r, in), `B` (out, r) or `magnitude` (out,). `routers[layer, projection]`
    (E, in), with an empty name for the feed-forward block's.
    """

    layout: Layout = LAYOUTS["LORA"]
    single: dict[tuple[int, str, str], Tensor] = field(default_factory=dict)
    experts: dict[tuple[int, str, str], Tensor] = field(default_factory=dict)
    routers: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def has_magnitudes(self, group: str) -> bool:
        """Return whether `group`, `single` or `experts`, has DoRA magnitudes."""
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
                f"0 to {experts - 1}: {DAMAGED}"
            )
        shapes = {tuple(tensor.shape) for tensor in tensors.values()}
        if len(shapes) != 1 or len({tensor.dtype for tensor in tensors.values()}) != 1:
            raise UserError(
                f"{where}: experts differ in shape or type, {sorted(shapes)[:3]}: {DAMAGED}"
            )
        stacked[layer, projection, part] = torch.stack([tensors[e] for e in range(experts)])
    return stacked


def from_official(tensors: Mapping[str, Tensor], layout: Layout, experts: int | None) -> Parts:
    """Sort tensors with the official names; `experts`: how many there must be, None for LoRA.

    Raises:
        UserError: a tensor has an unknown name, or an expert is missing.
    """
    parts, prefix = Parts(layout), layout.prefix
    found: dict[tuple[int, str, str], dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        rest = name.removeprefix(prefix) if name.startswith(prefix) else ""
        if match := EXPERT.fullmatch(rest):
            layer, block, projection, expert, part = match.groups()
            _known(name, projection, block)
            entry = found.setdefault((int(layer), projection, PARTS[part]), {})
            entry[int(expert)] = tensor
        elif match := PLAIN.fullmatch(rest):
            layer, block, projection, part = match.groups()
            parts.single[int(layer), _known(name, projection, block), PARTS[part]] = tensor
        elif (match := ROUTER.fullmatch(rest)) and (match[3] or match[2] == "mlp"):
            projection = _known(name, match[3], match[2]) if match[3] else ""
            parts.routers[int(match[1]), projection] = tensor
        else:
            raise UserError(f"tensor {shown(name, 200)} is unknown: it cannot be imported")
    if experts is not None:
        parts.experts = _stack(found, experts)
    elif found or parts.routers:
        raise UserError(
            "the adapter has experts or routers, but peft_type=LORA has none: correct peft_type in "
            "adapter_config.json"
        )
    return parts


def to_peft(parts: Parts) -> dict[str, Tensor]:
    """Return the tensors with the names that PEFT and this project's tuner give them."""
    named = {
        f"{PREFIX}layers.{layer}.{PROJECTIONS[p]}.{p}.lora_{SUFFIXES[part]}": tensor
        for (layer, p, part), tensor in parts.single.items()
    }
    for (layer, p, part), tensor in parts.experts.items():
        block = f"{PREFIX}layers.{layer}.{PROJECTIONS[p]}"
        own = f"{p}.lora_{part}" if parts.layout.linear else f"lora_{part}_{ROLE_OF[p]}"
        named[f"{block}.{own}"] = tensor
    for (layer, p), tensor in parts.routers.items():
        home = f"{PROJECTIONS[p]}.{p}" if p else "mlp"
        named[f"{PREFIX}layers.{layer}.{home}.lora_router"] = tensor
    return named


def check_shapes(parts: Parts, targets: list[str], rank: dict[str, int], experts: int) -> None:
    """Check that every layer has every projection with A (r, in), B (out, r) and, if any of its
    group has one, a magnitude (out,); experts' tensors have a leading dimension E. Every router
    is there and (E, in).

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    with_experts = [t for t in targets if t in parts.layout.experts]
    layers = {key[0] for key in (*parts.single, *parts.experts, *parts.routers)}
    if layers != set(range(len(layers))):
        raise UserError(
            f"the tensors are of layers {sorted(layers)[:8]}, not of 0 to {len(layers) - 1}: "
            f"{DAMAGED}"
        )
    sizes: dict[tuple[str, str], int] = {}
    for group, front, names in (
        (parts.experts, (experts,), with_experts),
        (parts.single, (), [t for t in targets if t not in with_experts]),
    ):
        kind = "experts" if front else "single"
        r = rank[kind]
        wanted = ("A", "B", "magnitude") if parts.has_magnitudes(kind) else ("A", "B")
        expected = {(layer, name, part) for layer in layers for name in names for part in wanted}
        if set(group) != expected:
            layer, name, part = sorted(set(group) ^ expected)[0]
            state = "missing" if (layer, name, part) in expected else "not among target_modules"
            raise UserError(f"lora_{part} of layer {layer}, {name} is {state}: {DAMAGED}")
        for (layer, name, part), tensor in group.items():
            shape = tuple(tensor.shape)
            size = shape[-1] if part == "A" else shape[len(front)] if len(shape) > len(front) else 0
            should = {"A": (*front, r, size), "B": (*front, size, r)}.get(part, (*front, size))
            side = (name, "in" if part == "A" else "out")
            if shape != should or sizes.setdefault(side, size) != size:
                raise UserError(
                    f"lora_{part} of layer {layer}, {name} is {shape}, which does not fit r={r}"
                    + (f", num_experts={experts}" if front else "")
                    + f" and the other layers: {DAMAGED}"
                )
    if not experts:
        return
    homes = with_experts if parts.layout.linear else [""]
    needed = {(layer, name) for layer in layers for name in homes}
    if missing := sorted(needed - set(parts.routers)):
        raise UserError(
            f"a router is missing: {len(missing)} of {len(needed)}, the first of layer "
            f"{missing[0][0]}{missing[0][1] and ', '}{missing[0][1]}: {DAMAGED}"
        )
    for (layer, name), router in parts.routers.items():
        where = f"the router of layer {layer}{name and ', '}{name}"
        if (layer, name) not in needed:
            raise UserError(f"{where} is not among those of target_modules: {DAMAGED}")
        known = [name] if name else ["gate_proj", "up_proj"]
        widths = [sizes[side] for p in known if (side := (p, "in")) in sizes]
        shape = (experts, *(widths or router.shape[-1:])[:1])
        if tuple(router.shape) != shape:
            raise UserError(f"{where} has shape {tuple(router.shape)}, not {shape}: {DAMAGED}")
