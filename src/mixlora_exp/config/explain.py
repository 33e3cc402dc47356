"""Messages for errors of Hydra and OmegaConf: one line with the field, its value, the way out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from mixlora_exp.config.architecture import old_name
from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.config.schema import Config
from mixlora_exp.config.schema_mixture import METHOD_SCHEMAS, REFUSED
from mixlora_exp.errors import UserError, did_you_mean

WANTED = {"Integer": "a whole number", "Float": "a number"}
_EXAMPLES = (
    "model.config={num_hidden_layers:2}",
    "method.rank_pattern={q_proj:8}",
    "method.alpha_pattern={q_proj:16}",
    "method.router_options={temperature:2}",
    "method.mixture_options={eta:1}",
    "method.peft={r:8}",
    "trainer.schedule_options={num_cycles:3}",
    "+data.train_limits={arc_e:200}",
    "+task.custom={mine:{question:q,options:[o],answer:a,answer_as:letter}}",
)
BY_NAME = {line.lstrip("+").partition("=")[0]: line for line in _EXAMPLES}
"""Fields with entries by name -> an override of each, as an example."""


def _custom_task(name: str) -> str:
    """Return the override that adds a task of this name: Hydra takes `task.custom` as a whole
    alone, because fields of a task have no defaults."""
    return f"'{BY_NAME['task.custom'].replace('{mine:', f'{{{name}:')}'"


def methods_with(name: str) -> list[str]:
    """Return the methods that have a setting, without those made from another method."""
    found = []
    for path in sorted((CONF_DIR / "method").glob("*.yaml")):
        (first, *_) = yaml.safe_load(path.read_text(encoding="utf-8")).get("defaults", [""])
        schema = METHOD_SCHEMAS.get(str(first).strip("/").partition("@")[0])
        if schema is None or name in REFUSED.get(schema, ()):
            continue
        if name in schema.__dataclass_fields__:
            found.append(path.stem)
    return found


def unknown_field(key: str, owner: type | None, source: str = "") -> str:
    """Return the message for a dotted key that the dataclass `owner` does not have."""
    parent, _, name = key.rpartition(".")
    if owner is dict:
        way = _custom_task(name) if parent == "task.custom" else f"+{key}=VALUE"
        return f"{parent} has no entry {name}{source}: add it with {way}"
    if not dataclasses.is_dataclass(owner):
        return f"{key} is not a setting{source}"
    fields = [item.name for item in dataclasses.fields(owner)]
    options = [*fields, "experiment"] if issubclass(owner, Config) else fields
    where = f"{parent} has" if parent else "there are"
    if parent == "model" and (today := old_name(name)) is not None:
        return f"{key} is not a setting{source}: write {today}"
    if parent == "method":
        if name == "target_modules":
            way = "write method.targets, as in method.targets=all-linear"
            return f"{key} is not a setting{source}: {way}"
        where = "the chosen method has"
        if have := methods_with(name):
            return (
                f"{key} is not a setting{source} of this method: {', '.join(have)}, and methods "
                "made from these, have it"
            )
    close = did_you_mean(name, options, prefix=f"{parent}." if parent else "")
    return f"{key} is not a setting{source}{close} ({where}: {', '.join(options)})"


PLUGINS = {
    "joblib": "hydra-joblib-launcher",
    "submitit": "hydra-submitit-launcher",
    "ray": "hydra-ray-launcher",
}
"""Beginning of a launcher's name -> the package that provides it."""


