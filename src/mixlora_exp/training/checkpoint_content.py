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
    counted: tuple[int, int] | None = None,
    muon: bool = False,
) -> None:
    """Check a checkpoint against the adapter's trained parameters, by name, and the run's number of
    optimizer steps. counted: (routers, E) of its counts of tokens, None without routers. muon: its
    optimizer is Muon, not AdamW.

    Raises:
        UserError: the run cannot have written it.
    """
    for objection in _objections(found, parameters, steps, counted, muon):
        raise UserError(
            f"{found.path} is not a checkpoint of this run, although its hashes fit: "
            f"{shown(objection, 200)}; remove it to resume from an earlier one or start from the "
            "beginning"
        )


def _objections(
    found: Checkpoint,
    parameters: Mapping[str, nn.Parameter],
    steps: int,
    counted: tuple[int, int] | None,
    muon: bool,
) -> Iterator[str]:
    if not 1 <= found.step <= steps:
        yield f"it is of step {found.step}, and the run has {steps}"
    yield from _of_state(found.state, found.step, counted)
    yield from _of_experts(found.state.get("not_chosen"), parameters)
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
        if (found.moments[f"{name}/exp_avg_sq"] < 0).any():
            yield f"exp_avg_sq of {name} has values below 0"
        taken = found.moments.get(f"{name}/step")
        if (
            taken is None
            or taken.numel() != 1
            or not taken.is_floating_point()
            or not 1 <= float(taken) <= found.step
            or not float(taken).is_integer()
        ):
            yield f"the optimizer has no valid number of steps of {name}"


def _unlike(what: str, tensor: Tensor, parameter: nn.Parameter) -> Iterator[str]:
    if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
        yield (
            f"{what} is {tensor.dtype} {tuple(tensor.shape)}, not {parameter.dtype} "
            f"{tuple(parameter.shape)}"
        )
    elif not tensor.isfinite().all():
        yield f"{what} is not finite"


def _of_state(
    state: Mapping[str, Any], step: int, counted: tuple[int, int] | None
) -> Iterator[str]:
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
    else:
        logged = [0, *(entry["step"] for entry in curve)]
        if logged != sorted(set(logged)) or logged[-1] > step:
            yield f"track.curve is not of ascending steps from 1 to {step}"
    if type(track.get("tokens")) is not int or not 0 <= track["tokens"] < 2**63:
        yield "track.tokens is not a number of tokens"
    if not _number(track.get("router_loss")):
        yield "track.router_loss is not a number"
    for name in ("counts", "window"):
        if not _is_table(track.get(name, ()), counted):
            sizes = "null" if counted is None else f"null or {counted[0]} rows of {counted[1]}"
            yield f"track.{name} is not {sizes} numbers of tokens"
    if not _number(state.get("seconds")) or state["seconds"] < 0:
        yield "seconds is not a number of seconds"
    kept = state.get("kept_bytes_per_token")
    if not (kept is None or _number(kept)):
        yield "kept_bytes_per_token is not null or a number"


def _of_experts(found: Any, parameters: Mapping[str, nn.Parameter]) -> Iterator[str]:
    if found is None:
        return
    if not isinstance(found, dict) or not all(map(_numbers, found.values())):
        yield "not_chosen is not null or a list of experts per module"
        return
    most = {name.rpartition(".")[0]: 0 for name in parameters}
    for name, parameter in parameters.items():
        module = name.rpartition(".")[0]
        most[module] = max(most[module], parameter.shape[0])
    for module, experts in found.items():
        if module not in most or not all(0 <= expert < most[module] for expert in experts):
            yield f"not_chosen has experts of {module} that the adapter does not have"


def _number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int for one in value)


def _logged(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("step")) is int and _number(entry.get("loss"))


def _is_table(value: Any, counted: tuple[int, int] | None) -> bool:
    if value is None or counted is None:
        return value is None
    rows, columns = counted
    return (
        isinstance(value, list)
        and len(value) == rows
        and all(isinstance(row, list) and len(row) == columns for row in value)
        and all(_number(x) and x >= 0 for row in value for x in row)
    )
