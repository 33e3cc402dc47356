"""What a run would do, without weights and without the network: sizes, steps, memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixlora_exp.config import Config, run_name
from mixlora_exp.config.parameters import Parameters, count_parameters
from mixlora_exp.config.schema import (
    FEED_FORWARD_TARGETS,
    AnswerForm,
    DataSource,
    Head,
    Kernel,
    LoraMethodConfig,
    LossOn,
    MixLoraMethodConfig,
    Precision,
    TrainerConfig,
)
from mixlora_exp.tasks import TASKS

__all__ = [
    "Plan",
    "kept_per_token",
    "many_that_fit",
    "memory_of",
    "plan",
    "print_plan",
    "print_plan_together",
]

# Mean characters of prompt and answer per training row (label, text), over the training splits
# (HellaSwag: over 6,477 of its rows). Used where no tokenizer or no data is at hand.
CHARACTERS = {
    "arc_e": (269, 157), "arc_c": (307, 179), "boolq": (694, 694), "obqa": (181, 103),
    "piqa": (284, 168), "siqa": (218, 144), "hellaswag": (465, 190), "winogrande": (175, 163),
}  # fmt: skip
BOOLQ_PASSAGE = 576
CHARACTERS_PER_TOKEN = 4.0
CARD_GIB = (24, 48)
USABLE = 0.94
"""Of a card's memory: the rest goes to the driver's context and to gaps between allocations."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of one run. `tokens` is per epoch; `tokens_counted` tells whether they were counted
    with the model's tokenizer or estimated from characters."""

    name: str
    parameters: Parameters
    rows: dict[str, int]
    test_rows: dict[str, int]
    examples: int
    tokens: int
    tokens_counted: bool
    steps: int
    memory: dict[str, int]


def _rows(config: Config) -> tuple[dict[str, int], dict[str, int], dict[str, list]]:
    """Train and test rows per task, and the training items where the data is at hand."""
    trains = config.task.train if isinstance(config.method, LoraMethodConfig) else []
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
            items[task] = loaded.limited(config.data.train_limit, config.data.seed).items
        rows = {task: len(found) for task, found in items.items()}
        split = "train" if config.evaluation.held_out else "test"
        tests = {
            task: len(load_split(config.data, task, split, custom).items)
            for task in config.task.evaluate
        }

    def cut(sizes: dict[str, int], limit: int | None) -> dict[str, int]:
        return {task: min(n, limit or n) for task, n in sizes.items()}

    if config.evaluation.held_out:
        tests = {task: max(0, n - (config.data.train_limit or 0)) for task, n in tests.items()}
    return cut(rows, config.data.train_limit), cut(tests, config.evaluation.limit), items


def _characters(config: Config, task: str, form: AnswerForm, items: list) -> float:
    """Mean characters of an example: of the data sets of the paper known, else counted."""
    if task in CHARACTERS:
        mean = CHARACTERS[task][0 if form is AnswerForm.label else 1]
        without = task == "boolq" and not config.data.boolq_passage
        return mean - (BOOLQ_PASSAGE if without else 0)
    from mixlora_exp.data.encoding import ask

    asked = [(ask(item, form), item.answer) for item in items]
    return sum(len(p.text) + 1 + len(answers[i]) for (p, answers), i in asked) / len(asked)


def _tokens(config: Config, rows: dict[str, int], items: dict[str, list]) -> tuple[int, bool]:
    """Tokens of one epoch, and whether they were counted."""
    if items:
        from mixlora_exp.models import has_local_tokenizer
    if items and has_local_tokenizer(config.model):
        from mixlora_exp.data.encoding import encode_examples
        from mixlora_exp.models import load_tokenizer

        tokenizer = load_tokenizer(config.model)
        every = [item for found in items.values() for item in found]
        return sum(len(e.input_ids) for e in encode_examples(tokenizer, every, config.data)), True
    total = 0.0
    for task, n in rows.items():
        for form in config.data.forms:
            characters = _characters(config, task, form, items.get(task, []))
            total += n * min(characters / CHARACTERS_PER_TOKEN + 2, config.data.cutoff_length)
    return round(total), False


