"""A search over the router-loss coefficient, the learning rate and other numbers, with Optuna.

Each trial is an ordinary run under its fingerprint: if the search is killed, the next start repeats
the interrupted trial, whose run resumes from its checkpoint. Settings are chosen on held-out
training rows, never on a test set.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from statistics import mean
from typing import Any

import optuna
from optuna.trial import TrialState
from safetensors import SafetensorError

from mixlora_exp.config.checks import require_name, require_short
from mixlora_exp.config.command import compose
from mixlora_exp.config.resolve import determining, to_dict
from mixlora_exp.config.schema import Config, MixLoraMethodConfig, Protocol
from mixlora_exp.errors import NotEnoughMemory, UserError
from mixlora_exp.records.record import read_record
from mixlora_exp.runs.inputs import comparable, gather_inputs, resolve_config
from mixlora_exp.runs.ownership import GivenUp, LostRun
from mixlora_exp.sweeps.study import (
    REASON,
    REPORTED,
    STORAGE_ERRORS,
    convert_storage_errors,
    ended,
    enqueue_cut_off,
    next_trial,
    open_study,
    require_same,
)
from mixlora_exp.system.console import echo
from mixlora_exp.system.runlock import RunLock
from mixlora_exp.system.signals import Terminated, requested

COEFFICIENT, RATE = "method.router_loss_coef", "trainer.learning_rate"
OWN = {
    COEFFICIENT: "set coef_low and coef_high",
    RATE: "set rate_low and rate_high",
    "evaluation.held_out": "a search always scores held-out rows",
}
"""Fields that the search sets -> hint for messages."""
LIKELIHOOD = (Protocol.label_logits, Protocol.answer_text)
Train = Callable[[Config, Callable[[int, float], None]], Path]


class Postponed(UserError):
    """A trial cannot run now; the next start of the search repeats it."""


@dataclass(slots=True, kw_only=True)
class SearchSettings:
    """Settings of a search. `study`: its name and that of its SQLite file in `output_dir`.
    `trials`: total number of finished, pruned and failed trials over all starts. Ranges are
    searched on a logarithmic scale."""

    study: str = "search"
    trials: int = 20
    output_dir: str = "outputs"
    coef_low: float = 1e-4
    coef_high: float = 1e-1
    rate_low: float = 5e-5
    rate_high: float = 1e-3
    seed: int = 0
    prune_after: int = 5
    """Number of complete trials before any is pruned."""
    ranges: list[str] = field(default_factory=list)
    """Further fields to search, each as `name=low:high`, such as `method.dropout=0.01:0.2`;
    integers if both limits are integers."""

    def __post_init__(self) -> None:
        require_name("study", self.study)
        # SQLite's journal has the longest name that is made of it.
        require_short("study", self.study, ending=".db-journal")
        require_short("output_dir", self.output_dir)
        for low, high in (("coef_low", "coef_high"), ("rate_low", "rate_high")):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise UserError(
                    f"{low}={getattr(self, low)} is not valid: it must be above 0 and below {high}="
                    f"{getattr(self, high)}"
                )
            if not isfinite(getattr(self, high)):
                raise UserError(f"{high}={getattr(self, high)} is not valid: it must be finite")
        self.space()
        for name, least in (("trials", 1), ("prune_after", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} is not valid: it must be >= {least}")

    def space(self) -> dict[str, tuple[float, float]]:
        """Return (low, high) of each searched field, by its dotted name.

        Raises:
            UserError: a range is not valid.
        """
        found: dict[str, tuple[float, float]] = {
            COEFFICIENT: (self.coef_low, self.coef_high),
            RATE: (self.rate_low, self.rate_high),
        }
        for text in self.ranges:
            name, _, limits = text.partition("=")
            try:
                low, high = (float(v) if set(v) & set(".e") else int(v) for v in limits.split(":"))
            except ValueError:
                low = high = 0
            sound = 0 < low < high < float("inf") and "." in name
            if not sound or name in found or name in OWN:
                raise UserError(
                    f"ranges: {text} is not valid: give name=low:high with 0 < low < high, such as "
                    "method.dropout=0.01:0.2, each field once"
                )
            found[name] = (low, high)
        return found

    @property
    def folder(self) -> Path:
        """`output_dir` as a path."""
        return Path(self.output_dir).expanduser()


def score_of(record: Mapping[str, Any]) -> float:
    """Return the mean log-likelihood (nats) of the gold answer over tasks and protocols, which
    changes even where accuracy stays at chance.

    Raises:
        UserError: a score has no finite log-likelihood.
    """
    found = [score["gold_log_likelihood"] for score in record["scores"]]
    if not found or None in found:
        raise UserError("the run's scores have no finite log-likelihood of the gold answer")
    return mean(found)


def search(settings: SearchSettings, overrides: Sequence[str], train: Train) -> optuna.Study:
    """Run trials until `settings.trials` have ended. `train(config, watch)` executes a run and
    returns the path of its record; `watch` raises `GivenUp` to prune it.

    A failed trial is stored with its reason, and the next one follows. A trial that is interrupted,
    or cannot run on this machine now, is repeated with its settings by the next start.

    Raises:
        UserError: the overrides are not valid, the study cannot be used or has trials with other
            settings, another process is searching it, a trial cannot run (memory, disk), or all
            trials failed.
    """
    space = settings.space()
    config = _checked(settings, overrides)
    made_with = _made_with(config, space)
    _make_folder(settings)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = settings.folder / f"{settings.study}.db"
    held = RunLock(settings.folder / f".{settings.study}.lock")
    with held as lock, convert_storage_errors(path):
        if not lock.acquire():
            raise UserError(
                f"study={settings.study} is in use by another process: give study another name, or "
                "wait until it is done"
            )
        study = open_study(path, settings.prune_after)
        require_same(study, made_with)
        enqueue_cut_off(study, space)
        while len(ended(study)) < settings.trials:
            if requested():
                # The stop was requested while a run was ending by itself.
                raise Terminated
            _carry_out(study, settings, overrides, train, lock)
        trials = ended(study)
        if not any(trial.state is TrialState.COMPLETE for trial in trials):
            reasons = [t.user_attrs[REASON] for t in trials if REASON in t.user_attrs]
            raise UserError(
                f"study={settings.study}: all {len(trials)} trials failed, the last one with: "
                f"{reasons[-1]} (once that is fixed, raise trials={settings.trials} or give study "
                "another name)"
            )
    return study


def _checked(settings: SearchSettings, overrides: Sequence[str]) -> Config:
    """Return the configuration of all trials, except for the searched fields.

    Raises:
        UserError: it is not valid, or a search cannot use it.
    """
    for line in overrides:
        name = line.lstrip("+").partition("=")[0]
        if name in OWN:
            raise UserError(f"{line}: a search sets {name} itself; leave it out ({OWN[name]})")
        if name in settings.space():
            raise UserError(f"{line}: ranges also contains {name}; leave one of them out")
    low = [f"{name}={limits[0]}" for name, limits in settings.space().items() if name not in OWN]
    config = compose([*overrides, *low])
    if config.dry_run:
        raise UserError("dry_run=true is not supported by search: leave it out, or use train.py")
    if config.adapters:
        raise UserError(
            "adapters=[...] is not supported by search, which trains one adapter at a time: leave "
            "it out"
        )
    if not isinstance(config.method, MixLoraMethodConfig):
        raise UserError(
            f"method={config.method.name} has no router-loss coefficient to search: use "
            "method=mixlora or method=mixdora"
        )
    for protocol in config.evaluation.protocols:
        if protocol not in LIKELIHOOD:
            raise UserError(
                f"evaluation.protocols={protocol.value} gives no likelihood of an answer, which a "
                "search compares: use label_logits or answer_text"
            )
    return _scored_on_held_out(settings, config)


def _scored_on_held_out(settings: SearchSettings, config: Config) -> Config:
    evaluation = dataclasses.replace(config.evaluation, held_out=True)
    return dataclasses.replace(config, output_dir=settings.output_dir, evaluation=evaluation)


def _made_with(config: Config, space: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings and inputs that determine a score, without the searched fields."""
    config = resolve_config(config)
    settings = determining(to_dict(config))
    for dotted in space:
        group, _, name = dotted.partition(".")
        settings[group].pop(name, None)
    return {**settings, "inputs": comparable(gather_inputs(config).identity)}


