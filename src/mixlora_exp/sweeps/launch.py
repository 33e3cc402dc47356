"""Runs a sweep through Hydra's launchers, restarts broken process pools, and reports all jobs."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from mixlora_exp.config.command import Plan
from mixlora_exp.config.command_line import Command
from mixlora_exp.config.paths import share_code
from mixlora_exp.config.recorded import Recorded
from mixlora_exp.errors import UserError
from mixlora_exp.sweeps.jobs import SWEEP, Failure, Outcome, duration, run_cell, run_one
from mixlora_exp.sweeps.ledger import Ledger
from mixlora_exp.system.exit_codes import MISTAKE
from mixlora_exp.system.signals import Terminated, deferred, requested

CRASH = 1
FRUITLESS = 3
"""Give up after this many process pools in a row that break before another job starts."""
KILLED_TWICE = "its process was killed twice, the second time alone: possibly out of memory"
Multirun = Callable[[Callable[..., Any]], Any]
"""Calls Hydra's multirun with a task function; returns the results of the jobs, in batches."""


def launch_sweep(
    session: Any,
    name: str,
    overrides: list[str],
    plan: Plan,
    recorded: Recorded = None,
    command: Command | None = None,
) -> int:
    """Check all cells, run them through Hydra's launcher and sweeper and return the exit code. Each
    job takes what it was not given from `recorded` (see `resolve.to_config`). command: the one
    that asks for it.

    Raises:
        UserError: a cell is not valid, or the launcher cannot start or write its files.
        Terminated: a stop was requested; completed work is kept.
    """
    # Imported late, so that a mistake on the command line is reported before torch loads.
    from mixlora_exp.runs.inputs import check_inputs

    by_submitit = plan.launcher in ("SlurmLauncher", "LocalLauncher")
    elsewhere = plan.launcher == "SlurmLauncher"
    if elsewhere and shutil.which("srun") is None:
        raise UserError(
            "hydra/launcher=slurm needs SLURM, but there is no srun: start it on a machine of the "
            "cluster, or use hydra/launcher=submitit_local"
        )
    check_inputs([cell.config for cell in plan.cells], elsewhere=elsewhere)
    overrides = [*(overrides if plan.packed is None else plan.packed), "hydra.mode=MULTIRUN"]

    share_code()

    def multirun(task: Callable[..., Any]) -> Any:
        job = partial(task, recorded=recorded, command=command)
        with _convert_folder_errors(plan):
            return session.multirun(config_name=name, task_function=job, overrides=overrides)

    if not plan.expanded:
        multirun(run_one)
        return 0
    SWEEP.begin(len(plan.jobs))
    try:
        if plan.launcher == "JoblibLauncher":
            _by_processes(multirun, plan)
        else:
            with _lost_jobs_returned() if by_submitit else nullcontext():
                SWEEP.outcomes = list(_outcomes(multirun(run_cell), plan))
    except Terminated:
        _print_summary(plan)
        if by_submitit:
            sys.stderr.write("jobs submitted to submitit continue\n")
        raise
    finally:
        # The next run of this process is not part of a sweep.
        SWEEP.runs = 0
    return _print_summary(plan)


