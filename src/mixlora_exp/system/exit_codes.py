"""Runs a command line and maps user mistakes, interruptions and SIGTERM to exit codes."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mixlora_exp.errors import UserError, shown
from mixlora_exp.system.disk_faults import disk_fault
from mixlora_exp.system.library_notices import shorten_notices
from mixlora_exp.system.signals import REQUEUE, Terminated, install

MISTAKE, INTERRUPTED, TERMINATED = 2, 130, 143
"""Exit codes."""
NO_HOME = "Could not determine home directory."
"""What `Path.expanduser` says of `~NAME` where there is no user NAME."""


def guarded(
    command: Callable[[Sequence[str]], int | None], argv: Sequence[str], *, resumes: bool = True
) -> int:
    """Run a command line and return its exit code.

    0: done; 2: a user mistake or a failing disk, reported in one message; 75: ended by SIGTERM,
    resumes when started again (143 unless it `resumes`); 130: interrupted; otherwise the result of
    `command`. A crash is raised, so that Python prints it and exits with 1.
    """
    install()
    shorten_notices()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As on standard error: characters outside the terminal's encoding must not cause a failure.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return command(argv) or 0
    except Terminated:
        if not resumes:
            sys.stderr.write("terminated\n")
            return TERMINATED
        sys.stderr.write(
            "terminated: what was saved is kept, the same command resumes from there\n"
        )
        return REQUEUE
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return MISTAKE
    except OSError as error:
        message = disk_fault(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {''.join(_field_of(error, argv))}{message}\n")
        return MISTAKE
    except RuntimeError as error:
        if str(error) != NO_HOME:
            raise
        named = [word for word in argv if word.partition("=")[2].startswith("~") or word[:1] == "~"]
        sys.stderr.write(
            f"error: {shown(''.join(named[:1]), 160) or 'a path'}: there is no user of the name "
            "after ~: write the folder in full, or ./~NAME\n"
        )
        return MISTAKE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        # As Python does for `SystemExit` with a text: print it, and exit with 1.
        sys.stderr.write(f"{error.code}\n")
        return 1


def _field_of(error: OSError, argv: Sequence[str]) -> list[str]:
    """Return `NAME: ` of the command line's field that a name too long for a file comes from, if
    it is there: everything else has names of fixed length."""
    path = str(error.filename or "")
    long = max(Path(path).parts, key=len, default="").partition(".")[0]
    if error.errno != errno.ENAMETOOLONG or not long:
        return []
    fields = [word.partition("=")[0] for word in argv if "=" in word and long in word]
    return [f"{field}: " for field in fields[:1]]
