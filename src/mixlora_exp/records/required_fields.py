"""The fields and types that readers require in the record of a run.

The hash in a record detects damage, but anybody can write a record, so its types are checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from re import fullmatch
from typing import Any

from mixlora_exp.config.recorded import check_recorded
from mixlora_exp.errors import UserError, shown

NUMBER = (int, float)
FIGURE = (int, float, None)
"""A number, or null if it was not finite."""
TEXT = (str, None)
LOADS = ([[FIGURE]], None)
SCORE = {
    "task": str, "protocol": str, "n": int, "accuracy": NUMBER, "stderr": FIGURE,
    "accuracy_normalized": FIGURE, "majority_class": FIGURE, "chance": FIGURE,
    "gold_log_likelihood": FIGURE, "unparsed?": (int, None), "expert_load": LOADS,
    "clusters?": {"*": str},
}  # fmt: skip
FILES = {"*": [{"path": str, "rows": int, "sha256": str}]}
GIT = ({"commit": str, "dirty": bool}, None)
CONFIG = {
    "seed": int, "model": {"name": str}, "method": {"name": str}, "data": {"name": str},
    "task": {"name": str, "train": [str], "evaluate": [str]}, "kernel": {"name": str},
    "trainer": {"precision": str}, "evaluation": {"protocols": [str]},
}  # fmt: skip
"""Fields of the configuration in all versions; `config.recorded` checks the types."""
SOURCE = {
    "name": str, "fingerprint": str, "config": CONFIG, "data": FILES, "model": {"source": str},
    "kernel?": TEXT, "dtype?": TEXT,
    "parameters?": (
        {"percent_paper?": FIGURE, "percent_true?": FIGURE, "components?": {"*": int}}, None,
    ),
}  # fmt: skip
COST = {
    "forward_flops_per_token": {"base": int, "adapter": (int, None)},
    "estimated_kept_bytes_per_token": FIGURE,
}
STABILITY = {
    "gradient_norm_median": FIGURE, "gradient_norm_max": FIGURE, "gradient_norm_max_step": FIGURE,
    "step_losses": [FIGURE], "step_gradient_norms": [FIGURE],
}  # fmt: skip
TRAIN = {
    "steps": int, "examples?": int, "tokens?": int, "seconds?": NUMBER,
    "final_loss?": FIGURE, "tokens_per_second?": NUMBER, "first_step_seconds?": FIGURE,
    "peak_memory_bytes?": int, "not_chosen?": ({"*": [int]}, None),
    "kept_bytes_per_token?": FIGURE, "processes?": int,
    "expert_load": LOADS, "curve": [{"step": int, "loss": FIGURE}], "stability?": (STABILITY, None),
}  # fmt: skip
PROVENANCE = {
    "git": GIT, "packages": {"torch": TEXT}, "hardware": {"cpu": TEXT, "gpus": [str]},
}  # fmt: skip
_TIMES = ("train_forward", "train_backward", "infer_forward", "train")
BENCHMARK = {
    "config": {
        "model": str, "layers": (int, None), "batch": int, "length": int, "dtype": str,
        "dropout": NUMBER, "rounds?": int,
    },
    "threads": int, "layers": int, "provenance": PROVENANCE,
    "rows": {"*": {
        "error?": str, "method": str, "kernel": str, "adapter_dtype": str, "head": str,
        "num_experts": int, "top_k": int, "router?": str,
        **{f"{time}_us_per_token?": FIGURE for time in _TIMES},
        **{f"{time}_ratio?": FIGURE for time in _TIMES},
        **{f"{time}_ratio_quartiles?": [NUMBER] for time in _TIMES},
        "train_peak_memory_bytes?": FIGURE, "infer_peak_memory_bytes?": FIGURE,
        "feed_forward_saved_bytes_per_token?": FIGURE,
        "samples?": [{"round": int, **{f"{time}_s?": NUMBER for time in _TIMES}}],
    }},
}  # fmt: skip
"""Of a benchmark of steps."""
RECORD = {
    **SOURCE,
    "status": str,
    "adapter?": (
        {"path": TEXT, "sha256": str, "trained_by?": ({**SOURCE, "git": GIT}, None)}, None,
    ),
    "saved_adapter?": ({"sha256": str}, None),
    "cost?": (COST, None),
    "train?": (TRAIN, None),
    "scores": [SCORE],
    "scores_before?": ([SCORE], None),
    "predictions": {"*": str},
    "predictions_sha256?": {"*": str},
    "provenance": PROVENANCE,
}  # fmt: skip
"""A field with `?` is optional, `*` matches any name, and other fields are ignored."""
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"


def predictions_name(task: str, protocol: str) -> str:
    """Return the name of the file in a run's folder with the predictions for a task under a
    protocol."""
    return f"predictions/{task}.{protocol}.jsonl"


def _word(kind: Any) -> str:
    if isinstance(kind, dict) or kind is dict:
        return "an object"
    if isinstance(kind, list):
        return "a list"
    return {str: "text", int: "an integer", float: "a number", bool: "true or false"}.get(
        kind, "null"
    )


def _check(value: Any, kind: Any, where: str) -> None:
    if isinstance(kind, tuple):
        own = [one for one in kind if _fits(value, one)]
        if not own:
            words = list(dict.fromkeys(_word(one) for one in kind))
            raise UserError(f"{where} must be {' or '.join(words)}, not {shown(repr(value), 60)}")
        kind = own[0]
    elif not _fits(value, kind):
        raise UserError(f"{where} must be {_word(kind)}, not {shown(repr(value), 60)}")
    if isinstance(kind, list):
        for number, entry in enumerate(value):
            _check(entry, kind[0], f"{where}[{number}]")
    elif isinstance(kind, dict):
        for name, inner in kind.items():
            plain = name.removesuffix("?")
            if name == "*":
                for key, entry in value.items():
                    _check(entry, inner, f"{where}.{shown(key, 60)}")
            elif plain in value:
                _check(value[plain], inner, f"{where}.{plain}" if where else plain)
            elif plain == name:
                raise UserError(f"{where}.{name} is missing" if where else f"{name} is missing")


def _fits(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if isinstance(kind, (dict, list)):
        return isinstance(value, type(kind))
    return type(value) is kind


def check_benchmark(record: Mapping[str, Any]) -> None:
    """Check one benchmark of steps.

    Raises:
        UserError: a field is missing or has the wrong type; the message names it.
    """
    _check(record, BENCHMARK, "")


def check_shape(record: Mapping[str, Any]) -> None:
    """Check a record of a run, its configurations included.

    Raises:
        UserError: a field is missing or has the wrong type; the message names it.
    """
    _check(record, RECORD, "")
    check_recorded(record["config"])
    trained_by = (record.get("adapter") or {}).get("trained_by")
    if trained_by is not None:
        check_recorded(trained_by["config"])
    for score in [*record["scores"], *(record.get("scores_before") or [])]:
        _check_score(score)
    train = record.get("train")
    if train is not None:
        _check_load(train["expert_load"], "train.expert_load")
        if train.get("stability") is not None and not (
            train.get("examples") and train["stability"]["step_losses"]
        ):
            raise UserError("train.stability has no examples or steps")
    for key, name in record["predictions"].items():
        task, _, protocol = key.partition("/")
        if not (fullmatch(NAME, task) and fullmatch(NAME, protocol)) or name != predictions_name(
            task, protocol
        ):
            raise UserError(
                f"predictions.{shown(key, 60)}={shown(name, 100)} is not a file that a run writes, "
                "predictions/<task>.<protocol>.jsonl"
            )


def _check_score(score: Mapping[str, Any]) -> None:
    named = f"{shown(score['task'], 60)}/{shown(score['protocol'], 60)}"
    if not (fullmatch(NAME, score["task"]) and fullmatch(NAME, score["protocol"])):
        raise UserError(f"scores: {named} is not a valid task and protocol")
    if score["n"] < 1 or not 0 <= score["accuracy"] <= 1:
        raise UserError(
            f"scores: {named} has accuracy={score['accuracy']} and n={score['n']}, which are not "
            "valid"
        )
    _check_load(score["expert_load"], f"scores: {named}: expert_load")


def _check_load(load: list[list[Any]] | None, where: str) -> None:
    lengths = None if load is None else {len(layer) for layer in load}
    if lengths is not None and (len(lengths) != 1 or 0 in lengths):
        raise UserError(f"{where} must have one row of shares per layer, all of the same length")


@contextmanager
def odd_fields(path: Any) -> Iterator[None]:
    """Convert exceptions from reading optional fields of a record into one `UserError`."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{path}: a field of the record is missing or not valid "
            f"({type(error).__name__}: {error})"
        ) from error
