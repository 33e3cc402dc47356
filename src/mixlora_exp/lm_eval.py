"""lm-eval's command line, with MixLoRA known to PEFT: `python -m mixlora_exp.lm_eval ARGUMENTS`.

lm-eval's own command cannot import another package first, and PEFT would not know the adapter.
"""

from __future__ import annotations

from mixlora_exp.errors import UserError

__all__ = ["main"]


def main() -> None:
    """Run lm-eval with the arguments that the process was started with.

    Raises:
        UserError: lm-eval is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise UserError("lm-eval is not installed: pip install 'lm-eval[hf]'") from error
    cli_evaluate()


if __name__ == "__main__":
    main()
