"""The plan of a run (sizes, steps, memory), without weights and without network access."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.config.resolve import run_name, to_dict
from mixlora_exp.config.schema import (
    AnswerForm,
    Config,
    DataSource,
    TrainedMethodConfig,
    TrainerConfig,
)
from mixlora_exp.models import architecture_of, has_local_tokenizer, load_tokenizer
from mixlora_exp.models.budget import budget_line
from mixlora_exp.models.flops import count_flops
from mixlora_exp.models.parameters import Parameters, count_parameters
from mixlora_exp.plans.memory import kept_by_all_layers, many_that_fit, memory_of
from mixlora_exp.records.checkout import git_state
from mixlora_exp.records.objections import objections
from mixlora_exp.tasks import TASKS

BOOLQ_PASSAGE = 576
"""Mean characters of BoolQ's passages, which `data.boolq_passage=false` leaves out."""
CHARACTERS_PER_TOKEN = 4.0
CARD_GIB = (24, 48)


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The plan of one run. `tokens`: per epoch; `tokens_counted`: whether they were counted with
    the model's tokenizer, not estimated from characters. `padding`: fraction of padding positions
    in the first epoch's batches, None if tokens were not counted."""

    name: str
    parameters: Parameters
    rows: dict[str, int]
    test_rows: dict[str, int]
    examples: int
    tokens: int
    tokens_counted: bool
    padding: float | None
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


def known_characters(config: Config, task: str, form: AnswerForm) -> float:
    """Mean characters of prompt and answer of one of the paper's tasks."""
    without = task == "boolq" and not config.data.boolq_passage
    return TASKS[task].characters[form.value] - (BOOLQ_PASSAGE if without else 0)


def _characters(config: Config, task: str, form: AnswerForm, items: list) -> float:
    """Mean characters of an example: known for the paper's data sets, otherwise counted."""
    if task in TASKS:
        return known_characters(config, task, form)
    from mixlora_exp.data.encoding import ask

    asked = [(ask(item, form), item.answer) for item in items]
    return sum(len(p.text) + 1 + len(answers[i]) for (p, answers), i in asked) / len(asked)


def _counted(config: Config, items: dict[str, list]) -> list[int] | None:
    """Tokens of each example; None without local data or without a local tokenizer."""
    if not items or not has_local_tokenizer(config.model):
        return None
    from mixlora_exp.data.encoding import encode_examples

    tokenizer = load_tokenizer(config.model)
    every = [item for found in items.values() for item in found]
    return [len(e.input_ids) for e in encode_examples(tokenizer, every, config.data)]


def _estimated(config: Config, rows: dict[str, int], items: dict[str, list]) -> int:
    """Tokens of one epoch, estimated from characters."""
    total = 0.0
    for task, n in rows.items():
        for form in config.data.forms:
            characters = _characters(config, task, form, items.get(task, []))
            total += n * min(characters / CHARACTERS_PER_TOKEN + 2, config.data.cutoff_length)
    return round(total)


def _padding(config: Config, lengths: list[int]) -> float:
    """Fraction of padding positions in the first epoch: each row is padded to the longest of its
    micro-batch."""
    from mixlora_exp.data.sampler import sampler_of

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
    """The optimizer steps of a training run; reads data as `plan` does."""
    if config.trainer.max_steps is not None:
        return config.trainer.max_steps
    rows, _, _ = _rows(config)
    return count_steps(config.trainer, sum(rows.values()) * len(config.data.forms))


def _together(config: Config) -> str:
    memory = memory_of(config, packed=True)
    fits = ", ".join(f"{many_that_fit(memory, size)} in {size} GiB" for size in CARD_GIB)
    return f"adapters like this on one base: {fits}"


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
        steps=count_steps(config.trainer, examples) if examples else 0,
        memory=memory_of(config),
    )


