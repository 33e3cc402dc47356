"""Intervals and p-values at their edges, and where several errors come together, by hand."""

from __future__ import annotations

from statistics import mean

import numpy as np
import pytest
from scipy.stats import norm

from mixlora_exp.records.wilson import Z, wilson
from mixlora_exp.results.statistics.estimates import compare, estimate
from mixlora_exp.results.statistics.families import holm
from mixlora_exp.results.statistics.intervals import student, tango
from mixlora_exp.results.statistics.parts import (
    TaskMean,
    accuracy_part,
    difference_part,
    interval,
    variance_of_mean,
)
from mixlora_exp.results.statistics.two_classes import area_part, area_under_curve

T = {2: 12.7062047, 3: 4.3026527}
"""Student's t at 97.5 %, by the number of values."""


def items(values: np.ndarray | list[float]) -> dict[str, float]:
    return {f"{i:05}": float(value) for i, value in enumerate(values)}


def right(share: float, n: int) -> dict[str, float]:
    return items([float(i < round(share * n)) for i in range(n)])


def accuracy(*shares: float, n: int = 100) -> TaskMean:
    return accuracy_part({k: right(share, n) for k, share in enumerate(shares)}, {})


def normal(middle: float, error: float, by_seed: dict[int, float] | None = None) -> TaskMean:
    """A difference with a normal error over items."""
    return TaskMean(
        middle, lambda z: (middle - z * error, middle + z * error), by_seed or {1: middle}, 10
    )


def test_a_mean_varies_as_its_clusters_do() -> None:
    # Mean 0.75; the deviations of the clusters sum to -0.5, 0.25 and 0.25.
    found = variance_of_mean(np.array([1.0, 0.0, 1.0, 1.0]), ["a", "a", "b", "c"])
    assert found == pytest.approx((0.25 + 0.0625 + 0.0625) / 16)


def test_no_more_items_than_answers() -> None:
    """Two seeds that are right on the other's wrong items have hardly an error over items."""
    side = {1: right(0.5, 100), 2: items([float(i >= 49) for i in range(100)])}
    assert accuracy_part(side, {}).by_item(Z) == pytest.approx(wilson(0.505, 200))


