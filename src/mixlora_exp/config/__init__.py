"""Configuration: `conf/` and the command line, composed by Hydra into checked dataclasses.

No OmegaConf object leaves this package: `to_config` turns one into a `schema.Config`. The schemas
need neither Hydra nor OmegaConf, which are imported when a name below is first used, so that
adapters and benchmarks run without them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixlora_exp.config.arguments import options
    from mixlora_exp.config.command import (
        Cell,
        Plan,
        check_composition,
        compose,
        compose_adapters,
        opened,
        parse_overrides,
        plan_runs,
    )
    from mixlora_exp.config.resolve import (
        CONF_DIR,
        EXCLUDED,
        determining,
        fingerprint,
        fingerprint_of,
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
    "compose_adapters",
    "determining",
    "fingerprint",
    "fingerprint_of",
    "open_session",
    "opened",
    "options",
    "parse_overrides",
    "plan_runs",
    "register_schemas",
    "run_name",
    "to_config",
    "to_dict",
]

_OWN = {"Config": "schema", "options": "arguments"}
_PLAN = {
    *("Cell", "Plan", "check_composition", "compose", "compose_adapters", "opened"),
    *("parse_overrides", "plan_runs"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "command" if name in _PLAN else _OWN.get(name, "resolve")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
