"""Intervals and comparisons, against figures worked out elsewhere."""

from __future__ import annotations

from statistics import mean

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import chi2, mannwhitneyu

from mixlora_exp.records.wilson import Z, wilson
from mixlora_exp.results.statistics.estimates import compare, estimate
from mixlora_exp.results.statistics.families import holm
from mixlora_exp.results.statistics.intervals import tango
from mixlora_exp.results.statistics.parts import TaskMean, accuracy_part, difference_part
from mixlora_exp.results.statistics.two_classes import area_error, area_part, area_under_curve


def items(values: np.ndarray | list[float]) -> dict[str, float]:
    return {f"{i:05}": float(value) for i, value in enumerate(values)}


def right(share: float, n: int) -> dict[str, float]:
    return items([float(i < round(share * n)) for i in range(n)])


def accuracy(*shares: float, n: int = 100) -> TaskMean:
    """A cell whose seeds have these accuracies on the same items."""
    return accuracy_part({k: right(share, n) for k, share in enumerate(shares)}, {})


def paired(
    first: dict, second: dict, groups: dict | None = None, *, binary: bool = True
) -> TaskMean:
    found = difference_part(first, second, groups or {}, binary=binary)
    assert found is not None
    return found


def test_wilson_s_interval() -> None:
    # Of 30 in 100.
    assert wilson(0.3, 100) == (pytest.approx(0.2189, abs=1e-4), pytest.approx(0.3958, abs=1e-4))
    assert wilson(0.0, 50) == (pytest.approx(0.0), pytest.approx(0.0714, abs=1e-4))


@pytest.mark.parametrize(("b", "c", "n"), [(9, 0, 50), (12, 2, 44), (1, 1, 50), (30, 11, 300)])
def test_tango_s_interval_ends_where_the_score_test_rejects(b: int, c: int, n: int) -> None:
    """By the definition: the likeliest shares with that difference, found numerically."""

    def score(d: float) -> float:
        def loss(q: float) -> float:
            # q: share that only the second answers; q + d: only the first.
            shares = np.array([q + d, q, 1 - 2 * q - d])
            if (shares <= 0).any():
                return 1e9
            return -float(np.array([b, c, n - b - c]) @ np.log(shares))

        least, most = max(0.0, -d) + 1e-12, (1 - d) / 2 - 1e-12
        q = minimize_scalar(loss, bounds=(least, most), method="bounded",
                            options={"xatol": 1e-10}).x  # fmt: skip
        return (b - c - n * d) / np.sqrt(n * (2 * q + d - d * d))

    low, high = tango(b / n, c / n, n)
    assert (score(low), score(high)) == (pytest.approx(Z, abs=1e-3), pytest.approx(-Z, abs=1e-3))
    assert tango(c / n, b / n, n) == (pytest.approx(-high), pytest.approx(-low))


def test_no_interval_has_zero_width() -> None:
    """Two runs that answer alike are not known to be equally good."""
    same = {1: right(0.4, 40), 2: right(0.4, 40)}
    found = compare(paired(same, same))
    # The largest difference d for which n d / (1 - d) is z^2.
    assert found.high == pytest.approx(Z**2 / (40 + Z**2), abs=1e-6)
    assert (found.value, found.low, found.p) == (0.0, pytest.approx(-found.high), 1.0)
    assert estimate(accuracy(1.0)).low < 1.0
    assert estimate(accuracy(0.0, 0.0)).high > 0.0
    assert tango(1.0, 0.0, 20) == (pytest.approx(0.678, abs=1e-3), 1.0)


def test_one_seed_has_the_interval_of_its_items() -> None:
    found = estimate(accuracy(0.3))
    assert (found.low, found.high) == pytest.approx(wilson(0.3, 100))
    assert (found.seeds, found.items) == (1, 100)


def test_items_and_seeds_are_added_in_quadrature() -> None:
    # t(2, 97.5 %) = 4.3027, standard deviation 0.1.
    seeds = 4.3027 * 0.1 / 3**0.5
    found = estimate(accuracy(0.5, 0.6, 0.7, n=1000))
    by_item = accuracy(0.5, 0.6, 0.7, n=1000).by_item(Z)
    assert found.value == pytest.approx(0.6)
    assert found.high - 0.6 == pytest.approx(((by_item[1] - 0.6) ** 2 + seeds**2) ** 0.5, abs=1e-4)
    assert found.high - 0.6 > seeds
    same = estimate(accuracy(0.3, 0.3, 0.3))
    assert (same.low, same.high) == pytest.approx(wilson(0.3, 100))


