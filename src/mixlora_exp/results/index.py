"""All records as one table, a row for each score: made from them, and made again at any time."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import pandas as pd

from mixlora_exp.errors import UserError
from mixlora_exp.results.runs import LeftOut, Run, load_runs

__all__ = ["build_index", "write_index"]


def _rows(run: Run) -> list[dict[str, Any]]:
    trained, record = run.trained, run.record
    method, train = trained["method"], record.get("train") or {}
    common = {
        "run": run.name,
        "fingerprint": record["fingerprint"],
        "model": trained["model"]["name"],
        "method": method["name"],
        "rank": method.get("rank"),
        "router_loss_coef": method.get("router_loss_coef"),
        "preset": trained["preset"]["name"],
        "trained_on": "+".join(trained["task"]["train"]) if method["name"] != "none" else None,
        "data": trained["data"]["name"],
        "train_limit": trained["data"]["train_limit"],
        "limit": run.scored["evaluation"]["limit"],
        "seed": trained["seed"],
        "steps": train.get("steps"),
        "final_loss": train.get("final_loss"),
        "train_seconds": train.get("seconds"),
        "commit": (record["provenance"]["git"] or {}).get("commit"),
    }
    figures = ("n", "accuracy", "stderr", "accuracy_normalized", "majority_class", "chance",
               "gold_log_likelihood")  # fmt: skip
    return [
        {**common, "task": task, "protocol": protocol, **{f: score.get(f) for f in figures}}
        for (task, protocol), score in run.scores.items()
    ]


def build_index(folder: Path) -> tuple[pd.DataFrame, list[LeftOut]]:
    """The scores of all usable records under `folder`, and the records that are not."""
    runs, left_out = load_runs(folder)
    return pd.DataFrame([row for run in runs for row in _rows(run)]), left_out


def write_index(folder: Path, path: Path) -> tuple[int, list[LeftOut]]:
    """Write the index of `folder` as Parquet, whole or not at all; returns its number of rows.

    Raises:
        UserError: the file cannot be written.
    """
    table, left_out = build_index(folder)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        table.to_parquet(temporary, index=False)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(table), left_out
