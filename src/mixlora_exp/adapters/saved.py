"""Checks an adapter's folder before use: PEFT's format, a supported type, and no settings that
reach anything outside the folder's two files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from mixlora_exp.adapters.files import BIN, CONFIG, SAFETENSORS, is_official, read_adapter_config
from mixlora_exp.adapters.own_types import OWN_TYPES
from mixlora_exp.adapters.tensor_shapes import load_shapes
from mixlora_exp.config.choices import PEFT_TYPES
from mixlora_exp.errors import UserError, shown

__all__ = ["saved_settings"]

KINDS = ("LORA", *OWN_TYPES, *(kind for kind in PEFT_TYPES if kind != "LORA"))
"""Supported PEFT types, which only add weights. Other types load tokenizers and further adapters
named in their configuration, or compile code."""
REACHING = (
    "megatron_config",
    "corda_config",
    "loftq_config",
    "lora_ga_config",
    "layer_replication",
)
"""Settings with which PEFT imports a module or opens a file by name, or rebuilds the base model."""
MEGATRON = (None, "megatron.core")
"""Accepted values of `megatron_core`, the name of a module, which every LoRA configuration has."""
PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern",
            "rank_pattern", "alpha_pattern", "target_parameters", "block_size_pattern",
            "lambda_pattern", "n_frequency_pattern")  # fmt: skip
"""Settings whose values or keys PEFT matches as regular expressions."""
UNSTORED = ("ADALORA", "LOKR")
"""PEFT types whose rank may be above every size of their tensors: AdaLoRA's first rank, which
training lowers, and LoKr's, where a whole matrix is smaller."""
COUNTS = ("block_size", "depth", "gralora_k", "hybrid_r", "mini_r", "n_frequency", "num_B",
          "oft_block_size", "stride_A")  # fmt: skip
"""Settings of PEFT's types that are sizes or numbers of what they allocate."""
LARGEST = 1e12
"""Maximum absolute value of a rank, scale or probability."""
STARS, LONGEST = 4, 1000
"""Maximum number of unbounded repetitions and of characters in a pattern."""
SINGLE = (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN)
REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)


def saved_settings(folder: Path) -> dict[str, Any]:
    """Return the configuration of an adapter in `folder`, written by PEFT or this project.

    Raises:
        UserError: a file is missing or damaged, the folder is in the official packages' format, the
            adapter's type is not supported, or a setting would make PEFT run or open something
            else.
    """
    config = read_adapter_config(folder, "adapter")
    if is_official(folder):
        raise UserError(
            f"adapter={folder} is in the format of the official packages: convert it first, "
            f"python scripts/convert_adapter.py {folder} OUT"
        )
    if not (folder / SAFETENSORS).is_file():
        old = (folder / BIN).is_file()
        hint = "load it with PEFT and save it again" if old else "give a folder that PEFT wrote"
        raise UserError(f"adapter={folder} has no {SAFETENSORS}: {hint}")
    _check_kind(folder, config.get("peft_type"))
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise UserError(
            f"adapter={folder}: base_model_name_or_path={base!r:.80} in {CONFIG} must be text or "
            "null: correct the entry"
        )
    for name in REACHING:
        if config.get(name):
            _refuse(folder, name, config[name], "is refused: it would run or open something else. "
                    "Save the adapter again as a plain one")  # fmt: skip
    if config.get("megatron_core") not in MEGATRON:
        _refuse(folder, "megatron_core", config["megatron_core"], "is refused: set it to null")
    _check_numbers(folder, config)
    _check_patterns(folder, config)
    _check_sizes(folder, config)
    return config


def _refuse(folder: Path, name: str, value: Any, rule: str) -> None:
    raise UserError(f"adapter={folder}: {name}={shown(repr(value), 80)} in {CONFIG} {rule}")


def _check_kind(folder: Path, kind: Any) -> None:
    if isinstance(kind, str) and kind in KINDS:
        return
    known = isinstance(kind, str) and kind in set(PEFT_TYPE_TO_CONFIG_MAPPING)
    why = "is not served here" if known else "is none that PEFT knows"
    raise UserError(
        f"adapter={folder}: peft_type={shown(repr(kind), 80)} in {CONFIG} {why}: give a folder "
        f"with {', '.join(KINDS[:-1])} or {KINDS[-1]}"
    )


def _check_numbers(folder: Path, config: Mapping[str, Any]) -> None:
    for name, value in config.items():
        for number in value.values() if isinstance(value, dict) else [value]:
            if isinstance(number, (int, float)) and not abs(number) < LARGEST:
                _refuse(folder, name, number, f"must be finite and at most {LARGEST:g}")


