"""A sweep through Hydra's launchers: every job started, the lost ones named, all counted."""

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

from mixlora_exp.config import Plan
from mixlora_exp.errors import UserError
from mixlora_exp.sweeps.jobs import SWEEP, Failure, Outcome, duration, run_cell, run_one
from mixlora_exp.sweeps.ledger import Ledger
from mixlora_exp.system.guarded import MISTAKE
from mixlora_exp.system.signals import Terminated, deferred, requested

__all__ = ["launch_sweep"]

CRASH = 1
FRUITLESS = 3
"""Pools of processes in a row that break before a further job has begun: then it is given up."""
KILLED_TWICE = "its process was killed twice, the second time alone: out of memory, perhaps"
Multirun = Callable[[Callable[..., Any]], Any]
"""Hydra's multirun of the command line with a task function: what the jobs returned, in batches."""


def launch_sweep(session: Any, name: str, overrides: list[str], plan: Plan) -> int:
    """Check all cells, run them through Hydra's launcher and sweeper and return the exit code.

    Raises:
        UserError: a cell is not valid, or the launcher cannot start or write anything.
        Terminated: asked to end; what was done is kept.
    """
    # Imported late, so that a mistake on the command line is told before torch is loaded.
    from mixlora_exp.runs.inputs import check_inputs

    by_submitit = plan.launcher in ("SlurmLauncher", "LocalLauncher")
    elsewhere = plan.launcher == "SlurmLauncher"
    if elsewhere and shutil.which("srun") is None:
        raise UserError(
            "hydra/launcher=slurm needs SLURM, whose srun is not here: start it on a machine of "
            "the cluster, or use hydra/launcher=submitit_local"
        )
    check_inputs([cell.config for cell in plan.cells], elsewhere=elsewhere)
    overrides = [*(overrides if plan.packed is None else plan.packed), "hydra.mode=MULTIRUN"]

    def multirun(task: Callable[..., Any]) -> Any:
        with _folder_told(plan):
            return session.multirun(config_name=name, task_function=task, overrides=overrides)

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
        _tell(plan)
        if by_submitit:
            sys.stderr.write("jobs that were handed to submitit go on\n")
        raise
    finally:
        # Not of a sweep any more: what this process runs next stands alone.
        SWEEP.runs = 0
    return _tell(plan)


@contextmanager
def _folder_told(plan: Plan) -> Iterator[None]:
    """Turn what Hydra raises where it cannot write into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(
            f"output_dir={plan.cells[0].config.output_dir}: {error.filename} cannot be written "
            f"({error.strerror}); choose another output_dir"
        ) from error


def _tell(plan: Plan) -> int:
    """Say how many runs are done, failed, left alone or stopped, and why; the exit code.

    Raises:
        Terminated: a run was asked to end.
    """
    outcomes, every = SWEEP.outcomes, len(plan.cells)
    done = sum(outcome.done for outcome in outcomes)
    failed = sum(outcome.failed for outcome in outcomes)
    alone = sum(outcome.alone for outcome in outcomes)
    rest = every - done - failed - alone
    stopped = f", {rest} stopped or not started" if rest else ""
    took = duration(time.monotonic() - SWEEP.started)
    sys.stderr.write(
        f"== {every} runs: {done} done, {failed} failed, {alone} left alone{stopped}, {took}\n"
    )
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
    """Yield what a sweeper returned one by one: job returns, in batches."""
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
    """Within this context a job of submitit's that ended without a result returns what is known of
    it; Hydra's launcher would raise at the first, and leave the results of the others unread."""
    from submitit.core.core import Job
    from submitit.core.utils import UncompletedJobError

    results = Job.results

    def read(job: Any) -> list[Any]:
        try:
            return results(job)
        except UncompletedJobError:
            why = f"its job ended without a result, killed perhaps: see {job.paths.folder}"
            return [JobReturn(status=JobStatus.COMPLETED, _return_value=why)]

    Job.results = read
    try:
        yield
    finally:
        Job.results = results


def _by_processes(multirun: Multirun, plan: Plan) -> None:
    """Run the jobs in a pool of processes, which breaks when one of them is killed: start it again
    for what has not begun, then give each job that was under way another chance, alone.

    Raises:
        Terminated: asked to end; the processes have been asked too, and have saved.
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
    """Launch until each job has begun once, whatever became of it."""
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
            f"a process was killed, out of memory perhaps, while there were under way: "
            f"{names or 'no runs'}; the others go on\n"
        )
    for number in range(len(plan.jobs)):
        if not ledger.starts(number):
            ledger.end(number, _lost(plan, number, "no process could be started for it"))


def _broken(multirun: Multirun, ledger: Ledger) -> BrokenExecutor | None:
    """Launch the jobs that may begin; the error if a process was killed."""
    try:
        multirun(partial(run_cell, ledger=ledger))
    except BrokenExecutor as error:
        return error
    return None
