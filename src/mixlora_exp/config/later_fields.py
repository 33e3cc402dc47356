"""Fields that the configuration got after the first records were written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mixlora_exp.config.architecture import current_model
from mixlora_exp.config.schema_data import DataConfig
from mixlora_exp.config.schema_mixture import method_class
from mixlora_exp.errors import UserError

UNNAMED = {
    ("data", "train_limits"): {},
    ("data", "packing"): False,
    ("model", "quantization"): "none",
    ("method", "router"): "top_k",
    ("trainer", "compile"): "off",
    ("trainer", "betas"): [0.9, 0.999],
    ("trainer", "final_rate"): 0.0,
    ("model", "package_parts"): None,
    ("method", "router_options"): {},
    ("method", "expert_rank"): None,
    ("method", "match_params"): None,
    ("evaluation", "shuffle_experts"): None,
    ("method", "router_loss_reduction"): "mean",
    ("method", "rslora"): False,
    ("method", "lora_fa"): False,
    ("method", "lora_plus_ratio"): 1.0,
    ("method", "rank_pattern"): {},
    ("method", "alpha_pattern"): {},
    ("method", "layers_to_transform"): None,
    ("method", "init_lora_weights"): "default",
    ("method", "expert_alpha"): None,
    ("trainer", "optim"): "adamw_torch_fused",
    ("trainer", "schedule_options"): {},
}
"""Group and name of a field -> the value that keeps the earlier behaviour. A fingerprint leaves out
a field with this value: older runs keep their fingerprints, and thus their names."""

LATER = {
    **UNNAMED,
    # Fingerprints have always included these, whatever their value.
    ("preset", "name"): "correct",
    ("method", "train_magnitude"): True,
    ("method", "router_precision"): "float32",
    ("trainer", "padding_in_loss"): False,
    ("trainer", "order"): "bucketed",
    ("evaluation", "dropout"): False,
    ("evaluation", "arc_labels"): "own",
    ("evaluation", "held_out"): False,
}
"""All fields that a record may lack, with the values that its run used."""


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's configuration in the current schema, with the fields that its version
    lacked."""
    known = {item.name for item in fields(method_class(settings["method"]))}
    found = {**settings, "model": current_model(settings["model"])}
    for (group, name), value in LATER.items():
        if group != "method" or name in known:
            found[group] = {name: value, **found.get(group, {})}
    return found


def require_complete(config: Mapping[str, Any]) -> None:
    """Check that a configuration of `completed` has all settings that tables compare.

    Raises:
        UserError: one is missing.
    """
    for group, kind in (("method", method_class(config["method"])), ("data", DataConfig)):
        missing = [item.name for item in fields(kind) if item.name not in config[group]]
        if missing:
            raise UserError(f"config.{group} lacks {', '.join(missing)}: it was edited by hand")
