"""What stands of every table, and what is left."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from composed import compose

from mixlora_exp.cli.main import main
from mixlora_exp.config.command import plan_runs
from mixlora_exp.config.resolve import open_session, to_dict
from mixlora_exp.config.run_names import run_name
from mixlora_exp.config.schema import Config
from mixlora_exp.data.sources import load_split
from mixlora_exp.models import build_hf_config
from mixlora_exp.plans.hours import gpu_hours
from mixlora_exp.records.code_hash import code_sha256
from mixlora_exp.records.record import finish_record, write_json
from mixlora_exp.runs.inputs import resolve_config
from mixlora_exp.sweeps import status
from mixlora_exp.sweeps.status import SWEEPS, CellState, find_cells
from mixlora_exp.system.runlock import RunLock

ROOT = Path(__file__).parents[2]
TINY = ["model=tiny", "data=embedded"]
SMALL = "table9_router_loss"
ONE = ["method=mixlora", "method.router_loss_coef=1e-3", "task=arc_e"]


def cells(name: str, folder: Path, *overrides: str) -> list[CellState]:
    given = [*TINY, f"output_dir={folder}", *overrides]
    return find_cells([name], given, folder / "records")


@pytest.mark.slow
def test_every_row_of_the_papers_sweeps_has_its_cells() -> None:
    """Tables 1, 2, 8 and 9, and 5 as 2: models, methods, ranks and coefficients of the CSVs."""
    wanted = {
        "table1": ("model", "method"),
        "table2": ("model", "method"),
        "table8_rank": ("model", "method", "rank"),
        "table9_router_loss": ("model", "method", "router_loss_coef"),
    }
    with open_session() as session:
        for name, columns in wanted.items():
            number = name.removeprefix("table").partition("_")[0]
            rows = []
            for table in ("2", "5") if number == "2" else (number,):
                with (ROOT / f"results/paper/table{table}.csv").open() as stream:
                    rows += list(csv.DictReader(stream))
            models = {row["model"] for row in rows}
            assert {words[0] for words in SWEEPS[name]} == {
                *(f"model={model}" for model in models), "model=smollm2_135m"
            }  # fmt: skip
            for model in models:
                given = [f"experiment={name}", f"model={model}"]
                plan = plan_runs(session, "config", given, False)
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
                assert need <= have, name


ODD_FILES = [{"path": "a", "rows": 1, "sha256": "0" * 64}]


def write_record(folder: Path, config: Config, **changes) -> Path:
    """A record as a finished run of `config` leaves it, on the data of now."""
    data = {}
    for task in [] if "data" in changes else config.task.train:
        for split in ("train", "test"):
            files = load_split(config.data, task, split).files
            data[f"{task}/{split}"] = [dataclasses.asdict(file) for file in files]
    record = {
        "name": folder.name, "fingerprint": "0" * 64, "status": "finished",
        "config": to_dict(config), "data": data, "model": {"source": "random"}, "scores": [],
        "predictions": {}, "code": code_sha256(),
        "provenance": {
            "git": None, "packages": {"torch": "0"}, "hardware": {"cpu": "a", "gpus": []},
        },
        **changes,
    }  # fmt: skip
    write_json(folder / "record.json", finish_record(record))
    return folder / "record.json"


def configs(folder: Path, *overrides: str) -> list[Config]:
    with open_session() as session:
        given = [f"experiment={SMALL}", *TINY, f"output_dir={folder}", *overrides]
        return [cell.config for cell in plan_runs(session, "config", given, True).cells]


def test_states(tmp_path: Path) -> None:
    few = [*ONE, "seed=1,2,3,4,5"]
    before = cells(SMALL, tmp_path, *few)
    assert len(before) == 5
    assert {cell.state for cell in before} == {"missing"}
    folders = [tmp_path / cell.name for cell in before]
    for folder in folders[1:4]:
        folder.mkdir()
    write_record(folders[0], configs(tmp_path, *ONE, "seed=1")[0])
    lock = RunLock(folders[1] / "lock", beat=0.1)
    assert lock.acquire()
    (folders[2] / "failure.json").write_text(json.dumps({"error": "UserError: no memory"}))
    (folders[3] / "checkpoints" / "step-00000040").mkdir(parents=True)
    (folders[3] / "checkpoints" / "step-odd").mkdir()
    after = cells(SMALL, tmp_path, *few)
    lock.release()
    assert [cell.state for cell in after[:4]] == ["done", "running", "failed", "interrupted"]
    assert after[2].detail == "UserError: no memory"
    assert after[3].detail == "after step 40"
    assert {cell.state for cell in after[4:]} == {"missing"}


@pytest.mark.parametrize(
    ("content", "told"),
    [("{}", "schema_version"), ('{"schema_version": 1, "conf', "truncated"), ("", "truncated")],
)
def test_a_damaged_record_is_not_taken_for_done(tmp_path: Path, content: str, told: str) -> None:
    """`train.py` refuses it as well, with the same words."""
    (config,) = configs(tmp_path, *ONE)
    path = write_record(tmp_path / run_name(config), config)
    path.write_text(content)
    (cell,) = cells(SMALL, tmp_path, *ONE)
    assert cell.state == "refused"
    assert told in cell.detail
    assert "force=true" in cell.detail


@pytest.mark.parametrize("what", ["code", "arc_e/test"])
def test_a_record_of_other_inputs_is_refused(tmp_path: Path, what: str) -> None:
    (config,) = configs(tmp_path, *ONE)
    changes = {"code": "0" * 64} if what == "code" else {"data": {what: ODD_FILES}}
    write_record(tmp_path / run_name(config), config, **changes)
    (cell,) = cells(SMALL, tmp_path, *ONE)
    assert cell.state == "refused"
    assert f"({what} differ)" in cell.detail


def foreign_lock(folder: Path, count: int = 3) -> Path:
    """A lock that a process on another machine holds, or held."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = {"host": "elsewhere", "boot": "b", "namespace": "n", "pid": 7, "started": 1.0}
    # As a holder counts up: by renaming.
    (folder / "next").write_text(json.dumps({**holder, "count": count}))
    return (folder / "next").replace(folder / "1")


