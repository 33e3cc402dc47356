"""Records that do not count, each told by name: spoilt, uncommitted, repeated, without a place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from table_cells import SMALL, block, five, row

from mixlora_exp.errors import UserError
from mixlora_exp.records.record import finish_record, write_json
from mixlora_exp.results.build import gather, table_files

Write = Callable[..., Path]


def test_runs_that_no_table_has_a_place_for_are_listed(
    add: Write, write: Write, results: Path
) -> None:
    add("odd", 0.4, "method=mixlora", "method.top_k=1")
    pair = ["model=smollm2_135m", "task=multi", "task.train=[arc_e,obqa]", *SMALL[2:]]
    write(results / "runs", "pair", [*pair, "method=lora"], five(0.4))
    found = gather(results)
    assert {entry.name for entry in found.left_out} == {"odd", "pair"}
    assert all("no table has" in entry.reason for entry in found.left_out)


def test_a_method_of_one_s_own_is_listed_and_stops_nothing(add: Write, results: Path) -> None:
    """As the walk of a router makes one."""

    def other(record: dict) -> None:
        record["config"]["method"]["name"] = "mixlora_above"

    add("own", 0.4, "method=mixlora", change=other)
    add("usual", 0.4, "method=lora")
    found = gather(results)
    assert [run.name for run in found.runs] == ["usual"]
    ((entry),) = found.left_out
    assert entry.reason.startswith("method=mixlora_above is not in the paper's tables (lora, dora")


def test_predictions_edited_without_a_trace_are_noticed(add: Write, results: Path) -> None:
    """A right and a wrong answer exchanged leave the accuracy as it was."""

    def sign(record: dict) -> None:
        record["predictions_sha256"] = {"arc_e/label_logits": "0" * 64}

    add("a", 0.4, "method=lora", change=sign)
    ((entry),) = gather(results).left_out
    assert "was changed after it was written" in entry.reason


def edited(folder: Path) -> None:
    path = folder / "record.json"
    path.write_text(path.read_text().replace('"accuracy": 0.4', '"accuracy": 0.9'))


def cut(folder: Path) -> None:
    path = folder / "record.json"
    path.write_text(path.read_text()[:500])


def old(folder: Path) -> None:
    path = folder / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 0}))


def prediction(folder: Path) -> None:
    path = folder / "predictions" / "obqa.label_logits.jsonl"
    path.write_text(path.read_text().replace('"prediction": 1', '"prediction": 0', 1))


def no_predictions(folder: Path) -> None:
    (folder / "predictions" / "obqa.label_logits.jsonl").unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(edited, "changed after it was written"), (cut, "truncated"), (old, "schema_version=0"),
     (prediction, "contradicts the accuracy"), (no_predictions, "cannot be read")],
)  # fmt: skip
def test_a_spoilt_record_is_left_out_by_name(
    spoil: Callable[[Path], None], reason: str, add: Write, results: Path
) -> None:
    add("good", 0.5, "method=lora", "seed=1")
    spoil(add("bad", 0.4, "method=lora", "seed=2"))
    found = gather(results)
    ((name, why),) = {(entry.name, entry.reason) for entry in found.left_out}
    assert name == "bad"
    assert reason in why
    cells = row(block(found.tables[2], "SmolLM2"), "LoRA", "MT", "ours")
    assert cells["ARC-e"].records == ("good",)
    assert f"`bad`: {why}" in table_files(found)["README.md"]


@pytest.mark.parametrize("git", [None, {"commit": "c" * 40, "dirty": True}])
def test_uncommitted_code_is_left_out(git: dict | None, add: Write, results: Path) -> None:
    add("dirty", 0.5, "method=lora", git=git)
    found = gather(results)
    assert [entry.name for entry in found.left_out] == ["dirty"]
    assert not any(b.run for b in found.tables[2].blocks)


def test_two_records_of_a_cell_with_other_data_are_both_left_out(add: Write, results: Path) -> None:
    add("a", 0.4, "method=lora", "seed=1", data_hash="1")
    add("b", 0.5, "method=lora", "seed=2", data_hash="2")
    found = gather(results)
    assert {entry.name for entry in found.left_out} == {"a", "b"}
    assert all("read different data" in entry.reason for entry in found.left_out)
    assert not any(b.run for b in found.tables[2].blocks)
    # The training rows count as well.
    add("b", 0.5, "method=lora", "seed=2", data_hash="1", train_hash="u")
    assert {entry.name for entry in gather(results).left_out} == {"a", "b"}


def copied(folder: Path, target: Path, **fields: int) -> None:
    """Copy a run and change fields of its configuration, as nobody should."""
    shutil.copytree(folder, target)
    record = json.loads((target / "record.json").read_text())
    record["config"].update(fields)
    write_json(target / "record.json", finish_record({**record, "name": target.name}))


def test_a_copy_is_no_second_seed(add: Write, results: Path) -> None:
    first = add("a", 0.4, "method=lora", "seed=1")
    copied(first, results / "runs" / "b", seed=2)
    # However the lines are laid out.
    for path in (results / "runs" / "b" / "predictions").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(r, sort_keys=True, indent=None) + "\n" for r in rows))
    add("c", 0.5, "method=lora", "seed=3")
    found = gather(results)
    ((entry),) = found.left_out
    assert entry.name == "b"
    assert entry.reason == "seed 2: its predictions are those of a, seed 1"
    cells = row(block(found.tables[2], "SmolLM2"), "LoRA", "MT", "ours")
    assert cells["ARC-e"].records == ("a", "c")
    assert "`b`: seed 2" in table_files(found)["README.md"]
    with pytest.raises(UserError, match="runs=b cannot be used: seed 2: its predictions"):
        gather(results, ["a", "b"])


def test_two_records_of_a_cell_and_seed_count_once(add: Write, results: Path) -> None:
    add("a", 0.4, "method=lora")
    add("b", 0.6, "method=lora", "kernel=reference")
    found = gather(results)
    assert {entry.name for entry in found.left_out} == {"b"}
    cells = row(block(found.tables[2], "SmolLM2"), "LoRA", "MT", "ours")
    assert cells["ARC-e"].value == pytest.approx(40.0)