def count_steps(trainer: TrainerConfig, examples: int) -> int:
    """Optimizer steps: `max_steps` if set, else whole epochs with their incomplete last batch."""
    if trainer.max_steps is not None:
        return trainer.max_steps
    return math.ceil(trainer.epochs * math.ceil(examples / trainer.batch_size))


def kept_per_token(config: Config, width: int, packed: bool = False) -> float:
    """Bytes that a layer keeps per token for the backward pass, `width` bytes to a number.

    Counted from what the kernels save (a test holds it against what autograd does): both norms'
    input and output, and in 16 bits a copy in float32; queries, keys, values and the heads' output,
    which several adapters in one pass hold twice; the frozen products of gate and up. LoRA keeps
    the activation and the product as well, DoRA the output of each adapted projection before its
    scale, a mixture its router's input in float32 and, with DoRA, the K outputs of the down
    projection. A mask of dropout has a byte per element.
    """
    model, method = config.model, config.method
    assert isinstance(method, LoraMethodConfig)
    d, f = model.hidden_size, model.intermediate_size
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    outputs = {"q_proj": heads, "k_proj": kv, "v_proj": kv, "o_proj": d, "gate_proj": f,
               "up_proj": f, "down_proj": d}  # fmt: skip
    inputs = dict.fromkeys(outputs, d) | {"o_proj": heads, "down_proj": f}
    mixed = isinstance(method, MixLoraMethodConfig)
    plain = [t for t in method.targets if not (mixed and t in FEED_FORWARD_TARGETS)]
    experts = [t for t in method.targets if t not in plain]
    masks = sum(inputs[target] for target in plain)
    if experts:
        masks += d * any(t != "down_proj" for t in experts) + f * ("down_proj" in experts)
    stock = config.kernel.name in (Kernel.peft, Kernel.reference)
    slots = method.top_k if mixed else 1
    norms = 6 if width == 2 else 4
    numbers = norms * d + (3 if packed else 2) * heads + 2 * kv + 2 * f
    numbers += method.rank * len(plain)
    if not mixed or stock:
        numbers += 2 * f * slots
    if method.dora:
        numbers += sum(outputs[target] for target in plain)
        numbers += slots * d if "down_proj" in experts else 0
    if stock:
        # Under dropout each branch keeps its own input; each expert keeps its gate and up.
        numbers += (masks if method.dropout else 0) + (2 * slots * f if mixed else 0)
        numbers += sum(outputs[target] for target in experts) * slots if method.dora else 0
    dropped = masks if method.dropout else 0
    router = 4 * d if mixed and width == 2 else 0
    # Of attention's softmax and of the norms a number in float32 each.
    return numbers * width + router + dropped + 4 * (model.num_heads + 2)


def _memory(
    config: Config, parameters: Parameters, longest: int, packed: bool = False
) -> dict[str, int]:
    """An estimate in bytes: frozen weights, the float32 adapter with gradient and AdamW's two
    moments, and what is kept for the backward pass of one micro-batch."""
    model, method = config.model, config.method
    # `auto` is taken for bf16, since a plan is often made for another machine.
    width = 4 if config.trainer.precision is Precision.float32 else 2
    if not isinstance(method, LoraMethodConfig):
        return {"weights": parameters.base * width, "adapter_and_optimizer": 0, "activations": 0}
    tokens = config.trainer.micro_batch_size * longest
    layer = kept_per_token(config, width, packed)
    kept = layer * model.depth
    if config.trainer.gradient_checkpointing:
        # The input of each layer, and one layer at a time in full.
        kept = layer + model.depth * model.hidden_size * width
    # The loss holds a few rows of logits at a time, in float32.
    chunk = 2**23 * 4
    answers = longest if config.trainer.loss_on is LossOn.all else 4
    logits = config.trainer.micro_batch_size * answers * model.vocab_size * 8
    if config.trainer.head is not Head.full:
        logits = min(logits, 2 * chunk)
    return {
        "weights": parameters.base * width,
        "adapter_and_optimizer": parameters.trainable * 16,
        "activations": round(tokens * kept + logits),
    }