def unknown_option(group: str, option: str, options: Sequence[str], source: str = "") -> str:
    """Return the message for `group=option` when the group has no such option."""
    plugin = next((p for start, p in PLUGINS.items() if option.startswith(start)), None)
    if group.endswith("hydra/launcher") and plugin is not None:
        return f"{group}={option}{source} needs a Hydra plug-in: run `pip install {plugin}`"
    head, slash, folder = group.partition("/")
    here = CONF_DIR / head
    if head == "experiment" and slash and (here / folder).is_dir():
        # Hydra treats the folder as a group, and lists the options of its parent.
        group, option = head, f"{folder}/{option}"
        options = sorted(f"{folder}/{path.stem}" for path in (here / folder).glob("*.yaml"))
        source = ""
    elif head == "experiment" and (here / option).is_dir():
        names = sorted(f"{group}={option}/{path.stem}" for path in (here / option).glob("*.yaml"))
        return f"{group}={option}{source} is a folder: choose one of {', '.join(names)}"
    if not options:
        return f"{group}={option}{source}: there is no group {group!r} in conf/"
    return (
        f"{group}={option}{source} is not an option of {group}"
        f"{did_you_mean(option, options, prefix=f'{group}=')} (options: {', '.join(options)})"
    )


def _root_cause(error: BaseException) -> OmegaConfBaseException | None:
    """Return the OmegaConf error below a Hydra one, innermost first."""
    found: OmegaConfBaseException | None = None
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OmegaConfBaseException) and (found is None or seen.full_key):
            found = seen
        seen = seen.__cause__ or seen.__context__
    return found


def _file(error: BaseException) -> str:
    """Return ` (in FILE.yaml)` for the file that Hydra's message names, or nothing."""
    file = re.match(r"In '([^']+)': ", str(error))
    if file is None or file[1] in ("config", "evaluate", "generate", "hydra/config"):
        return ""
    return f" (in {file[1]}.yaml)"


def _typed(key: str, overrides: Sequence[str]) -> str | None:
    """Return the override that set `key`, a part of it, or a mapping that contains it, without the
    `++` that `command.opened` may have added."""
    plain = re.sub(r"\[\d+\]$", "", key)
    names = {line.partition("=")[0]: line for line in (o.lstrip("+") for o in overrides)}
    inside = (line for name, line in names.items() if name.startswith(f"{plain}."))
    around = (
        line
        for name, line in names.items()
        if plain.startswith(f"{name}.") and line.partition("=")[2].startswith("{")
    )
    return names.get(plain) or next(inside, None) or next(around, None)


def file_of(key: str, value: Any, runtime: Any, overrides: Sequence[str]) -> str:
    """Return ` (in FILE.yaml)` for the chosen experiment, scale, or option of the key's
    group that sets `key` to `value`; nothing if it was typed. runtime: Hydra's `hydra.runtime`."""
    if _typed(key, overrides) is not None:
        return ""
    group, _, inner = key.partition(".")
    folders = [Path(s.path) for s in runtime.config_sources if s.schema == "file"]
    for choice, names in (("experiment", key), ("scale", key), (group, inner)):
        file = f"{choice}/{runtime.choices.get(choice)}.yaml"
        path = next((folder / file for folder in folders if (folder / file).is_file()), None)
        held = None if path is None else yaml.safe_load(path.read_text(encoding="utf-8"))
        for name in names.split("."):
            held = held.get(name) if isinstance(held, dict) else None
        if held is not None and held == value:
            return f" (in {file})"
    return ""


def _explain_value(cause: OmegaConfBaseException, key: str, source: str, line: str | None) -> str:
    """Return the message for a value of the wrong type or form, or outside an enumeration."""
    detail = str(cause).splitlines()[0]
    if wrong := re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", detail):
        options = wrong[2].split(", ")
        given = line or f"{key}={wrong[1]}"
        close = did_you_mean(wrong[1], options)
        return f"{given}{source} is not valid{close} (choose from {wrong[2]})"
    if wrong := re.search(r"Value '(.*)' of type '(\w+)' could not be converted to (\w+)", detail):
        given = line or f"{key}={wrong[1]}"
        wanted = WANTED.get(wrong[3], wrong[3])
        return f"{given}{source} is not valid: expected {wanted}, got {wrong[1]!r} ({wrong[2]})"
    if wrong := re.search(r"Value '(.*)' is not a valid bool", detail):
        return f"{line or f'{key}={wrong[1]}'}{source} is not valid: expected true or false"
    if "is not Optional" in detail:
        return f"{line or f'{key}=null'}{source} is not valid: null is not allowed here"
    mixed = "Cannot merge DictConfig with ListConfig" in detail
    if key in BY_NAME and (mixed or detail.startswith("Cannot assign ")):
        example = f"expected entries by name, as in '{BY_NAME[key]}'"
        return f"{line or key}{source} is not valid: {example}"
    if mixed or "is not a ListConfig" in detail:
        return f"{line or key}{source} is not valid: expected a list, as in {key}=[a,b]"
    return f"{line or key or 'configuration'}{source} is not valid: {detail}"


