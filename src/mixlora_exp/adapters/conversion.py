"""From the adapter format of the official packages to PEFT's.

Scaling is alpha / r, or alpha / sqrt(r) with rsLoRA, in both. The official format has no place for
DoRA's magnitude: there it is set to the row norms of W + s B A on loading, so that a loaded adapter
computes plain LoRA. The router loss of the official packages counts all chosen experts and pools
the tokens of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig

from mixlora_exp.adapters.config import MixLoraConfig
from mixlora_exp.adapters.official import KEPT, AdapterFiles, Converted
from mixlora_exp.adapters.tensors import (
    PROJECTIONS,
    check_shapes,
    from_official,
    to_peft,
)
from mixlora_exp.errors import UserError

__all__ = ["import_official", "saved_config"]

LORA_FIELDS = {
    "peft_type", "bias", "r", "lora_alpha", "lora_dropout", "target_modules", "use_dora",
    "use_rslora", "lora_init", "base_model_name_or_path", "task_type",
}  # fmt: skip
MIXLORA_FIELDS = LORA_FIELDS | {
    "routing_strategy", "num_experts", "top_k", "act_fn", "expert_lora", "router_init_range",
    "jitter_noise", "router_loss", "router_aux_loss_coef",
}  # fmt: skip


def _value(config: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any = ...):
    """An entry of the official configuration, of the right type."""
    found = config.get(name, default)
    if found is ...:
        raise UserError(f"adapter_config.json has no {name}, which the official format needs")
    if isinstance(found, bool) and kind is not bool or not isinstance(found, kind):
        raise UserError(f"adapter_config.json: {name}={found!r} is of the wrong kind")
    return found


def _lora_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """r, alpha, dropout, use_dora and use_rslora of one block of the official configuration."""
    settings = {
        "r": _value(config, "r", int),
        "lora_alpha": _value(config, "lora_alpha", (int, float)),
        "lora_dropout": float(_value(config, "lora_dropout", (int, float))),
        "use_dora": _value(config, "use_dora", bool, False),
        "use_rslora": _value(config, "use_rslora", bool, False),
    }
    if not 1 <= settings["r"] <= 2**16 or not settings["lora_alpha"] > 0:
        raise UserError(
            f"adapter_config.json: r={settings['r']} and lora_alpha={settings['lora_alpha']} "
            "must be above 0"
        )
    if not 0 <= settings["lora_dropout"] < 1:
        raise UserError(
            f"adapter_config.json: lora_dropout={settings['lora_dropout']} must be in [0, 1)"
        )
    if config.get("bias", "none") != "none":
        raise UserError(f"adapter_config.json: bias={config['bias']!r} is not supported")
    return settings


def _targets(config: Mapping[str, Any], notes: list[str]) -> list[str]:
    given = _value(config, "target_modules", (list, dict))
    named = [name for name, on in given.items() if on] if isinstance(given, dict) else given
    unknown = [name for name in named if name not in PROJECTIONS]
    if unknown:
        notes.append(f"target_modules: {', '.join(map(str, unknown))} left out, as moe-peft does")
    return [name for name in named if name in PROJECTIONS]


def _peft_type(config: Mapping[str, Any]) -> str:
    kind = config.get("peft_type")
    if kind not in ("LORA", "MIXLORA", "MOLA", "LORAMOE"):
        strategy = config.get("routing_strategy")
        kind = "LORA" if strategy is None else str(strategy).split("-")[0].upper()
    if kind not in ("LORA", "MIXLORA"):
        raise UserError(f"peft_type={kind} is not supported: LORA and MIXLORA can be converted")
    return kind


def _check_routing(config: Mapping[str, Any]) -> None:
    strategy = _value(config, "routing_strategy", str)
    if strategy != "mixlora":
        reasons = {
            "mixlora-dynamic": "it chooses as many experts as reach top_p",
            "mixlora-switch": "it drops tokens above a capacity",
        }
        raise UserError(
            f"routing_strategy={strategy} is not supported "
            f"({reasons.get(strategy, 'it is unknown')}): only mixlora, top-k routing, is"
        )
    jitter = _value(config, "jitter_noise", (int, float), 0.0)
    if jitter:
        raise UserError(f"jitter_noise={jitter} is not supported: routers here take no noise")


def saved_config(config: LoraConfig) -> dict[str, Any]:
    """The configuration as PEFT would write it, with lists in a fixed order."""
    entries = config.to_dict()
    return {
        name: sorted(value) if isinstance(value, set) else value for name, value in entries.items()
    }


def import_official(files: AdapterFiles) -> Converted:
    """From the official format to PEFT's.

    DoRA without magnitudes becomes plain LoRA, which is what the official packages compute with it;
    with magnitudes it stays DoRA.

    Raises:
        UserError: an option is unsupported, or tensors are missing, too many or of a wrong shape.
    """
    config, notes = files.config, []
    kind = _peft_type(config)
    if kind == "MIXLORA":
        _check_routing(config)
    unknown = set(config) - (LORA_FIELDS if kind == "LORA" else MIXLORA_FIELDS) - {KEPT, "name"}
    if unknown:
        raise UserError(f"adapter_config.json: {', '.join(sorted(unknown))} is not supported")
    task = config.get("task_type", "CAUSAL_LM")
    if task not in ("CAUSAL_LM", "QUESTION_ANS"):
        raise UserError(f"task_type={task} is not supported: only causal language models are")
    settings, targets = _lora_settings(config), _targets(config, notes)
    experts, experts_settings = None, settings
    if kind == "MIXLORA":
        experts = _value(config, "num_experts", int)
        if not 1 <= experts <= len(files.tensors):
            raise UserError(
                f"num_experts={experts} does not fit the {len(files.tensors)} tensors of the file"
            )
        block = _value(config, "expert_lora", dict, {})
        experts_settings = _lora_settings({**config, **block})
    parts = from_official(files.tensors, experts)
    ranks = {"single": settings["r"], "experts": experts_settings["r"]}
    check_shapes(parts, targets, ranks, experts or 0)
    if parts.magnitudes:
        if not (settings["use_dora"] and experts_settings["use_dora"]):
            raise UserError("there are magnitudes, but use_dora is not set for all of the adapter")
    elif settings["use_dora"] or experts_settings["use_dora"]:
        notes.append(
            "use_dora: no magnitude was saved, and without one the official packages compute plain "
            "LoRA; imported as that"
        )
        settings = {**settings, "use_dora": False}
        experts_settings = {**experts_settings, "use_dora": False}
    tensors = to_peft(parts)
    kept = config.get(KEPT)
    if isinstance(kept, dict) and kept.get("official") == {
        n: v for n, v in config.items() if n != KEPT
    }:
        # Exported from here and not changed since: what the format has no place for comes back.
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kept.get("dtype"))
        if dtype is not None:
            tensors = to_peft(parts.as_type(dtype))
        return Converted(AdapterFiles(_checked(kept.get("peft")), tensors), notes)
    common = {
        **settings,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "inference_mode": True,
    }
    if experts is None:
        return Converted(AdapterFiles(saved_config(LoraConfig(**common)), tensors), notes)
    coefficient = _value(config, "router_aux_loss_coef", (int, float), 1e-3)
    try:
        made = MixLoraConfig(
            **common,
            num_experts=experts,
            top_k=_value(config, "top_k", int, 2),
            act_fn=config.get("act_fn"),
            expert_lora=None if experts_settings == settings else experts_settings,
            router_loss_coef=coefficient if _value(config, "router_loss", bool, True) else 0.0,
            router_loss="topk",
            router_loss_pooling="all",
            router_init_std=_value(config, "router_init_range", (int, float), 0.02),
        )
    except ValueError as error:
        raise UserError(f"adapter_config.json: {error}") from error
    return Converted(AdapterFiles(saved_config(made), tensors), notes)


def _checked(config: Any) -> dict[str, Any]:
    """A configuration of PEFT's that came in a file: one that PEFT could make."""
    if not isinstance(config, dict):
        raise UserError(f"adapter_config.json: {KEPT} is damaged; remove the entry")
    kind = MixLoraConfig if config.get("peft_type") == "MIXLORA" else LoraConfig
    known = {name: value for name, value in config.items() if name in kind.__dataclass_fields__}
    known.pop("peft_type", None)
    try:
        kind(**known)
    except (TypeError, ValueError) as error:
        raise UserError(f"adapter_config.json: {KEPT} is damaged ({error}); remove it") from error
    return config