@pytest.mark.parametrize("binary", [True, False])
def test_differences_of_accuracies_end_where_none_can_be(binary: bool) -> None:
    """With two seeds Student's t reaches far; log-likelihoods have no end."""
    shares = ({1: right(1.0, 20), 2: right(0.4, 20)}, {1: right(0.0, 20), 2: right(0.2, 20)})
    found, mirrored = (compare(paired(*sides, binary=binary)) for sides in (shares, shares[::-1]))
    assert (found.high == 1.0, mirrored.low == -1.0) == (binary, binary)
    assert found.low == pytest.approx(-mirrored.high)
    assert (found.low < -1.0, found.p) == (not binary, pytest.approx(mirrored.p))


def test_seeds_that_answer_other_items_have_more_items() -> None:
    """Where the errors of two seeds are independent, they count as twice as many items."""
    draw = np.random.default_rng(0)
    side = {seed: items(draw.random(4000) < 0.3) for seed in (1, 2)}
    low, high = accuracy_part(side, {}).by_item(Z)
    assert high - low == pytest.approx(2 * Z * (0.21 / 8000) ** 0.5, rel=0.05)


def test_clustered_items_count_once() -> None:
    """Each item five times, under five names of one cluster, is no more than once."""
    draw = np.random.default_rng(1)
    a, b = (draw.random(200) < 0.6, draw.random(200) < 0.5)
    groups = {f"{5 * i + k:05}": f"{5 * i:05}" for i in range(200) for k in range(5)}
    once = compare(paired({1: items(a)}, {1: items(b)}))
    five = {1: items(np.repeat(a, 5))}, {1: items(np.repeat(b, 5))}
    assert compare(paired(*five, groups)).low == pytest.approx(once.low, abs=1e-6)
    assert compare(paired(*five, groups)).p == pytest.approx(once.p, abs=1e-6)
    assert compare(paired(*five)).p < once.p
    assert accuracy_part(five[0], groups).by_item(Z) == pytest.approx(
        accuracy_part({1: items(a)}, {}).by_item(Z)
    )


def test_p_is_mcnemar_s_for_one_seed() -> None:
    """Without his correction of continuity: (b - c)^2 / (b + c)."""
    a, b = np.zeros(300), np.zeros(300)
    a[:30], b[20:41] = 1, 1
    found = compare(paired({1: items(a)}, {1: items(b)}))
    assert found.p == pytest.approx(chi2.sf((20 - 11) ** 2 / 31, 1), rel=1e-3)
    turned = compare(paired({1: items(b)}, {1: items(a)}))
    assert (turned.value, turned.p) == (-found.value, pytest.approx(found.p))


def test_p_is_where_the_interval_ends_at_zero() -> None:
    draw = np.random.default_rng(4)
    base = draw.random(400) < 0.5
    for gain in (0.02, 0.06, 0.2):
        sides = [
            {seed: items(base | (draw.random(400) < more)) for seed in range(3)}
            for more in (gain, 0.0)
        ]
        found = compare(paired(*sides))
        assert (found.p <= 0.05) == (found.low > 0)
    assert found.p <= 0.05


def test_averages_of_tasks() -> None:
    parts = accuracy(0.5, n=100), accuracy(0.7, n=400)
    one = estimate(*parts)
    assert (one.value, one.items) == (pytest.approx(0.6), 500)
    up = [wilson(0.5, 100)[1] - 0.5, wilson(0.7, 400)[1] - 0.7]
    assert one.high - 0.6 == pytest.approx((up[0] ** 2 + up[1] ** 2) ** 0.5 / 2)
    # The averages of the two seeds are 0.6 and 0.7; t(1, 97.5 %) = 12.706.
    several = estimate(accuracy(0.5, 0.6), accuracy(0.7, 0.8))
    assert several.high == 1.0
    assert several.low == pytest.approx(0.65 - 12.706 * 0.0707107 / 2**0.5, abs=0.01)


