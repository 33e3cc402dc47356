"""Names of the folders of runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from mixlora_exp.config.command import compose
from mixlora_exp.config.resolve import determining, fingerprint, to_dict
from mixlora_exp.config.schema import Config
from mixlora_exp.errors import UserError

GROUPS = ("method", "trainer", "data")
SHORT = {"learning_rate": "lr", "train_limit": "rows", "router_loss_coef": "coef"}
LONGEST = 60
"""Characters of the settings in a name: beyond them the fingerprint distinguishes runs."""


def run_name(config: Config, adapter: Mapping[str, Any] | None = None) -> str:
    """Return a folder name for the run: readable parts, the settings that are not the method's
    defaults, the seed, the fingerprint's beginning.

    `adapter`: the record's entry for the adapter to score, whose method names the run. Equal
    fingerprints give equal names.
    """
    method = config.method.name if config.adapter is None else (adapter or {}).get("method")
    parts = (config.model.name, method or "adapter", config.task.name, config.data.name.value)
    return "-".join((*parts, *_settings(config), f"s{config.seed}", fingerprint(config)[:10]))


@cache
def _usual(method: str, trainer: str) -> dict[str, Any]:
    """Return the settings that determine the default run of a method; empty for one that is not in
    `conf/`."""
    try:
        return determining(to_dict(compose([f"method={method}", f"trainer={trainer}"])))
    except UserError:
        return {}


def _settings(config: Config) -> Iterator[str]:
    """Yield `rank4`, `lr0.0006`: the scalar settings that differ from the defaults, as far as they
    fit. A run that only scores has none."""
    usual = {} if config.method.name == "none" else _usual(config.method.name, config.trainer.name)
    own, room = determining(to_dict(config)), LONGEST
    for group in GROUPS if usual else ():
        for name, value in own[group].items():
            known = usual[group].get(name)
            if name == "name" or value == known or isinstance(value, (dict, list)):
                continue
            shown = f"{value:g}" if isinstance(value, float) else str(value).lower()
            text = re.sub(r"[^A-Za-z0-9.]+", "_", f"{SHORT.get(name, name)}{shown}")
            room -= len(text) + 1
            if room < 0:
                return
            yield text