def describe(config: Config, found: RunPlan) -> list[tuple[str, str]]:
    """The plan as (title, value) lines."""
    model, p = config.model, found.parameters
    shape = architecture_of(model)
    percent = f"{p.percent_true:.3f} % of all"
    if p.percent_paper is not None:
        percent += (
            f"; without magnitudes {p.percent_paper:.2f} % of the paper's "
            f"{model.nominal_parameters:.3g}"
        )
    counted = "estimated from characters"
    if found.padding is not None:
        counted = f"counted; {100 * found.padding:.0f} % of the batches is padding"
    gib = {name: size / 2**30 for name, size in found.memory.items()}
    frozen = p.magnitude and not config.method.train_magnitude
    training = [
        ("examples", f"{found.examples:,} per epoch, {found.tokens:,} tokens ({counted})"),
        (
            "steps",
            f"{found.steps:,} of {config.trainer.batch_size} examples "
            f"({config.trainer.micro_batch_size} x {config.trainer.accumulation_steps})",
        ),
    ]
    return [
        ("run", found.name),
        (
            "model",
            f"{model.name}: {shape.num_hidden_layers} layers, hidden {shape.hidden_size}, "
            f"feed-forward {shape.intermediate_size}, heads "
            f"{shape.num_attention_heads}/{shape.num_key_value_heads}, "
            f"vocabulary {shape.vocab_size}",
        ),
        ("parameters", f"{p.base:,} frozen, {p.trainable:,} trainable ({percent})"),
        (
            "of them",
            f"low rank {p.adapter - p.router:,}, router {p.router:,}, magnitude {p.magnitude:,}"
            + (" (not trained)" if frozen else ""),
        ),
        *([("budget", line)] if (line := budget_line(config)) else []),
        ("train rows", ", ".join(f"{task} {n:,}" for task, n in found.rows.items()) or "none"),
        ("test rows", ", ".join(f"{task} {n:,}" for task, n in found.test_rows.items())),
        *(training if found.examples else [("training", "none: the model is scored as it is")]),
        (
            "memory",
            f"about {sum(gib.values()):.1f} GiB at {config.data.cutoff_length} tokens per example: "
            + ", ".join(f"{name.replace('_', ' ')} {size:.1f}" for name, size in gib.items())
            + " (estimated)",
        ),
        *([("together", _together(config))] if found.examples else []),
    ]


def print_plan(config: Config, adapter: Mapping[str, Any] | None) -> None:
    """Plan a run and print the plan. `adapter`: see `runs.inputs.adapter_entry`."""
    from mixlora_exp.system.console import say

    lines, against = describe(config, plan(config, adapter)), _against(config, adapter)
    for what, value in [*lines, *([("record", against)] if against else [])]:
        say(f"{what:<12}{value}")


def first_line(name: str, config: Config, adapter: Mapping[str, Any] | None) -> str:
    """The first line that a run prints: its name, and objections to its use in tables; with
    `method.match_params` a second one. `adapter`: see `runs.inputs.adapter_entry`."""
    against, budget = _against(config, adapter), budget_line(config)
    first = f"Run {name}" + (f" ({against})" if against else "")
    return f"{first}\n{budget}" if budget else first


def _against(config: Config, adapter: Mapping[str, Any] | None) -> str:
    """Message on why `make collect` will not take the run; empty if it will."""
    record = {
        "config": {"model": to_dict(config.model)},
        "provenance": {"git": git_state(CONF_DIR.parent)},
        "adapter": adapter,
    }
    found = objections(record)
    return f"make collect will not take it: {'; '.join(found)}" if found else ""


def print_plan_together(configs: Sequence[Config]) -> None:
    """Print the total memory of runs that share one base model."""
    from mixlora_exp.system.console import say

    memories = [memory_of(config, packed=True) for config in configs]
    each = [m["adapter_and_optimizer"] + m["activations"] for m in memories]
    total = memories[0]["weights"] + sum(each)
    say(
        f"{'all':<12}{len(configs)} adapters on one base: about {total / 2**30:.1f} GiB, "
        f"{total / len(configs) / 2**30:.1f} for each (estimated); alone the largest needs "
        f"{(memories[0]['weights'] + max(each)) / 2**30:.1f}"
    )


def parameters_entry(config: Config) -> dict[str, Any]:
    """The parameter counts in the format of a record."""
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
