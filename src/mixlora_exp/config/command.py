"""Turns a command line into its runs, one or many, all checked before the first one starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import yaml
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from mixlora_exp.config.architecture import OWN
from mixlora_exp.config.checks import InvalidValue
from mixlora_exp.config.explain import explain, file_of
from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.config.recorded import Recorded
from mixlora_exp.config.resolve import fingerprint, open_session, to_config
from mixlora_exp.config.schema import Config
from mixlora_exp.config.schema_modules import ALL_LINEAR
from mixlora_exp.config.together import check_together, expand, packs_of
from mixlora_exp.errors import UserError, did_you_mean

Settings = TypeVar("Settings")
CHECKED_LATER = (
    "model.config", "method.rank_pattern", "method.alpha_pattern", "method.router_options",
    "method.mixture_options", "method.peft", "trainer.schedule_options",
)  # fmt: skip
"""Fields whose entries are checked by name, but not by the schema."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run: its overrides and the configuration they compose."""

    overrides: tuple[str, ...]
    config: Config


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedJob:
    """One job of a launcher: one cell, or several cells trained together on one base model."""

    overrides: str
    cells: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All runs of a command line; `expanded` is false for a sweeper that picks its own cells.

    `packed`: the overrides that run several cells per job, None if each cell is a separate job;
    `packs`: the cell numbers of each of those jobs. `launcher`: class name of Hydra's launcher."""

    multirun: bool
    expanded: bool
    cells: tuple[Cell, ...]
    packed: tuple[str, ...] | None = None
    packs: tuple[tuple[int, ...], ...] = ()
    launcher: str = ""

    @property
    def jobs(self) -> list[PlannedJob]:
        """The jobs of a sweep, indexed by Hydra's job numbers."""
        packs = self.packs or [(number,) for number in range(len(self.cells))]
        names = [" ".join(cell.overrides) for cell in self.cells]
        return [
            PlannedJob(overrides=" | ".join(names[i] for i in pack), cells=len(pack))
            for pack in packs
        ]


