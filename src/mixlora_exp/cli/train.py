"""The command line: check everything first, then let Hydra run it; exit code 2 for a mistake."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser

from mixlora_exp import __version__
from mixlora_exp.config import (
    CONF_DIR,
    Plan,
    check_composition,
    open_session,
    plan_runs,
    register_schemas,
)
from mixlora_exp.config.schema import Config
from mixlora_exp.errors import UserError
from mixlora_exp.sweeps.jobs import run_one, run_single
from mixlora_exp.sweeps.launch import launch_sweep
from mixlora_exp.system.guarded import guarded


def _parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse with Hydra's own flags; overrides and flags may come in any order."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        known = [flag for action in parser._actions for flag in action.option_strings]
        typed = [word.partition("=")[0] for word in argv if word.startswith("-")]
        wrong = next((flag for flag in typed if flag not in known), "")
        close = difflib.get_close_matches(wrong, known, cutoff=0.7)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; --hydra-help lists flags"
        setting = wrong.lstrip("-").replace("-", "_")
        if setting in Config.__dataclass_fields__:
            hint = f"; settings have no dashes: write {setting}=..."
        raise UserError(f"{message}{hint}")

    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(list(argv))
    if args.experimental_rerun is not None:
        raise UserError(
            f"--experimental-rerun={args.experimental_rerun} is not supported: "
            "repeat the overrides that stand in the run's record"
        )
    return args


def _launch(session: Any, name: str, overrides: list[str], plan: Plan) -> int:
    """Run the plan through Hydra's launcher and sweeper and return the exit code."""
    if not plan.multirun:
        job = session.run(config_name=name, task_function=run_single, overrides=overrides)
        if isinstance(job.return_value, UserError):
            raise job.return_value
        return 0
    return launch_sweep(session, name, overrides, plan)


def _base_model(overrides: Sequence[str]) -> list[str]:
    """The words that choose the base model of an adapter that is scored, where none were given."""
    given = dict(line.split("=", 1) for line in overrides if "=" in line)
    folder = Path(given.get("adapter", "null").strip("'\"")).expanduser()
    # What else may be wrong with it is told when the configuration is there.
    if given.get("method") != "none" or "experiment" in given or not folder.is_dir():
        return []
    from mixlora_exp.runs.base_choice import base_words

    return base_words(folder, given)


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
    overrides = [*_base_model(overrides), *overrides]
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
