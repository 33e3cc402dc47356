"""From PEFT's adapter format to that of the official packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig

from mixlora_exp.adapters.config import MixLoraConfig, saved_config
from mixlora_exp.errors import UserError
from mixlora_exp.official.fields import (
    EXPERT_FIELDS,
    check_activation,
    count,
    finite,
    lora_settings,
    name_list,
    value,
    wrong,
)
from mixlora_exp.official.folders import KEPT, AdapterFiles, Converted
from mixlora_exp.official.tensors import Parts, check_shapes, from_peft, to_official, to_peft

__all__ = ["export_official", "reimport"]

# In the order in which moe-peft writes them.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
# PEFT's own bookkeeping, what a trained adapter does not need, and what is looked at by itself.
PEFT_IGNORED = {
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "r", "target_modules", "lora_alpha", "lora_dropout", "use_rslora", "use_dora",
    "init_lora_weights", "num_experts", "top_k", "act_fn", "expert_lora", "router_init_std",
    "router_loss_coef", "router_loss", "router_loss_pooling", "router_precision",
    "ensure_weight_tying", "runtime_config", "megatron_core", "ephemeral_gpu_offload",
}  # fmt: skip


def _whole(name: str, found: float) -> int:
    if found != int(found):
        raise UserError(
            f"{name}={found} is not a whole number, which the official format asks for: an adapter "
            "with such a one cannot be exported"
        )
    return int(found)


def _export_settings(settings: Mapping[str, Any], dropout: float | None) -> dict[str, Any]:
    given = settings["lora_dropout"] if dropout is None else dropout
    if given == 0:
        raise UserError(
            "lora_dropout=0 is refused by the official packages: add dropout=1e-9, say (they drop "
            "in evaluation too, so this is also the way to the same logits)"
        )
    entries = {"use_dora": True} if settings["use_dora"] else {}
    entries |= {"use_rslora": True} if settings["use_rslora"] else {}
    return {
        **entries,
        "bias": "none",
        "r": settings["r"],
        "lora_alpha": _whole("lora_alpha", settings["lora_alpha"]),
        "lora_dropout": float(given),
    }


def _check_exportable(config: Mapping[str, Any], kind: type[LoraConfig]) -> None:
    """Options that change what an adapter computes, and that the official format does not have;
    and values that no adapter can have."""
    fields = kind.__dataclass_fields__
    defaults = saved_config(kind(target_modules=list(TARGETS)))
    for name, found in config.items():
        if name in PEFT_IGNORED:
            continue
        # By identity: 0 is the first layer, and not "none of them".
        empty = found is None or found is False or found in ([], {}, "")
        if name not in fields or not (empty or found == defaults.get(name)):
            raise UserError(
                f"{name}={found!r:.200} cannot be exported: the official format has no place for it"
            )
    whole = {**defaults, **config}
    lora_settings(whole)
    value(whole, "base_model_name_or_path", (str, type(None)), None)
    if kind is not MixLoraConfig:
        return
    for name in ("num_experts", "top_k"):
        count(whole, name)
    for name in ("router_loss_coef", "router_init_std"):
        finite(whole, name, least=0)
    check_activation(value(whole, "act_fn", (str, type(None))))
    block = value(whole, "expert_lora", (dict, type(None))) or {}
    odd = [name for name in block if name not in EXPERT_FIELDS]
    if odd:
        raise wrong("expert_lora", block, f"of {', '.join(EXPERT_FIELDS)}")
    lora_settings({**whole, **block})


def _checked(config: Mapping[str, Any], kind: type[LoraConfig]) -> dict[str, Any]:
    """The configuration with PEFT's defaults for what it leaves out; one that PEFT could make."""
    _check_exportable(config, kind)
    given = {name: value for name, value in config.items() if name in kind.__dataclass_fields__}
    given.pop("peft_type", None)
    try:
        made = kind(**given)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"adapter_config.json: {error}: mend the entry, or take another copy"
        ) from error
    odd = made.init_lora_weights
    if not isinstance(odd, bool) and odd != "gaussian":
        raise UserError(
            f"init_lora_weights={odd!r} cannot be exported: it changes the base weights as well"
        )
    if getattr(made, "router_precision", "float32") != "float32":
        raise UserError(
            f"router_precision={made.router_precision} cannot be exported: the official router "
            "runs in float32"
        )
    return {**saved_config(made), "target_modules": config.get("target_modules")}


def reimport(kept: Any, official: Mapping[str, Any], parts: Parts) -> AdapterFiles | None:
    """The adapter as it was before it was exported from here, if `kept` (the entry that goes with
    it) gives the official entries again; None where they were changed since.

    Raises:
        UserError: the entry is damaged.
    """
    if not isinstance(kept, dict) or not isinstance(kept.get("peft"), dict):
        raise UserError(f"adapter_config.json: {KEPT} is damaged; remove the entry")
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(kept.get("dtype")))
    files = AdapterFiles(kept["peft"], to_peft(parts if dtype is None else parts.as_type(dtype)))
    options = kept.get("options") if isinstance(kept.get("options"), dict) else {}
    try:
        dropout = None if options.get("dropout") is None else finite(options, "dropout")
        act_fn = value(options, "act_fn", (str, type(None)), None)
        again = export_official(files, dropout=dropout, act_fn=act_fn).files.config
    except UserError as error:
        raise UserError(
            f"adapter_config.json: {KEPT} does not fit the tensors ({error}); remove the entry"
        ) from error
    same = {name: value for name, value in again.items() if name != KEPT} == dict(official)
    return files if same else None


