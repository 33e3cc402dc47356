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
SHORT = {
    "learning_rate": "lr",
    "train_limit": "rows",
    "train_limits": "rows_",
    "forms": "forms_",
    "targets": "targets_",
    "router_loss_coef": "coef",
    "rank_pattern": "rank_",
    "alpha_pattern": "alpha_",
    "layers_to_transform": "layers",
    # Their entries have names that say enough.
    "router_options": "",
    "mixture_options": "",
    "peft": "",
    "schedule_options": "",
}
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
    """Yield `rank4`, `lr0.0006`, `rank_q8`: the settings that differ from the defaults, as far as
    they fit. A run that only scores has none."""
    usual = {} if config.method.name == "none" else _usual(config.method.name, config.trainer.name)
    own, room = determining(to_dict(config)), LONGEST
    for group in GROUPS if usual else ():
        for name, value in own[group].items():
            if name == "name":
                continue
            for text in _differing(SHORT.get(name, name), value, usual[group].get(name)):
                room -= len(text) + 1
                if room < 0:
                    return
                yield text


def _differing(name: str, value: Any, usual: Any) -> Iterator[str]:
    """Yield a setting with its value unless that is the usual one; of entries by name, each that
    differs."""
    if isinstance(value, dict):
        known = usual if isinstance(usual, dict) else {}
        # Their order does not count in the fingerprint.
        for key, entry in sorted(value.items()):
            yield from _differing(f"{name}{key}", entry, known.get(key))
    elif value != usual:
        text = f"{name}{_shown(value)}".replace("_proj", "")
        yield re.sub(r"[^A-Za-z0-9.]+", "_", text)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "_".join(_parts(value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _parts(values: list[Any]) -> Iterator[str]:
    """Yield the entries of a list, three numbers or more that count up as `0to15`, equal ones as
    `4x16`."""
    while values:
        for step, word in ((1, "{0}to{1}"), (0, "{0}x{2}")):
            run = 1
            while run < len(values) and type(values[run]) is type(values[0]) is int:
                if values[run] != values[0] + step * run:
                    break
                run += 1
            if run >= 3:
                yield word.format(values[0], values[run - 1], run)
                break
        else:
            run = 1
            yield _shown(values[0])
        values = values[run:]
