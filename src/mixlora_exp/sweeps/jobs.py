"""A job of Hydra's, in whatever process a launcher runs it: one run, or several on one base."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mixlora_exp.config import Config, compose_adapters, open_session, to_config
from mixlora_exp.errors import PackError, UserError
from mixlora_exp.sweeps.ledger import Ledger
from mixlora_exp.system.signals import Terminated, heeded

__all__ = ["SWEEP", "Failure", "Outcome", "duration", "run_cell", "run_one", "run_single"]

NOT_FOR_A_CELL = ("hydra.mode", "hydra.sweep", "hydra.job")
"""What Hydra adds to the overrides of a job of a sweep."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A job of a sweep that did not finish."""

    overrides: str
    message: str
    crashed: bool
    """True for an error of the program's, false for a request that cannot be carried out."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the runs of a job; there are several where adapters are packed."""

    done: int = 0
    alone: int = 0
    """Left alone: another process works on them."""
    failed: int = 0
    failure: Failure | None = None
    stopped: bool = False
    """Asked to end before it was through."""


@dataclass(slots=True)
class Sweep:
    """How far a sweep of this process is. In the processes of other launchers nothing is known."""

    runs: int = 0
    started: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)

    def begin(self, runs: int) -> None:
        """Count anew: a sweep of so many jobs starts now."""
        self.runs, self.started, self.outcomes = runs, time.monotonic(), []

    def heading(self, number: int) -> str:
        """Which run begins, and how long the others may take if they are like those before."""
        if not self.runs:
            return f"run {number}"
        passed, done = time.monotonic() - self.started, number - 1
        left = passed / done * (self.runs - done) if done else 0.0
        shown = f" ({duration(passed)} passed, about {duration(left)} left)" if done else ""
        return f"run {number} of {self.runs}{shown}"


SWEEP = Sweep()


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def run_one(cfg: DictConfig) -> Outcome:
    """Carry out one composed configuration (a task function of Hydra's)."""
    config = _grouped(to_config(cfg))
    # Imported late, so that a mistake on the command line is told before torch is loaded.
    if config.adapters:
        from mixlora_exp.runs.together import run_together

        runs, done = len(config.adapters), len(run_together(_adapters_of(config)))
    else:
        from mixlora_exp.runs.run import run

        runs, done = 1, int(run(config) is not None)
    return Outcome(done=runs) if config.dry_run else Outcome(done=done, alone=runs - done)


def _grouped(config: Config) -> Config:
    """With the experiment's name for trackers, so that the runs of a sweep stand together."""
    choice = HydraConfig.get().runtime.choices.get("experiment")
    if choice is None or config.tracker.group is not None:
        return config
    return replace(config, tracker=replace(config.tracker, group=str(choice)))


def _adapters_of(config: Config) -> list[Config]:
    """The runs that a job with `adapters=[...]` stands for."""
    job = HydraConfig.get()
    overrides = [*job.overrides.hydra, *job.overrides.task]
    kept = [line for line in overrides if not line.lstrip("+~").startswith(NOT_FOR_A_CELL)]
    folder = next(s.path for s in job.runtime.config_sources if s.provider == "main")
    with ExitStack() as stack:
        # A launcher's own process has no session yet.
        here = GlobalHydra.instance()
        session = here.hydra if here.is_initialized() else stack.enter_context(open_session(folder))
        found = compose_adapters(session, job.job.config_name, kept, config.adapters)
    return [_grouped(each) for each in found]


def run_single(cfg: DictConfig) -> UserError | None:
    """Carry out a run that stands alone; Hydra would announce a mistake as a crash, if raised."""
    try:
        run_one(cfg)
    except UserError as error:
        return error
    return None


def run_cell(cfg: DictConfig, ledger: Ledger | None = None) -> Outcome | None:
    """Carry out one job of a sweep; a failure is returned, so that the other jobs still start.

    With `ledger` it is noted there when the job begins and how it ends; None if that is not its
    turn.

    Raises:
        Terminated: this process was asked to end and runs the whole sweep.
        SystemExit: it was asked to end and is a job of submitit's, which is queued again.
    """
    job = HydraConfig.get().job
    if ledger is not None:
        known = ledger.outcome(job.num)
        if known is not None or not ledger.may_begin(job.num):
            return known
    overrides = " ".join(HydraConfig.get().overrides.task)
    ending = _signals_of_submitit()
    try:
        with heeded(*ending):
            if ledger is not None:
                ledger.begin(job.num)
                # After that note: whoever asks for a stop reads the notes after asking.
                if ledger.stopped:
                    raise Terminated
            sys.stderr.write(f"== {SWEEP.heading(job.num + 1)}: {overrides}\n")
            outcome = _carried_out(cfg, overrides)
    except Terminated:
        if SWEEP.runs:
            raise
        outcome = Outcome(stopped=True)
        if ending:
            outcome = _queued_again(ending, overrides)
    if ledger is not None:
        ledger.end(job.num, outcome)
    SWEEP.outcomes.append(outcome)
    return outcome


def _carried_out(cfg: DictConfig, overrides: str) -> Outcome:
    try:
        return run_one(cfg)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        failure = Failure(overrides, str(error), crashed=False)
        done, failed = 0, max(1, len(cfg.adapters))
        if isinstance(error, PackError):
            done, failed = error.done, error.failed
        alone = max(1, len(cfg.adapters)) - done - failed
        return Outcome(done=done, alone=alone, failed=failed, failure=failure)
    except Exception as error:
        traceback.print_exc()
        failure = Failure(overrides, f"{type(error).__name__}: {error}", crashed=True)
        return Outcome(failed=max(1, len(cfg.adapters)), failure=failure)


def _signals_of_submitit() -> dict[int, Callable[[int, None], None]]:
    """In a job of submitit's: the signal on which it would end at once, before a checkpoint is
    written, and what it does then, which is to have the job queued again and to end."""
    found = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    name = "checkpoint_and_try_requeue"
    return {n: f for n, f in found.items() if callable(f) and getattr(f, "__name__", "") == name}


def _queued_again(ending: dict[int, Callable[[int, None], None]], overrides: str) -> Outcome:
    """End the process and let the job be queued again, or say why that is not done."""
    try:
        for number, end in ending.items():
            end(number, None)
    except Exception as error:
        message = f"{error} What was done is kept: the same command resumes from there"
        sys.stderr.write(f"error: {message}\n")
        return Outcome(stopped=True, failure=Failure(overrides, message, crashed=False))
    return Outcome(stopped=True)
