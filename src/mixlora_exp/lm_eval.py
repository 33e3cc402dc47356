"""lm-eval's command line, with MixLoRA known to PEFT: `python -m mixlora_exp.lm_eval ARGUMENTS`.

lm-eval's own command cannot import another package first, and PEFT would not know the adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from mixlora_exp.errors import UserError, guarded

__all__ = ["main", "run"]


def run(argv: Sequence[str]) -> None:
    """Run lm-eval with the arguments that the process was started with.

    Raises:
        UserError: lm-eval is not installed, or has no task of a name that was given.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise UserError("lm-eval is not installed: pip install 'lm-eval[hf]'") from error
    try:
        cli_evaluate()
    except ValueError as error:
        # Other errors of lm-eval's may be faults, and keep their traceback.
        if not str(error).startswith("Tasks not found"):
            raise
        raise UserError(
            f"--tasks: {error}; name tasks that `python -m mixlora_exp.lm_eval ls tasks` lists, or "
            "a YAML file of a task, or give its folder with --include_path"
        ) from error


def main() -> NoReturn:
    """Run the command line that the process was started with, and exit."""
    sys.exit(guarded(run, sys.argv[1:]))


if __name__ == "__main__":
    main()
