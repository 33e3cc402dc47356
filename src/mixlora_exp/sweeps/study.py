"""A search's study on disk: an SQLite file with its trials and their common settings."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import OptunaError
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from mixlora_exp.config.resolve import leaves
from mixlora_exp.errors import UserError

MADE_WITH, REASON, REPORTED = "made_with", "reason", "reported"
"""Attributes: the common settings of a study's trials; the reason of a failed trial (a failed trial
without one was interrupted); what the interrupted trial that a trial repeats had reported."""

STORAGE_ERRORS = (OptunaError, SQLAlchemyError)
SHOWN = 4
"""Maximum number of differing settings in a message."""


@contextmanager
def convert_storage_errors(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Convert errors of the study's file within the context into one `UserError`; `more`: further
    exception types to convert.

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
            f"study={path.stem}: {path} cannot be used ({reason}): restore it from a copy, or move "
            "it away to start a new study (finished runs are not repeated)"
        ) from error


def open_study(path: Path, prune_after: int) -> optuna.Study:
    """Return the study in the file `path`, created or resumed.

    Raises:
        UserError: the file cannot be read or written.
    """
    # Not in a URL, in which versions of SQLAlchemy parse special characters differently.
    connect = {"creator": lambda: sqlite3.connect(path, check_same_thread=False)}
    # Optuna also raises these for a file of another version or with other content.
    with convert_storage_errors(path, RuntimeError, ValueError):
        return optuna.create_study(
            study_name=path.stem,
            storage=RDBStorage("sqlite://", engine_kwargs=connect),
            load_if_exists=True,
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=prune_after),
        )


def require_same(study: optuna.Study, settings: Mapping[str, Any]) -> None:
    """Store the trials' common settings in a new study, or compare them with the stored ones.

    Raises:
        UserError: the study has trials with other settings.
    """
    now = leaves(json.loads(json.dumps(settings)))
    if MADE_WITH not in study.user_attrs:
        if study.get_trials(deepcopy=False):
            raise UserError(
                f"study={study.study_name} does not contain the settings of its trials: give study "
                "another name"
            )
        study.set_user_attr(MADE_WITH, settings)
        return
    then = leaves(study.user_attrs[MADE_WITH])
    differing = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if differing:
        shown = differing[:SHOWN]
        differences = [_difference(name, then.get(name), now.get(name)) for name in shown]
        more = len(differing) - SHOWN
        raise UserError(
            f"study={study.study_name} has trials with other settings: {'; '.join(differences)}"
            f"{f'; and {more} more' if more > 0 else ''}. Give study another name, or repeat its "
            "settings"
        )


def _difference(name: str, then: Any, now: Any) -> str:
    if name.startswith("inputs."):
        # The values are hashes, which mean nothing to a user.
        return f"{name.removeprefix('inputs.')} differs"
    values = ["null" if value is None else value for value in (then, now)]
    return f"{name}={values[0]}, now {values[1]}"


def enqueue_cut_off(study: optuna.Study, searched: Iterable[str]) -> None:
    """Enqueue trials that were interrupted in an earlier start again, with their settings; their
    runs resume from their checkpoints. searched: names of the settings; a trial that does not have
    all of them has not begun, and the next one draws them anew."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.params.keys() >= set(searched):
            earlier = trial.user_attrs.get(REPORTED, {})
            reported = {**earlier, **{str(k): v for k, v in trial.intermediate_values.items()}}
            study.enqueue_trial(trial.params, user_attrs={REPORTED: reported})
        study.tell(trial.number, state=TrialState.FAIL)


def next_trial(study: optuna.Study, seed: int) -> optuna.Trial:
    """Begin a trial. Its settings follow from `seed` and the trials that ended, so that a search
    which was interrupted has the trials of one that was not."""
    digest = hashlib.sha256(f"{seed} {len(ended(study))}".encode()).digest()
    study.sampler = TPESampler(seed=int.from_bytes(digest[:4]))
    trial = study.ask()
    # The pruner compares all reports, and a resumed run makes only the later ones.
    for step, value in trial.user_attrs.get(REPORTED, {}).items():
        trial.report(value, int(step))
    return trial


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that ended: finished, pruned, or failed with a reason (not interrupted)."""
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    found = study.get_trials(deepcopy=False, states=states)
    return [t for t in found if t.state is not TrialState.FAIL or REASON in t.user_attrs]
