"""The conditions of a block in words, for readers who do not know the names of settings."""

from __future__ import annotations

import json
from typing import Any

from mixlora_exp.results.cells import Key, Standards, odd_conditions
from mixlora_exp.results.headings import word
from mixlora_exp.results.paper import MODEL_TITLES, TASK_TITLES

PROTOCOLS = {
    "answer_text": "answers as text",
    "label_logits": "answers as letters",
    "generate": "generated answers",
}
WORDS = {
    "data.train_limit": "{} training rows a task",
    "evaluation.limit": "{} test items a task",
    "trainer.max_steps": "{} steps",
    "trainer.epochs": "{} epochs",
    "trainer.learning_rate": "learning rate {}",
    "trainer.micro_batch_size": "micro-batches of {}",
    "evaluation.shuffle_experts": "experts shuffled by seed {}",
    "preset": "preset {}",
    "precision": "{}",
    "data.boolq_passage": "BoolQ's passages: {}",
}
"""A condition -> its words, with its value for {}."""


def _described(name: str, value: Any) -> str:
    if name == "trainer.epochs" and value == 1:
        return "1 epoch"
    if name == "evaluation.held_out":
        return "rows held out of training"
    if name == "kernel":
        return "PEFT's layers" if value == "peft" else f"{value} kernel"
    if name == "hardware":
        return "CPU" if value == "cpu" else str(value)
    if name == "data.train_limits":
        return ", ".join(f"{n:,} of {TASK_TITLES.get(task, task)}" for task, n in value.items())
    if name in WORDS:
        return WORDS[name].format(f"{value:,}" if type(value) is int else word(value))
    return f"{name}={word(value)}"


def condition_text(key: Key, standards: Standards) -> str:
    """Model, protocol and what differs from a full run, as one line of text."""
    model, protocol, text = key
    conditions = json.loads(text)
    odd = odd_conditions(key, standards)
    forms = odd.pop("data.forms", None)
    found = [PROTOCOLS.get(protocol, protocol)]
    if conditions["data.name"] == "embedded":
        found.append("generated tasks, not the benchmarks")
    if conditions.get("evaluation.limit") is None:
        found.append("full test sets")
    if forms and len(forms) > 1:
        found.append("trained on letters and text")
    # torch's version changes summation order; the details name it.
    shown = {n: v for n, v in odd.items() if not n.endswith("torch")}
    order = sorted(shown, key=lambda n: (n not in WORDS, list(WORDS).index(n) if n in WORDS else 0))
    return f"{MODEL_TITLES.get(model, model)}, " + ", ".join(
        [*found, *(_described(name, shown[name]) for name in order)]
    )