def test_stale_locks_of_another_machine_are_distinguished_from_living_ones(tmp_path: Path) -> None:
    """All at once: as long as one takes, however many there are."""
    few = [*ONE, "seed=1,2,3,4"]
    names = [cell.name for cell in cells(SMALL, tmp_path, *few)]
    for name in names:
        foreign_lock(tmp_path / name / "lock")
    living, stop = tmp_path / names[2] / "lock", threading.Event()

    def count_up() -> None:
        number = 3
        while not stop.wait(0.1):
            foreign_lock(living, number := number + 1)

    thread = threading.Thread(target=count_up)
    thread.start()
    given = [*TINY, f"output_dir={tmp_path}", *few]
    found = find_cells([SMALL], given, tmp_path / "records", patience=1.0)
    stop.set()
    thread.join()
    states = [cell.state for cell in found]
    assert states == ["stopped", "stopped", "running", "stopped"]
    assert found[0].detail == "not seen alive for 1 s: elsewhere, process 7"


def test_counts_do_not_wait_for_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Watching a process of this machine or of another takes longer than `--brief` may."""
    few = [*ONE, "seed=1,2,3"]
    names = [cell.name for cell in cells(SMALL, tmp_path, *few)]
    lock = RunLock(tmp_path / names[0] / "lock")
    assert lock.acquire()
    foreign_lock(tmp_path / names[1] / "lock")

    def waited(seconds: float) -> None:
        raise AssertionError(f"slept {seconds} s")

    monkeypatch.setattr(status.time, "sleep", waited)
    words = [f"experiment={SMALL}", "brief=true", *TINY, *few, f"output_dir={tmp_path}"]
    assert main(["status", *words]) == 0
    lock.release()
    _, counts, told = capsys.readouterr().out.splitlines()
    assert counts.split() == [SMALL, "0", "3"]
    assert told.startswith("2 of those missing are locked, ")
    assert "was not watched" in told


def test_a_model_in_a_folder_is_found_under_its_own_shape(tmp_path: Path) -> None:
    """The folder's shape counts in the name of the run, whatever the model's file says."""
    model = compose(["model=tiny"]).model
    shape = build_hf_config(model)
    shape.num_hidden_layers += 1
    shape.save_pretrained(tmp_path / "model")
    given = [*ONE, f"model.path={tmp_path / 'model'}", "model.weights=pretrained"]
    (config,) = map(resolve_config, configs(tmp_path, *given))
    assert config.model.config["num_hidden_layers"] == shape.num_hidden_layers
    write_record(tmp_path / run_name(config), config)
    (cell,) = cells(SMALL, tmp_path, *given)
    assert (cell.state, cell.name) == ("done", run_name(config))


def test_a_model_of_ones_own_is_chosen_by_its_folder_alone(tmp_path: Path) -> None:
    """As in `train.py`: the sweep's own models are not looked for."""
    build_hf_config(compose(["model=tiny"]).model).save_pretrained(tmp_path / "mine")
    words = [word for word in TINY if not word.startswith("model=")]
    given = [*words, *ONE, f"model.path={tmp_path / 'mine'}", f"output_dir={tmp_path}"]
    (cell,) = find_cells([SMALL], given, tmp_path / "records")
    assert cell.state == "missing"
    assert cell.name.startswith("mine-mixlora-")


