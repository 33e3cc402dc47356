"""Intervals and comparisons, against figures worked out elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from mixlora_exp.results.statistics import (
    compare,
    compare_average,
    estimate,
    estimate_average,
    mcnemar,
)


def test_one_seed_has_wilson_s_interval() -> None:
    found = estimate([0.3], 100)
    # Wilson's score interval of 30 in 100.
    assert (found.low, found.high) == (
        pytest.approx(0.2189, abs=1e-4),
        pytest.approx(0.3958, abs=1e-4),
    )
    assert (found.seeds, found.items, found.by) == (1, 100, "items")


def test_several_seeds_have_student_s_interval() -> None:
    found = estimate([0.5, 0.6, 0.7], 1000)
    # t(2, 97.5 %) = 4.3027, standard deviation 0.1.
    assert found.value == pytest.approx(0.6)
    assert found.high - found.value == pytest.approx(4.3027 * 0.1 / 3**0.5, abs=1e-4)
    assert found.low == pytest.approx(0.6 - 4.3027 * 0.1 / 3**0.5, abs=1e-4)
    assert found.by == "seeds"


def test_seeds_that_agree_have_the_interval_of_their_items() -> None:
    found = estimate([0.3, 0.3, 0.3], 100)
    assert found.low == pytest.approx(0.2189, abs=1e-4)
    assert found.high == pytest.approx(0.3958, abs=1e-4)
    assert (found.seeds, found.by) == (3, "items")


def test_average_over_tasks() -> None:
    one = estimate_average([[0.5], [0.7]], [100, 400])
    assert one.value == pytest.approx(0.6)
    error = (0.25 / 100 + 0.21 / 400) ** 0.5 / 2
    assert one.high - one.value == pytest.approx(1.96 * error, abs=1e-4)
    several = estimate_average([[0.5, 0.6], [0.7, 0.8]], [100, 400])
    assert several.value == pytest.approx(0.65)
    # The averages of the two seeds are 0.6 and 0.7; t(1, 97.5 %) = 12.706.
    assert several.high - several.value == pytest.approx(12.706 * 0.0707107 / 2**0.5, abs=1e-3)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    # Two-sided: 2 (1 + 10) / 2^10.
    assert mcnemar(9, 1) == pytest.approx(22 / 1024)


def right(values: np.ndarray) -> dict[str, bool]:
    return {str(i): bool(value) for i, value in enumerate(values)}


def test_a_clear_difference_is_found_and_noise_is_not() -> None:
    generator = np.random.default_rng(3)
    base = generator.random(500) < 0.5
    better = base | (generator.random(500) < 0.3)
    found = compare({1: right(better)}, {1: right(base)})
    average = compare_average([({1: right(better)}, {1: right(base)})] * 2)
    assert average.difference == found.difference
    assert found.high - found.low > average.high - average.low > 0, "twice as many items"
    assert average.clear
    assert found.clear
    assert found.difference == pytest.approx(better.mean() - base.mean())
    assert found.low < found.difference < found.high
    assert found.p < 1e-6
    noise = compare({1: right(generator.random(500) < 0.5)}, {1: right(base)})
    assert not noise.clear
    assert noise.p > 0.01
    assert compare({1: right(better)}, {1: right(base)}) == found, (
        "the same input, the same interval"
    )


def test_coverage_of_the_bootstrap() -> None:
    """Of two equally good methods, about 5 % are called different."""
    generator = np.random.default_rng(11)
    wrong = 0
    for _ in range(60):
        a, b = (generator.random(200) < 0.6 for _ in range(2))
        wrong += compare({1: right(a)}, {1: right(b)}).clear
    assert wrong <= 9


@pytest.mark.parametrize("seeds", [2, 3])
def test_coverage_over_seeds_that_differ(seeds: int) -> None:
    """Each seed of a method is a little better or worse; the methods are equally good."""
    generator = np.random.default_rng(5)
    wrong = 0
    for _ in range(60):
        sides = [
            {
                seed: right(generator.random(800) < 0.6 + generator.normal(0, 0.05))
                for seed in range(seeds)
            }
            for _ in range(2)
        ]
        wrong += compare(*sides).clear
    assert wrong <= 7


def test_only_shared_seeds_and_equal_items_are_compared() -> None:
    a, b = {"x": True, "y": False}, {"x": False, "y": False}
    found = compare({1: a, 2: a}, {2: b, 3: b})
    assert (found.seeds, found.items, found.difference) == (1, 2, 0.5)
    assert compare({1: a}, {2: b}) is None
    with pytest.raises(ValueError, match="different items"):
        compare({1: a}, {1: {"x": True, "z": True}})
