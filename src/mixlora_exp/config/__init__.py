"""Configuration: `conf/` and the command line, composed by Hydra into checked dataclasses.

No OmegaConf object leaves this package: `to_config` turns one into a `schema.Config`.
"""

from __future__ import annotations

from mixlora_exp.config.plan import Cell, Plan, check_composition, compose, plan_runs
from mixlora_exp.config.resolve import (
    CONF_DIR,
    EXCLUDED,
    fingerprint,
    open_session,
    register_schemas,
    run_name,
    to_config,
    to_dict,
)
from mixlora_exp.config.schema import Config

__all__ = [
    "CONF_DIR",
    "EXCLUDED",
    "Cell",
    "Config",
    "Plan",
    "check_composition",
    "compose",
    "fingerprint",
    "open_session",
    "plan_runs",
    "register_schemas",
    "run_name",
    "to_config",
    "to_dict",
]
