"""Files that anybody may have written: refused in a clause, within limits, and shown harmlessly."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mixlora_exp.errors import SCREEN, UserError, shown
from mixlora_exp.system.exit_codes import guarded
from mixlora_exp.system.untrusted import (
    LIMIT,
    json_lines,
    parse_json,
    raw_lines,
    read_json,
    refuse_links,
)


@pytest.mark.parametrize(
    ("text", "clause"),
    [
        (b"", "Expecting value, line 1 column 1"),
        (b'{"a": 1', "line 1"),
        (b"[" * 100_000, "nested deeper than 64 levels"),
        (b"[" * 70 + b"]" * 70, "nested deeper than 64 levels"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested deeper than 64 levels"),
        (b"1" * 5000, "a whole number has thousands of digits"),
        (b"1" * 50, "an integer has more than 40 digits"),
        (b"1e999", "a number is too large"),
        (b'{"a": NaN}', "NaN is not a number in JSON"),
        (b'{"a": -Infinity}', "-Infinity is not a number in JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "the field a occurs twice"),
        (b'{"a": "\xff"}', "byte 8 is not UTF-8 text"),
        (b'{"a": ["\\ud800"]}', "half of a character"),
        (b'{"\\udfff": 1}', "half of a character"),
    ],
)
def test_json_that_no_reader_could_use(text: bytes, clause: str) -> None:
    with pytest.raises(ValueError, match=clause):
        parse_json(text)


@pytest.mark.parametrize("value", ["é", "😀", 10**30, -1.5, None, True, [[[1]]], {"a": {"b": []}}])
def test_what_tools_write_is_read(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(b"\xef\xbb\xbf" + json.dumps(value, ensure_ascii=False).encode()) == value


def test_halves_and_odd_numbers_pass_where_the_caller_looks_at_them() -> None:
    assert parse_json(b'"\\ud800"', halves=True) == "\ud800"
    assert parse_json(b"[Infinity]", finite=False) == [float("inf")]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="it is a pipe, not a file"):
        read_json(pipe)
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="it is a device, not a file"):
        read_json(tmp_path / "link")
    with pytest.raises(OSError, match="a folder"):
        read_json(tmp_path)


def test_limits_are_reported_with_what_changes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT, "1")
    path = tmp_path / "large.json"
    path.write_text('"' + "a" * 2**20 + '"')
    with pytest.raises(ValueError, match="it has more than 1 MiB; MIXLORA_EXP_READ_LIMIT=N"):
        read_json(path)
    with pytest.raises(ValueError, match=r"line 1 has more than 0\.03125 MiB; MIXLORA_EXP_READ_L"):
        list(raw_lines(path))
    # A bomb: a thousand times what it has, in lines that are short.
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(b'{"a": 1}\n' * 200_000))
    assert bomb.stat().st_size < 20_000
    with pytest.raises(ValueError, match="up to line 116509 there are more than 1 MiB"):
        list(raw_lines(bomb))
    monkeypatch.setenv(LIMIT, "64")
    assert len(read_json(path)) == 2**20
    assert sum(1 for _ in json_lines(bomb)) == 200_000
    for wrong in ("0", "-1", "a", "", "1e3", "9" * 10):
        monkeypatch.setenv(LIMIT, wrong)
        with pytest.raises(UserError, match=f"{LIMIT}={wrong} is not valid"):
            read_json(path)


def test_a_line_is_never_read_whole_when_it_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT, "1")
    path = tmp_path / "one.jsonl.gz"
    path.write_bytes(gzip.compress(b"a" * 50 * 2**20))
    tracemalloc.start()
    with pytest.raises(ValueError, match="line 1"):
        list(raw_lines(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2**20


def test_damaged_gzip_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(b"{}\n" * 1000)[:-12])
    with pytest.raises(ValueError, match="the gzip file is damaged or truncated after line"):
        list(raw_lines(path))


def test_links_on_the_way_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run" / "in").mkdir(parents=True)
    (tmp_path / "run" / "in" / "file").write_text("1")
    refuse_links(tmp_path / "run" / "in" / "file", tmp_path / "run")
    (tmp_path / "run" / "out").symlink_to(tmp_path / "run" / "in")
    (tmp_path / "run" / "file").symlink_to(tmp_path / "run" / "in" / "file")
    (tmp_path / "other").symlink_to(tmp_path / "run")
    for path, below in (
        (tmp_path / "run" / "out" / "file", tmp_path / "run"),
        (tmp_path / "run" / "file", tmp_path / "run"),
        (tmp_path / "other" / "in" / "file", tmp_path / "other"),
    ):
        with pytest.raises(ValueError, match="is a link, which is not followed"):
            refuse_links(path, below)


HARMFUL = "a\x1b[31m\x07b\x9bc\rd\ne\u202ef\u200bg\u2066h\ud800i\x7fj\u2028k\ufeff"


def test_what_a_terminal_would_act_on_is_shown() -> None:
    text = shown(HARMFUL)
    assert text.isascii()
    assert text.isprintable()
    assert text == r"a\x1b[31m\x07b\x9bc\rd\ne\u202ef\u200bg\u2066h\ud800i\x7fj\u2028k\ufeff"
    assert shown(text) == text
    assert shown("ä 文 é 😀 a\\b") == "ä 文 é 😀 a\\b"
    assert shown("a\nb\x1b", None, keep="\n") == "a\nb\\x1b"


def test_messages_are_one_line_no_longer_than_a_screen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = str(UserError(f"data.path={HARMFUL}{'x' * 10**7}: give another one"))
    assert len(message) <= SCREEN
    assert message.startswith("data.path=a")
    assert message.endswith(": give another one")

    def fails(argv: Any) -> None:
        raise UserError(f"{HARMFUL}{'x' * 10**6}")

    assert guarded(fails, []) == 2
    error = capsys.readouterr().err
    assert len(error) < SCREEN + 10
    assert error.count("\n") == 1
    assert error.strip().isprintable()
