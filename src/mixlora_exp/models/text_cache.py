"""A cache for functions whose arguments have no hash, such as configurations with dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

P, R = ParamSpec("P"), TypeVar("R")


@dataclass(frozen=True)
class _Call:
    text: str
    arguments: tuple[Any, ...] = field(compare=False)


def cached_by_text(
    text: Callable[P, str], maxsize: int = 32
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Cache the results of the decorated function of positional arguments, by `text` of them, which
    must say all that the result depends on."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @lru_cache(maxsize)
        def cached(call: _Call) -> R:
            return function(*call.arguments)

        @wraps(function)
        def called(*arguments: Any) -> R:
            return cached(_Call(text(*arguments), arguments))

        return called

    return decorate
