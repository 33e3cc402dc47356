"""What stands of every table, and what is left."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mixlora_exp.config import compose, open_session, plan_runs, run_name
from mixlora_exp.runlock import RunLock
from mixlora_exp.status import experiments, find_cells, gpu_hours

ROOT = Path(__file__).parents[2]
TINY = ["model=tiny", "data=embedded"]


def cells(name: str, folder: Path, *overrides: str):
    found = find_cells([name], [*TINY, f"output_dir={folder}", *overrides], folder / "records")
    return list(found)


def test_every_row_of_the_papers_sweeps_has_its_cells() -> None:
    """Tables 1, 2, 5, 8 and 9: models, methods, tasks, ranks and coefficients of the CSVs."""
    wanted = {
        "table1": ("model", "method"),
        "table2": ("model", "method"),
        "table5": ("model", "method"),
        "table8_rank": ("model", "method", "rank"),
        "table9_router_loss": ("model", "method", "router_loss_coef"),
    }
    with open_session() as session:
        for folder, columns in wanted.items():
            number = folder.removeprefix("table").partition("_")[0]
            with (ROOT / f"results/paper/table{number}.csv").open() as stream:
                rows = list(csv.DictReader(stream))
            for model in {row["model"] for row in rows}:
                plan = plan_runs(session, "config", [f"experiment={folder}/{model}"], False)
                have = {
                    (c.config.model.name, c.config.method.name, *(
                        float(getattr(c.config.method, column)) for column in columns[2:]
                    ))
                    for c in plan.cells
                }  # fmt: skip
                need = {
                    (row["model"], row["method"], *(float(row[column]) for column in columns[2:]))
                    for row in rows
                    if row["model"] == model
                }
                assert need <= have, folder


def test_states(tmp_path: Path) -> None:
    name = "table9_router_loss/llama2_7b"
    before = cells(name, tmp_path)
    assert len(before) == 32
    assert {cell.state for cell in before} == {"missing"}
    folders = [tmp_path / cell.name for cell in before[:4]]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "record.json").write_text("{}")
    lock = RunLock(folders[1] / "lock")
    assert lock.acquire()
    (folders[2] / "failure.json").write_text(json.dumps({"error": "UserError: no memory"}))
    (folders[3] / "checkpoints" / "step-00000040").mkdir(parents=True)
    after = cells(name, tmp_path)
    lock.release()
    assert [cell.state for cell in after[:4]] == ["done", "running", "failed", "interrupted"]
    assert after[2].detail == "UserError: no memory"
    assert after[3].detail == "after step 40"
    assert {cell.state for cell in after[4:]} == {"missing"}


def test_the_command_runs_that_cell_alone(tmp_path: Path) -> None:
    for cell in cells("table8_rank/llama2_7b", tmp_path)[::13]:
        start, flag, *overrides = cell.command.split()[1:]
        assert (start, flag) == ("train.py", "-m")
        with open_session() as session:
            (only,) = plan_runs(session, "config", overrides, True).cells
        assert run_name(only.config) == cell.name


def test_estimates_grow_with_the_work() -> None:
    base = ["model=llama2_7b", "task=arc_e"]
    plain = gpu_hours(compose(base))
    assert gpu_hours(compose([*base, "trainer.epochs=4"])) > plain
    assert gpu_hours(compose(["model=llama2_13b", "task=arc_e"])) > 1.5 * plain
    assert gpu_hours(compose([*base, "evaluation.limit=10"])) < plain
    assert gpu_hours(compose([*base, "method=none"])) < plain
    # The five tasks mixed: some hours of one GPU, by the operations alone.
    assert 0.3 < gpu_hours(compose(["model=llama2_7b", "task=multi"])) < 3


def script(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "status.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script(tmp_path: Path) -> None:
    argv = ["experiment=table9_router_loss/smollm2_135m", *TINY, f"output_dir={tmp_path}"]
    told = script(*argv)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("missing\n") == 8
    assert "GPU hours and memory are estimated" in told.stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("experiment=table3", "experiment=table3 is unknown: choose from figure4c/llama2_7b"),
        ("state=lost", "state=lost is unknown: choose from done, running"),
        ("brief", "'brief' is no setting: write name=value"),
        ("method.rnak=2", "rnak"),
    ],
)
def test_mistakes_are_told(argument: str, message: str) -> None:
    told = script(
        *(["experiment=table5/gemma_2b"] if "experiment" not in argument else []), argument
    )
    assert told.returncode == 2
    assert message in told.stderr
    assert "Traceback" not in told.stderr


def test_experiments_are_found() -> None:
    assert {"table1/llama2_13b", "table8_rank/smollm2_135m", "figure4c/llama2_7b"} <= set(
        experiments()
    )