def export_official(
    files: AdapterFiles,
    *,
    drop_magnitude: bool = False,
    dropout: float | None = None,
    act_fn: str | None = None,
) -> Converted:
    """From PEFT's format to the official one.

    `drop_magnitude` leaves out DoRA's magnitudes, `dropout` writes this in the place of the
    adapter's own, `act_fn` names the base model's activation where the adapter does not. With none
    of these an adapter that was imported, and has the same configuration still, gets its official
    one again.

    Raises:
        UserError: the official format has no place for something that the adapter has.
    """
    config, notes = files.config, []
    kind = config.get("peft_type")
    if kind not in ("LORA", "MIXLORA"):
        raise UserError(f"peft_type={kind} cannot be exported: LORA and MIXLORA can")
    mixture = kind == "MIXLORA"
    check_activation(act_fn)
    config = _checked(config, MixLoraConfig if mixture else LoraConfig)
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"task_type={config['task_type']} cannot be exported: CAUSAL_LM can")
    parts = from_peft(files.tensors)
    if parts.magnitudes:
        if not drop_magnitude:
            raise UserError(
                "the adapter has DoRA's trained magnitudes, for which the official format has no "
                "place: the official packages would compute something else with it. Add "
                "magnitude=drop to export it without them"
            )
        notes.append(f"{parts.magnitudes} tensors of magnitudes were dropped")
    short = [name.rpartition(".")[2] for name in name_list(config.get("target_modules"))]
    settings = {name: config.get(name) for name in EXPERT_FIELDS}
    given_block = config.get("expert_lora") if mixture else None
    block = {**settings, **given_block} if given_block else None
    experts = config.get("num_experts") if mixture else 0
    ranks = {"single": settings["r"], "experts": (block or settings)["r"]}
    check_shapes(parts, short, ranks, experts)
    if not (drop_magnitude or dropout or act_fn) and _unchanged(files):
        return Converted(_as_it_came(files, parts), notes)
    entries = _export_settings(settings, dropout)
    official = {name: entries.pop(name) for name in ("use_dora", "use_rslora", "bias")
                if name in entries}  # fmt: skip
    official |= {"peft_type": kind, **entries}
    official["target_modules"] = [name for name in TARGETS if name in short]
    if mixture:
        official |= _export_mixture(config, block, dropout, act_fn)
        if block is not None:
            notes.append("expert_lora: moe-peft reads it; mixlora 0.2.3 takes no notice of it")
    official |= {
        "base_model_name_or_path": config.get("base_model_name_or_path") or "",
        "task_type": "CAUSAL_LM",
    }
    dtypes = {str(t.dtype).removeprefix("torch.") for t in files.tensors.values()}
    exported = parts.without_magnitudes().as_type(torch.float32)
    if dtypes != {"float32"}:
        notes.append(f"tensors were {', '.join(sorted(dtypes))} and are float32 now")
    if not parts.magnitudes and len(dtypes) == 1 and "float64" not in dtypes:
        official[KEPT] = {
            "peft": dict(files.config), "official": dict(official), "dtype": dtypes.pop(),
            "options": {"dropout": dropout, "act_fn": act_fn},
        }  # fmt: skip
    return Converted(AdapterFiles(official, to_official(exported)), notes)


def _unchanged(files: AdapterFiles) -> bool:
    return files.original is not None and files.original.peft == dict(files.config)


def _as_it_came(files: AdapterFiles, parts: Parts) -> AdapterFiles:
    """The official configuration that an imported adapter had, with the tensors it has now."""
    original = files.original
    assert original is not None
    whole = Parts(
        parts.single, parts.experts, {**parts.routers, **from_peft(original.tensors).routers}
    )
    return AdapterFiles(original.config, to_official(whole))


def _export_mixture(
    config: Mapping[str, Any],
    block: Mapping[str, Any] | None,
    dropout: float | None,
    act_fn: str | None,
) -> dict[str, Any]:
    """The entries of routing and experts."""
    entries: dict[str, Any] = {}
    if block is not None:
        lora = _export_settings(block, dropout)
        # Written also where false: what is left out would come from the outer entries.
        flags = {name: bool(block[name]) for name in ("use_dora", "use_rslora")}
        entries["expert_lora"] = {**flags, **lora}
    activation = config.get("act_fn") or act_fn
    if activation is None:
        raise UserError(
            "act_fn is not known: name the base model's activation, act_fn=silu for Llama or "
            "act_fn=gelu_pytorch_tanh for Gemma"
        )
    return {
        **entries,
        "routing_strategy": "mixlora",
        "num_experts": config["num_experts"],
        "act_fn": activation,
        "top_k": config["top_k"],
        "router_aux_loss_coef": float(config["router_loss_coef"]),
        "router_init_range": float(config["router_init_std"]),
    }
