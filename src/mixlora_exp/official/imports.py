"""Converts adapters from the format of the official packages to PEFT's.

Scaling is alpha / r, or alpha / sqrt(r) with rsLoRA, in both. The official format does not store
DoRA's magnitude: loading sets it to the row norms of W + s B A, so that a loaded adapter computes
plain LoRA. The router loss of the official packages counts all chosen experts and pools
the tokens of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from mixlora_exp.adapters.config import MixLoraConfig, saved_config
from mixlora_exp.errors import UserError, shown
from mixlora_exp.official.fields import (
    check_activation,
    count,
    finite,
    lora_settings,
    name_list,
    value,
)
from mixlora_exp.official.folders import AdapterFiles
from mixlora_exp.official.tensors import PROJECTIONS, Parts, check_shapes, from_official, to_peft

LORA_FIELDS = {
    "peft_type", "bias", "r", "lora_alpha", "lora_dropout", "target_modules", "use_dora",
    "use_rslora", "lora_init", "base_model_name_or_path", "task_type",
}  # fmt: skip
IGNORED = {"name", "task_name", "mixlora_exp"}
"""Fields that do not affect the computation; the last one was written by earlier versions of this
project."""
MIXLORA_FIELDS = LORA_FIELDS | {
    "routing_strategy", "num_experts", "top_k", "act_fn", "expert_lora", "router_init_range",
    "jitter_noise", "router_loss", "router_aux_loss_coef",
}  # fmt: skip


def _targets(config: Mapping[str, Any], notes: list[str]) -> list[str]:
    given = value(config, "target_modules", (list, dict))
    named = name_list([n for n, on in given.items() if on] if isinstance(given, dict) else given)
    unknown = [name for name in named if name not in PROJECTIONS]
    if unknown:
        notes.append(f"target_modules: {', '.join(unknown)} left out, as moe-peft does")
    return list(dict.fromkeys(name for name in named if name in PROJECTIONS))


def _peft_type(config: Mapping[str, Any]) -> str:
    kind = config.get("peft_type")
    if kind is None:
        strategy = config.get("routing_strategy")
        kind = "LORA" if strategy is None else str(strategy).split("-")[0].upper()
    if kind not in ("LORA", "MIXLORA"):
        raise UserError(
            f"peft_type={kind!s:.80} is not supported: LORA and MIXLORA can be converted"
        )
    return kind


def _check_routing(config: Mapping[str, Any]) -> None:
    strategy = value(config, "routing_strategy", str)
    if strategy != "mixlora":
        reasons = {
            "mixlora-dynamic": "it chooses as many experts as reach top_p",
            "mixlora-switch": "it drops tokens above a capacity",
        }
        raise UserError(
            f"routing_strategy={strategy} is not supported "
            f"({reasons.get(strategy, 'it is unknown')}): only mixlora, top-k routing, is"
        )
    jitter = finite(config, "jitter_noise", 0.0)
    if jitter:
        raise UserError(f"jitter_noise={jitter} is not supported: routers here take no noise")


def _check_names(entries: Mapping[str, Any], known: set[str], where: str = "") -> None:
    unknown = sorted(set(entries) - known - IGNORED)
    if unknown:
        raise UserError(
            f"adapter_config.json: {where}{shown(', '.join(unknown), 200)} is not supported: it is "
            "no known entry of the format; remove entries without effect"
        )


def _check_others(config: Mapping[str, Any]) -> None:
    """Check fields of which only some values can be converted."""
    # moe-peft writes null for a mixture of tasks, and runs the causal model for all of these.
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM", "QUESTION_ANS"):
        raise UserError(f"task_type={task} is not supported: only causal language models are")
    if config.get("lora_init", "original") not in ("original", "gaussian"):
        raise UserError(
            f"lora_init={config['lora_init']!r:.80} is not supported: moe-peft has original and "
            "gaussian"
        )
    value(config, "base_model_name_or_path", (str, type(None)), None)
    check_activation(value(config, "act_fn", (str, type(None)), None))


def _magnitudes(
    group: str, parts: Parts, settings: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """The settings of attention or experts, with `use_dora` off where no magnitude was saved."""
    if parts.has_magnitudes(group) and not settings["use_dora"]:
        raise UserError("there are magnitudes, but use_dora is not set where they are")
    if not settings["use_dora"] or parts.has_magnitudes(group) or not getattr(parts, group):
        return settings
    if parts.has_magnitudes("single") or parts.has_magnitudes("experts"):
        raise UserError("some magnitudes are missing: the adapter is truncated or was changed")
    note = (
        "use_dora: no magnitude was saved, and without one the official packages compute plain "
        "LoRA; imported as that"
    )
    if note not in notes:
        notes.append(note)
    return {**settings, "use_dora": False}


def import_official(files: AdapterFiles) -> AdapterFiles:
    """Convert an adapter from the official format to PEFT's.

    DoRA without magnitudes becomes plain LoRA, which is what the official packages compute with it;
    with magnitudes it stays DoRA.

    Raises:
        UserError: an option is unsupported, or tensors are missing, unexpected or of wrong shape.
    """
    config, notes = files.config, list(files.notes)
    kind = _peft_type(config)
    if kind == "MIXLORA":
        _check_routing(config)
    _check_names(config, LORA_FIELDS if kind == "LORA" else MIXLORA_FIELDS)
    _check_others(config)
    settings, targets = lora_settings(config), _targets(config, notes)
    experts, experts_settings = None, settings
    if kind == "MIXLORA":
        experts = count(config, "num_experts")
        block = value(config, "expert_lora", dict, {})
        _check_names(block, LORA_FIELDS, "expert_lora.")
        experts_settings = lora_settings({**config, **block})
    parts = from_official(files.tensors, experts)
    ranks = {"single": settings["r"], "experts": experts_settings["r"]}
    check_shapes(parts, targets, ranks, experts or 0)
    settings = _magnitudes("single", parts, settings, notes)
    experts_settings = _magnitudes("experts", parts, experts_settings, notes)
    common = {
        **settings,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "inference_mode": True,
    }
    if not parts.single and not parts.experts:
        raise UserError(
            f"target_modules={targets}: no module has weights, so there is nothing to convert: the "
            "adapter computes what its base model does"
        )
    if experts is not None and not parts.experts:
        # A router over experts that do nothing: the feed-forward block is the base model's.
        notes.append("no expert has weights, so the routers do nothing: imported as LoRA")
        parts, experts = Parts(single=parts.single), None
    made = LoraConfig(**common) if experts is None else _mixture(config, common, experts_settings)
    return AdapterFiles(saved_config(made), to_peft(parts), tuple(notes))


def _mixture(
    config: Mapping[str, Any], common: Mapping[str, Any], experts: Mapping[str, Any]
) -> MixLoraConfig:
    """The configuration of an adapter with experts. common: attention's LoRA settings; experts:
    those of the experts, written as `expert_lora` where they differ."""
    coefficient = finite(config, "router_aux_loss_coef", 1e-3)
    same = all(common[name] == found for name, found in experts.items())
    try:
        return MixLoraConfig(
            **common,
            num_experts=config["num_experts"],
            top_k=value(config, "top_k", int, 2),
            act_fn=config.get("act_fn"),
            expert_lora=None if same else dict(experts),
            router_loss_coef=coefficient if value(config, "router_loss", bool, True) else 0.0,
            router_loss="topk",
            router_loss_pooling="all",
            router_init_std=finite(config, "router_init_range", 0.02, least=0),
        )
    except ValueError as error:
        raise UserError(
            f"adapter_config.json: {error}: correct the entry, or use another copy"
        ) from error
