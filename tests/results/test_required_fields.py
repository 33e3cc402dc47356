"""Records with a fitting hash and fields that no run writes are refused by the field's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from table_cells import SMALL, five

from mixlora_exp.errors import UserError
from mixlora_exp.records.record import read_run
from mixlora_exp.records.required_fields import odd_fields, predictions_name

STABILITY = {
    "gradient_norm_median": 1.0, "gradient_norm_max": 2.0, "gradient_norm_max_step": 3,
    "step_losses": [1.0], "step_gradient_norms": [1.0],
}  # fmt: skip
KEY = f"{next(iter(five(0.5)))}/label_logits"


def put(path: str, value: Any) -> Callable[[dict], None]:
    """Sets a field, which is named by the keys that lead to it."""

    def change(record: dict) -> None:
        *folders, last = path.split("|")
        place: Any = record
        for name in folders:
            place = place[int(name) if isinstance(place, list) else name]
        place[int(last) if isinstance(place, list) else last] = value

    return change


def adapted(record: dict) -> None:
    """An adapter of another run, whose configuration lacks its seed."""
    source = {key: record[key] for key in ("name", "fingerprint", "config", "data", "model")}
    config = {key: value for key, value in source["config"].items() if key != "seed"}
    record["adapter"] = {
        "path": None, "sha256": "a", "trained_by": {**source, "config": config, "git": None},
    }  # fmt: skip


@pytest.fixture
def read(write: Callable[..., Path], tmp_path: Path) -> Callable[..., dict]:
    def run(change: Callable[[dict], None]) -> dict:
        return read_run(write(tmp_path, "run", [*SMALL, "method=lora"], five(0.5), change=change)
                        / "record.json")  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (put("scores|0|accuracy", None), r"scores\[0\]\.accuracy must be an integer or a number"),
        (put("scores|0|accuracy", 1.5), "has accuracy=1.5"),
        (put("scores|0|accuracy", -0.5), "has accuracy=-0.5"),
        (put("scores|0|n", 0), "and n=0"),
        (put("scores|0|n", True), r"scores\[0\]\.n must be an integer, not True"),
        (put("scores|0|task", "../x"), "is not a valid task"),
        (put("scores|0|protocol", ""), "is not a valid task and protocol"),
        (put("scores|0|expert_load", [[0.5, 0.5], [1.0]]), "expert_load must have one row"),
        (put("scores|0|expert_load", [[], []]), "expert_load must have one row"),
        (put("scores|0|expert_load", [[1.0], []]), "expert_load must have one row"),
        (put("scores|0|expert_load", []), "expert_load must have one row"),
        (put("scores|0|expert_load", [["a"]]), r"expert_load\[0\]\[0\] must be"),
        (put("scores_before", [{}]), r"scores_before\[0\]\.task is missing"),
        (put("train|expert_load", [[1.0], []]), "train.expert_load must have one row"),
        (put("train|stability", STABILITY), "train.stability has no examples or steps"),
        (put("train|curve|0|step", 1.5), r"train.curve\[0\].step must be an integer, not 1.5"),
        (put("config|seed", "1"), "config.seed must be an integer"),
        (put("predictions", {KEY: "record.json"}), "is not a file that a run writes"),
        (put("predictions", {"a": predictions_name("a", "")}), "is not a file that a run writes"),
        (put("predictions", {"../a/b": predictions_name("../a", "b")}), "is not a file"),
        (put("provenance|git", "c"), "provenance.git must be an object or null, not 'c'"),
        (put("provenance|hardware|gpus", {}), "gpus must be a list"),
        (put("status", None), "status must be text, not None"),
        (adapted, "adapter.trained_by.config.seed is missing"),
        (lambda record: record.pop("status"), "^[^:]*: status is missing"),
        (lambda record: record["model"].pop("source"), "model.source is missing"),
    ],
)  # fmt: skip
def test_a_field_that_no_run_writes_is_named(
    change: Callable[[dict], None], told: str, read: Callable[..., dict]
) -> None:
    with pytest.raises(UserError, match=told):
        read(change)


@pytest.mark.parametrize(
    "change",
    [
        put("scores|0|expert_load", [[0.5, None], [1.0, 0.0]]),
        put("scores|0|accuracy", 1),
        put("scores|0|accuracy", 0),
        put("scores|0|n", 1),
        put("provenance|git", None),
        put("adapter", None),
        put("train|expert_load", [[1.0]]),
        lambda record: record["train"].update(examples=3, stability=STABILITY),
        lambda record: record.pop("scores_before"),
        lambda record: record.update(something="else"),
    ],
)
def test_what_a_run_may_write_is_read(
    change: Callable[[dict], None], read: Callable[..., dict]
) -> None:
    assert read(change)["name"] == "run"


def test_steps_without_a_loss_are_no_stability(read: Callable[..., dict]) -> None:
    with pytest.raises(UserError, match="no examples or steps"):
        read(
            lambda record: record["train"].update(
                examples=3, stability={**STABILITY, "step_losses": []}
            )
        )


@pytest.mark.parametrize(
    "kind",
    [KeyError, TypeError, AttributeError, IndexError, ValueError, ZeroDivisionError, OverflowError],
)
def test_an_odd_optional_field_is_one_message(kind: type[Exception]) -> None:
    told = rf"^run: a field of the record is missing or not valid \({kind.__name__}"
    with pytest.raises(UserError, match=told), odd_fields("run"):
        raise kind("odd")
    with pytest.raises(OSError, match="disk"), odd_fields("run"):
        raise OSError("disk")