def _texts(value: Any) -> Iterator[Any]:
    """Yield the patterns in a setting: a text, the entries of a list, or the keys of an object."""
    if isinstance(value, (list, dict)):
        yield from value
    elif value is not None:
        yield value


def _check_patterns(folder: Path, config: Mapping[str, Any]) -> None:
    for name in PATTERNS:
        for text in _texts(config.get(name)):
            if not isinstance(text, str):
                _refuse(folder, name, text, "must be text")
            try:
                slow = len(text) > LONGEST or _stars(parser.parse(text)) > STARS
            except (re.error, RecursionError, OverflowError):
                _refuse(folder, name, text, "is not a regular expression")
            if slow:
                _refuse(folder, name, text, "could take forever to match: name the modules")


def _stars(pattern: Any) -> int:
    """Return the number of unbounded repetitions in a pattern. Repeated groups and back-references
    count as very many, since matching them can take exponential time."""
    found = 0
    for code, argument in pattern:
        if code in REPEATS:
            _, most, inner = argument
            if most > 1:
                found += 1 if len(inner) == 1 and inner[0][0] in SINGLE else STARS + 1
            found += _stars(inner)
        elif code in (codes.GROUPREF, codes.GROUPREF_EXISTS):
            found += STARS + 1
        elif code is codes.BRANCH:
            found += sum(map(_stars, argument[1]))
        elif code is codes.SUBPATTERN:
            found += _stars(argument[-1])
        elif code in (codes.ASSERT, codes.ASSERT_NOT):
            found += _stars(argument[1])
        elif code is codes.ATOMIC_GROUP:
            found += _stars(argument)
    return found


def _check_sizes(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse sizes that do not match the adapter's tensors: PEFT would allocate layers of any size
    before reading the file."""
    try:
        shapes = load_shapes(folder / SAFETENSORS).values()
    except UserError as error:
        raise UserError(f"adapter={folder}: {error}") from error
    largest = max((size for shape in shapes for size in shape), default=0)
    sizes = {name: config.get(name) for name in ("r", "init_r", "target_r")}
    ranks = config.get("rank_pattern") or {}
    if not isinstance(ranks, dict):
        _refuse(folder, "rank_pattern", ranks, "must be an object")
    sizes |= {f"rank_pattern.{shown(name, 80)}": rank for name, rank in ranks.items()}
    for name, size in sizes.items():
        # AdaLoRA stores a list (mask) per rank.
        if size is not None and not isinstance(size, list):
            # OFT has either a number of blocks or their size, and 0 for the other.
            least = 0 if config["peft_type"] == "OFT" else 1
            if type(size) is not int or size < least:
                _refuse(folder, name, size, f"must be an integer above {least - 1}")
            if config["peft_type"] not in UNSTORED and size > largest:
                _refuse(folder, name, size, f"is larger than in any tensor of {SAFETENSORS}")
    elements = sum(math.prod(shape) for shape in shapes)
    for name in COUNTS:
        own = config.get(f"{name}_pattern") or {}
        if not isinstance(own, dict):
            _refuse(folder, f"{name}_pattern", own, "must be an object")
        for size in (config.get(name), *own.values()):
            if size is not None and not (type(size) is int and 0 <= size <= elements):
                _refuse(folder, name, size, f"does not fit the tensors in {SAFETENSORS}")
    experts, limit = config.get("num_experts"), len(shapes)
    if config["peft_type"] in OWN_TYPES:
        # All experts of a layer are one tensor.
        limit = max((shape[0] for shape in shapes if len(shape) == 3), default=0)
        experts = _most_experts(folder, config)
    if experts is not None and (type(experts) is not int or not 1 <= experts <= limit):
        _refuse(folder, "num_experts", experts, f"does not match the tensors in {SAFETENSORS}")


def _most_experts(folder: Path, config: Mapping[str, Any]) -> int | None:
    """Return the largest number of experts in a layer with an adapter. Refuse a value that is
    neither a positive integer nor a list of them, one per layer."""
    for name in ("num_experts", "top_k"):
        value = config.get(name, 1)
        listed = value if isinstance(value, list) else [value]
        if not listed or not all(type(one) is int and one >= 1 for one in listed):
            _refuse(folder, name, value, "must be an integer above 0, or a list of them")
    experts, layers = config.get("num_experts"), config.get("layers_to_transform")
    if not isinstance(experts, list):
        return experts
    chosen = layers if isinstance(layers, list) else [layers]
    everywhere = layers is None or not chosen
    return max((e for layer, e in enumerate(experts) if everywhere or layer in chosen), default=1)
