"""`generate.py`: one prompt, a file of prompts, or prompts as they are typed, for one adapter or
several in the same batches."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mixlora_exp.config import options
from mixlora_exp.errors import UserError
from mixlora_exp.serving.open import (
    GROUPS,
    Opened,
    labelled,
    open_adapter,
    open_adapters,
    split_words,
)
from mixlora_exp.serving.text_generation import check_chat, continuations
from mixlora_exp.system.untrusted import parse_json, read_bytes

__all__ = ["run"]


@dataclass(slots=True, kw_only=True)
class Settings:
    adapter: str | None = None
    adapters: list[str] = field(default_factory=list)
    prompt: str | None = None
    prompts: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 8
    chat: bool = False
    random_seed: int = 0


def _check(settings: Settings) -> None:
    for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("random_seed", 0)):
        value = getattr(settings, name)
        if value < least:
            raise UserError(f"{name}={value} must be >= {least}")
    if settings.random_seed >= 2**63:
        raise UserError(f"random_seed={settings.random_seed} must be below 2**63")
    # Logits are divided by it: below this they are no numbers.
    if settings.temperature != 0 and not 1e-4 <= settings.temperature <= 1e4:
        raise UserError(
            f"temperature={settings.temperature} must be 0 (greedy), or from 1e-4 to 1e4"
        )
    if not 0 < settings.top_p <= 1:
        raise UserError(f"top_p={settings.top_p} must be above 0 and at most 1")
    if settings.prompt is not None and not settings.prompt.strip():
        raise UserError("prompt is empty: give some text, or leave it out to be asked")
    if settings.prompt is not None:
        _check_text(settings.prompt, "prompt")
    if settings.prompt is not None and settings.prompts is not None:
        raise UserError("prompt and prompts were both given: name one of them")
    if settings.adapters and settings.adapter is not None:
        raise UserError("adapter and adapters were both given: name one of them")
    if settings.adapters and settings.chat:
        raise UserError("chat=true is for one adapter: give adapter=DIR instead of adapters")


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, and which adapter is asked; None: all there are."""

    prompt: str
    adapter: str | None = None


def _check_text(text: str, where: str) -> None:
    """Bytes that are no UTF-8 come as halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is no UTF-8 text ({error.reason}): give text") from error


def _read_prompts(path: Path) -> list[Asked]:
    try:
        raw = read_bytes(path)
        text = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"prompts={path}:{line}: this is no UTF-8 text ({error.reason}): give a text file"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"prompts={path} cannot be read ({error}): give a text file") from error
    # Not `splitlines`, which cuts at characters that JSON leaves as they are.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"prompts={path} is empty: give a prompt per line")
    if path.suffix != ".jsonl":
        return [Asked(line.rstrip("\r")) for _, line in lines]
    prompts = []
    for number, line in lines:
        where = f"{path}:{number}"
        try:
            row = parse_json(line, halves=True)
            asked = Asked(row["prompt"], row.get("adapter"))
            if not isinstance(asked.prompt, str) or not isinstance(asked.adapter, str | None):
                raise TypeError("a prompt or an adapter is no text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where}: this is no JSON object with a `prompt` (and perhaps an `adapter`), "
                f"both text ({error})"
            ) from error
        if not asked.prompt.strip():
            raise UserError(f"{where}: prompt is empty: give some text")
        _check_text(asked.prompt, f"{where}: prompt")
        _check_text(asked.adapter or "", f"{where}: adapter")
        prompts.append(asked)
    return prompts


def _check_adapters(asked: Iterable[Asked], known: Collection[str]) -> None:
    """Refuse prompts for adapters that are not there, before a model is loaded."""
    for one in asked:
        if one.adapter is not None and one.adapter not in known:
            hint = f"give one of {', '.join(known)}" if known else "name adapters=[DIR,DIR]"
            raise UserError(f"prompts: {one.prompt[:40]!r} asks for adapter {one.adapter}: {hint}")


def _typed() -> Iterator[str]:
    """Prompts as they are typed, until an empty line or the end of input; from a pipe, to its end,
    empty lines left out."""
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
            raise UserError(
                f"what was typed is no UTF-8 text ({error.reason}): type text"
            ) from error
        if line.strip():
            yield line
        elif typed:
            return


def _show(opened: Opened, settings: Settings, prompts: Iterable[str]) -> None:
    """Answer prompts one by one, word by word as they come; a chat remembers what was said."""
    turns: list[dict[str, str]] = []
    for prompt in prompts:
        turns.append({"role": "user", "content": prompt})
        (answer,) = continuations(
            opened, [turns if settings.chat else prompt], stream=True, **_sampling(settings)
        )
        turns.append({"role": "assistant", "content": answer})


def _sampling(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("max_new_tokens", "temperature", "top_p")}


def _each_adapter(opened: Opened, asked: Sequence[Asked]) -> list[Asked]:
    """Every prompt with the adapter that answers it: its own, or each of them."""
    found = []
    for one in asked:
        labels = opened.adapters or [None] if one.adapter is None else [one.adapter]
        found += [Asked(one.prompt, label) for label in labels]
    return found


def _answer_all(opened: Opened, settings: Settings, asked: Sequence[Asked]) -> None:
    """Answer prompts in batches, as JSON lines."""
    asked = _each_adapter(opened, asked)
    turns = [[{"role": "user", "content": a.prompt}] if settings.chat else a.prompt for a in asked]
    answers = continuations(
        opened,
        turns,
        batch_size=settings.batch_size,
        adapters=[a.adapter for a in asked] if opened.adapters else None,
        **_sampling(settings),
    )
    for one, answer in zip(asked, answers, strict=True):
        entry = {"prompt": one.prompt, "adapter": one.adapter, "answer": answer}
        if one.adapter is None:
            del entry["adapter"]
        sys.stdout.write(json.dumps(entry, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def run(argv: Sequence[str]) -> None:
    """Carry out one command line.

    Raises:
        UserError: an option is unknown or wrong, or the adapter cannot be used.
    """
    words, rest = split_words(argv)
    settings = options(Settings, rest, also=GROUPS)
    _check(settings)
    asked = None
    if settings.prompts is not None:
        asked = _read_prompts(Path(settings.prompts).expanduser())
        _check_adapters(asked, labelled(settings.adapters))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Not every terminal can show every character.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _answer(settings, words, asked)
    except BrokenPipeError:
        # Who reads has seen enough (`| head`). Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _answer(settings: Settings, words: Sequence[str], asked: list[Asked] | None) -> None:
    if settings.adapters:
        opened = open_adapters(settings.adapters, words)
    else:
        opened = open_adapter(settings.adapter, words)
    used = ", ".join(settings.adapters) or settings.adapter or "no adapter (adapter=DIR names one)"
    sys.stderr.write(f"{opened.config.model.name} with {used}\n")
    torch.manual_seed(settings.random_seed)
    if settings.chat:
        check_chat(opened)
    if asked is not None:
        _answer_all(opened, settings, asked)
        return
    prompts = _typed() if settings.prompt is None else [settings.prompt]
    if not opened.adapters:
        _show(opened, settings, prompts)
        return
    for prompt in prompts:
        _answer_all(opened, settings, [Asked(prompt)])
