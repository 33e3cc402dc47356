"""lm-eval's command line, with MixLoRA known to PEFT: `python -m mixlora_exp.lm_eval ARGUMENTS`.

lm-eval's own command cannot import another package first, and PEFT would not know the adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from mixlora_exp.errors import UserError, guarded

__all__ = ["main", "run"]


KNOWN = (
    (
        "Tasks not found",
        "--tasks: name tasks that `python -m mixlora_exp.lm_eval ls tasks` lists, or a YAML file "
        "of a task, or give its folder with --include_path",
    ),
    ("Can't find 'adapter_config.json'", "--model_args: peft=DIR must be a folder with an adapter"),
)
"""How errors of lm-eval and PEFT begin that are the user's, and the way out."""
NO_MODEL = ("is not a valid model identifier", "couldn't find them in the cached files")
"""What transformers says of a model that is not there."""


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
    except (ValueError, OSError) as error:
        # Other errors may be faults, and keep their traceback.
        hint = next((hint for begin, hint in KNOWN if str(error).startswith(begin)), None)
        if hint is None and any(text in str(error) for text in NO_MODEL):
            hint = "--model_args: give pretrained=DIR with a model, or its name on the hub"
        if hint is None:
            raise
        raise UserError(f"{hint} ({' '.join(str(error).split())[:160]})") from error


def main() -> NoReturn:
    """Run the command line that the process was started with, and exit."""
    sys.exit(guarded(run, sys.argv[1:]))


if __name__ == "__main__":
    main()
