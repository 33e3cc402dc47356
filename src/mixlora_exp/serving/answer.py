"""Prints answers to prompts: streamed for one adapter, otherwise in batches as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from mixlora_exp.config.schema_commands import GenerateConfig
from mixlora_exp.serving.open import Opened, labelled, open_adapter, open_adapters
from mixlora_exp.serving.prompts import (
    PromptEntry,
    check_adapters,
    piped_prompts,
    read_prompts,
    typed_prompts,
)
from mixlora_exp.serving.text_generation import check_chat, continuations, harmless


def answer(settings: GenerateConfig, words: Sequence[str]) -> None:
    """Answer the prompts in `settings`; `words` are the overrides that choose the base model.

    Raises:
        UserError: an adapter cannot be used, or a prompt cannot be read or answered.
    """
    entries = None
    if settings.prompts is not None:
        entries = read_prompts(Path(settings.prompts).expanduser())
        check_adapters(entries, labelled(settings.adapters))
    elif settings.prompt is not None:
        prompts = iter([settings.prompt])
    else:
        # From a pipe the first is read before a model is.
        prompts = typed_prompts() if sys.stdin.isatty() else piped_prompts()
    if settings.adapters:
        opened = open_adapters(settings.adapters, words)
    else:
        opened = open_adapter(settings.adapter, words)
    used = ", ".join(settings.adapters) or settings.adapter or "no adapter (adapter=DIR names one)"
    sys.stderr.write(f"{opened.config.model.name} with {used}\n")
    torch.manual_seed(settings.random_seed)
    if settings.chat:
        check_chat(opened)
    if entries is not None:
        _answer_all(opened, settings, entries)
        return
    if not opened.adapters:
        _show(opened, settings, prompts)
        return
    for prompt in prompts:
        _answer_all(opened, settings, [PromptEntry(prompt)])


def _show(opened: Opened, settings: GenerateConfig, prompts: Iterable[str]) -> None:
    """Answer prompts one by one, streamed; a chat keeps its earlier turns."""
    turns: list[dict[str, str]] = []
    for prompt in prompts:
        turns.append({"role": "user", "content": prompt})
        (answer,) = continuations(
            opened, [turns if settings.chat else prompt], stream=True, **_sampling(settings)
        )
        turns.append({"role": "assistant", "content": answer})


def _sampling(settings: GenerateConfig) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("max_new_tokens", "temperature", "top_p")}


def _each_adapter(opened: Opened, entries: Sequence[PromptEntry]) -> list[PromptEntry]:
    """Return every prompt with each adapter that answers it: its `adapter`, or all of them."""
    found = []
    for one in entries:
        labels = opened.adapters or [None] if one.adapter is None else [one.adapter]
        found += [PromptEntry(one.prompt, label) for label in labels]
    return found


def _answer_all(opened: Opened, settings: GenerateConfig, entries: Sequence[PromptEntry]) -> None:
    """Answer prompts in batches and print JSON lines."""
    entries = _each_adapter(opened, entries)
    turns = [
        [{"role": "user", "content": a.prompt}] if settings.chat else a.prompt for a in entries
    ]
    answers = continuations(
        opened,
        turns,
        batch_size=settings.batch_size,
        adapters=[a.adapter for a in entries] if opened.adapters else None,
        **_sampling(settings),
    )
    for one, answer in zip(entries, answers, strict=True):
        entry = {"prompt": one.prompt, "adapter": one.adapter, "answer": answer}
        if one.adapter is None:
            del entry["adapter"]
        sys.stdout.write(harmless(json.dumps(entry, ensure_ascii=False)) + "\n")
        sys.stdout.flush()
