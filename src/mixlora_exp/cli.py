"""The command line: check everything first, then let Hydra run it; exit code 2 for a mistake."""

from __future__ import annotations

import argparse
import difflib
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from omegaconf import DictConfig

from mixlora_exp import __version__
from mixlora_exp.config import (
    CONF_DIR,
    Config,
    Plan,
    check_composition,
    compose_adapters,
    open_session,
    plan_runs,
    register_schemas,
    to_config,
)
from mixlora_exp.errors import MISTAKE, UserError, guarded

CRASH = 1
NOT_FOR_A_CELL = ("hydra.mode", "hydra.sweep", "hydra.job")
"""What Hydra adds to the overrides of a job of a sweep."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A run of a sweep that did not finish."""

    overrides: str
    message: str
    crashed: bool
    """True for an error of the program's, false for a request that cannot be carried out."""


def _parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse with Hydra's own flags; overrides and flags may come in any order."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        known = [flag for action in parser._actions for flag in action.option_strings]
        typed = [word.partition("=")[0] for word in argv if word.startswith("-")]
        wrong = next((flag for flag in typed if flag not in known), "")
        close = difflib.get_close_matches(wrong, known, cutoff=0.7)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; --hydra-help lists flags"
        raise UserError(f"{message}{hint}")

    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(list(argv))
    if args.experimental_rerun is not None:
        raise UserError(
            f"--experimental-rerun={args.experimental_rerun} is not supported: "
            "repeat the overrides that stand in the run's record"
        )
    return args


def run_one(cfg: DictConfig) -> None:
    """Carry out one composed configuration (a task function of Hydra's)."""
    config = _grouped(to_config(cfg))
    # Imported late, so that a mistake on the command line is told before torch is loaded.
    if config.adapters:
        from mixlora_exp.together import run_together

        run_together(_adapters_of(config))
        return
    from mixlora_exp.experiment import run

    run(config)


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


def run_cell(cfg: DictConfig) -> Failure | None:
    """Carry out one run of a sweep; a failure is returned, so that the other runs still start."""
    job = HydraConfig.get()
    overrides = " ".join(job.overrides.task)
    sys.stderr.write(f"== {SWEEP.heading(job.job.num + 1)}: {overrides}\n")
    try:
        run_one(cfg)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return Failure(overrides, str(error), crashed=False)
    except Exception as error:
        traceback.print_exc()
        return Failure(overrides, f"{type(error).__name__}: {error}", crashed=True)
    return None


@dataclass(slots=True)
class Sweep:
    """How far a sweep of this process is. In the processes of other launchers nothing is known."""

    runs: int = 0
    started: float = 0.0

    def heading(self, number: int) -> str:
        """Which run begins, and how long the others may take if they are like those before."""
        if not self.runs:
            return f"run {number}"
        passed, done = time.monotonic() - self.started, number - 1
        left = passed / done * (self.runs - done) if done else 0.0
        shown = f" ({_duration(passed)} passed, about {_duration(left)} left)" if done else ""
        return f"run {number} of {self.runs}{shown}"


SWEEP = Sweep()


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _failures(returned: Any) -> Iterator[Failure]:
    """Yield the failures among what a sweeper returned: job returns, in batches."""
    if isinstance(returned, JobReturn):
        if isinstance(returned.return_value, Failure):
            yield returned.return_value
    elif isinstance(returned, (list, tuple)):
        for item in returned:
            yield from _failures(item)


def _launch(session: Any, name: str, overrides: list[str], plan: Plan) -> int:
    """Run the plan through Hydra's launcher and sweeper and return the exit code."""
    if not plan.multirun:
        job = session.run(config_name=name, task_function=run_single, overrides=overrides)
        if isinstance(job.return_value, UserError):
            raise job.return_value
        return 0
    # Imported late, so that a mistake on the command line is told before torch is loaded.
    from mixlora_exp.inputs import check_inputs

    check_inputs([cell.config for cell in plan.cells])
    overrides = [*overrides, "hydra.mode=MULTIRUN"]
    if not plan.expanded:
        session.multirun(config_name=name, task_function=run_one, overrides=overrides)
        return 0
    if plan.packed is not None:
        overrides = [*plan.packed, "hydra.mode=MULTIRUN"]
    SWEEP.runs = len(plan.cells) if plan.packed is None else plan.packs
    SWEEP.started = time.monotonic()
    returned = session.multirun(config_name=name, task_function=run_cell, overrides=overrides)
    failures = list(_failures(returned))
    took = _duration(time.monotonic() - SWEEP.started)
    sys.stderr.write(f"== {len(plan.cells)} runs, {len(failures)} failed, {took}\n")
    if not failures:
        return 0
    sys.stderr.write(f"error: {len(failures)} of {len(plan.cells)} runs failed:\n")
    for failure in failures:
        sys.stderr.write(f"  {failure.overrides}: {failure.message}\n")
    return CRASH if any(failure.crashed for failure in failures) else MISTAKE


def _show(argv: Sequence[str], args: argparse.Namespace) -> int:
    """Let Hydra print help, the configuration or its own state."""
    register_schemas()
    flags = [word for word in argv if word not in args.overrides]
    before = sys.argv
    sys.argv = [before[0], *args.overrides, *flags]
    try:
        hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")(run_one)()
    except ValueError as error:
        raise UserError(str(error)) from error
    finally:
        sys.argv = before
    return 0


def _dispatch(argv: Sequence[str]) -> int:
    if "--version" in argv:
        sys.stdout.write(f"mixlora-exp {__version__}\n")
        return 0
    args = _parse_arguments(argv)
    overrides = list(args.overrides)
    if args.hydra_help:
        args.overrides = []
    if args.hydra_help or args.shell_completion:
        return _show([word for word in argv if word.startswith("-") or not args.hydra_help], args)
    if args.config_dir is not None:
        if not Path(args.config_dir).is_dir():
            raise UserError(f"--config-dir={args.config_dir}: there is no such folder")
        overrides.append(f"hydra.searchpath=['file://{Path(args.config_dir).resolve()}']")
    name = args.config_name or "config"
    with ExitStack() as stack:
        session = stack.enter_context(open_session(args.config_path or CONF_DIR))
        if args.help or args.cfg is not None or args.info is not None or args.resolve:
            check_composition(session, name, overrides)
            stack.close()
            return _show(argv, args)
        if args.run and args.multirun:
            raise UserError("--run and --multirun cannot be used together: give one of them")
        plan = plan_runs(session, name, overrides, args.multirun)
        return _launch(session, name, overrides, plan)


def execute(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code.

    0: done; 2: a mistake of the user's, told in one message; 130: interrupted; 1: runs of a sweep
    crashed. A crash outside of a sweep is raised, for Python to print it and exit with 1.
    """
    return guarded(_dispatch, argv)


def main() -> NoReturn:
    """Run the command line that the process was started with, and exit."""
    sys.exit(execute(sys.argv[1:]))
