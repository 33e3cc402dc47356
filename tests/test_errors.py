"""Exit codes of the command lines."""

from __future__ import annotations

import sys

import pytest

from mixlora_exp.errors import UserError
from mixlora_exp.system.guarded import guarded


@pytest.mark.parametrize(
    ("raised", "code", "shown"),
    [
        (None, 0, ""),
        (UserError("rank=0 is too small"), 2, "error: rank=0 is too small\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(), 0, ""),
        (SystemExit(3), 3, ""),
        (SystemExit("no such table"), 1, "no such table\n"),
    ],
    ids=repr,
)
def test_how_a_command_ends(
    raised: BaseException | None, code: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(_: object) -> None:
        if raised is not None:
            raise raised

    assert guarded(command, []) == code
    assert capsys.readouterr().err == shown


def test_a_crash_is_raised() -> None:
    def command(_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guarded(command, sys.argv)
