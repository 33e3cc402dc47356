"""Exit codes of the command lines."""

from __future__ import annotations

import logging
import sys

import pytest

from mixlora_exp.errors import UserError
from mixlora_exp.system.exit_codes import guarded


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


def test_a_hub_that_does_not_answer_is_reported_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = logging.getLogger("huggingface_hub.utils._http")

    def command(_: object) -> None:
        for number in range(1, 6):
            log.warning(f"'[Errno -2]' thrown while requesting HEAD https://hub/{number}")
            log.warning(f"Retrying in {number}s [Retry {number}/5].")
        log.warning("Rate limited. Waiting 60s before retry [Retry 1/5].")

    before = list(log.filters)
    # An earlier command of this process may have told it.
    log.filters[:] = []
    try:
        assert guarded(command, []) == 0
        assert guarded(lambda _: None, []) == 0
        assert len(log.filters) == 1
    finally:
        log.filters[:] = before
    first, second = [record.getMessage() for record in caplog.records]
    assert first == "the hub does not answer; trying again for up to half a minute"
    assert second.startswith("Rate limited")


def test_a_crash_is_raised() -> None:
    def command(_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guarded(command, sys.argv)
