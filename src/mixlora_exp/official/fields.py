"""Entries of an official `adapter_config.json`: of the right kind and within range, or refused by
name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.activations import ACT2FN

from mixlora_exp.errors import UserError

KINDS = {
    int: "a whole number",
    str: "a text",
    bool: "true or false",
    dict: "an object",
    (int, float): "a number",
    (str, type(None)): "a text or null",
    (list, dict): "a list or an object",
}
MOST = 2**16
"""Larger ranks and numbers of experts are mistakes: a router over so many has no use."""


def wrong(name: str, found: Any, should: str) -> UserError:
    """The message for an entry that cannot be what it says."""
    return UserError(
        f"adapter_config.json: {name}={found!r:.200} must be {should}: mend the entry, or take "
        "another copy"
    )


def value(config: Mapping[str, Any], name: str, kind: Any, default: Any = ...) -> Any:
    """An entry of a configuration, of the right kind (a key of `KINDS`).

    Raises:
        UserError: it is of another kind, or missing and has no default.
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
    """A number that float can hold, and not below `least`.

    Raises:
        UserError: it is another.
    """
    found = value(config, name, (int, float), default)
    if not abs(found) < 1e30:
        raise UserError(
            f"adapter_config.json: {name} is out of range: mend the entry, or take another copy"
        )
    if found < least:
        raise wrong(name, found, f">= {least:g}")
    return found


def count(config: Mapping[str, Any], name: str, default: Any = ...) -> int:
    """A whole number of at least 1.

    Raises:
        UserError: it is another.
    """
    found = value(config, name, int, default)
    if not 1 <= found <= MOST:
        raise wrong(name, found, f"from 1 to {MOST}")
    return found


def lora_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """r, lora_alpha, lora_dropout, use_dora and use_rslora of one block of a configuration.

    Raises:
        UserError: one of them is of the wrong kind or out of range.
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
    """`target_modules` as a list of names.

    Raises:
        UserError: it is anything else.
    """
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise UserError(
            f"adapter_config.json: target_modules={given!r:.200} is not a list of names: mend the "
            "entry, or take another copy"
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