def test_an_average_is_of_the_cells_that_are_shown() -> None:
    """Each over all of its seeds; the seeds need not be the same."""
    found = estimate(accuracy(0.5, 0.6, 0.7), accuracy(0.8, 0.82))
    assert (found.value, found.seeds) == (pytest.approx(mean([0.6, 0.81])), 2)
    half = (4.3027 * 0.1 / 3**0.5 + 12.706 * 0.0141421 / 2**0.5) / 2
    assert found.value - found.low > half
    assert estimate(accuracy(0.5, 0.6), accuracy(0.8)).seeds == 1


def test_figures_other_than_right_and_wrong() -> None:
    draw = np.random.default_rng(2)
    nats = [draw.normal(m, 1.0, 500) for m in (-3.0, -3.2)]
    found = compare(paired({1: items(nats[0])}, {1: items(nats[1])}, binary=False))
    error = (nats[0] - nats[1]).std() / 500**0.5
    assert found.high - found.value == pytest.approx(Z * error)


def test_only_shared_seeds_and_equal_items_are_compared() -> None:
    a, b = {"x": 1.0, "y": 0.0}, {"x": 0.0, "y": 0.0}
    found = compare(paired({1: a, 2: a}, {2: b, 3: b}))
    assert (found.seeds, found.items, found.value) == (1, 2, 0.5)
    assert difference_part({1: a}, {2: b}, {}, binary=True) is None
    with pytest.raises(ValueError, match="different items"):
        paired({1: a}, {1: {"x": 1.0, "z": 1.0}})
    # Also where the clusters are the same.
    clusters = {"x": "c", "y": "d", "z": "d"}
    with pytest.raises(ValueError, match="different items"):
        difference_part({1: a}, {1: {"x": 1.0, "z": 1.0}}, clusters, binary=True)
    for one, other in ((a, {"x": 1.0}), ({"x": 1.0}, a)):
        with pytest.raises(ValueError, match="different items"):
            paired({1: one}, {1: other})
    with pytest.raises(ValueError, match="different items"):
        accuracy_part({1: a, 2: {"x": 1.0}}, {})


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.2]) == pytest.approx([0.04, 0.09, 0.09, 0.2])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_area_under_the_curve() -> None:
    draw = np.random.default_rng(5)
    first = draw.random(200) < 0.4
    margins = np.round(draw.normal(0.6 * first, 1.0), 1)
    area, parts = area_under_curve(margins, first)
    u = mannwhitneyu(margins[first], margins[~first]).statistic
    assert area == pytest.approx(u / (first.sum() * (~first).sum()))
    # DeLong's variance, from its definition.
    pairs = np.sign(margins[first][:, None] - margins[~first]) / 2 + 0.5
    variance = pairs.mean(1).var() / first.sum() + pairs.mean(0).var() / (~first).sum()
    assert (parts**2).sum() / 200**2 == pytest.approx(variance)
    rows = {
        str(i): (float(m), bool(f)) for i, (m, f) in enumerate(zip(margins, first, strict=True))
    }
    found = estimate(area_part({1: rows, 2: rows}, {}))
    assert (found.value, found.seeds) == (pytest.approx(area), 2)
    assert found.high - found.low == pytest.approx(2 * Z * variance**0.5, rel=0.05)


def test_the_error_of_an_area_is_delongs() -> None:
    draw = np.random.default_rng(3)
    first = draw.random(60) < 0.4
    margins = draw.normal(size=60) + first
    rows = {f"{i:02}": (float(margins[i]), bool(first[i])) for i in range(60)}
    area, error = area_error(rows, {})
    above = (margins[first][:, None] > margins[~first][None, :]).astype(float)
    assert area == pytest.approx(above.mean())
    parts = (above.mean(axis=1), above.mean(axis=0))
    variance = sum(((part - area) ** 2).sum() / len(part) ** 2 for part in parts)
    assert error == pytest.approx(variance**0.5)


def test_a_constant_answer_has_an_area_of_one_half() -> None:
    rows = {str(i): (2.0, i < 60) for i in range(100)}
    found = estimate(area_part({1: rows}, {}))
    assert found.value == 0.5
    assert found.low < 0.5 < found.high
    perfect = {str(i): (1.0 if i < 60 else -1.0, i < 60) for i in range(100)}
    assert estimate(area_part({1: perfect}, {})).low < 1
    with pytest.raises(ValueError, match="ever right"):
        area_under_curve(np.ones(3), np.ones(3, bool))
