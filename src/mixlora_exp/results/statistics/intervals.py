"""Score intervals, as functions of the number z of standard errors (1.96 for 95 %).

n may be fractional: an effective number of items. No interval here has zero width.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.stats import norm, t

from mixlora_exp.records.wilson import Z

Bounds = tuple[float, float]


def tango(only_first: float, only_second: float, n: float, z: float = Z) -> Bounds:
    """Return Tango's score interval (1998) of the difference of two paired proportions.

    only_first, only_second: shares of the n items that just one of the two answers correctly. The
    interval holds each difference d that (difference - d)^2 <= z^2 v(d) / n admits, where v(d) is
    the variance of an item's difference under the likeliest shares whose difference is d.
    """
    difference = only_first - only_second

    def excess(d: float) -> float:
        b = -only_first - only_second + (2 - difference) * d
        root = math.sqrt(max(0.0, b * b + 8 * only_second * d * (1 - d)))
        variance = max(0.0, (root - b) / 2 + d * (1 - d))
        return (d - difference) ** 2 - z * z * variance / n

    def bound(end: float) -> float:
        # Just beside the difference, where `excess` may be exactly zero.
        start = difference + math.copysign(1e-9, end)
        if abs(start) >= 1 or excess(start) >= 0:
            return difference
        return end if excess(end) <= 0 else float(brentq(excess, start, end, xtol=1e-9))

    return bound(-1.0), bound(1.0)


def student(z: float, count: int) -> float:
    """Return the quantile of Student's t of `count` values, in the place of z."""
    return float(t.isf(norm.sf(z), count - 1))
