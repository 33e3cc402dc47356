"""From the adapter format of the official packages to PEFT's.

Scaling is alpha / r, or alpha / sqrt(r) with rsLoRA, in both. The official format has no place for
DoRA's magnitude: there it is set to the row norms of W + s B A on loading, so that a loaded adapter
computes plain LoRA. The router loss of the official packages counts all chosen experts and pools
the tokens of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from mixlora_exp.adapters.config import MixLoraConfig, saved_config
from mixlora_exp.adapters.export import reimport
from mixlora_exp.adapters.official import KEPT, AdapterFiles, Converted
from mixlora_exp.adapters.tensors import (
    PROJECTIONS,
    Parts,
    check_shapes,
    from_official,
    to_peft,
)
from mixlora_exp.errors import UserError

__all__ = ["import_official"]

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


def _finite(config: Mapping[str, Any], name: str, default: Any = ...) -> float:
    """A number of the official configuration that float can hold."""
    value = _value(config, name, (int, float), default)
    if not abs(value) < 1e30:
        raise UserError(f"adapter_config.json: {name} is out of range")
    return value


def _lora_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """r, alpha, dropout, use_dora and use_rslora of one block of the official configuration."""
    settings = {
        "r": _value(config, "r", int),
        "lora_alpha": _finite(config, "lora_alpha"),
        "lora_dropout": float(_finite(config, "lora_dropout")),
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
    if not all(isinstance(name, str) for name in named):
        raise UserError(f"adapter_config.json: target_modules={named!r} is not a list of names")
    unknown = [name for name in named if name not in PROJECTIONS]
    if unknown:
        notes.append(f"target_modules: {', '.join(unknown)} left out, as moe-peft does")
    return list(dict.fromkeys(name for name in named if name in PROJECTIONS))


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
    jitter = _finite(config, "jitter_noise", 0.0)
    if jitter:
        raise UserError(f"jitter_noise={jitter} is not supported: routers here take no noise")


def _magnitudes(
    group: str, parts: Parts, settings: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """The settings of attention or experts with what their magnitudes make of `use_dora`."""
    if parts.has_magnitudes(group) and not settings["use_dora"]:
        raise UserError("there are magnitudes, but use_dora is not set where they are")
    if not settings["use_dora"] or parts.has_magnitudes(group) or not getattr(parts, group):
        return settings
    if parts.magnitudes:
        raise UserError("some magnitudes are missing: the adapter is cut off or was changed")
    note = (
        "use_dora: no magnitude was saved, and without one the official packages compute plain "
        "LoRA; imported as that"
    )
    if note not in notes:
        notes.append(note)
    return {**settings, "use_dora": False}


def import_official(files: AdapterFiles) -> Converted:
    """From the official format to PEFT's.

    DoRA without magnitudes becomes plain LoRA, which is what the official packages compute with it;
    with magnitudes it stays DoRA.

    Raises:
        UserError: an option is unsupported, or tensors are missing, too many or of a wrong shape.
    """
    config, notes = files.config, list(files.notes)
    kind = _peft_type(config)
    if kind == "MIXLORA":
        _check_routing(config)
    unknown = set(config) - (LORA_FIELDS if kind == "LORA" else MIXLORA_FIELDS) - {KEPT, "name"}
    if unknown:
        raise UserError(f"adapter_config.json: {', '.join(sorted(unknown))} is not supported")
    # moe-peft writes null for a mixture of tasks, and runs the causal model for all of these.
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM", "QUESTION_ANS"):
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
    settings = _magnitudes("single", parts, settings, notes)
    experts_settings = _magnitudes("experts", parts, experts_settings, notes)
    kept = config.get(KEPT)
    if kept is not None:
        unchanged = {name: value for name, value in config.items() if name != KEPT}
        found = reimport(kept, unchanged, parts)
        if found is not None:
            return Converted(found, notes)
    tensors = to_peft(parts)
    common = {
        **settings,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "inference_mode": True,
    }
    if experts is not None and not parts.experts:
        # A router over experts that do nothing: the feed-forward block is the base model's.
        notes.append("no expert has weights, so the routers do nothing: imported as LoRA")
        tensors, experts = to_peft(Parts(single=parts.single)), None
    if experts is None:
        return Converted(AdapterFiles(saved_config(LoraConfig(**common)), tensors), notes)
    coefficient = _finite(config, "router_aux_loss_coef", 1e-3)
    try:
        made = MixLoraConfig(
            **common,
            num_experts=experts,
            top_k=_value(config, "top_k", int, 2),
            act_fn=_value(config, "act_fn", (str, type(None)), None),
            expert_lora=None if experts_settings == settings else experts_settings,
            router_loss_coef=coefficient if _value(config, "router_loss", bool, True) else 0.0,
            router_loss="topk",
            router_loss_pooling="all",
            router_init_std=_finite(config, "router_init_range", 0.02),
        )
    except ValueError as error:
        raise UserError(f"adapter_config.json: {error}") from error
    return Converted(AdapterFiles(saved_config(made), tensors), notes)
