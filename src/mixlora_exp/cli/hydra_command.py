"""Hydra command lines: flags, help, and runs, all of which are checked before the first starts."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml

# Hydra does not export its flags, and a list of them here would go out of date.
from hydra._internal.utils import get_args_parser

from mixlora_exp import __version__
from mixlora_exp.config.command import (
    Plan,
    check_composition,
    compose_cell,
    opened,
    plan_runs,
)
from mixlora_exp.config.command_line import Command, command_of
from mixlora_exp.config.given_paths import check_given
from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.config.recorded import Recorded
from mixlora_exp.config.resolve import open_session, register_schemas, to_dict
from mixlora_exp.config.schema import Config
from mixlora_exp.config.typed import as_typed
from mixlora_exp.errors import UserError, did_you_mean
from mixlora_exp.sweeps.jobs import run_one, run_single
from mixlora_exp.sweeps.launch import launch_sweep

Settle = Callable[[Sequence[str]], tuple[list[str], Recorded]]
"""Turns the typed overrides of a command into those that Hydra composes, and what a record adds."""

SCRIPTS = {"config": "train.py", "evaluate": "evaluate.py"}
"""The script of each root in conf/."""


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Parse with Hydra's own flags; overrides and flags may come in any order.

    Raises:
        UserError: a flag is unknown or not supported.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        known = [flag for action in parser._actions for flag in action.option_strings]
        typed = [word.partition("=")[0] for word in argv if word.startswith("-")]
        wrong = next((flag for flag in typed if flag not in known), "")
        hint = did_you_mean(wrong, known)
        setting = wrong.lstrip("-").replace("-", "_")
        group, dot, field = setting.partition(".")
        meant = difflib.get_close_matches(group, Config.__dataclass_fields__, n=1, cutoff=0.7)
        if meant and (group in meant or not hint):
            hint = f"; settings have no dashes: write {meant[0]}{dot}{field}=..."
        raise UserError(f"{message}{hint or '; --hydra-help lists flags'}")

    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(list(argv))
    if args.experimental_rerun is not None:
        raise UserError(
            f"--experimental-rerun={args.experimental_rerun} is not supported: "
            "repeat the overrides in the run's record"
        )
    return args


def _check_completion(words: Sequence[str]) -> None:
    """Refuse what Hydra reports with a traceback."""
    name, _, shell = words[0].partition("=") if len(words) == 1 else ("", "", "")
    if name not in ("install", "uninstall", "query") or shell not in ("bash", "fish", "zsh"):
        raise UserError(
            f"--shell-completion {' '.join(words)}".rstrip() + ": write -sc install=bash (or "
            "uninstall=bash; bash, fish or zsh)"
        )


def shows(args: argparse.Namespace) -> bool:
    """Return whether the flags ask to show something instead of running."""
    return bool(args.help or args.cfg is not None or args.info is not None or args.resolve)


def show(argv: Sequence[str], args: argparse.Namespace, name: str, overrides: list[str]) -> int:
    """Have Hydra print help, the configuration or its own state; returns the exit code."""
    register_schemas()
    flags = [word for word in argv if word not in args.overrides]
    before = sys.argv
    sys.argv = [before[0], *overrides, *flags]
    try:
        hydra.main(config_path=str(CONF_DIR), config_name=name, version_base="1.3")(run_one)()
    except ValueError as error:
        raise UserError(str(error)) from error
    finally:
        sys.argv = before
    return 0


def _print_config(config: Any, package: str | None) -> int:
    """Print what `--cfg job` prints, of a configuration that Hydra has not composed alone."""
    found = to_dict(config)
    for name in (package or "").split(".") if package else ():
        if not isinstance(found, dict) or name not in found:
            raise UserError(f"--package={package}: there is no such part of the configuration")
        found = found[name]
    sys.stdout.write(yaml.safe_dump(found, sort_keys=False, allow_unicode=True))
    return 0


def _launch(
    session: Any,
    name: str,
    overrides: list[str],
    plan: Plan,
    recorded: Recorded,
    command: Command,
) -> int:
    """Run the plan through Hydra's launcher and sweeper and return the exit code."""
    if not plan.multirun:
        task = partial(run_single, recorded=recorded, command=command)
        job = session.run(config_name=name, task_function=task, overrides=overrides)
        if isinstance(job.return_value, UserError):
            raise job.return_value
        return 0
    return launch_sweep(session, name, overrides, plan, recorded, command)


def dispatch(argv: Sequence[str], root: str, settle: Settle) -> int:
    """Execute a command line over `conf/ROOT.yaml` and return the exit code.

    Raises:
        UserError: the command line is not valid.
    """
    if "--version" in argv:
        sys.stdout.write(f"mixlora-exp {__version__}\n")
        return 0
    argv = opened(as_typed(argv))
    args = parse_flags(argv)
    if args.shell_completion:
        _check_completion(args.overrides)
    if args.hydra_help or args.shell_completion:
        kept = [] if args.hydra_help else list(args.overrides)
        return show(argv, args, root, kept)
    if args.config_dir is not None and not Path(args.config_dir).is_dir():
        raise UserError(f"--config-dir={args.config_dir}: there is no such folder")
    settled, recorded = settle(args.overrides)
    overrides = opened(settled)
    places = {"path": args.config_path, "dir": args.config_dir, "name": args.config_name}
    flags = [f"--config-{what}={given}" for what, given in places.items() if given is not None]
    command = command_of(SCRIPTS[root], [*flags, *args.overrides], overrides)
    if args.config_dir is not None:
        overrides.append(f"hydra.searchpath=['file://{Path(args.config_dir).resolve()}']")
    name = args.config_name or root
    with ExitStack() as stack:
        session = stack.enter_context(open_session(args.config_path or CONF_DIR))
        if shows(args):
            check_composition(session, name, overrides)
            if recorded and args.cfg == "job":
                return _print_config(compose_cell(session, name, overrides, recorded), args.package)
            stack.close()
            return show(argv, args, root, overrides)
        if args.run and args.multirun:
            raise UserError("--run and --multirun cannot be used together: give one of them")
        plan = plan_runs(session, name, overrides, args.multirun, recorded=recorded)
        for cell in plan.cells:
            check_given(cell.config)
        return _launch(session, name, overrides, plan, recorded, command)
