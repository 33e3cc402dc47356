"""Reads prompts from a file or from standard input."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mixlora_exp.errors import UserError
from mixlora_exp.system.untrusted import parse_json, read_bytes


@dataclass(frozen=True, slots=True)
class PromptEntry:
    """A prompt, and the label of the adapter that answers it; None: all adapters."""

    prompt: str
    adapter: str | None = None


def check_text(text: str, where: str) -> None:
    """Refuse a text with lone surrogates, by which Python represents bytes that are not UTF-8 and
    which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not UTF-8 text ({error.reason}): give text") from error


def read_prompts(path: Path) -> list[PromptEntry]:
    """Return the prompts in a file, one per line; in a `.jsonl` file, objects with `prompt` and
    optionally `adapter`.

    Raises:
        UserError: the file cannot be read or is empty, or a line is not UTF-8 or, in JSONL, not a
            valid object.
    """
    try:
        raw = read_bytes(path)
        text = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"prompts={path}:{line}: this is not UTF-8 text ({error.reason}): give a text file"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"prompts={path} cannot be read ({error}): give a text file") from error
    # Not `splitlines`, which also splits at characters that are valid inside JSON strings.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"prompts={path} is empty: give a prompt per line")
    if path.suffix != ".jsonl":
        return [PromptEntry(line.rstrip("\r")) for _, line in lines]
    prompts = []
    for number, line in lines:
        where = f"{path}:{number}"
        try:
            row = parse_json(line, halves=True)
            entry = PromptEntry(row["prompt"], row.get("adapter"))
            if not isinstance(entry.prompt, str) or not isinstance(entry.adapter, str | None):
                raise TypeError("a prompt or an adapter is not text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where}: this is not a JSON object with a `prompt` (and optionally an "
                f"`adapter`), both text ({error})"
            ) from error
        if not entry.prompt.strip():
            raise UserError(f"{where}: prompt is empty: give some text")
        check_text(entry.prompt, f"{where}: prompt")
        check_text(entry.adapter or "", f"{where}: adapter")
        prompts.append(entry)
    return prompts


def check_adapters(entries: Iterable[PromptEntry], known: Collection[str]) -> None:
    """Refuse prompts for unknown adapters, before a model is loaded."""
    for one in entries:
        if one.adapter is not None and one.adapter not in known:
            hint = f"give one of {', '.join(known)}" if known else "name adapters=[DIR,DIR]"
            raise UserError(
                f"prompts: {one.prompt[:40]!r} names the unknown adapter {one.adapter}: {hint}"
            )


def piped_prompts() -> Iterator[str]:
    """Return prompts from a pipe, of which the first is read at once.

    Raises:
        UserError: there is none.
    """
    lines = typed_prompts()
    first = next(lines, None)
    if first is None:
        raise UserError("no prompt was given: give 'prompt=...' or prompts=FILE")
    return itertools.chain([first], lines)


def typed_prompts() -> Iterator[str]:
    """Yield prompts from standard input: on a terminal until an empty line, from a pipe all
    non-empty lines.

    Raises:
        UserError: the input is not UTF-8 text.
    """
    typed = sys.stdin.isatty()
    if typed:
        sys.stderr.write("Type a prompt; an empty line ends.\n")
    while True:
        try:
            line = input("> " if typed else "")
            line.encode()
        except EOFError:
            return
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            raise UserError(f"the input is not UTF-8 text ({error.reason}): type text") from error
        if line.strip():
            yield line
        elif typed:
            return
