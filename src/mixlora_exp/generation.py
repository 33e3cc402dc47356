"""`generate.py`: one prompt, a file of prompts, or prompts as they are typed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mixlora_exp.config import options
from mixlora_exp.errors import UserError
from mixlora_exp.serving import Opened, continuations, open_adapter, split_words

__all__ = ["run"]


@dataclass(slots=True, kw_only=True)
class Settings:
    adapter: str | None = None
    prompt: str | None = None
    prompts: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 8
    chat: bool = False
    random_seed: int = 0


def _check(settings: Settings) -> None:
    for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("temperature", 0)):
        value = getattr(settings, name)
        if value < least:
            raise UserError(f"{name}={value} must be >= {least}")
    if not 0 < settings.top_p <= 1:
        raise UserError(f"top_p={settings.top_p} must be above 0 and at most 1")
    if settings.prompt is not None and not settings.prompt.strip():
        raise UserError("prompt is empty: give some text, or leave it out to be asked")
    if settings.prompt is not None and settings.prompts is not None:
        raise UserError("prompt and prompts were both given: name one of them")


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={path} cannot be read ({error}): give a text file") from error
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompt = json.loads(line)["prompt"]
            if not isinstance(prompt, str):
                raise TypeError(f"the prompt {prompt!r} is no text")
            prompts.append(prompt)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: this is no JSON object with a `prompt`") from error
    return prompts


def _typed() -> Iterator[str]:
    """Prompts as they are typed, until an empty line or the end of input."""
    if sys.stdin.isatty():
        sys.stderr.write("Type a prompt; an empty line ends.\n")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            return
        yield line


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


def run(argv: Sequence[str]) -> None:
    """Carry out one command line.

    Raises:
        UserError: an option is unknown or wrong, or the adapter cannot be used.
    """
    words, rest = split_words(argv)
    settings = options(Settings, rest)
    _check(settings)
    prompts = None if settings.prompts is None else _read_prompts(Path(settings.prompts))
    opened = open_adapter(settings.adapter, words)
    torch.manual_seed(settings.random_seed)
    if settings.prompt is not None:
        _show(opened, settings, [settings.prompt])
    elif prompts is None:
        _show(opened, settings, _typed())
    else:
        asked = [[{"role": "user", "content": p}] if settings.chat else p for p in prompts]
        answers = continuations(
            opened, asked, batch_size=settings.batch_size, **_sampling(settings)
        )
        for prompt, answer in zip(prompts, answers, strict=True):
            entry = {"prompt": prompt, "answer": answer}
            sys.stdout.write(json.dumps(entry, ensure_ascii=False) + "\n")
            sys.stdout.flush()