def test_where_nothing_varies_clusters_are_counted() -> None:
    groups = {f"{i:05}": str(i // 5) for i in range(100)}
    for share in (0.0, 1.0):
        part = accuracy_part({1: right(share, 100), 2: right(share, 100)}, groups)
        assert part.by_item(Z) == pytest.approx(wilson(share, 20))
    # One seed right where the other is wrong: the share varies, the mean of an item does not.
    opposite = {1: right(0.5, 100), 2: items([float(i >= 50) for i in range(100)])}
    assert accuracy_part(opposite, {}).by_item(Z) == pytest.approx(wilson(0.5, 100))


def test_one_seed_s_difference_has_tango_s_interval_of_its_items() -> None:
    a, b = items([1.0] * 30 + [0.0] * 70), items([0.0] * 20 + [1.0] * 15 + [0.0] * 65)
    for seeds in ((1,), (1, 2)):
        part = difference_part(dict.fromkeys(seeds, a), dict.fromkeys(seeds, b), {}, binary=True)
        assert part is not None
        assert part.value == pytest.approx(0.15)
        assert part.by_item(Z) == pytest.approx(tango(0.2, 0.05, 100), abs=1e-9)


def test_tango_s_interval_at_the_ends() -> None:
    low, high = tango(1.0, 0.0, 20)
    assert tango(0.0, 1.0, 20) == (-1.0, pytest.approx(-low))
    assert high == 1.0
    # Where only one of the two is ever right, at z = 1: n (1 - d) = d, as of one proportion.
    assert tango(1.0, 0.0, 4, 1.0)[0] == pytest.approx(wilson(1.0, 4, 1.0)[0] * 2 - 1)
    narrow, wide = tango(0.3, 0.1, 50, 1.0), tango(0.3, 0.1, 50, 3.0)
    assert wide[0] < narrow[0] < 0.2 < narrow[1] < wide[1]
    assert tango(0.3, 0.1, 50.5)[0] > tango(0.3, 0.1, 50)[0]


def test_quantiles_of_student_s_t() -> None:
    for count, t in T.items():
        assert student(Z, count) == pytest.approx(t)
    assert student(Z, 10**6) == pytest.approx(Z, rel=1e-5)


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_an_average_adds_all_its_errors(shift: float) -> None:
    """Three seeds each: the error over seeds is that of the averages of a seed."""
    parts = [
        normal(0.2, 0.01, {1: 0.1, 2: 0.2, 3: 0.3}),
        normal(0.4 + shift, 0.02, {1: 0.3 + shift, 2: 0.4 + shift, 3: 0.5 + shift}),
    ]
    half = (((0.01 * Z) ** 2 + (0.02 * Z) ** 2) / 4 + (T[3] * 0.1) ** 2 / 3) ** 0.5
    middle = 0.3 + shift / 2
    assert interval(parts) == pytest.approx((middle - half, middle + half))


def test_an_average_over_other_seeds_is_no_surer() -> None:
    parts = [
        normal(0.6, 0.01, {1: 0.5, 2: 0.6, 3: 0.7}),
        normal(0.8, 0.02, {1: 0.79, 2: 0.81}),
    ]
    seeds = (T[3] * 0.1 / 3**0.5 + T[2] * 0.0141421356 / 2**0.5) / 2
    half = (((0.01 * Z) ** 2 + (0.02 * Z) ** 2) / 4 + seeds**2) ** 0.5
    assert interval(parts) == pytest.approx((0.7 - half, 0.7 + half))
    # As many, but not the same.
    others = [normal(0.6, 0.0, {1: 0.5, 2: 0.7}), normal(0.6, 0.0, {1: 0.7, 3: 0.5})]
    assert interval(others)[1] == pytest.approx(0.6 + T[2] * 0.1)
    same = [normal(0.6, 0.0, {1: 0.5, 2: 0.7}), normal(0.6, 0.0, {1: 0.7, 2: 0.5})]
    assert interval(same) == pytest.approx((0.6, 0.6))


def test_the_sides_of_an_interval_are_its_own() -> None:
    lopsided = TaskMean(0.5, lambda z: (0.4, 0.8), {1: 0.5}, 10)
    assert interval([lopsided]) == pytest.approx((0.4, 0.8))
    assert interval([lopsided, normal(0.3, 0.0)]) == pytest.approx((0.35, 0.55))


def test_estimates_are_shares_and_differences_are_not() -> None:
    parts = normal(0.95, 0.1, {1: 0.95, 2: 0.95}), normal(0.95, 0.1, {1: 0.95, 2: 0.95})
    assert estimate(*parts).high == 1.0
    assert compare(*parts).high == pytest.approx(0.95 + 0.1 * Z / 2**0.5)
    low = normal(0.05, 0.1)
    assert estimate(low).low == 0.0
    assert compare(low).low == pytest.approx(0.05 - 0.1 * Z)
    assert (compare(*parts).items, compare(*parts).seeds) == (20, 2)
    assert compare(*parts).value == pytest.approx(0.95)


@pytest.mark.parametrize("ratio", [0.01, 0.5, 1.0, 1.96, 3.0, 7.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_p_of_a_normal_difference(ratio: float, sign: int) -> None:
    assert compare(normal(sign * ratio, 1.0)).p == pytest.approx(2 * norm.sf(ratio), rel=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_p_has_an_end_on_either_side(sign: int) -> None:
    assert compare(normal(0.0, 1.0)).p == 1.0
    assert compare(normal(sign * 1e-5, 1.0)).p == 1.0
    assert compare(normal(sign * 9.0, 1.0)).p == pytest.approx(2 * norm.sf(8.0))
    assert compare(normal(sign * 0.5, 0.0)).p == pytest.approx(2 * norm.sf(8.0))


def test_p_over_seeds_is_where_the_interval_ends() -> None:
    part = normal(0.2, 0.03, {1: 0.1, 2: 0.2, 3: 0.3})
    z = norm.isf(compare(part).p / 2)
    assert interval([part], z)[0] == pytest.approx(0.0, abs=1e-5)


def test_holm_keeps_the_order_that_it_is_given() -> None:
    assert holm([0.03, 0.01]) == pytest.approx([0.03, 0.02])
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06] * 3)
    assert holm([0.001, 0.9, 0.8]) == pytest.approx([0.003, 1.0, 1.0])
    assert holm([0.7]) == [0.7]


@pytest.mark.parametrize("first", [60, 30])
def test_a_perfect_area_is_as_sure_as_the_rarer_answer(first: int) -> None:
    rows = {f"{i:03}": (1.0 if i < first else -1.0, i < first) for i in range(100)}
    part = area_part({1: rows}, {})
    assert (part.value, part.items) == (1.0, 100)
    assert part.by_item(Z) == pytest.approx(wilson(1.0, min(first, 100 - first)))
    never = {item: (-margin, right) for item, (margin, right) in rows.items()}
    assert area_part({1: never}, {}).by_item(Z)[0] == pytest.approx(0.0)


@pytest.mark.parametrize("gain", [0.8, -0.8], ids=["above one half", "below"])
def test_an_area_has_the_items_that_its_error_says(gain: float) -> None:
    draw = np.random.default_rng(7)
    first = draw.random(80) < 0.4
    margins = {seed: draw.normal(gain * first, 1.0) for seed in (1, 2)}
    found = [area_under_curve(m, first) for m in margins.values()]
    area = mean(a for a, _ in found)
    variance = variance_of_mean(np.mean([p for _, p in found], axis=0), [*map(str, range(80))])
    rows = {
        seed: {f"{i:03}": (float(m[i]), bool(first[i])) for i in range(80)}
        for seed, m in margins.items()
    }
    part = area_part(rows, {})
    assert part.value == pytest.approx(area)
    assert part.by_seed == pytest.approx(dict(zip((1, 2), (a for a, _ in found), strict=True)))
    assert part.by_item(Z) == pytest.approx(wilson(area, area * (1 - area) / variance))
    # Each item three times under names of one cluster.
    thrice = {
        seed: {f"{i}-{k}": row for i, row in held.items() for k in range(3)}
        for seed, held in rows.items()
    }
    groups = {name: name[:3] for name in thrice[1]}
    assert area_part(thrice, groups).by_item(Z) == pytest.approx(part.by_item(Z))


def test_an_area_needs_both_answers() -> None:
    for right_ones in (np.ones(3, bool), np.zeros(3, bool)):
        with pytest.raises(ValueError, match="only one"):
            area_under_curve(np.ones(3), right_ones)
    area, parts = area_under_curve(np.array([2.0, 1.0]), np.array([True, False]))
    assert area == 1.0
    assert parts == pytest.approx([0.0, 0.0])