def _make_folder(settings: SearchSettings) -> None:
    reason = ""
    try:
        settings.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
    if reason or not os.access(settings.folder, os.W_OK):
        raise UserError(
            f"output_dir={settings.output_dir} cannot be written "
            f"({reason or 'Permission denied'}): choose another folder"
        )


def _carry_out(
    study: optuna.Study,
    settings: SearchSettings,
    overrides: Sequence[str],
    train: Train,
    lock: RunLock,
) -> None:
    """Run one trial and store its result in the study; an interrupted trial stays "running".

    Raises:
        UserError: the trial cannot run now, or another process has taken over the study.
    """
    trial = next_trial(study, settings.seed)
    reported = set(trial.user_attrs.get(REPORTED, {}))
    for name, (low, high) in settings.space().items():
        suggest = trial.suggest_int if isinstance(low, int) else trial.suggest_float
        suggest(name, low, high, log=True)
    chosen = [f"{name}={value!r}" for name, value in trial.params.items()]
    config = _scored_on_held_out(settings, compose([*overrides, *chosen]))

    def watch(step: int, loss: float) -> None:
        if str(step) not in reported:
            # Larger is better, as for the score.
            trial.report(-loss, step)
        if trial.should_prune():
            raise GivenUp

    score, reason, crash = None, None, None
    try:
        score = score_of(read_record(train(config, watch)))
    except GivenUp:
        pass
    except STORAGE_ERRORS:
        raise
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"output_dir={settings.output_dir}: a trial's files cannot be written or read "
            f"({error}); once that is fixed, the same command resumes"
        ) from error
    except UserError as error:
        if not _by_its_settings(error):
            raise
        reason = " ".join(str(error).split())
    except Exception as error:
        # Stored before raising: otherwise the next start would crash in the same trial.
        crash, reason = error, " ".join(f"{type(error).__name__}: {error}".split())
    if lock.lost.is_set():
        raise UserError(
            f"study={settings.study}: another process took over this search, because this one did "
            "not respond for a while; the search continues there"
        )
    if reason is None:
        study.tell(trial, score, TrialState.PRUNED if score is None else TrialState.COMPLETE)
        return
    trial.set_user_attr(REASON, reason)
    study.tell(trial, state=TrialState.FAIL)
    if crash is not None:
        raise crash
    values = " ".join(f"{name}={value:.3g}" for name, value in trial.params.items())
    echo(f"Trial {trial.number} failed with {values}: {reason}")


def _by_its_settings(error: UserError) -> bool:
    """Return whether a trial may have failed because of its searched values. Insufficient memory,
    file errors and runs of other processes affect any trial, and can be fixed."""
    elsewhere = isinstance(error, (Postponed, NotEnoughMemory, LostRun))
    return not elsewhere and not isinstance(error.__cause__, (OSError, SafetensorError))
