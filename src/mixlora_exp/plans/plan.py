"""The plan of a run (sizes, steps, memory), without weights and without network access."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mixlora_exp.config.run_names import run_name
from mixlora_exp.config.schema import (
    AnswerForm,
    Config,
    DataSource,
    TrainedMethodConfig,
    TrainerConfig,
)
from mixlora_exp.models import has_local_tokenizer, load_tokenizer
from mixlora_exp.models.flops import count_flops
from mixlora_exp.models.parameters import Parameters, count_parameters
from mixlora_exp.plans.memory import kept_by_all_layers, memory_of
from mixlora_exp.tasks import TASKS, Item

BOOLQ_PASSAGE = 576
"""Mean characters of BoolQ's passages, which `data.boolq_passage=false` leaves out."""
CHARACTERS_PER_TOKEN = 4.0


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The plan of one run. `tokens`: per epoch; `tokens_counted`: whether they were counted with
    the model's tokenizer, not estimated from characters. `padding`: fraction of padding positions
    in the first epoch's batches, `longest`: tokens of the longest example; None if tokens were not
    counted."""

    name: str
    parameters: Parameters
    rows: dict[str, int]
    test_rows: dict[str, int]
    examples: int
    tokens: int
    tokens_counted: bool
    padding: float | None
    longest: int | None
    steps: int
    memory: dict[str, int]


def _rows(config: Config) -> tuple[dict[str, int], dict[str, int], dict[str, list]]:
    """Training and test rows per task, and the training items if the data are local."""
    trains = config.task.train if isinstance(config.method, TrainedMethodConfig) else []
    items: dict[str, list] = {}
    if config.data.name is DataSource.hub and config.data.mirror is None:
        rows = {task: TASKS[task].sizes["train"] for task in trains}
        split = "train" if config.evaluation.held_out else "test"
        tests = {task: TASKS[task].sizes[split] for task in config.task.evaluate}
    else:
        from mixlora_exp.data.sources import load_split

        custom = config.task.custom
        for task in trains:
            loaded = load_split(config.data, task, "train", custom)
            items[task] = loaded.limited(config.data.train_limit_of(task), config.data.seed).items
        rows = {task: len(found) for task, found in items.items()}
        split = "train" if config.evaluation.held_out else "test"
        tests = {
            task: len(load_split(config.data, task, split, custom).items)
            for task in config.task.evaluate
        }

    limit_of = config.data.train_limit_of
    if config.evaluation.held_out:
        tests = {task: max(0, n - (limit_of(task) or 0)) for task, n in tests.items()}
    rows = {task: min(n, limit_of(task) or n) for task, n in rows.items()}
    tests = {task: min(n, config.evaluation.limit or n) for task, n in tests.items()}
    return rows, tests, items


def known_tokens(config: Config, task: str, form: AnswerForm) -> float:
    """Return the tokens of prompt and answer of one of the paper's tasks, estimated from its mean
    characters."""
    without = task == "boolq" and not config.data.boolq_passage
    characters = TASKS[task].characters[form.value] - (BOOLQ_PASSAGE if without else 0)
    return min(characters / CHARACTERS_PER_TOKEN + 2, config.data.cutoff_length)


def _tokens(config: Config, item: Item, form: AnswerForm) -> float:
    """Estimate an example's tokens from its characters; what has no context (free text) is not
    cut."""
    from mixlora_exp.data.encoding import prompt_with_answers

    prompt, answers = prompt_with_answers(item, form)
    tokens = (len(prompt.text) + 1 + len(answers[item.answer])) / CHARACTERS_PER_TOKEN + 2
    return min(tokens, config.data.cutoff_length) if prompt.context else tokens


def _counted(config: Config, items: dict[str, list]) -> list[int] | None:
    """Return tokens of each example; None without local data or without a local tokenizer."""
    if not items or not has_local_tokenizer(config.model):
        return None
    from mixlora_exp.data.encoding import encode_examples

    tokenizer = load_tokenizer(config.model)
    every = [item for found in items.values() for item in found]
    return [len(e.input_ids) for e in encode_examples(tokenizer, every, config.data)]


def _estimated(config: Config, rows: dict[str, int], items: dict[str, list]) -> int:
    """Return tokens of one epoch, estimated from characters."""
    total = 0.0
    for task, n in rows.items():
        for form in config.data.forms:
            if task in TASKS:
                total += n * known_tokens(config, task, form)
            else:
                total += sum(_tokens(config, item, form) for item in items[task])
    return round(total)


def _padding(config: Config, lengths: list[int]) -> float:
    """Return the fraction of padding positions in the first epoch: each row is padded to the
    longest of its micro-batch, but with `data.packing`."""
    from mixlora_exp.data.sampler import sampler_of

    if config.data.packing:
        return 0.0
    trainer = config.trainer
    order = list(sampler_of(lengths, trainer.batch_size, config.seed, trainer.order))
    positions = 0
    for start in range(0, len(order), trainer.micro_batch_size):
        rows = order[start : start + trainer.micro_batch_size]
        positions += len(rows) * max(lengths[i] for i in rows)
    return 1 - sum(lengths) / positions


def count_steps(trainer: TrainerConfig, examples: int) -> int:
    """Optimizer steps: `max_steps` if set, otherwise all epochs with incomplete last batches."""
    if trainer.max_steps is not None:
        return trainer.max_steps
    return math.ceil(trainer.epochs * math.ceil(examples / trainer.batch_size))


def planned_steps(config: Config) -> int:
    """Return the optimizer steps of a training run; reads data as `plan` does."""
    if config.trainer.max_steps is not None:
        return config.trainer.max_steps
    rows, _, _ = _rows(config)
    return count_steps(config.trainer, sum(rows.values()) * len(config.data.forms))


def plan(config: Config, adapter: Mapping[str, Any] | None = None) -> RunPlan:
    """Plan a run. Reads only data that are local or generated. `adapter`: see
    `runs.inputs.adapter_entry`.

    Raises:
        UserError: local data are missing or malformed.
    """
    parameters = count_parameters(config.model, config.method)
    rows, tests, items = _rows(config)
    examples = sum(rows.values()) * len(config.data.forms)
    lengths = _counted(config, items) if examples else []
    return RunPlan(
        name=run_name(config, adapter),
        parameters=parameters,
        rows=rows,
        test_rows=tests,
        examples=examples,
        tokens=_estimated(config, rows, items) if lengths is None else sum(lengths),
        tokens_counted=lengths is not None,
        padding=_padding(config, lengths) if lengths else None,
        longest=max(lengths) if lengths else None,
        steps=count_steps(config.trainer, examples) if examples else 0,
        memory=memory_of(config),
    )


def with_longest_row(config: Config, found: RunPlan) -> Config:
    """Return the configuration with `data.cutoff_length` raised to the longest example, as what has
    no context to cut (free text) is not cut there."""
    longest = max(config.data.cutoff_length, found.longest or 0)
    return replace(config, data=replace(config.data, cutoff_length=longest))


def parameters_entry(config: Config) -> dict[str, Any]:
    """Return the parameter counts in the format of a record."""
    return dataclasses.asdict(count_parameters(config.model, config.method))


def cost_entry(config: Config, width: int) -> dict[str, Any] | None:
    """Return the calculated cost of a token in the format of a record; `train` has measured values.
    None where an existing adapter is scored. width: bytes per number of the run."""
    if config.adapter is not None:
        return None
    trains = isinstance(config.method, TrainedMethodConfig)
    return {
        "forward_flops_per_token": count_flops(config.model, config.method)._asdict(),
        "estimated_kept_bytes_per_token": (
            round(kept_by_all_layers(config, width), 1) if trains else None
        ),
    }