def test_committed_records_are_distinguished_from_finished_runs(tmp_path: Path) -> None:
    """`train.py` does not look there: the cell counts as recorded, and only on the same data."""
    (config,) = configs(tmp_path, *ONE)
    folder = tmp_path / "records" / "any name"
    write_record(folder, config)
    (cell,) = cells(SMALL, tmp_path, *ONE)
    assert cell.state == "recorded"
    assert cell.detail == str(folder / "record.json")
    write_record(folder, config, data={"arc_e/test": ODD_FILES})
    assert [c.state for c in cells(SMALL, tmp_path, *ONE)] == ["missing"]
    (folder / "record.json").write_text("{")
    assert [c.state for c in cells(SMALL, tmp_path, *ONE)] == ["missing"]


def test_records_on_local_data_are_pointed_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default `data=hub` is another run, which would be called missing without a word."""
    words = [f"--experiment={SMALL}", "--brief", *TINY[:1], *ONE, f"output_dir={tmp_path}"]
    files = ["data=local", f"data.path={tmp_path / 'nowhere'}"]
    (config,) = configs(tmp_path, *ONE, *files)
    write_record(
        tmp_path / "runs" / "a",
        config,
        data={"arc_e/test": ODD_FILES},
    )
    assert main(["status", *words, f"results={tmp_path}"]) == 0
    told = capsys.readouterr().out
    assert "1 of those missing are recorded with data=local" in told
    assert main(["status", *words, *files, f"results={tmp_path}"]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[1].split() == [SMALL, "1", "0"]
    assert "of those missing" not in told


def test_counts_need_no_torch() -> None:
    """It takes seconds to load, and `--brief` is to answer within five, of which one sweep is a
    part."""
    words = ["status", f"experiment={SMALL}", "brief=true", "model=tiny", "method=mixlora"]
    code = (
        "import sys, time; from mixlora_exp.cli.main import main; "
        f"assert main({words}) == 0; assert 'torch' not in sys.modules; "
        "assert time.process_time() < 5, time.process_time()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    header, counts = map(str.split, done.stdout.splitlines()[:2])
    assert (header, counts) == (["experiment", "finished", "missing"], [SMALL, "0", "16"])


def test_data_that_is_not_there_is_not_compared(tmp_path: Path) -> None:
    given = [*ONE, "data=local", f"data.path={tmp_path / 'nowhere'}"]
    (config,) = configs(tmp_path, *given)
    folder = tmp_path / "records" / "a"
    path = write_record(folder, config, data={"arc_e/test": ODD_FILES})
    (cell,) = cells(SMALL, tmp_path, *given)
    assert (cell.state, cell.detail) == ("recorded", f"{path} (its data was not compared)")


def test_the_command_runs_that_cell_alone(tmp_path: Path) -> None:
    for cell in cells("table8_rank", tmp_path, "task=multi")[::6]:
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


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--experiment={SMALL}", *TINY, "task=multi", f"output_dir={tmp_path}"]
    assert main(["status", *words]) == 0
    told = capsys.readouterr().out
    assert told.count("missing\n") == 8
    # Not on a terminal, and whole all the same.
    header, counts, *note = told.splitlines()[-4:]
    assert "at most data.cutoff_length tokens an example" in note[0]
    assert note[1] == "dry_run=true counts the tokens of local data; free text may have more."
    assert header.split() == ["experiment", "missing", "GPU", "hours", "left"]
    assert counts.split()[:2] == [SMALL, "8"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--experiment=table3", "--experiment=table3 is unknown; did you mean table2?"),
        ("--state=lost", "--state=lost is unknown; choose one of done, "),
        ("--breif", "did you mean --brief?"),
        ("brief=yes", "brief=yes is not valid: expected true or false"),
        ("method.rnak=2", "rnak"),
    ],
)
def test_mistakes_are_reported(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = [] if "experiment" in argument else [f"--experiment={SMALL}"]
    assert main(["status", *first, argument]) == 2
    assert message in capsys.readouterr().err


def test_each_sweep_is_shown_for_its_models(tmp_path: Path) -> None:
    found = find_cells(["table9_router_loss"], [f"output_dir={tmp_path}", "seed=1"], tmp_path)
    titles = {cell.experiment for cell in found}
    assert titles == {
        "table9_router_loss model=llama2_7b",
        "table9_router_loss model=smollm2_135m scale=cpu task=multi",
    }
    (cell,) = (cell for cell in found if "smollm2" in cell.name and cell.overrides == (
        "method=mixdora method.router_loss_coef=0.1"
    ))  # fmt: skip
    assert cell.command == (
        "python train.py -m experiment=table9_router_loss method=mixdora "
        f"method.router_loss_coef=0.1 model=smollm2_135m scale=cpu task=multi "
        f"output_dir={tmp_path} seed=1"
    )
