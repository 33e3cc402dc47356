"""Rows of data that are odd: read as a task's rows or refused in one message."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from composed import compose
from odd_values import changed_somewhere, cut_or_flipped, trouble

from mixlora_exp.data.encoding import encode_examples
from mixlora_exp.data.sources import load_split
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_tokenizer
from mixlora_exp.tasks import TASKS, embedded

Draws = Callable[..., Iterator[Random]]
OWN = "own_task"
OWN_FIELDS = (
    f"++task.custom={{{OWN}:{{question:question,options:[choices],answer:answer,answer_as:index}}}}"
)


def one_odd(draw: Random, folder: Path) -> tuple[str, str]:
    """Write an odd file; returns its task and split."""
    task = draw.choice([*sorted(TASKS), OWN])
    split = draw.choice(("train", "test"))
    rows: list[Any] = embedded.rows("arc_e" if task == OWN else task, split, seed=0)[:6]
    if task == OWN:
        rows = [{"id": str(i), "question": "Is it?", "choices": ["a", "b"], "answer": i % 2}
                for i in range(6)]  # fmt: skip
    for _ in range(draw.choice((1, 2))):
        place = draw.randrange(len(rows))
        if isinstance(rows[place], dict):
            rows[place] = changed_somewhere(rows[place], draw)
        if draw.random() < 0.1:
            rows[place] = [rows[place]]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packed = draw.random() < 0.2
    if packed:
        content = gzip.compress(content)
    if draw.random() < 0.25:
        content = cut_or_flipped(content, draw)
    path = folder / task / f"{split}.jsonl{'.gz' if packed else ''}"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return task, split


def test_odd_data(draws: Draws, tmp_path: Path) -> None:
    tokenizer, wrong, sound = load_tokenizer(compose(["model=tiny"]).model), {}, 0
    for number, draw in enumerate(draws("data files", 40, 200)):
        folder = tmp_path / str(number)
        task, split = one_odd(draw, folder)
        words = ["model=tiny", "data=local", f"data.path={folder}"]
        words += [OWN_FIELDS] if task == OWN else []
        config = compose(words)

        def read(config=config, task=task, split=split) -> None:
            nonlocal sound
            loaded = load_split(config.data, task, split, config.task.custom)
            encode_examples(tokenizer, loaded.items, config.data)
            sound += 1

        if what := trouble(read, UserError):
            wrong[number] = what
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())
    assert sound, "nothing but refusals: the generator is too wild to test anything behind them"


def test_the_generator_changes_something() -> None:
    rows = {"rows": [{"a": 1}, {"b": [2, 3]}]}
    made = [json.dumps(changed_somewhere(rows, Random(seed))) for seed in range(50)]
    assert len(set(made)) > 30
    assert json.dumps(rows) not in made
