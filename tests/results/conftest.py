"""Records made by hand, as a run writes them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from composed import compose
from table_cells import SMALL, five

from mixlora_exp.config.resolve import to_dict
from mixlora_exp.config.schema import Config
from mixlora_exp.models.parameters import count_parameters
from mixlora_exp.records.record import finish_record, write_json, write_jsonl
from mixlora_exp.results.build import Results, gather
from mixlora_exp.tasks import TASKS

GIT = {"commit": "c" * 40, "dirty": False}


def counted(config: Config) -> dict[str, Any]:
    """The sizes that a record has; a folder that is named here need not be there."""
    model = dataclasses.replace(config.model, path=None)
    return dataclasses.asdict(count_parameters(model, config.method))


@functools.cache
def composed(words: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A configuration and its sizes, to be copied: many records have the same."""
    made = compose(words)
    return to_dict(made), counted(made)


def write_run(
    folder: Path,
    name: str,
    overrides: Sequence[str],
    accuracy: dict[str, float],
    *,
    protocol: str = "label_logits",
    n: int = 40,
    git: dict[str, Any] | None = GIT,
    data_hash: str = "d",
    train_hash: str = "t",
    rows: dict[str, int] | None = None,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """A finished run with `n` items per task, of which the given share is right."""
    words = (*overrides, f"evaluation.protocols=[{protocol}]")
    config, counts = copy.deepcopy(composed(words))
    scores, predictions = [], {}
    for task, share in accuracy.items():
        right = [i < round(share * n) for i in range(n)]
        random.Random(f"{name}/{task}").shuffle(right)
        file = f"predictions/{task}.{protocol}.jsonl"
        answers = [
            {"id": f"{task}-{i}", "answer": 0, "prediction": 0 if good else 1, "scores": [0.0, 1.0]}
            for i, good in enumerate(right)
        ]
        write_jsonl(folder / name / file, answers)
        predictions[f"{task}/{protocol}"] = file
        scores.append(
            {
                "task": task, "protocol": protocol, "n": n, "accuracy": sum(right) / n,
                "stderr": 0.0, "accuracy_normalized": None, "majority_class": 0.3,
                "chance": 0.25, "gold_log_likelihood": -1.25, "tied": 0, "shortened": 0,
                "unparsed": None, "expert_load": [[0.25] * 4, [0.1, 0.2, 0.3, 0.4]],
                "batch_check": None,
            }
        )  # fmt: skip
    trains = config["method"]["name"] != "none"
    sizes = {f"{task}/{split}": size for task in TASKS for split, size in TASKS[task].sizes.items()}
    sizes |= rows or {}
    hashes = {f"{task}/test": data_hash for task in accuracy}
    if trains:
        hashes |= {f"{task}/train": train_hash for task in config["task"]["train"]}
    splits = {
        name: [{"path": "f", "rows": sizes[name], "sha256": sha256}]
        for name, sha256 in hashes.items()
    }
    curve = [{"step": 10 * k, "loss": 2.0 / k, "epoch": 0.1} for k in range(1, 6)]
    record = {
        "name": name, "fingerprint": "f" * 64, "status": "finished", "config": config,
        "data": splits, "model": {"source": "pypi", "id": "m"}, "adapter": None,
        "kernel": "exact" if trains else None, "dtype": "bfloat16", "attention": "eager",
        "parameters": counts, "saved_adapter": {"sha256": "a"} if trains else None,
        "train": {"steps": 50, "curve": curve, "expert_load": None} if trains else None,
        "scores": scores, "scores_before": None, "predictions": predictions, "seconds": 1.0,
        "provenance": {
            "git": git, "packages": {"torch": "2.13.0"},
            "hardware": {"cpu": "a cpu", "gpus": []},
        },
    }  # fmt: skip
    if change is not None:
        change(record)
    write_json(folder / name / "record.json", finish_record(record))
    return folder / name


@pytest.fixture
def write() -> Callable[..., Path]:
    return write_run


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name in ("runs", "bench"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def add(results: Path) -> Callable[..., Path]:
    """Put a run into `results`: five tasks scored by SmolLM2, the first with this accuracy."""

    def added(name: str, value: float, *words: str, **more: Any) -> Path:
        return write_run(results / "runs", name, [*SMALL, *words], five(value), **more)

    return added


@pytest.fixture(scope="session")
def committed() -> Results:
    """All committed records and the tables made from them."""
    return gather()
