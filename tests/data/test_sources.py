"""Where items come from: local files and embedded rows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pandas
import pytest
from hostile import HOSTILE, place
from opens import opens_below
from rows_on_disk import GOOD, local, refusal, write_lines

from mixlora_exp.config.schema import AnswerKind, CustomTask, DataConfig, DataSource
from mixlora_exp.data.sources import load_split
from mixlora_exp.errors import SCREEN
from mixlora_exp.system.untrusted import LIMIT
from mixlora_exp.tasks.embedded import rows as embedded_rows


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_local_files_of_each_kind_give_the_same_items(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / "piqa" / f"train{suffix}"
    if suffix == ".parquet":
        file.parent.mkdir()
        pandas.DataFrame([GOOD, GOOD]).to_parquet(file)
    else:
        write_lines(file, GOOD, "", GOOD)
    with opens_below(tmp_path) as opened:
        loaded = load_split(local(tmp_path), "piqa", "train")
    assert opened == {f"piqa/train{suffix}": 1}
    assert [item.id for item in loaded.items] == ["piqa-0", "piqa-1"]
    assert loaded.items[0].answer == 1
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert [(Path(f.path), f.rows, f.sha256) for f in loaded.files] == [(file, 2, expected)]


def test_nested_parquet_columns_are_read(tmp_path: Path) -> None:
    (tmp_path / "arc_e").mkdir()
    rows = embedded_rows("arc_e", "test", 0)[:5]
    pandas.DataFrame(rows).to_parquet(tmp_path / "arc_e" / "test.parquet")
    loaded = load_split(local(tmp_path), "arc_e", "test")
    assert [item.id for item in loaded.items] == [row["id"] for row in rows]


def test_missing_folders_and_splits_say_what_is_there(tmp_path: Path) -> None:
    missing = refusal(local(tmp_path / "nowhere"))
    assert "data.path=" in missing
    assert "does not exist" in missing
    write_lines(tmp_path / "siqa" / "train.jsonl", "{}")
    assert "no folder 'piqa' (tasks there: siqa)" in refusal(local(tmp_path))
    no_split = refusal(local(tmp_path), "siqa", "test")
    assert "no test split of siqa" in no_split
    assert "in siqa/: train.jsonl" in no_split


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"goal": "Dry', "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ({**GOOD, "label": 2}, "label 2 is not one of 0..1"),
        ({"goal": "Dry a cup"}, "field 'sol1' is missing"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: Any, reason: str) -> None:
    file = write_lines(tmp_path / "piqa" / "train.jsonl", GOOD, "", bad)
    message = refusal(local(tmp_path))
    assert f"{file}:3" in message
    assert reason in message


def test_a_bad_parquet_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    pandas.DataFrame([GOOD, {**GOOD, "label": 5}]).to_parquet(tmp_path / "piqa" / "train.parquet")
    assert "train.parquet row 2: " in refusal(local(tmp_path))


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "piqa" / "train.jsonl")
    assert "has no rows" in refusal(local(tmp_path))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "piqa" / "train.jsonl.gz", *[GOOD] * 50)
    file.write_bytes(file.read_bytes()[:-12])
    assert "damaged or truncated" in refusal(local(tmp_path))
    file.write_bytes(b"not gzip")
    assert "damaged or truncated" in refusal(local(tmp_path))
    file.unlink()
    file.with_name("train.parquet").write_bytes(b"PAR1 but not really")
    assert "cannot be read as parquet" in refusal(local(tmp_path))


def test_a_split_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "piqa" / "train.jsonl", GOOD)
    write_lines(tmp_path / "piqa" / "train.jsonl.gz", GOOD)
    assert "more than once" in refusal(local(tmp_path))


def test_real_data_loads_with_the_published_hash(shared_data: Path) -> None:
    loaded = load_split(local(shared_data), "obqa", "test")
    assert len(loaded.items) == 500
    assert loaded.files[0].sha256 in (shared_data / "README.md").read_text()


@pytest.mark.parametrize("stray", ["{}\r", " {}\n", "\ufeff{}", "{}\u200b"])
def test_labels_of_a_task_of_one_s_own_may_have_stray_signs(stray: str, tmp_path: Path) -> None:
    own = {
        kind: CustomTask(question="q", options=["o"], answer="a", answer_as=kind)
        for kind in AnswerKind
        if not kind.free
    }
    given = {AnswerKind.index: "1", AnswerKind.letter: "b", AnswerKind.text: "y"}
    for kind, task in own.items():
        row = {"q": "Which?", "o": ["x", "y"], "a": stray.format(given[kind])}
        write_lines(tmp_path / "quiz" / "test.jsonl", row)
        (item,) = load_split(local(tmp_path), "quiz", "test", {"quiz": task}).items
        assert item.answer == 1, kind


def test_embedded_splits_carry_the_hash_of_their_rows() -> None:
    config = DataConfig(name=DataSource.embedded, seed=2)
    first, again = (load_split(config, "siqa", "test") for _ in range(2))
    assert first == again
    assert first.files[0].path == "embedded:siqa/test?seed=2"
    assert first.files[0].rows == len(first.items) == 96
    other = load_split(DataConfig(name=DataSource.embedded, seed=3), "siqa", "test")
    assert other.files[0].sha256 != first.files[0].sha256


def test_a_limit_takes_the_first_of_a_shuffle() -> None:
    whole = load_split(DataConfig(name=DataSource.embedded), "piqa", "test")
    assert whole.limited(None, 0).items == whole.items
    few, more = whole.limited(5, 0), whole.limited(9, 0)
    assert few.items == more.items[:5]
    assert few.items != whole.items[:5]
    assert few.items != whole.limited(5, 1).items
    assert len(whole.limited(10_000, 0).items) == len(whole.items)
    for item, row in zip(few.items, few.rows, strict=True):
        assert (item.question, item.options) == (row["goal"], (row["sol1"], row["sol2"]))


def test_an_unknown_split_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="dev"):
        load_split(DataConfig(name=DataSource.embedded), "piqa", "dev")


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.parquet"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_of_rows_are_refused_at_once(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT, "2")
    place(kind, tmp_path / "piqa" / name)
    message = refusal(local(tmp_path))
    assert message.isprintable()
    assert len(message) <= SCREEN


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.parquet"])
def test_bombs_are_refused_with_the_limit_that_they_break(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good rows, which take a thousandth of their size: they could fill any memory."""
    monkeypatch.setenv(LIMIT, "1")
    file = tmp_path / "piqa" / name
    if name.endswith("parquet"):
        file.parent.mkdir()
        pandas.DataFrame([GOOD] * 60_000).to_parquet(file)
        assert file.stat().st_size < 20_000
    else:
        write_lines(file, *[GOOD] * 20_000)
    message = refusal(local(tmp_path))
    assert "more than 1 MiB; MIXLORA_EXP_READ_LIMIT=N (MiB per file) allows more" in message
    monkeypatch.setenv(LIMIT, "64")
    assert len(load_split(local(tmp_path), "piqa", "train").items) >= 20_000


def test_a_row_may_not_flood_the_screen(tmp_path: Path) -> None:
    write_lines(tmp_path / "piqa" / "train.jsonl", {**GOOD, "label": "\x1b[2J" + "x" * 10**6})
    message = refusal(local(tmp_path))
    assert "train.jsonl:1" in message
    assert message.isprintable()
    assert len(message) <= SCREEN
