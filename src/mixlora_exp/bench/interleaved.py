"""Interleaved measurements, summarised by medians and by ratios within rounds."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Sample = dict[str, float]
"""Seconds by part, and the `round`."""
TRAIN = ("train_forward_s", "train_backward_s")
WHOLE = "train_s"
"""A training step that cannot be divided, in place of its two parts."""


def _seconds(sample: Sample, parts: Sequence[str]) -> float | None:
    """Return the sum of `parts` of a step, None if one was not measured."""
    if WHOLE in sample and tuple(parts) == TRAIN:
        return sample[WHOLE]
    return sum(sample[part] for part in parts) if all(p in sample for p in parts) else None


def interleaved(
    steps: Mapping[str, Callable[[int], Sample]],
    rounds: int,
    seed: int,
    *,
    every: Mapping[str, int] | None = None,
    deadline: float | None = None,
    lost: Callable[[str, int, Exception], bool] = lambda name, number, error: False,
    echo: Callable[[str], None] = lambda text: None,
) -> dict[str, list[Sample]]:
    """Return each step's measurements in each round. The steps of a round run in a random order, so
    that none always follows the same one.

    `every`: a step is taken in each n-th round. `deadline` (of `time.monotonic`) ends the rounds
    early. `lost(name, number, error)`: whether a step that raised is given up, with what it has
    measured so far, and the others go on.
    """
    found: dict[str, list[Sample]] = {name: [] for name in steps}
    for number in range(rounds):
        if deadline is not None and time.monotonic() > deadline:
            echo(f"stopped after {number} of {rounds} rounds: out of time")
            break
        names = list(found)
        random.Random(seed + number).shuffle(names)
        for name in names:
            if number % (every or {}).get(name, 1):
                continue
            try:
                found[name].append({"round": number, **steps[name](number)})
            except Exception as error:
                if not lost(name, number, error):
                    raise
                del found[name]
        echo(f"round {number + 1}/{rounds}")
    return found


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile; a single value stands for all three."""
    if len(values) < 2:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def ratios(taken: Sequence[Sample], others: Sequence[Sample], parts: Sequence[str]) -> list[float]:
    """Return sums of `parts` of one step over those of another, within the rounds that have
    both."""
    by_round = {sample["round"]: sample for sample in others}
    pairs = [(s, by_round[s["round"]]) for s in taken if s["round"] in by_round]
    both = [(_seconds(a, parts), _seconds(b, parts)) for a, b in pairs]
    return [a / b for a, b in both if a is not None and b is not None]


def summary(taken: Sequence[Sample], reference: Sequence[Sample], tokens: int) -> dict[str, Any]:
    """Return medians and quartiles per token, and of the ratios within the same rounds."""
    if not taken:
        return {"rounds": 0}
    found: dict[str, Any] = {"rounds": len(taken)}
    timed = [key for key in taken[0] if key.endswith("_s")]
    for key in timed:
        low, middle, high = quartiles([s[key] for s in taken if key in s])
        name = key.removesuffix("_s") + "_us_per_token"
        found[name] = round(middle * 1e6 / tokens, 3)
        found[name + "_quartiles"] = [round(v * 1e6 / tokens, 3) for v in (low, high)]
    parts = {key.removesuffix("_s"): (key,) for key in timed}
    for name, keys in {**parts, "train": TRAIN}.items():
        own = ratios(taken, reference, keys)
        if own:
            low, middle, high = quartiles(own)
            found[f"{name}_ratio"] = round(middle, 4)
            found[f"{name}_ratio_quartiles"] = [round(low, 4), round(high, 4)]
    totals = [total for s in taken if (total := _seconds(s, TRAIN)) is not None]
    # Something else ran then: medians bear a few of them.
    found["disturbed_rounds"] = sum(t > 2 * statistics.median(totals) for t in totals)
    found["samples"] = taken
    return found


def pair(taken: Sequence[Sample], others: Sequence[Sample], name: str) -> dict[str, Any]:
    """Return the ratio of a row's training step to another row's within the same rounds."""
    own = ratios(taken, others, TRAIN)
    low, middle, high = quartiles(own)
    both = [round(low, 4), round(high, 4)]
    return {"row": name, "median": round(middle, 4), "quartiles": both, "rounds": len(own)}