@contextmanager
def _explained(overrides: Sequence[str]) -> Iterator[None]:
    """Convert Hydra's errors about a command line or a file into a `UserError`."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(explain(error, overrides)) from error


def _parse(hydra: Any, overrides: Sequence[str]) -> list[Override]:
    with _explained(overrides):
        return OverridesParser.create(hydra.config_loader).parse_overrides(list(overrides))


@lru_cache(maxsize=1)
def _groups(hydra: Any) -> list[str]:
    """Return the groups of a session, for which Hydra copies its whole repository of files."""
    return hydra.config_loader.list_groups("")


def _check_overrides(hydra: Any, overrides: Sequence[Override], sweep: bool) -> None:
    """Refuse overrides that Hydra accepts or reports unclearly."""
    groups = _groups(hydra)
    for override in overrides:
        key, line = override.key_or_group, override.input_line or ""
        if not key:
            raise UserError(f"{line!r} names no field: write group=option or group.field=value")
        if override.is_sweep_override():
            _check_sweep(override, line, sweep)
            continue
        if override.is_delete():
            if key != "experiment" and not override.is_hydra_override():
                hint = " (tracker=none)" if key == "tracker" else ""
                raise UserError(f"{line}: a setting cannot be deleted, give it another value{hint}")
            continue
        if key not in groups:
            head, slash, _ = key.partition("/")
            if slash and head not in groups:
                raise UserError(f"{line}: there is no group {head!r}{did_you_mean(head, groups)}")
            if not slash:
                continue
        elif override.is_add() or override.is_force_add():
            raise UserError(f"{line}: the group {key} always exists, write {line.lstrip('+')}")
        value = override.value()
        names = value if isinstance(value, list) else [value]
        if not (isinstance(value, dict) or all(isinstance(name, str) for name in names)):
            options = hydra.config_loader.get_group_options(key, ObjectType.CONFIG)
            known = ", ".join(options)
            raise UserError(f"{line} is not valid: choose one option by name ({known})")


def _check_sweep(override: Override, line: str, sweep: bool) -> None:
    if override.is_hydra_override():
        raise UserError(f"{line}: Hydra's own settings cannot be swept, give one value")
    if not sweep:
        raise UserError(
            f"{line} names several values: add -m to run each of them, or write [a,b] for a list"
        )


def load(hydra: Any, name: str, overrides: Sequence[str], mode: RunMode) -> DictConfig:
    """Hydra's configuration over the root `conf/NAME.yaml`, not checked.

    Raises:
        UserError: the command line is not valid.
    """
    with _explained(overrides):
        found = hydra.config_loader.load_configuration(
            config_name=name,
            overrides=list(overrides),
            run_mode=mode,
            validate_sweep_overrides=False,
        )
        # Hydra reads its own settings where an error is a traceback.
        own = [line.lstrip("+~") for line in overrides if line.lstrip("+~").startswith("hydra.")]
        usual = hydra.config_loader.load_configuration(name, [], mode) if own else found
        for line in own:
            key = line.partition("=")[0]
            # Some, such as the number of a job, have a value only later.
            with suppress(InterpolationToMissingValueError):
                _check_kind(line, OmegaConf.select(found, key), OmegaConf.select(usual, key))
    return found


def _check_kind(line: str, value: Any, usual: Any) -> None:
    """Refuse a word where Hydra has an object or a list, and what is no switch for `verbose`."""
    key = line.partition("=")[0]
    if "_target_" in line:
        raise UserError(f"{line}: a plugin of Hydra is chosen by name, as hydra/launcher=NAME")
    if key == "hydra.verbose" and not isinstance(value, bool | str | ListConfig):
        raise UserError(f"{line}: write true, false, or the name of a logger")
    for kind, word in ((DictConfig, "an object"), (ListConfig, "a list")):
        if isinstance(usual, kind) and not isinstance(value, kind):
            group = key.replace(".", "/")
            raise UserError(f"{line}: {key} is {word}; a choice is written {group}=NAME")


def _finish(cfg: DictConfig, overrides: Sequence[str], recorded: Recorded = None) -> Any:
    chosen, name = cfg.hydra.runtime.choices.get("method"), cfg.get("method", {}).get("name")
    typed = any(line.lstrip("+").startswith("method.name=") for line in overrides)
    if typed and name != chosen and (CONF_DIR / "method" / f"{name}.yaml").is_file():
        raise UserError(
            f"method.name={name} would only rename {chosen}: write method={name} to choose it"
        )
    runtime = cfg.hydra.runtime
    with _explained(overrides):
        try:
            return to_config(cfg, recorded)
        except InvalidValue as error:
            if recorded:
                raise
            source = file_of(error.name, error.value, runtime, overrides)
            raise InvalidValue(error.name, error.value, error.rule, source) from error


def opened(overrides: Sequence[str]) -> list[str]:
    """Return the overrides with `++` before those of fields whose entries are checked later,
    with `model=own` before a `model.path` or `model.hub_id` that no model is chosen for, and with
    the list that `method.targets=all-linear` means."""
    bare = [(line, line.lstrip("+")) for line in overrides]
    later = tuple(f"{name}{end}" for name in CHECKED_LATER for end in ".=")
    lines = [f"++{name}" if name.startswith(later) else line for line, name in bare]
    # The field is a list.
    every = {f"method.targets={ALL_LINEAR}": f"method.targets=[{ALL_LINEAR}]"}
    lines = [every.get(line, line) for line in lines]
    fields = {line.partition("=")[0] for line in lines}
    chosen = {"model", "model.name", "model.source", "model.weights"} & fields
    if not chosen and {"model.path", "model.hub_id"} & fields:
        return [f"model={OWN}", *lines]
    return lines


def compose_cell(hydra: Any, name: str, overrides: Sequence[str], recorded: Recorded = None) -> Any:
    """Return the checked configuration of one run over the root `conf/NAME.yaml`; see
    `resolve.to_config` for `recorded`."""
    overrides = opened(overrides)
    _check_overrides(hydra, _parse(hydra, overrides), sweep=False)
    return _finish(load(hydra, name, overrides, RunMode.RUN), overrides, recorded)


def compose(
    overrides: Sequence[str] = (),
    name: str = "config",
    recorded: Recorded = None,
) -> Any:
    """Return the configuration of one command line over the root `conf/NAME.yaml`: a `Config`, or a
    `GenerateConfig` for `generate`; see `resolve.to_config` for `recorded`.

    Raises:
        UserError: the command line is not valid.
    """
    with open_session() as hydra:
        return compose_cell(hydra, name, overrides, recorded)


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """Return the overrides of a command line, parsed with Hydra's grammar.

    Raises:
        UserError: an argument is not of the form name=value.
    """
    with _explained(words):
        return OverridesParser.create().parse_overrides(list(words))


def compose_settings(schema: type[Settings], words: Sequence[str]) -> Settings:
    """Return an instance of the dataclass `schema` with the values given as `name=value`, in
    Hydra's grammar. For commands whose settings are not in `conf/`.

    Raises:
        UserError: a field is unknown, or a value has the wrong type.
    """
    with _explained(words):
        made = OmegaConf.structured(schema)
        for override in parse_overrides(words):
            if override.type is not OverrideType.CHANGE or override.is_sweep_override():
                line = override.input_line
                raise UserError(f"{line} is not valid: write name=value, a list as name=[a,b]")
            made[override.get_key_element()] = override.value()
        return OmegaConf.to_object(made)


def compose_adapters(
    hydra: Any,
    name: str,
    overrides: Sequence[str],
    entries: Sequence[Any],
    recorded: Recorded = None,
) -> list[Config]:
    """Return the configurations of the entries of `adapters=[...]`, checked together."""
    configs = expand(lambda lines: compose_cell(hydra, name, lines, recorded), overrides, entries)
    if len(configs) > 1:
        check_together(configs, [fingerprint(config) for config in configs])
    return configs


def check_composition(hydra: Any, name: str, overrides: Sequence[str]) -> None:
    """Check that the overrides compose, for a command that only shows the configuration."""
    _check_overrides(hydra, _parse(hydra, overrides), sweep=False)
    load(hydra, name, overrides, RunMode.RUN)


def plan_runs(
    hydra: Any,
    name: str,
    overrides: Sequence[str],
    multirun: bool,
    compose_one: Callable[[Any, str, Sequence[str]], Any] = compose_cell,
    load_sweep: Callable[[Any, str, Sequence[str], RunMode], DictConfig] = load,
    recorded: Recorded = None,
) -> Plan:
    """Expand a command line into its runs, as Hydra's own sweeper does, and check each of them.
    `load_sweep` loads the configuration whose node `hydra` describes a sweep, `compose_one` makes
    the configuration of each of its cells; with `recorded` (see `resolve.to_config`),
    `compose_cell` does.

    An experiment file may also request a sweep (`hydra.mode: MULTIRUN` with
    `hydra.sweeper.params`).

    Raises:
        UserError: a run is not valid; the message names the first such cell.
    """
    if recorded:
        compose_one = partial(compose_cell, recorded=recorded)
    parsed = _parse(hydra, overrides)
    _check_overrides(hydra, parsed, sweep=True)
    master = load_sweep(hydra, name, overrides, RunMode.MULTIRUN)
    with _explained(overrides):
        multirun = multirun or master.hydra.mode == RunMode.MULTIRUN
        target = str(master.hydra.sweeper.get("_target_", ""))
        launcher = str(master.hydra.launcher.get("_target_", "")).rpartition(".")[2]
    if not multirun:
        _check_overrides(hydra, parsed, sweep=False)
        config = _finish(master, overrides, recorded)
        configs = [config]
        if config.adapters:
            configs = compose_adapters(hydra, name, overrides, config.adapters, recorded)
        cells = tuple(Cell(overrides=tuple(overrides), config=found) for found in configs)
        return Plan(multirun=False, expanded=True, cells=cells)

    fixed = [line for line in overrides if line.lstrip("+~").startswith("hydra")]
    sweeper = master.hydra.sweeper
    if not target.endswith(".BasicSweeper"):
        base = [o.input_line for o in parsed if not o.is_sweep_override()]
        cell = Cell(overrides=tuple(base), config=compose_one(hydra, name, base))
        return Plan(multirun=True, expanded=False, cells=(cell,), launcher=launcher)

    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    task = [line for line in overrides if line not in fixed]
    swept = _parse(hydra, [*params, *task])
    for override in swept:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise UserError(
                f"{override.input_line} is not a list of values, as Hydra's basic sweeper needs: "
                "write key=1,2 or key=range(1,4)"
            )
    with _explained(overrides):
        # The sweeper's own function, so that the cells checked here are the cells it runs.
        batches = get_class(sweeper._target_).split_arguments(swept, None)
    cells = []
    for lines in batches[0]:
        # Hydra's own jobs compose the lines as they stand.
        for line, open_line in zip(lines, opened(lines)[-len(lines) :], strict=True):
            if line != open_line:
                raise UserError(f"{line} cannot be swept in this form: write {open_line}")
        try:
            config = compose_one(hydra, name, [*fixed, *lines])
        except UserError as error:
            raise UserError(
                f"cell {len(cells) + 1} of {len(batches[0])} ({' '.join(lines)}): {error}; "
                "nothing was started"
            ) from error
        if config.adapters:
            raise UserError(
                "adapters and -m cannot be used together: list all adapters, or sweep with -m and "
                "trainer.pack_adapters=4"
            )
        cells.append(Cell(overrides=tuple(lines), config=config))
    size = cells[0].config.trainer.pack_adapters
    if size == 1:
        return Plan(multirun=True, expanded=True, cells=tuple(cells), launcher=launcher)
    packs = packs_of([cell.config for cell in cells], size)
    return Plan(
        multirun=True,
        expanded=True,
        cells=tuple(cells),
        packed=(*fixed, *_packed(cells, packs, swept)),
        packs=tuple(map(tuple, packs)),
        launcher=launcher,
    )


def _packed(
    cells: Sequence[Cell], packs: Sequence[Sequence[int]], swept: Sequence[Override]
) -> list[str]:
    """Return the sweep rewritten as one over `adapters=[...]`, so that any launcher can run it."""
    keys = [o.get_key_element().lstrip("+") for o in swept if o.is_sweep_override()]
    common = [o.input_line for o in swept if not o.is_sweep_override()]

    def entry(cell: Cell) -> str:
        given = dict(line.lstrip("+").split("=", 1) for line in cell.overrides)
        return "{" + ",".join(f"{key}:{given[key]}" for key in keys) + "}"

    lists = ["[" + ",".join(entry(cells[i]) for i in pack) + "]" for pack in packs]
    return [*common, f"adapters={','.join(lists)}", "hydra.sweeper.params=null"]
