"""Turns Hydra's `DictConfig` into a plain, checked `Config`, and computes its fingerprint."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from mixlora_exp.config import schema
from mixlora_exp.config.architecture import OWN, complete, read_architecture
from mixlora_exp.config.explain import explain, unknown_field
from mixlora_exp.config.later_fields import UNNAMED
from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.config.recorded import Recorded, built, overlaid
from mixlora_exp.config.schema import Config
from mixlora_exp.config.schema_commands import EvaluateConfig, GenerateConfig
from mixlora_exp.config.schema_mixture import METHOD_SCHEMAS
from mixlora_exp.config.switches import ONLY
from mixlora_exp.errors import UserError
from mixlora_exp.tasks.free_text import TEMPLATE

EXCLUDED = (
    "output_dir",
    "dry_run",
    "plan",
    "force",
    # Only decides whether a run is refused, not what it computes.
    "base",
    "tracker",
    # Its values count in the fields that take them.
    "preset",
    "trainer.logging_steps",
    # Adapters trained together have the same results as alone.
    "adapters",
    "trainer.pack_adapters",
    # A resumed run has the same result as an uninterrupted one.
    "trainer.auto_micro_batch",
    "trainer.save_steps",
    "trainer.keep_checkpoints",
    # Nor does the number of processes change a result.
    "trainer.parallel",
    "model.access",
    "model.license",
    "model.nominal_parameters",
    "data.path",
    "data.mirror",
)
"""Fields that do not determine a result, as dotted names; a group name excludes all its fields.

The record contains the hashes of the data files, so their location does not count. `model.path`
counts: the weights are not hashed, and two folders may contain different models.
"""

LATER_OF_TASKS = {"instruction": "", "template": TEMPLATE, "labels": [], "label": None}
"""Fields of an entry of `task.custom` that came later, with the value that keeps the earlier
behaviour."""


@cache
def register_schemas() -> None:
    """Register the dataclasses with Hydra, once in a process."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(name="generate_schema", node=GenerateConfig)
    for switch, values in ONLY.items():
        name = f"only_{switch}"
        node = {"defaults": ["correct", "_self_"], "name": name, **values}
        store.store(group="preset", name=name, node=node)
    # Not in the group `method`, so that `method=glob(*)` and lists of options contain only files.
    for name, method in METHOD_SCHEMAS.items():
        store.store(name=name, node=method)
    store.store(group="model", name=OWN, node={"name": OWN, "source": "hub"})
    # No file per kernel: each registers itself, and `kernel=NAME` chooses it.
    for kernel in schema.KernelName:
        store.store(group="kernel", name=kernel.name, node={"name": kernel.name})
    # Hydra copies the store with its file sources for each configuration it composes, a sixth of
    # the time; it returns copies of the entries in any case.
    store.__dict__["__deepcopy__"] = lambda _: store


@contextmanager
def open_session(config_dir: Path | str = CONF_DIR) -> Iterator[Any]:
    """Yield Hydra's object, initialised with `config_dir`; restores an outer session afterwards.

    Raises:
        UserError: there is no such folder.
    """
    register_schemas()
    if not Path(config_dir).is_dir():
        raise UserError(
            f"the configuration folder {config_dir} does not exist: install the repository with "
            "`pip install -e .` and run from it, or pass --config-path=DIR"
        )
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(
            config_dir=str(Path(config_dir).resolve()), job_name="train", version_base="1.3"
        ):
            yield GlobalHydra.instance().hydra
    finally:
        if outer is not None:
            GlobalHydra.instance().initialize(outer)


def _check_fields(node: DictConfig, path: str) -> None:
    """Refuse fields that `+key=value` added but the dataclass does not have."""
    owner = OmegaConf.get_type(node)
    if dataclasses.is_dataclass(owner):
        known = {item.name for item in dataclasses.fields(owner)}
        for key in node:
            if key not in known:
                given = OmegaConf.to_container(node, resolve=False)[key]
                source = f" (given as '{path}{key}={given}')"
                raise UserError(unknown_field(f"{path}{key}", owner, source))
    for key in node:
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        child = node[key]
        if isinstance(child, DictConfig):
            _check_fields(child, f"{path}{key}.")


