"""An accuracy in percent, and Wilson's interval of it, for records and for tables."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
"""Number of standard errors on each side."""


def percent(value: float | None, digits: int = 1, sign: str = "") -> str:
    """Return a share in percent as text, a dash for None. sign: `+` writes that of positive ones
    too."""
    return "-" if value is None else f"{100 * value:{sign}.{digits}f}"


def wilson(share: float, n: float, z: float = Z) -> tuple[float, float]:
    """Return Wilson's score interval (1927) of a proportion over `n` items, which may be
    fractional."""
    middle = share + z * z / (2 * n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
