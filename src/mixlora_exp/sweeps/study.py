"""A search's study on disk: an SQLite file that says what was tried, under which settings."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import OptunaError
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from mixlora_exp.errors import UserError

__all__ = [
    "REASON",
    "STORAGE_ERRORS",
    "ended",
    "enqueue_cut_off",
    "open_study",
    "require_same",
    "storage_told",
]

MADE_WITH, REASON = "made_with", "reason"
"""Of a study: the settings of its trials. Of a failed trial: why; one without was cut off."""

STORAGE_ERRORS = (OptunaError, SQLAlchemyError)
SHOWN = 4
"""Differing settings that are told one by one."""


@contextmanager
def storage_told(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Within this context a study file that fails is told in one line; `more`: other exceptions
    that mean it.

    Raises:
        UserError: the file is damaged, locked or cannot be written.
    """
    try:
        yield
    except (*STORAGE_ERRORS, *more) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise UserError(
            f"study={path.stem}: {path} cannot be used ({reason}): bring it back from a copy, or "
            "move it away to begin anew (finished runs are not repeated)"
        ) from error


def open_study(path: Path, seed: int, prune_after: int) -> optuna.Study:
    """The study of that file and of its name, made or continued.

    Raises:
        UserError: the file cannot be read or written.
    """
    # Not in the URL: versions of SQLAlchemy read odd characters in it differently.
    connect = {"creator": lambda: sqlite3.connect(path, check_same_thread=False)}
    # Beside errors of its own, Optuna raises these for a file of another version or content.
    with storage_told(path, RuntimeError, ValueError):
        study = optuna.create_study(
            study_name=path.stem,
            storage=RDBStorage("sqlite://", engine_kwargs=connect),
            load_if_exists=True,
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=prune_after),
        )
        # With the seed alone, each start would draw the trials of the first one again.
        study.sampler = TPESampler(seed=seed + len(study.get_trials(deepcopy=False)))
        return study


def require_same(study: optuna.Study, settings: Mapping[str, Any]) -> None:
    """Note the settings that the trials have in common, or compare with those noted.

    Raises:
        UserError: the study has trials of other settings.
    """
    now = _flat(json.loads(json.dumps(settings)))
    if MADE_WITH not in study.user_attrs:
        if study.get_trials(deepcopy=False):
            raise UserError(
                f"study={study.study_name} does not say which settings its trials had: give "
                "study another name"
            )
        study.set_user_attr(MADE_WITH, settings)
        return
    then = _flat(study.user_attrs[MADE_WITH])
    differing = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if differing:
        told = [_difference(name, then.get(name), now.get(name)) for name in differing[:SHOWN]]
        more = len(differing) - SHOWN
        raise UserError(
            f"study={study.study_name} has trials of other settings: {'; '.join(told)}"
            f"{f'; and {more} more' if more > 0 else ''}. Give study another name, or the "
            "settings that it was made with"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        found |= {f"{prefix}{name}": value} if inner is None else inner
    return found


def _difference(name: str, then: Any, now: Any) -> str:
    if name.startswith("inputs."):
        # Hashes tell nobody anything.
        return f"{name.removeprefix('inputs.')} differs"
    values = ["null" if value is None else value for value in (then, now)]
    return f"{name}={values[0]}, now {values[1]}"


def enqueue_cut_off(study: optuna.Study) -> None:
    """Let the trials that an earlier start was cut off in be made again, with their settings: their
    runs resume from their checkpoints."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.params:
            study.enqueue_trial(trial.params)
        study.tell(trial.number, state=TrialState.FAIL)


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that came to an end of their own: finished, pruned, or failed for a reason."""
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    found = study.get_trials(deepcopy=False, states=states)
    return [t for t in found if t.state is not TrialState.FAIL or REASON in t.user_attrs]
