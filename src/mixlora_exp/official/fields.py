"""Reads fields of an official `adapter_config.json`, checked for type and range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.activations import ACT2FN

from mixlora_exp.errors import UserError

KINDS = {
    int: "an integer",
    str: "a text",
    bool: "true or false",
    dict: "an object",
    (int, float): "a number",
    (str, type(None)): "a text or null",
    (list, dict): "a list or an object",
}
MOST = 2**16
"""Maximum rank and number of experts; larger values are mistakes."""


def wrong(name: str, found: Any, should: str) -> UserError:
    """Return the error for a field with an invalid value."""
    return UserError(
        f"adapter_config.json: {name}={found!r:.200} must be {should}: correct the entry, or use "
        "another copy"
    )


def value(config: Mapping[str, Any], name: str, kind: Any, default: Any = ...) -> Any:
    """Return a field of a configuration, with type `kind` (a key of `KINDS`).

    Raises:
        UserError: it has another type, or is missing and has no default.
    """
    found = config.get(name, default)
    if found is ...:
        raise UserError(
            f"adapter_config.json has no {name}, which the official format needs: add the entry"
        )
    if (isinstance(found, bool) and kind is not bool) or not isinstance(found, kind):
        raise wrong(name, found, KINDS[kind])
    return found


def finite(config: Mapping[str, Any], name: str, default: Any = ..., least: float = -1e30) -> float:
    """Return a finite number, at least `least`.

    Raises:
        UserError: it is not valid.
    """
    found = value(config, name, (int, float), default)
    if not abs(found) < 1e30:
        raise UserError(
            f"adapter_config.json: {name} is out of range: correct the entry, or use another copy"
        )
    if found < least:
        raise wrong(name, found, f">= {least:g}")
    return found


def count(config: Mapping[str, Any], name: str, default: Any = ...) -> int:
    """Return an integer of at least 1.

    Raises:
        UserError: it is not valid.
    """
    found = value(config, name, int, default)
    if not 1 <= found <= MOST:
        raise wrong(name, found, f"from 1 to {MOST}")
    return found


def lora_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return r, lora_alpha, lora_dropout, use_dora and use_rslora of one block of a configuration.

    Raises:
        UserError: one of them has the wrong type or is out of range.
    """
    settings = {
        "r": count(config, "r"),
        "lora_alpha": finite(config, "lora_alpha"),
        "lora_dropout": float(finite(config, "lora_dropout")),
        "use_dora": value(config, "use_dora", bool, False),
        "use_rslora": value(config, "use_rslora", bool, False),
    }
    if not settings["lora_alpha"] > 0:
        raise wrong("lora_alpha", settings["lora_alpha"], "above 0")
    if not 0 <= settings["lora_dropout"] < 1:
        raise wrong("lora_dropout", settings["lora_dropout"], "in [0, 1)")
    if config.get("bias", "none") != "none":
        raise wrong("bias", config["bias"], "'none': trained biases are not supported")
    return settings


def name_list(given: Any) -> list[str]:
    """Return `target_modules` as a list of names.

    Raises:
        UserError: it is anything else.
    """
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise UserError(
            f"adapter_config.json: target_modules={given!r:.200} is not a list of names: correct "
            "the entry, or use another copy"
        )
    return given


def check_activation(name: str | None) -> None:
    """Refuse an activation that transformers does not have.

    Raises:
        UserError: there is none of this name.
    """
    if name is not None and name not in ACT2FN:
        raise UserError(
            f"act_fn={name!r} is unknown: name one that transformers has, act_fn=silu for Llama or "
            "act_fn=gelu_pytorch_tanh for Gemma"
        )
