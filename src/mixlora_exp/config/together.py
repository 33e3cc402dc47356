"""Several adapters trained together: from a list on the command line to one configuration each.

Every entry is the run that its settings would be alone: same fingerprint, same folder, same record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mixlora_exp.config.schema import (
    Config,
    LoraMethodConfig,
    MethodConfig,
    ModelSource,
    TrainedMethodConfig,
    Weights,
)
from mixlora_exp.config.typed import literal
from mixlora_exp.errors import UserError


def entry_overrides(entry: Any, number: int) -> list[str]:
    """Return the overrides of one entry of `adapters`: a method's name or a mapping of settings.

    Raises:
        UserError: the entry is neither a name nor a mapping of settings.
    """
    if isinstance(entry, str):
        return [f"method={entry}"]
    if not isinstance(entry, Mapping) or not entry:
        raise UserError(
            f"adapters: entry {number} is {entry!r}: give a method's name, or settings as "
            "{method:lora,method.rank:8,task:arc_e}"
        )
    found = []
    for key, value in entry.items():
        if str(key).partition(".")[0] == "adapters":
            raise UserError(
                f"adapters: entry {number} contains adapters={value}: list them one by one"
            )
        # `trainer: {learning_rate: 1e-4}` in a file means `trainer.learning_rate`; a field of a
        # group may itself have entries by name.
        if isinstance(value, Mapping) and "." not in str(key):
            # `name` chooses the option, as `method: lora` does.
            if "name" in value:
                found.append(f"{key}={value['name']}")
            fields = {field: held for field, held in value.items() if field != "name"}
            found += [f"{key}.{field}={literal(held)}" for field, held in fields.items()]
        elif key == "task" and isinstance(value, (list, tuple)):
            raise UserError(
                f"adapters: entry {number} has task={list(value)}: a mix of tasks is written "
                "task: multi, or task.train: [...]"
            )
        else:
            found.append(f"{key}={literal(value)}")
    return found


def shared_settings(config: Config) -> dict[str, Any]:
    """Return the settings that all adapters on one base model must share, by field."""
    drawn = config.model.weights is Weights.random or (
        config.model.path is None and config.model.source is ModelSource.random
    )
    return {
        "model": config.model,
        "kernel": config.kernel,
        "output_dir": config.output_dir,
        "dry_run": config.dry_run,
        "trainer.precision": config.trainer.precision,
        "trainer.optim": config.trainer.optim,
        "trainer.head": config.trainer.head,
        "trainer.gradient_checkpointing": config.trainer.gradient_checkpointing,
        # A random base model is drawn from the seed.
        **({"seed": config.seed} if drawn else {}),
    }


def shares_a_base(method: MethodConfig) -> bool:
    """Return whether adapters of a method can be trained with others on one base model. PEFT's own
    types cannot, nor those that need a pass without any adapter."""
    return isinstance(method, LoraMethodConfig) and not method.needs_base_gradient


def check_together(configs: Sequence[Config], names: Sequence[str]) -> None:
    """Check that runs can share one base model; `names` are their fingerprints.

    Raises:
        UserError: an entry has no adapter, two entries are the same run, or shared settings differ.
    """
    first = shared_settings(configs[0])
    for number, config in enumerate(configs, start=1):
        if isinstance(config.method, TrainedMethodConfig) and not shares_a_base(config.method):
            raise UserError(
                f"adapters: entry {number} has method={config.method.name}, which cannot share a "
                "base model with others: train it alone"
            )
        if not isinstance(config.method, LoraMethodConfig) and config.adapter is None:
            raise UserError(
                f"adapters: entry {number} has method={config.method.name} and no adapter: choose "
                "a method that trains one, or name the adapter=DIR to score"
            )
        for field, value in shared_settings(config).items():
            if value != first[field]:
                reason = " (a random base model is drawn from it)" if field == "seed" else ""
                raise UserError(
                    f"adapters: entry {number} has a different {field} than entry 1: all adapters "
                    f"share one base model{reason}; give it once, outside adapters"
                )
        if names.index(names[number - 1]) != number - 1:
            raise UserError(
                f"adapters: entries {names.index(names[number - 1]) + 1} and {number} are the same "
                "run: leave one out, or give them different seeds"
            )


def expand(
    compose: Callable[[Sequence[str]], Config], overrides: Sequence[str], entries: Sequence[Any]
) -> list[Config]:
    """Return one configuration per entry: the command line followed by the entry's settings.

    Raises:
        UserError: an entry is not valid; the message names it.
    """
    base = [line for line in overrides if line.lstrip("+").partition("=")[0] != "adapters"]
    # Overrides a list in an experiment file.
    base.append("adapters=[]")
    found = []
    for number, entry in enumerate(entries, start=1):
        own = entry_overrides(entry, number)
        # Hydra refuses a field that is given twice.
        given = {line.partition("=")[0] for line in own}
        kept = [line for line in base if line.lstrip("+").partition("=")[0] not in given]
        try:
            found.append(compose([*kept, *own]))
        except UserError as error:
            raise UserError(f"adapters: entry {number} ({' '.join(own)}): {error}") from error
    return found


def packs_of(configs: Sequence[Config], size: int) -> list[list[int]]:
    """Return the cell numbers of a sweep, grouped into packs of at most `size` cells that can share
    a base model; each pack keeps the sweep's order."""
    packs: list[list[int]] = []
    for i, config in enumerate(configs):
        shares = shares_a_base(config.method)
        for pack in packs:
            other = configs[pack[0]]
            fits = shares and shares_a_base(other.method)
            if fits and len(pack) < size and shared_settings(config) == shared_settings(other):
                pack.append(i)
                break
        else:
            packs.append([i])
    return packs
