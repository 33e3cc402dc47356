"""Required content of a checkpoint. Hashes detect damage; this detects content
that no run wrote, from which training would silently continue as another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from torch import Tensor, nn

from mixlora_exp.errors import UserError, shown
from mixlora_exp.training.checkpoints import Checkpoint

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter beside `step`; methods store more."""
MUON = "momentum_buffer"
"""Muon's state of a parameter, which has no number of steps."""


def check_content(
    found: Checkpoint,
    parameters: Mapping[str, nn.Parameter],
    steps: int,
    *,
    muon: bool = False,
) -> None:
    """Check a checkpoint against the adapter's trained parameters, by name, and the run's number of
    optimizer steps. muon: its optimizer is Muon, not AdamW.

    Raises:
        UserError: the run cannot have written it.
    """
    for objection in _objections(found, parameters, steps, muon):
        raise UserError(
            f"{found.path} is not a checkpoint of this run, although its hashes fit: "
            f"{shown(objection, 200)}; remove it to resume from an earlier one or start anew"
        )


def _objections(
    found: Checkpoint, parameters: Mapping[str, nn.Parameter], steps: int, muon: bool
) -> Iterator[str]:
    if not 1 <= found.step <= steps:
        yield f"it is of step {found.step}, and the run has {steps}"
    yield from _of_state(found.state, found.step)
    other = sorted(found.adapter.keys() ^ parameters.keys())
    if other:
        yield f"only one of the two has the weight {other[0]}"
    for name, parameter in parameters.items():
        yield from _unlike(name, found.adapter[name], parameter)
        for key in (MUON,) if muon else MOMENTS:
            moment = found.moments.get(f"{name}/{key}")
            if moment is None:
                yield f"the optimizer has no {key} of {name}"
            else:
                yield from _unlike(f"{key} of {name}", moment, parameter)
        if muon:
            continue
        taken = found.moments.get(f"{name}/step")
        if taken is None or taken.numel() != 1 or not 1 <= float(taken) <= found.step:
            yield f"the optimizer has no valid number of steps of {name}"


def _unlike(what: str, tensor: Tensor, parameter: nn.Parameter) -> Iterator[str]:
    if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
        yield (
            f"{what} is {tensor.dtype} {tuple(tensor.shape)}, not {parameter.dtype} "
            f"{tuple(parameter.shape)}"
        )
    elif not tensor.isfinite().all():
        yield f"{what} is not finite"


def _of_state(state: Mapping[str, Any], step: int) -> Iterator[str]:
    track = state.get("track")
    if not isinstance(track, dict):
        yield "it has no statistics of the steps"
        return
    for name in ("losses", "norms"):
        values = track.get(name)
        if not isinstance(values, list) or len(values) != step or not all(map(_number, values)):
            yield f"track.{name} is not one number per step"
    curve = track.get("curve")
    if not isinstance(curve, list) or not all(map(_logged, curve)):
        yield "track.curve is not a list of log entries"
    if type(track.get("tokens")) is not int or track["tokens"] < 0:
        yield "track.tokens is not a number of tokens"
    if not _number(track.get("router_loss")):
        yield "track.router_loss is not a number"
    for name in ("counts", "window"):
        if not _is_table(track.get(name, ())):
            yield f"track.{name} is not null or one row of numbers per layer"
    if not _number(state.get("seconds")):
        yield "seconds is not a number"
    experts = state.get("not_chosen")
    if not (
        experts is None or (isinstance(experts, dict) and all(map(_numbers, experts.values())))
    ):
        yield "not_chosen is not null or a list of experts per module"
    kept = state.get("kept_bytes_per_token")
    if not (kept is None or _number(kept)):
        yield "kept_bytes_per_token is not null or a number"


def _number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int for one in value)


def _logged(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("step")) is int and _number(entry.get("loss"))


def _is_table(value: Any) -> bool:
    if value is None:
        return True
    rows = isinstance(value, list) and all(isinstance(row, list) and row for row in value)
    return rows and len({*map(len, value)}) == 1 and all(_number(x) for row in value for x in row)
