"""A command line run to its exit code: mistakes, interruptions and requests to end told apart."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence

from mixlora_exp.errors import UserError
from mixlora_exp.system.hub_notices import shorten
from mixlora_exp.system.signals import REQUEUE, Terminated, install

__all__ = ["INTERRUPTED", "MISTAKE", "REQUEUE", "TERMINATED", "guarded"]


MISTAKE, INTERRUPTED, TERMINATED = 2, 130, 143
"""Exit codes."""


def guarded(
    command: Callable[[Sequence[str]], int | None], argv: Sequence[str], *, resumes: bool = True
) -> int:
    """Run a command line and return its exit code.

    0: done; 2: a mistake of the user's, told in one message; 75: asked to end by SIGTERM, and will
    resume when started again (143: it `resumes` nothing); 130: interrupted; else what `command`
    returned. A crash is raised, for Python to print it and exit with 1.
    """
    install()
    shorten()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As on standard error: what the terminal's encoding lacks is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return command(argv) or 0
    except Terminated:
        if not resumes:
            sys.stderr.write("terminated\n")
            return TERMINATED
        sys.stderr.write("terminated: what was done is kept, the same command resumes from there\n")
        return REQUEUE
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return MISTAKE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        # As Python does with a text: it is shown, and the exit code is 1.
        sys.stderr.write(f"{error.code}\n")
        return 1
