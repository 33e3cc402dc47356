"""lm-eval's command line, with MixLoRA known to PEFT: `python -m mixlora_exp.lm_eval ARGUMENTS`.

lm-eval's own command cannot import another package first, and PEFT would not know the adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from mixlora_exp.errors import UserError, guarded

__all__ = ["main"]


def _run(argv: Sequence[str]) -> None:
    """Run lm-eval with the arguments that the process was started with.

    Raises:
        UserError: lm-eval is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise UserError("lm-eval is not installed: pip install 'lm-eval[hf]'") from error
    cli_evaluate()


def main() -> NoReturn:
    """Run the command line that the process was started with, and exit."""
    sys.exit(guarded(_run, sys.argv[1:]))


if __name__ == "__main__":
    main()