def _raw_value(cfg: DictConfig, key: str | None) -> Any:
    """Return the value at a dotted key as written, with interpolations unresolved."""
    value = OmegaConf.to_container(cfg, resolve=False)
    for name in (key or "").split("."):
        value = value.get(name, "???") if isinstance(value, dict) else "???"
    return value


def to_config(cfg: DictConfig, recorded: Recorded = None) -> Any:
    """Check a composed configuration and return it as plain dataclasses: a `Config`, or a
    `GenerateConfig`.

    The JSON file next to a model's YAML completes the model's configuration. `recorded`: groups or
    fields from a record, which replace all that the command line did not give.

    Raises:
        UserError: a field does not exist, a value is missing or out of its range, or an
            interpolation cannot be resolved.
    """
    # Hydra stores its own state outside the configuration of a job.
    state = HydraConfig.get() if HydraConfig.initialized() else None
    if "hydra" in cfg:
        state = cfg.hydra
        with flag_override(cfg, ["struct", "readonly"], False):
            del cfg["hydra"]
    _check_fields(cfg, "")
    try:
        if recorded:
            plain = to_dict(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
            given = [line.lstrip("+").partition("=")[0] for line in state.overrides.task]
            config = built(overlaid(plain, recorded, given), OmegaConf.get_type(cfg))
        else:
            config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        value = _raw_value(cfg, error.full_key)
        raise UserError(explain(error, [f"{error.full_key}={value}"])) from error
    if isinstance(config, EvaluateConfig):
        config = config.settled()
    if not isinstance(config, (Config, GenerateConfig)):
        raise UserError(
            "the configuration lacks this package's schema: add `schema` to its defaults list"
        )
    published = read_architecture(_folders(state), config.model.name)
    if published is None and state is not None:
        # `model.name=mine` renames the chosen option.
        published = read_architecture(_folders(state), str(state.runtime.choices.get("model")))
    return dataclasses.replace(config, model=complete(config.model, published))


def _folders(state: Any) -> list[Path]:
    """Return the configuration folders; those of `--config-path` and `--config-dir` come first."""
    sources = [] if state is None else state.runtime.config_sources
    return [*(Path(s.path) for s in sources if s.schema == "file"), CONF_DIR]


def to_dict(config: Any) -> Any:
    """Return a configuration (or a part of it) as JSON-able dicts, lists and scalars."""
    if dataclasses.is_dataclass(config):
        return {
            item.name: to_dict(getattr(config, item.name)) for item in dataclasses.fields(config)
        }
    if isinstance(config, Enum):
        return config.value
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    return config


def fingerprint(config: Config) -> str:
    """Return the SHA-256 of all fields of `config` that determine the result (see `EXCLUDED`)."""
    return fingerprint_of(to_dict(config))


def determining(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration (from `to_dict`) that determine the result.

    Drops the fields in `EXCLUDED`, whether present or not, and those of `UNNAMED` that have the
    value of earlier versions; of the rank of experts, how it was chosen.
    """
    tree = copy.deepcopy(settings)
    for dotted in EXCLUDED:
        *parents, name = dotted.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node.pop(name, None)
    method = tree["method"]
    if method.get("expert_rank") is not None:
        method.pop("match_params", None)
        if method["expert_rank"] == method["rank"]:
            del method["expert_rank"]
    if method.get("expert_rank") is None and method.get("expert_alpha") == method.get("alpha"):
        method.pop("expert_alpha", None)
    # An older version had no such fields.
    custom = tree["task"].get("custom")
    for task in custom.values() if isinstance(custom, dict) else ():
        for name, before in LATER_OF_TASKS.items():
            if task.get(name) == before:
                task.pop(name, None)
    for (group, name), before in UNNAMED.items():
        if tree[group].get(name) == before:
            tree[group].pop(name, None)
    return tree


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a configuration that are no groups, by dotted name."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping)
        found |= leaves(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def fingerprint_of(settings: dict[str, Any]) -> str:
    """Return the fingerprint of a configuration in the form of `to_dict` or of a record."""
    tree = determining(settings)
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
