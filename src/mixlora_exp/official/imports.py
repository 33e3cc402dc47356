"""Converts adapters from the format of the official packages to PEFT's.

Scaling is alpha / r, or alpha / sqrt(r) with rsLoRA, in both. The official format does not store
DoRA's magnitude: loading sets it to the row norms of W + s B A, so that a loaded adapter computes
plain LoRA; experts of single projections compute plain LoRA in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from mixlora_exp.adapters.config import MixLoraConfig, saved_config
from mixlora_exp.adapters.mixtures.config import MixtureConfig
from mixlora_exp.errors import UserError, shown
from mixlora_exp.official.fields import (
    check_activation,
    count,
    lora_settings,
    name_list,
    value,
)
from mixlora_exp.official.folders import AdapterFiles
from mixlora_exp.official.routing import FIELDS, KINDS, router_settings, strategy_of
from mixlora_exp.official.tensors import (
    DAMAGED,
    LAYOUTS,
    PROJECTIONS,
    Parts,
    check_shapes,
    from_official,
    to_peft,
)

LORA_FIELDS = {
    "peft_type", "bias", "r", "lora_alpha", "lora_dropout", "target_modules", "use_dora",
    "use_rslora", "lora_init", "base_model_name_or_path", "task_type",
}  # fmt: skip
IGNORED = {"name", "task_name", "mixlora_exp"}
"""Fields that do not affect the computation; the last one was written by earlier versions of this
project."""


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
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise UserError(
            f"peft_type={shown(str(kind), 80)} is not supported: {', '.join(LAYOUTS)} can be "
            "converted"
        )
    return kind


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
    """Return the settings of attention or experts, with `use_dora` off where no magnitude was
    saved."""
    if parts.layout.linear and parts.has_magnitudes(group):
        raise UserError(
            f"magnitudes are not supported in an adapter of {parts.layout.prefix.rstrip('.')}, "
            "whose experts have none: remove the file that holds them"
        )
    if parts.has_magnitudes(group) and not settings["use_dora"]:
        raise UserError(
            "there are magnitudes, but use_dora is not set where they are: set it in "
            "adapter_config.json, or remove the file that holds them"
        )
    if not settings["use_dora"] or parts.has_magnitudes(group) or not getattr(parts, group):
        return settings
    if parts.has_magnitudes("single") or parts.has_magnitudes("experts"):
        raise UserError(f"some magnitudes are missing: {DAMAGED}")
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
    strategy = strategy_of(config, kind) if kind in KINDS else None
    _check_names(config, LORA_FIELDS | FIELDS.get(strategy, set()))
    _check_others(config)
    settings, targets = lora_settings(config), _targets(config, notes)
    experts, experts_settings, router, added = None, settings, {}, []
    if strategy is not None:
        experts = count(config, "num_experts")
        block = value(config, "expert_lora", dict, {})
        _check_names(block, LORA_FIELDS, "expert_lora.")
        experts_settings = lora_settings({**config, **block})
        router = router_settings(config, strategy, experts, added)
    parts = from_official(files.tensors, LAYOUTS[kind], experts)
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
        added = ["no expert has weights, so the routers do nothing: imported as LoRA"]
        parts, experts = Parts(single=parts.single), None
    if experts is None:
        made = LoraConfig(**common)
    elif parts.layout.linear:
        made = _in_linears(common, router, parts)
    else:
        made = _in_blocks(config, common, experts_settings, router)
    return AdapterFiles(saved_config(made), to_peft(parts), (*notes, *added))


def _in_blocks(
    config: Mapping[str, Any],
    common: Mapping[str, Any],
    experts: Mapping[str, Any],
    router: Mapping[str, Any],
) -> MixLoraConfig:
    """Return the configuration of an adapter with experts in feed-forward blocks. common:
    attention's LoRA settings; experts: those of the experts, written as `expert_lora` where they
    differ."""
    same = all(common[name] == found for name, found in experts.items())
    own = None if same else dict(experts)
    return _checked(MixLoraConfig, **common, **router, act_fn=config.get("act_fn"), expert_lora=own)


def _in_linears(
    common: Mapping[str, Any], router: Mapping[str, Any], parts: Parts
) -> MixtureConfig:
    """Return the configuration of an adapter with experts in single projections, and LoRA in
    others."""
    plain = sorted({projection for _, projection, _ in parts.single})
    common = {**common, "use_dora": False}
    return _checked(MixtureConfig, **common, **router, lora_targets=plain)


def _checked(kind: type[LoraConfig], **settings: Any) -> Any:
    try:
        return kind(**settings)
    except ValueError as error:
        raise UserError(
            f"adapter_config.json: {error}: correct the entry, or use another copy"
        ) from error
