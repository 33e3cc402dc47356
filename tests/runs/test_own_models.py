"""The sweeps behind the paper's tables, for a model of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from composed import compose

from mixlora_exp.cli.train import execute
from mixlora_exp.models import load_model, load_tokenizer

TABLES = {"table1": 4, "table2": 4, "table8_rank": 10, "table9_router_loss": 8}
"""Experiment -> its runs for one task."""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mine"
    config = compose(["model=tiny", "model.config={num_hidden_layers: 3, intermediate_size: 96}"])
    load_model(config.model, torch.float32).save_pretrained(folder)
    load_tokenizer(config.model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "table",
    ["table2", *(pytest.param(t, marks=pytest.mark.slow) for t in TABLES if t != "table2")],
)
def test_a_table_of_a_model_in_a_folder(own: Path, table: str, tmp_path: Path, capsys) -> None:
    words = [f"experiment={table}", f"model.path={own}", "dry_run=true", "data=embedded",
             "task=arc_e", "data.train_limit=8", "evaluation.limit=4",
             f"output_dir={tmp_path}"]  # fmt: skip
    assert execute(words) == 0
    told = capsys.readouterr()
    assert f"== {TABLES[table]} runs: {TABLES[table]} planned, " in told.err
    # Each run is of this model, by its name and shape.
    names = [line for line in told.out.splitlines() if "mine-" in line]
    found = {word for line in names for word in line.split() if "mine-" in word}
    assert len(found) == TABLES[table]
    assert not list(tmp_path.glob("*/record.json"))
