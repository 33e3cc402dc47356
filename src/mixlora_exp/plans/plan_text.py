"""Lines that a dry run prints about one run, or about several on one base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mixlora_exp.config.by_layer import by_layer
from mixlora_exp.config.command_line import CommandLine
from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.config.resolve import to_dict
from mixlora_exp.config.schema import Config
from mixlora_exp.config.schema_method import MixtureSettings
from mixlora_exp.config.together import shares_a_base
from mixlora_exp.models import architecture_of
from mixlora_exp.models.budget import budget_line
from mixlora_exp.models.parameters import routers_of
from mixlora_exp.plans.cards import CARDS, card_lines, many_that_fit, total_bytes
from mixlora_exp.plans.disk import disk_line
from mixlora_exp.plans.hours import scored_tokens, trained_tokens
from mixlora_exp.plans.memory import memory_of, peak_bytes, scoring_bytes
from mixlora_exp.plans.plan import RunPlan, plan, with_longest_row
from mixlora_exp.plans.speed import Speed, time_line
from mixlora_exp.records.checkout import git_state
from mixlora_exp.records.objections import objections
from mixlora_exp.tasks import TASKS

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Circumstances:
    """Facts beside the configuration that a plan depends on. line: the command line.
    accepts: whether a configuration is not refused for another reason than memory. processes:
    how many train together. speed: that of this machine, None where it is not known."""

    line: CommandLine = CommandLine()
    accepts: Callable[[Config], bool] = lambda config: True
    processes: int = 1
    speed: Speed | None = None


def describe(
    config: Config, found: RunPlan, around: Circumstances | None = None
) -> list[tuple[str, str]]:
    """Return the plan as (title, value) lines, without those about cards."""
    around = around or Circumstances()
    model, p = config.model, found.parameters
    shape = architecture_of(model)
    percent = f"{p.percent_true:.3f} % of all"
    if p.percent_paper is not None:
        percent += (
            f"; without magnitudes {p.percent_paper:.2f} % of the paper's "
            f"{model.nominal_parameters:.3g}"
        )
    counted = "estimated from characters"
    if found.padding is not None and config.data.packing:
        counted = "counted; packed, without padding"
    elif found.padding is not None:
        counted = f"counted; {100 * found.padding:.0f} % of the batches is padding"
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
        *([("experts", line)] if (line := _by_layer(config)) else []),
        *(("experts", line) for line in _uneven_groups(config)),
        ("train rows", ", ".join(f"{task} {n:,}" for task, n in found.rows.items()) or "none"),
        ("test rows", ", ".join(f"{task} {n:,}" for task, n in found.test_rows.items())),
        *(training if found.examples else [("training", "none: the model is scored as it is")]),
        ("memory", _memory(config, found, around.processes)),
        (
            "time",
            time_line(
                around.speed,
                trained_tokens(config, found),
                scored_tokens(config, found),
                around.processes,
            ),
        ),
        ("disk", disk_line(config)),
    ]


def _memory(config: Config, found: RunPlan, processes: int) -> str:
    unknown = not found.tokens_counted and not TASKS.keys() >= found.rows.keys()
    more = "; free text is not cut, and longer rows need more" if unknown else ""
    config = with_longest_row(config, found)
    scored = f"{scoring_bytes(config) / GIB:.1f}"
    if not found.examples:
        return f"about {scored} GiB to score (estimated)"
    items = memory_of(config, processes=processes)
    named = ", ".join(f"{name.replace('_', ' ')} {n / GIB:.1f}" for name, n in items.items())
    each = f" on each of {processes} devices" if processes > 1 else ""
    return (
        f"about {total_bytes([config], processes) / GIB:.1f} GiB{each} at "
        f"{config.data.cutoff_length} tokens per example: {named}; scoring {scored} "
        f"(estimated{more})"
    )


def _together(config: Config) -> str:
    fits = ", ".join(f"{many_that_fit(config, size)} in {size}" for size in CARDS)
    return f"adapters like this on one base: {fits} GB"


def print_plan(
    config: Config,
    adapter: Mapping[str, Any] | None,
    around: Circumstances | None = None,
    *,
    cards: bool = True,
) -> Config:
    """Plan a run and print the plan; returns the configuration with rows as long as the longest.
    `adapter`: see `runs.inputs.adapter_entry`. cards: with what fits each card."""
    around = around or Circumstances()
    found = plan(config, adapter)
    lines, against = describe(config, found, around), _against(config, adapter)
    longest = with_longest_row(config, found)
    if cards:
        lines += card_lines([longest], around.line, around.accepts, around.processes)
    joins = found.examples and shares_a_base(config.method)
    lines += [("together", _together(longest))] if joins else []
    _print([*lines, *([("record", against)] if against else [])])
    return longest


def print_plan_together(configs: Sequence[Config], around: Circumstances | None = None) -> None:
    """Print the total memory of runs that share one base model, and what fits each card."""
    around = around or Circumstances()
    total, alone = total_bytes(configs), max(map(peak_bytes, configs))
    text = (
        f"{len(configs)} adapters on one base: about {total / GIB:.1f} GiB, "
        f"{total / len(configs) / GIB:.1f} for each (estimated); alone the largest needs "
        f"{alone / GIB:.1f}"
    )
    _print([("all", text), *card_lines(configs, around.line, around.accepts)])


def _print(lines: Sequence[tuple[str, str]]) -> None:
    from mixlora_exp.system.console import echo

    for what, value in lines:
        echo(f"{what:<12}{value}")


def first_line(name: str, config: Config, adapter: Mapping[str, Any] | None) -> str:
    """Return the first line that a run prints: its name, and objections to its use in tables; with
    `method.match_params` a second one, and one where counts by groups of layers are not all used.
    `adapter`: see `runs.inputs.adapter_entry`."""
    against, budget = _against(config, adapter), budget_line(config)
    first = f"Run {name}" + (f" ({against})" if against else "")
    return "\n".join(line for line in (first, budget, *_uneven_groups(config)) if line)


def _by_layer(config: Config) -> str:
    """Return E and K of each run of layers with the same; empty if they are given as numbers. K is
    the router's, which may not be `top_k`."""
    method = config.method
    if not isinstance(method, MixtureSettings) or method.alike:
        return ""
    told = {
        layer: f"E {router.num_experts}, K {'up to ' if router.varies else ''}{router.slots}"
        for layer, router in routers_of(config.model, method).items()
    }
    found = []
    for text, own in groupby(sorted(told), key=told.__getitem__):
        numbers = list(map(str, own))
        where = f"layer {numbers[0]}" + (f" to {numbers[-1]}" if len(numbers) > 1 else "")
        found.append(f"{where}: {text}")
    return "; ".join(found)


def _uneven_groups(config: Config) -> list[str]:
    """Return a line for each number of experts that is given for more groups than there are
    layers, of which some then have none."""
    if not isinstance(config.method, MixtureSettings):
        return []
    layers, lines = architecture_of(config.model).num_hidden_layers, []
    for name in ("num_experts", "top_k"):
        value = getattr(config.method, name)
        if isinstance(value, str) and len(value.split("/")) > layers:
            found = ", ".join(map(str, by_layer(name, value, layers)))
            lines.append(
                f"method.{name}={value} has more groups than the model has layers ({layers}): they "
                f"get {found}"
            )
    return lines


def _against(config: Config, adapter: Mapping[str, Any] | None) -> str:
    """Message on why `make collect` will not take the run; empty if it will."""
    record = {
        "config": {"model": to_dict(config.model)},
        "provenance": {"git": git_state(CONF_DIR.parent)},
        "adapter": adapter,
    }
    found = objections(record)
    return f"make collect will not take it: {'; '.join(found)}" if found else ""
