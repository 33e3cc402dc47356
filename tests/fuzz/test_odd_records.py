"""Records whose hash fits and whose content is odd: no reader stops, tables leave them out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from odd_values import changed_somewhere, cut_or_flipped, misbehaviour, sealed, trouble
from saved_adapters import save_all

from mixlora_exp.cli.evaluate import settled
from mixlora_exp.config.paths import RESULTS
from mixlora_exp.errors import UserError
from mixlora_exp.records.files import RunFiles
from mixlora_exp.records.record import read_record, read_run
from mixlora_exp.records.required_fields import odd_fields
from mixlora_exp.records.show import print_record
from mixlora_exp.results.build import data_files, gather, table_files, write_report
from mixlora_exp.results.collect import collect
from mixlora_exp.runs.base_choice import base_of, noted_base
from mixlora_exp.runs.inputs import _trained_by
from mixlora_exp.runs.repeat import configuration
from mixlora_exp.serving.push import package
from mixlora_exp.sweeps.status import find_cells

Draws = Callable[..., Iterator[Random]]
KINDS = ("-lora-arc_e-", "-mixlora-arc_e-", "-mixdora-multi-", "-adapter-arc_e_obqa-", "-none-")
BENCHMARKS = sorted(RESULTS.glob("bench/cpu-*.json"))
WORDS = ["model=smollm2_135m", "data=embedded", "method=lora", "task=arc_e"]


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    save_all(folder)
    return folder


def unpacked(kind: str, folder: Path) -> Path:
    """A committed run of a kind as a folder."""
    path = min(RESULTS.glob(f"runs/*{kind}*.zip"), key=lambda path: (path.stat().st_size, path))
    files = RunFiles(path)
    record = read_record(files)
    for name in ("record.json", *record["predictions"].values()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(files.read(name))
    return folder


@pytest.mark.parametrize("kind", [*KINDS, "-adapter-arc_e_obqa-local-s42-907b9004a4"])
def test_every_kind_of_record_is_compared(kind: str) -> None:
    """The last is of an adapter whose training left no record."""
    first, other = (
        str(min(RESULTS.glob(f"runs/*{one}*.zip"), key=lambda path: path.stat().st_size))
        for one in (kind, "-mixlora-arc_e_obqa-")
    )
    assert not misbehaviour(["compare", first, other])


def one_odd(draw: Random, runs: Path, number: int) -> Path:
    folder = unpacked(draw.choice(KINDS), runs / f"odd{number:03}")
    path = folder / "record.json"
    if draw.random() < 0.1:
        path.write_bytes(cut_or_flipped(path.read_bytes(), draw))
        return folder
    record = changed_somewhere(read_record(path), draw)
    if draw.random() < 0.1:
        record["schema_version"] = draw.choice((0, 2, 99, "1", 1.0, True, None, [1]))
    path.write_bytes(sealed(record))
    return folder


def read_by_all(folder: Path, adapters: Path, aside: Path) -> Iterator[str]:
    """What is wrong with each reader of one run's folder."""
    yield misbehaviour(["show", str(folder)])
    yield trouble(lambda: settled([f"run={folder}"]), UserError)
    yield trouble(lambda: configuration(read_run(folder / "record.json"), []), UserError)
    shutil.copytree(adapters / "lora", folder / "adapter")
    yield trouble(lambda: base_of(folder / "adapter", []), UserError)
    yield trouble(lambda: base_of(folder / "adapter", [], precision=True), UserError)
    yield trouble(lambda: noted_base(folder / "adapter"), UserError)
    yield trouble(lambda: _trained_by(folder / "record.json", "0"), UserError)
    yield trouble(lambda: package(folder, "a/b"), UserError)
    yield misbehaviour(["power", str(folder), str(folder)])
    beside = folder.parent / f"good{KINDS[0]}"
    yield misbehaviour(["compare", str(beside), str(folder)])
    shutil.rmtree(folder / "adapter")

    def shown() -> None:
        with odd_fields(folder):
            print_record(read_run(folder / "record.json"))

    yield trouble(shown, UserError)
    aside.mkdir()
    shutil.copytree(folder, aside / folder.name)
    yield trouble(lambda: collect(aside, aside / "packed", force=True))


def of_all_at_once(results: Path, output: Path) -> None:
    found = gather(results)
    table_files(found)
    data_files(found)
    write_report(found, output)
    names = {run.name for run in found.runs} | {entry.name for entry in found.left_out}
    measured = {f"bench/{path.stem}" for path in (results / "bench").iterdir()}
    assert measured <= names | {f"bench/{record['name']}" for record in found.benchmarks}
    assert {path.name for path in (results / "runs").iterdir()} <= names


def test_odd_records(draws: Draws, adapters: Path, tmp_path: Path, capsys) -> None:
    results = tmp_path / "results"
    (results / "bench").mkdir(parents=True)
    for kind in KINDS:
        unpacked(kind, results / "runs" / f"good{kind}")
    wrong = {}
    for number, draw in enumerate(draws("records", 12, 100)):
        folder = one_odd(draw, results / "runs", number)
        for reader, what in enumerate(read_by_all(folder, adapters, tmp_path / f"c{number}")):
            if what:
                wrong[f"{folder.name}, reader {reader}"] = what

    def states() -> None:
        find_cells(["figure4c"], WORDS, results / "runs", patience=0.0)

    for number, draw in enumerate(draws("benchmarks", 12, 100)):
        record = changed_somewhere(read_record(draw.choice(BENCHMARKS)), draw)
        (results / "bench" / f"odd{number:03}.json").write_bytes(sealed(record))
    status = trouble(states)
    told = trouble(lambda: of_all_at_once(results, tmp_path / "out"))
    capsys.readouterr()
    wrong |= {"status": status, "tables": told}
    assert not any(wrong.values()), "\n".join(f"{name}: {what}" for name, what in wrong.items())
