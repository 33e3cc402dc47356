"""Executes one Hydra job, in any launcher's process: one run, or several on one base model."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mixlora_exp.config.command import compose_adapters
from mixlora_exp.config.command_line import Command
from mixlora_exp.config.recorded import Recorded
from mixlora_exp.config.resolve import open_session, to_config
from mixlora_exp.config.schema import Config
from mixlora_exp.errors import PackError, UserError
from mixlora_exp.sweeps.ledger import Ledger
from mixlora_exp.system.console import labelled, line_label
from mixlora_exp.system.disk_faults import disk_fault
from mixlora_exp.system.signals import Terminated, heeded

NOT_FOR_A_CELL = ("hydra.mode", "hydra.sweep", "hydra.job")
"""Overrides that Hydra adds to those of a sweep's job."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A job of a sweep that did not finish."""

    overrides: str
    message: str
    crashed: bool
    """True for an unexpected exception, false for a `UserError`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Numbers of runs of a job by result; a job has several runs if adapters are packed."""

    done: int = 0
    """Recorded: run now, or finished before."""
    before: int = 0
    """Finished before, of those that are done."""
    alone: int = 0
    """Skipped, because another process is executing them."""
    failed: int = 0
    failure: Failure | None = None
    stopped: bool = False
    """True if a signal stopped the job before its end."""


@dataclass(slots=True)
class Sweep:
    """Progress of the sweep in this process; unknown in the processes of other launchers."""

    runs: int = 0
    started: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)

    def begin(self, runs: int) -> None:
        """Start a sweep of `runs` jobs."""
        self.runs, self.started, self.outcomes = runs, time.monotonic(), []

    def heading(self, number: int) -> str:
        """Return the text with the number of the starting job, elapsed time, and estimated
        remaining time."""
        if not self.runs:
            return f"run {number}"
        passed, done = time.monotonic() - self.started, number - 1
        left = passed / done * (self.runs - done) if done else 0.0
        shown = f" ({duration(passed)} elapsed, about {duration(left)} left)" if done else ""
        return f"run {number} of {self.runs}{shown}"


SWEEP = Sweep()


def duration(seconds: float) -> str:
    """Return seconds as text in s, min or h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def run_one(
    cfg: DictConfig,
    earlier: list[Path] | None = None,
    recorded: Recorded = None,
    command: Command | None = None,
) -> Outcome:
    """Execute one composed configuration (a Hydra task function); see `runs.run` for `earlier` and
    `resolve.to_config` for `recorded`. command: the one that asks for it."""
    config = _grouped(to_config(cfg, recorded))
    line = (command or Command()).line(HydraConfig.get().overrides.task, config.adapters)
    # Imported late, so that a mistake on the command line is reported before torch loads.
    if config.adapters:
        from mixlora_exp.runs.together import run_together

        found = run_together(_adapters_of(config, recorded), earlier=earlier, line=line)
        runs, done = len(config.adapters), len(found)
    else:
        from mixlora_exp.runs.run import run

        runs, done = 1, int(run(config, earlier=earlier, line=line) is not None)
    return Outcome(done=runs) if config.dry_run else Outcome(done=done, alone=runs - done)


def _grouped(config: Config) -> Config:
    """Return the configuration with the experiment's name as the tracker's group, if none is
    set."""
    choice = HydraConfig.get().runtime.choices.get("experiment")
    if choice is None or config.tracker.group is not None:
        return config
    return replace(config, tracker=replace(config.tracker, group=str(choice)))


def _adapters_of(config: Config, recorded: Recorded) -> list[Config]:
    """Return the configurations of the runs of a job with `adapters=[...]`."""
    job = HydraConfig.get()
    overrides = [*job.overrides.hydra, *job.overrides.task]
    kept = [line for line in overrides if not line.lstrip("+~").startswith(NOT_FOR_A_CELL)]
    folder = next(s.path for s in job.runtime.config_sources if s.provider == "main")
    with ExitStack() as stack:
        # A process started by a launcher has no Hydra session yet.
        here = GlobalHydra.instance()
        session = here.hydra if here.is_initialized() else stack.enter_context(open_session(folder))
        found = compose_adapters(session, job.job.config_name, kept, config.adapters, recorded)
    return [_grouped(each) for each in found]


def run_single(
    cfg: DictConfig, recorded: Recorded = None, command: Command | None = None
) -> UserError | None:
    """Execute a single run and return a `UserError`, which Hydra would report as a crash if it were
    raised; a failure of the disk becomes one."""
    try:
        run_one(cfg, recorded=recorded, command=command)
    except UserError as error:
        return error
    except OSError as error:
        message = disk_fault(error)
        if message is None:
            raise
        return UserError(message)
    return None


def run_cell(
    cfg: DictConfig,
    ledger: Ledger | None = None,
    recorded: Recorded = None,
    command: Command | None = None,
) -> Outcome | None:
    """Execute one job of a sweep. A failure is returned, so that the other jobs still start.

    With `ledger`, start and end of the job are recorded there; returns None if it must not start.

    Raises:
        Terminated: a stop was requested, and this process runs the whole sweep.
        SystemExit: a stop was requested, and this is a submitit job, which is requeued.
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
                # Checked after recording the start: `Ledger.stop` first sets the flag, then reads
                # the starts.
                if ledger.stopped:
                    raise Terminated
            sys.stderr.write(f"== {SWEEP.heading(job.num + 1)}: {overrides}\n")
            # With a ledger other processes run others of the jobs on the same terminal.
            with labelled(f"run {job.num + 1}") if ledger is not None else nullcontext():
                outcome = _carried_out(cfg, overrides, recorded, command)
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


def _carried_out(
    cfg: DictConfig, overrides: str, recorded: Recorded, command: Command | None
) -> Outcome:
    earlier: list[Path] = []
    try:
        return replace(run_one(cfg, earlier, recorded, command), before=len(earlier))
    except UserError as error:
        sys.stderr.write(f"error: {line_label()}{error}\n")
        failure = Failure(overrides, str(error), crashed=False)
        done, failed = 0, max(1, len(cfg.adapters))
        if isinstance(error, PackError):
            done, failed = error.done, error.failed
        alone = max(1, len(cfg.adapters)) - done - failed
        return Outcome(done=done, before=len(earlier), alone=alone, failed=failed, failure=failure)
    except Exception as error:
        traceback.print_exc()
        failure = Failure(overrides, f"{type(error).__name__}: {error}", crashed=True)
        return Outcome(failed=max(1, len(cfg.adapters)), failure=failure)


def _signals_of_submitit() -> dict[int, Callable[[int, None], None]]:
    """Return, in a submitit job, the signals on which submitit would requeue the job and exit at
    once, without a checkpoint, and the handlers that do so."""
    found = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    name = "checkpoint_and_try_requeue"
    return {n: f for n, f in found.items() if callable(f) and getattr(f, "__name__", "") == name}


def _queued_again(ending: dict[int, Callable[[int, None], None]], overrides: str) -> Outcome:
    """Requeue the job and exit the process, or report why that is not possible."""
    try:
        for number, end in ending.items():
            end(number, None)
    except Exception as error:
        message = f"{error} Completed work is kept: the same command resumes from there"
        sys.stderr.write(f"error: {message}\n")
        return Outcome(stopped=True, failure=Failure(overrides, message, crashed=False))
    return Outcome(stopped=True)
