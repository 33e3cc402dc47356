"""Copies an adapter's tensors, exactly those its configuration requires, into a model with its
layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import (
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from mixlora_exp.errors import UserError, shown
from mixlora_exp.models.base_identity import read_base

__all__ = ["fill", "read_weights"]

PREFIX = "base_model.model."
LAYER = re.compile(r"\.layers\.(\d+)\.")
COPY_IT = "train it again, or take another copy"


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter in PEFT's format, on the CPU.

    Raises:
        UserError: the file is truncated or damaged.
    """
    try:
        return load_peft_weights(str(folder), device="cpu")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"adapter={folder} cannot be read, it is truncated or damaged ({error}); {COPY_IT}"
        ) from error


def fill(model: PeftModel, name: str, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Put `weights`, as PEFT saves them, into the adapter `name` of `model`.

    Weights of the base model are not part of an adapter unless its configuration trains them
    (`modules_to_save`, `bias`): they would change all adapters on the same base model. PEFT also
    saves the base weights of an adapted embedding, which are ignored if they equal the base's own.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape; the base is unchanged.
    """
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(model.peft_config[name].peft_type)
    called = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    owned = {key for key in weights if prefix and prefix in key}
    others = weights.keys() - owned - called.keys()
    _check_base_weights(model, {key: weights[key] for key in others}, folder)
    lacking = [key for key in called if not (prefix and prefix in key) and key not in weights]
    if lacking:
        raise UserError(_lacks(folder, lacking))
    _check_shapes(called, weights, folder)
    kept = {key: tensor for key, tensor in weights.items() if key not in others}
    try:
        result = set_peft_model_state_dict(model, kept, adapter_name=name)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(
            f"adapter={folder} does not fit this base model: {reason}; {_name_it(folder)}"
        ) from error
    _check_places(model, name, result.missing_keys, result.unexpected_keys, prefix, folder)


def _name_it(folder: Path) -> str:
    """Return the way out where an adapter is another model's: its name, where it is noted."""
    base = read_base(folder)
    known = base is not None and base.source != "path"
    way = f"model={shown(base.model, 120)}" if known else "model=NAME or model.path=DIR"
    return f"name the model it was trained on, {way}"


def _base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the base model's parameters and buffers, by their names in a model without
    adapters."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return {key.removeprefix(PREFIX).replace(".base_layer", ""): tensor for key, tensor in named}


def _check_base_weights(model: PeftModel, others: Mapping[str, Tensor], folder: Path) -> None:
    base = _base_weights(model) if others else {}
    for key in sorted(others):
        own = base.get(key.removeprefix(PREFIX).replace(".base_layer", ""))
        if own is None:
            raise UserError(
                f"adapter={folder}: {shown(key, 200)} is neither a tensor of this adapter's "
                f"configuration nor of this base model; {COPY_IT}, or {_name_it(folder)}"
            )
        if not _same(own.detach(), others[key]):
            raise UserError(
                f"adapter={folder} contains weights of another base model, such as "
                f"{shown(key, 200)}, which its configuration does not train (modules_to_save): put "
                "them into a model's folder and give it as model.path=DIR"
            )


def _same(own: Tensor, stored: Tensor) -> bool:
    """Return whether two tensors are equal in the lower precision of the two."""
    if own.shape != stored.shape:
        return False
    dtype = min((own.dtype, stored.dtype), key=lambda found: found.itemsize)
    return torch.equal(own.to(dtype), stored.to(own.device, dtype))


def _lacks(folder: Path, lacking: list[str]) -> str:
    return (
        f"adapter={folder} lacks {len(lacking)} tensors that its configuration calls for, "
        f"{shown(lacking[0], 200)} for one; {COPY_IT}"
    )


def _of_the_model(key: str, shape: torch.Size) -> int | None:
    """Return the size of a LoRA tensor in the dimension that the base model determines, not the
    rank."""
    if "lora_B" in key:
        return shape[-2] if len(shape) > 1 else None
    return shape[-1] if len(shape) else None


def _check_shapes(
    called: Mapping[str, Tensor], weights: Mapping[str, Tensor], folder: Path
) -> None:
    for key in sorted(called.keys() & weights.keys()):
        needed, found = called[key].shape, weights[key].shape
        if needed == found:
            continue
        message = f"{shown(key, 200)} has the shape {list(found)}, and {list(needed)} is needed"
        if _of_the_model(key, needed) == _of_the_model(key, found):
            raise UserError(
                f"adapter={folder} does not fit its own configuration (rank or experts): "
                f"{message}; {COPY_IT}"
            )
        raise UserError(
            f"adapter={folder} does not fit this base model: {message}; {_name_it(folder)}"
        )


def _layers(keys: Iterable[str]) -> set[str]:
    return {found[1] for key in keys if (found := LAYER.search(key))}


def _check_places(
    model: PeftModel,
    name: str,
    missing: list[str],
    unexpected: list[str],
    prefix: str | None,
    folder: Path,
) -> None:
    """Distinguish an incomplete file from one of another model, which lacks whole layers or has
    tensors for modules that do not exist."""
    own = [key for key in missing if prefix and prefix in key and name in key.split(".")]
    every = [key for key, _ in model.named_parameters() if prefix and name in key.split(".")]
    filled = _layers(set(every) - set(own))
    if unexpected:
        modules = {key.replace(".base_layer", "") for key, _ in model.named_modules()}
        placed = [key for key in unexpected if key.split(f".{prefix}")[0] in modules]
        if len(placed) == len(unexpected):
            raise UserError(
                f"adapter={folder} does not fit its own configuration: it has "
                f"{len(unexpected)} unexpected tensors, such as {shown(unexpected[0], 200)}; "
                f"{COPY_IT}"
            )
    elif own and _layers(own) <= filled:
        # As the file would name them.
        raise UserError(_lacks(folder, [key.replace(f".{name}", "") for key in own]))
    if own or unexpected:
        odd = (own or unexpected)[0]
        raise UserError(
            f"adapter={folder} does not fit this base model: {len(own)} tensors are missing and "
            f"{len(unexpected)} are unexpected, such as {shown(odd, 200)}; {_name_it(folder)}"
        )