@contextmanager
def _convert_folder_errors(plan: Plan) -> Iterator[None]:
    """Convert Hydra's error about an unwritable folder into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(
            f"output_dir={plan.cells[0].config.output_dir}: {error.filename} cannot be written "
            f"({error.strerror}): choose another output_dir"
        ) from error


def _print_summary(plan: Plan) -> int:
    """Print how many runs were run now, finished before, failed, skipped or stopped, with the
    reasons of failures; returns the exit code.

    Raises:
        Terminated: a stop was requested.
    """
    outcomes, every = SWEEP.outcomes, len(plan.cells)
    done = sum(outcome.done for outcome in outcomes)
    before = sum(outcome.before for outcome in outcomes)
    failed = sum(outcome.failed for outcome in outcomes)
    alone = sum(outcome.alone for outcome in outcomes)
    rest = every - done - failed - alone
    stopped = f", {rest} stopped or not started" if rest else ""
    took = duration(time.monotonic() - SWEEP.started)
    now = f"{done - before} {'planned' if plan.cells[0].config.dry_run else 'run now'}"
    sys.stderr.write(
        f"== {every} runs: {now}, {before} finished before, {failed} failed, "
        f"{alone} skipped{stopped}, {took}\n"
    )
    if not plan.cells[0].config.dry_run:
        # Imported late: records are read only now.
        from mixlora_exp.sweeps.summary import print_summary

        print_summary(plan.cells)
    failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    if failures:
        sys.stderr.write(f"error: {failed or len(failures)} of {every} runs failed:\n")
    for failure in failures:
        sys.stderr.write(f"  {failure.overrides}: {failure.message}\n")
    if rest and not failures and any(outcome.stopped for outcome in outcomes):
        raise Terminated
    if not failures:
        return 0
    return CRASH if any(failure.crashed for failure in failures) else MISTAKE


def _returns(returned: Any) -> Iterator[JobReturn]:
    """Flatten the nested results of a sweeper."""
    if isinstance(returned, JobReturn):
        yield returned
    elif isinstance(returned, (list, tuple)):
        for item in returned:
            yield from _returns(item)


def _outcomes(returned: Any, plan: Plan) -> Iterator[Outcome]:
    for number, job in enumerate(_returns(returned)):
        found = job.return_value
        yield found if isinstance(found, Outcome) else _lost(plan, number, str(found))


def _lost(plan: Plan, number: int, why: str) -> Outcome:
    job = plan.jobs[number]
    return Outcome(failed=job.cells, failure=Failure(job.overrides, why, crashed=False))


@contextmanager
def _lost_jobs_returned() -> Iterator[None]:
    """Within this context a submitit job without a result returns a message instead of raising;
    Hydra's launcher would raise at the first one, without reading the results of the others. It
    creates and reads the jobs itself and hands them to nobody, so their class is changed."""
    from submitit.core.core import Job
    from submitit.core.utils import UncompletedJobError

    results = Job.results

    def read(job: Any) -> list[Any]:
        try:
            return results(job)
        except UncompletedJobError:
            why = f"its job ended without a result, possibly killed: see {job.paths.folder}"
            return [JobReturn(status=JobStatus.COMPLETED, _return_value=why)]

    Job.results = read
    try:
        yield
    finally:
        Job.results = results


def _by_processes(multirun: Multirun, plan: Plan) -> None:
    """Run the jobs in a process pool, which breaks if one of its processes is killed: restart it
    for the jobs that have not started, then retry each interrupted job alone.

    Raises:
        Terminated: a stop was requested; the processes were stopped too, and have saved.
    """
    with tempfile.TemporaryDirectory(prefix="mixlora-sweep-") as folder:
        ledger = Ledger(Path(folder))
        with deferred(ledger.stop):
            _all_begun(multirun, ledger, plan)
            for number in ledger.under_way():
                if requested():
                    break
                if _broken(multirun, replace(ledger, alone=number)) and not requested():
                    ledger.end(number, _lost(plan, number, KILLED_TWICE))
            found = map(ledger.outcome, range(len(plan.jobs)))
            SWEEP.outcomes = [outcome for outcome in found if outcome is not None]


def _all_begun(multirun: Multirun, ledger: Ledger, plan: Plan) -> None:
    """Launch until every job has started once, with any result."""
    known: list[int] = []
    fruitless = 0
    while fruitless < FRUITLESS:
        error = _broken(multirun, ledger)
        if error is None or requested():
            return
        lost = [number for number in ledger.under_way() if number not in known]
        known += lost
        fruitless = 0 if lost else fruitless + 1
        names = "; ".join(plan.jobs[number].overrides for number in lost)
        sys.stderr.write(
            f"a process was killed, possibly out of memory, while it was running: "
            f"{names or 'no runs'}; the others continue\n"
        )
    for number in range(len(plan.jobs)):
        if not ledger.starts(number):
            ledger.end(number, _lost(plan, number, "no process could be started"))


def _broken(multirun: Multirun, ledger: Ledger) -> BrokenExecutor | None:
    """Launch the jobs that may start; returns the error if a process was killed."""
    try:
        multirun(partial(run_cell, ledger=ledger))
    except BrokenExecutor as error:
        return error
    return None
