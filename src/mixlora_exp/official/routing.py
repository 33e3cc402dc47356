"""Translates router settings of the official packages' files into this project's.

Their load-balance losses count every chosen expert and pool the tokens of all routers; those of the
dynamic and the switch routing count padding as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mixlora_exp.errors import UserError, shown
from mixlora_exp.official.fields import count, finite, value, wrong

OF_ANY = {"routing_strategy", "num_experts", "router_init_range"}
LOSS = {"router_loss", "router_aux_loss_coef"}
OF_MIXLORA = {*OF_ANY, *LOSS, "act_fn", "expert_lora", "jitter_noise"}
FIELDS = {
    "mixlora": {*OF_MIXLORA, "top_k"},
    "mixlora-dynamic": {*OF_MIXLORA, "top_p", "temperature"},
    "mixlora-switch": {
        *(*OF_MIXLORA, "expert_capacity", "sparse_step", "router_z_loss_coef", "ffn_dropout"),
    },
    "mola": {*OF_ANY, *LOSS, "top_k"},
    "loramoe": OF_ANY,
}
"""Fields that each `routing_strategy` has beside LoRA's."""
KINDS = {"MIXLORA": ("mixlora", "mixlora-dynamic", "mixlora-switch"), "MOLA": ("mola",),
         "LORAMOE": ("loramoe",)}  # fmt: skip
"""Strategies that a `peft_type` has."""


def strategy_of(config: Mapping[str, Any], kind: str) -> str:
    """Return the `routing_strategy` of an adapter of type `kind`.

    Raises:
        UserError: it is missing, or none of this type.
    """
    known = KINDS[kind]
    found = value(config, "routing_strategy", str, *known[:1] if len(known) == 1 else ())
    if found not in known:
        raise UserError(
            f"routing_strategy={shown(found, 80)} is not supported: peft_type={kind} has "
            f"{', '.join(known)}"
        )
    return found


def router_settings(
    config: Mapping[str, Any], strategy: str, experts: int, notes: list[str]
) -> dict[str, Any]:
    """Return fields of `MixLoraConfig` or `MixtureConfig`, and what the user is to know as `notes`.

    Raises:
        UserError: a field has an invalid value, or one that computes something else there.
    """
    return {"num_experts": experts, **STRATEGIES[strategy](config, experts, notes)}


def _loss(config: Mapping[str, Any], on: bool, init: float) -> dict[str, Any]:
    """Return settings of the loss and of initial weights. on, init: what is read where the file has
    none."""
    coefficient = finite(config, "router_aux_loss_coef", 1e-3, least=0)
    return {
        "router_loss_coef": coefficient if value(config, "router_loss", bool, on) else 0.0,
        "router_loss": "topk",
        "router_loss_pooling": "all",
        "router_init_std": finite(config, "router_init_range", init, least=0),
    }


def _check_noise(config: Mapping[str, Any]) -> None:
    jitter = finite(config, "jitter_noise", 0.0)
    if jitter:
        raise UserError(
            f"jitter_noise={jitter} is not supported: there it changes what the experts see too, "
            "here a router's noise is its own; without it all but further training is the same: "
            "set it to 0"
        )


def _mixlora(config: Mapping[str, Any], experts: int, notes: list[str]) -> dict[str, Any]:
    _check_noise(config)
    return {**_loss(config, True, 0.02), "top_k": value(config, "top_k", int, 2)}


def _dynamic(config: Mapping[str, Any], experts: int, notes: list[str]) -> dict[str, Any]:
    _check_noise(config)
    p = finite(config, "top_p", 0.8)
    if not 0 < p <= 1:
        raise wrong("top_p", p, "in (0, 1]")
    options = {
        "p": p,
        "normalise": False,
        "exceed": True,
        "divisor": finite(config, "temperature", 0.0, least=0),
        "padding_in_loss": True,
    }
    notes.append("top_p: as there, the weights of a token are not divided by their sum")
    if options["divisor"]:
        notes.append("temperature: as there, it divides probabilities and weights, not logits")
    return {**_loss(config, True, 0.02), **_chosen_by("top_p", options, experts)}


def _switch(config: Mapping[str, Any], experts: int, notes: list[str]) -> dict[str, Any]:
    loss = _loss(config, True, 1.0)
    z = finite(config, "router_z_loss_coef", 1e-3, least=0)
    if not value(config, "router_loss", bool, True):
        z = 0.0
    elif z and not loss["router_loss_coef"]:
        raise wrong("router_aux_loss_coef", 0, "above 0 where router_z_loss_coef is")
    if finite(config, "ffn_dropout", 0.0):
        raise wrong("ffn_dropout", config["ffn_dropout"], "0: no block here has one")
    if config.get("sparse_step") is not None:
        # In the file it has no effect either: each layer has its router and experts.
        count(config, "sparse_step")
    jitter = finite(config, "jitter_noise", 0.0, least=0)
    if jitter >= 1:
        raise wrong("jitter_noise", jitter, "in [0, 1)")
    options = {
        "capacity": count(config, "expert_capacity", 32),
        "skip": True,
        "z_loss": z,
        "jitter": jitter,
        "padding_in_loss": True,
    }
    notes.append(
        "mixlora-switch: imported is what moe-peft trains, in inference too, where moe-peft passes "
        "the feed-forward block's input on unchanged"
    )
    if "jitter_noise" not in config:
        notes.append(
            "jitter_noise: moe-peft does not write it and trains on with 0.01; imported as 0"
        )
    return {**loss, **_chosen_by("switch", options, experts)}


def _chosen_by(router: str, options: dict[str, Any], experts: int) -> dict[str, Any]:
    """Return a router that chooses the number of experts itself; `top_k` is not read."""
    return {"router": router, "router_options": options, "top_k": min(2, experts)}


def _mola(config: Mapping[str, Any], experts: int, notes: list[str]) -> dict[str, Any]:
    # `router_init_range` is another quantity there, whose value 5 is what None is here.
    settings = {**_loss(config, False, 5.0), "router_init_std": None}
    return {**settings, "mixture": "mola", "top_k": value(config, "top_k", int, 2)}


def _loramoe(config: Mapping[str, Any], experts: int, notes: list[str]) -> dict[str, Any]:
    finite(config, "router_init_range", 5.0, least=0)
    return {"mixture": "loramoe", "top_k": experts, "router_loss_coef": 0.0}


STRATEGIES: dict[str, Callable[[Mapping[str, Any], int, list[str]], dict[str, Any]]] = {
    "mixlora": _mixlora,
    "mixlora-dynamic": _dynamic,
    "mixlora-switch": _switch,
    "mola": _mola,
    "loramoe": _loramoe,
}
