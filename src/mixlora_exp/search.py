"""A search over the router-loss coefficient and the learning rate, with Optuna.

Each trial is a run like any other, under its fingerprint: killed, the search goes on with the same
trials, and a run that was under way continues from its checkpoint. Settings are chosen on training
rows that training leaves out, never on a test set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from mixlora_exp.config import Config, compose
from mixlora_exp.errors import UserError
from mixlora_exp.results.record import read_record
from mixlora_exp.runlock import RunLock

__all__ = ["SearchSettings", "open_study", "score_of", "search"]

COEFFICIENT, RATE = "method.router_loss_coef", "trainer.learning_rate"
Train = Callable[[Config, Callable[[int, float], None]], Path]


@dataclass(slots=True, kw_only=True)
class SearchSettings:
    """`study`: its name and, under `output_dir`, its SQLite file. `trials`: finished or pruned ones
    in all, over all starts. Ranges are searched on a logarithmic scale."""

    study: str = "search"
    trials: int = 20
    output_dir: str = "outputs"
    coef_low: float = 1e-4
    coef_high: float = 1e-1
    rate_low: float = 5e-5
    rate_high: float = 1e-3
    seed: int = 0
    prune_after: int = 5
    """Trials that run whole before any is pruned."""

    def __post_init__(self) -> None:
        for low, high in (("coef_low", "coef_high"), ("rate_low", "rate_high")):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise UserError(
                    f"{low}={getattr(self, low)} must be above 0 and below {high}="
                    f"{getattr(self, high)}"
                )
        if self.trials < 1:
            raise UserError(f"trials={self.trials} must be >= 1")


def score_of(record: Mapping[str, Any]) -> float:
    """The mean log-likelihood of the gold answer over tasks and protocols: it moves where accuracy
    sits at chance.

    Raises:
        UserError: a protocol does not give it.
    """
    found = [score["gold_log_likelihood"] for score in record["scores"]]
    if not found or None in found:
        raise UserError(
            "evaluation.protocols: a search needs protocols with a likelihood, label_logits or "
            "answer_text"
        )
    return mean(found)


def open_study(settings: SearchSettings) -> optuna.Study:
    """The study, made or continued. Trials that another start left unfinished are asked for again
    with the same settings, so that their runs go on."""
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    storage = RDBStorage(f"sqlite:///{folder / settings.study}.db")
    study = optuna.create_study(
        study_name=settings.study,
        storage=storage,
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=settings.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=settings.prune_after),
    )
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params, skip_if_exists=False)
    return study


def _finished(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.PRUNED]))


def search(settings: SearchSettings, overrides: Sequence[str], train: Train) -> optuna.Study:
    """Run trials until there are `settings.trials`. `train(config, watch)` carries out a run and
    returns the path of its record.

    Raises:
        UserError: the overrides are not valid, a run failed for a reason that the user can mend, or
            another process searches this study.
    """
    with RunLock(Path(settings.output_dir) / f".{settings.study}.lock") as lock:
        if not lock.acquire():
            raise UserError(
                f"study={settings.study}: another process searches it; give this one another name, "
                "or wait"
            )
        return _search(settings, overrides, train)


def _search(settings: SearchSettings, overrides: Sequence[str], train: Train) -> optuna.Study:
    base = [*overrides, f"output_dir={settings.output_dir}", "evaluation.held_out=true"]
    # A mistake is told before any trial begins.
    compose(base)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = open_study(settings)

    def objective(trial: optuna.Trial) -> float:
        coefficient = trial.suggest_float(
            COEFFICIENT, settings.coef_low, settings.coef_high, log=True
        )
        rate = trial.suggest_float(RATE, settings.rate_low, settings.rate_high, log=True)
        config = compose([*base, f"{COEFFICIENT}={coefficient!r}", f"{RATE}={rate!r}"])

        def watch(step: int, loss: float) -> None:
            # Larger is better, as for the score.
            trial.report(-loss, step)
            if trial.should_prune():
                raise optuna.TrialPruned

        return score_of(read_record(train(config, watch)))

    while _finished(study) < settings.trials:
        study.optimize(objective, n_trials=1)
    return study