def _explain_omegaconf(
    cause: OmegaConfBaseException, error: BaseException, overrides: Sequence[str]
) -> str:
    key = cause.full_key or ""
    source = _file(error)
    if "is not a subclass of CustomTask" in str(cause):  # Its key is the name of the task alone.
        given = _typed(f"task.custom.{key}", overrides) or f"task.custom.{key}"
        return f"{given}{source} is not valid: add the task with {_custom_task(key)}"
    line = None if source else _typed(key, overrides)
    if isinstance(cause, MissingMandatoryValue):
        return f"{key}=??? has no value{source}: set {key}=VALUE"
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
        if key == "experiment" and source:
            return f"{source[5:-1]} must begin with the line `# @package _global_`"
        if line is not None:
            source = f" (given as {line!r})"
        return unknown_field(key, cause.object_type, source)
    if dereferenced := re.search(r"interpolation '(.+?)': (.*)", str(cause)):
        return f"{line or f'{key}={dereferenced[1]}'}{source} is not valid: {dereferenced[2]}"
    return _explain_value(cause, key, source, line)


def _explain_grammar(error: OverrideParseException) -> str:
    reasons = [line for line in error.message.splitlines() if line.strip()]
    reason = next((x for x in reasons if not x.startswith(("Error parsing", "See https"))), "")
    key, equals, value = error.override.partition("=")
    hint = f"""; quote special characters: '{key}="{value}"'""" if equals and value else ""
    if not equals:
        files = CONF_DIR.glob("*/*.yaml")
        groups = sorted({path.parent.name for path in files if path.stem == key})
        if groups:
            hint = f"; did you mean {' or '.join(f'{group}={key}' for group in groups)}?"
    return (
        f"{error.override!r} cannot be read as group=option or group.field=value ({reason}){hint}"
    )


def _explain_missing(error: MissingConfigException, overrides: Sequence[str]) -> str:
    path = error.missing_cfg_file or ""
    group, _, option = path.rpartition("/")
    if not group:
        return f"--config-name={path}: there is no such file in the configuration folder"
    source = _file(error)
    if not source and not any(line.startswith(f"{group}=") for line in overrides):
        experiment = next((line for line in overrides if line.startswith("experiment=")), None)
        source = f" (set by {experiment})" if experiment else ""
    return unknown_option(group, option, error.options or (), source)


def _one_line(error: BaseException) -> str:
    return re.sub(r"\s*\n\s*", " ", str(error).strip())


def explain(error: BaseException, overrides: Sequence[str] = ()) -> str:
    """Return a one-line message for a composition error; `overrides`: the typed ones."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OverrideParseException):
        return _explain_grammar(error)
    if isinstance(error, MissingConfigException):
        return _explain_missing(error, overrides)
    if isinstance(error, yaml.YAMLError):
        return f"a YAML file cannot be read: {_one_line(error)}"
    cause = _root_cause(error)
    if cause is not None:
        return _explain_omegaconf(cause, error, overrides)
    if wrong := re.search(r"Could not override '([^'@]+)'\. No match", str(error)):
        groups = [item.name for item in dataclasses.fields(Config)]
        return f"override {wrong[1]}{_file(error)} names no group{did_you_mean(wrong[1], groups)}"
    return _one_line(error)