def many_that_fit(memory: dict[str, int], gib: float) -> int:
    """Adapters of one kind that train together on one base within `gib` GiB."""
    each = memory["adapter_and_optimizer"] + memory["activations"]
    return max(0, int((gib * 2**30 * USABLE - memory["weights"]) // each))


def memory_of(config: Config, packed: bool = False) -> dict[str, int]:
    """The estimate of a run's memory, in bytes by item; `packed`: as one of several adapters."""
    parameters = count_parameters(config.model, config.method)
    return _memory(config, parameters, config.data.cutoff_length, packed)


def _together(config: Config) -> str:
    memory = memory_of(config, packed=True)
    fits = ", ".join(f"{many_that_fit(memory, size)} in {size} GiB" for size in CARD_GIB)
    return f"adapters like this on one base: {fits}"


def plan(config: Config) -> Plan:
    """Plan a run. Reads data files only where they are local or generated.

    Raises:
        UserError: local data is missing or malformed.
    """
    parameters = count_parameters(config.model, config.method)
    rows, tests, items = _rows(config)
    examples = sum(rows.values()) * len(config.data.forms)
    tokens, counted = _tokens(config, rows, items) if examples else (0, True)
    return Plan(
        name=run_name(config),
        parameters=parameters,
        rows=rows,
        test_rows=tests,
        examples=examples,
        tokens=tokens,
        tokens_counted=counted,
        steps=count_steps(config.trainer, examples) if examples else 0,
        memory=_memory(config, parameters, config.data.cutoff_length),
    )


def describe(config: Config, found: Plan) -> list[tuple[str, str]]:
    """The plan as (what, value) lines."""
    model, p = config.model, found.parameters
    percent = f"{p.percent_true:.3f} % of all"
    if p.percent_paper is not None:
        percent += (
            f"; without magnitudes {p.percent_paper:.2f} % of the paper's "
            f"{model.nominal_parameters:.3g}"
        )
    counted = "counted" if found.tokens_counted else "estimated from characters"
    gib = {name: size / 2**30 for name, size in found.memory.items()}
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
            f"{model.name}: {model.depth} layers, hidden {model.hidden_size}, feed-forward "
            f"{model.intermediate_size}, heads {model.num_heads}/{model.num_kv_heads}, "
            f"vocabulary {model.vocab_size}",
        ),
        ("parameters", f"{p.base:,} frozen, {p.trainable:,} trainable ({percent})"),
        (
            "of them",
            f"low rank {p.adapter - p.router:,}, router {p.router:,}, magnitude {p.magnitude:,}",
        ),
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


def print_plan(config: Config) -> None:
    """Plan a run and print it."""
    from mixlora_exp.results.show import say

    for what, value in describe(config, plan(config)):
        say(f"{what:<12}{value}")


def print_plan_together(configs: Sequence[Config]) -> None:
    """Print what runs that share one base need together."""
    from mixlora_exp.results.show import say

    memories = [memory_of(config, packed=True) for config in configs]
    each = [m["adapter_and_optimizer"] + m["activations"] for m in memories]
    total = memories[0]["weights"] + sum(each)
    say(
        f"{'all':<12}{len(configs)} adapters on one base: about {total / 2**30:.1f} GiB, "
        f"{total / len(configs) / 2**30:.1f} for each (estimated); alone the largest needs "
        f"{(memories[0]['weights'] + max(each)) / 2**30:.1f}"
    )


def parameters_entry(config: Config) -> dict[str, Any]:
    """The parameter counts as they stand in a record."""
    return dataclasses.asdict(count_parameters(config.model, config.method))
