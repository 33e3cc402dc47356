"""The rank of experts whose trainable parameters come closest to those of another method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache

from mixlora_exp.config.command import compose
from mixlora_exp.config.schema import Config, MethodConfig
from mixlora_exp.config.schema_rank import ExpertRank
from mixlora_exp.errors import UserError
from mixlora_exp.models.parameters import Parameters, count_parameters


def with_matched_rank(config: Config) -> Config:
    """Return the configuration with `method.expert_rank` as `method.match_params` asks for;
    unchanged without that.

    Raises:
        UserError: the reference is no method, `expert_rank` is another number, or already rank 1 or
            the routers alone have more parameters than the reference.
    """
    method = config.method
    if not isinstance(method, ExpertRank) or method.match_params is None:
        return config
    wanted = _reference(config).trainable

    @lru_cache
    def counted(rank: int) -> Parameters:
        return count_parameters(config.model, dataclasses.replace(method, expert_rank=rank))

    given = f"method.match_params={method.match_params}"
    try:
        least = counted(1)
    except UserError as error:
        raise UserError(f"{given}: {error}") from error
    _check_reach(given, least, wanted)
    rank = _closest(given, lambda rank: counted(rank).trainable, wanted)
    if method.expert_rank not in (None, rank):
        raise UserError(
            f"method.expert_rank={method.expert_rank}: {given} chooses {rank}: give one of the two"
        )
    return dataclasses.replace(config, method=dataclasses.replace(method, expert_rank=rank))


def budget_line(config: Config) -> str:
    """Return the choice of `with_matched_rank` in one line; empty where it had none."""
    method = config.method
    if not isinstance(method, ExpertRank) or method.match_params is None:
        return ""
    own = count_parameters(config.model, method)
    wanted = _reference(config).trainable
    beside = f" beside LoRA of rank {method.rank}" if own.components["attention"] else ""
    return (
        f"method.match_params={method.match_params}: experts of rank {method.expert_rank}{beside}; "
        f"{own.trainable:,} trainable parameters, {wanted:,} there "
        f"({100 * (own.trainable / wanted - 1):+.2f} %)"
    )


def _check_reach(given: str, least: Parameters, wanted: int) -> None:
    """Refuse a budget below that of rank 1; `least`: the parameters then."""
    if least.router > wanted:
        raise UserError(
            f"{given}: the routers alone have {least.router:,} trainable parameters, and it has "
            f"{wanted:,}: choose a larger rank there, or fewer experts"
        )
    if least.trainable > wanted:
        raise UserError(
            f"{given}: experts of rank 1 make {least.trainable:,} trainable parameters in all, and "
            f"it has {wanted:,}: choose a larger rank there, or fewer experts"
        )


def _closest(given: str, count: Callable[[int], int], wanted: int) -> int:
    """Return the rank >= 1 whose count, which grows with the rank, is nearest; of two the lower.

    Raises:
        UserError: it would be one that `count` refuses.
    """

    def is_above(rank: int) -> bool:
        try:
            return count(rank) > wanted
        except UserError:
            return True  # Experts that start from the weights cannot have any rank.

    low, high = 1, 2
    while not is_above(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_above(middle) else (middle, high)
    left = wanted - count(low)
    try:
        return low if left == 0 or left <= count(high) - wanted else high
    except UserError as error:
        step = count(low) - count(low - 1) if low > 1 else 0
        if 2 * left <= step:
            return low
        raise UserError(
            f"{given}: the largest rank that these experts can have is {low}, with {count(low):,} "
            f"trainable parameters in all, and it has {wanted:,}: choose a smaller rank there"
        ) from error


def _reference(config: Config) -> Parameters:
    """Return the parameter counts of the method in `match_params` on the same model.

    Raises:
        UserError: there is no such method, or it has no rank.
    """
    method = config.method
    name, rank = method.budget()
    magnitudes = config.preset.train_magnitude
    try:
        return count_parameters(config.model, _method(name, rank, train_magnitude=magnitudes))
    except UserError as error:
        raise UserError(f"method.match_params={method.match_params}: {error}") from error


@lru_cache(maxsize=8)
def _method(name: str, rank: int, *, train_magnitude: bool) -> MethodConfig:
    given = str(train_magnitude).lower()
    words = [f"method={name}", f"method.rank={rank}", f"preset.train_magnitude={given}"]
    return compose(words).method
