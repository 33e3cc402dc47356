"""Where items come from: local files, hub repositories and their mirrors, embedded rows."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hostile import HOSTILE, place
from opens import opens_below

from mixlora_exp.config.schema import TASK_NAMES, AnswerKind, CustomTask, DataConfig, DataSource
from mixlora_exp.data.sources import load_split
from mixlora_exp.errors import SCREEN, UserError
from mixlora_exp.system.untrusted import LIMIT
from mixlora_exp.tasks import TASKS
from mixlora_exp.tasks.embedded import rows as embedded_rows

GOOD = {"goal": "Dry a cup", "sol1": "Wet it.", "sol2": "Take a towel.", "label": 1}


def local(path: Path) -> DataConfig:
    return DataConfig(name=DataSource.local, path=str(path))


def write_lines(file: Path, *lines: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines)
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "wt", encoding="utf-8") as stream:
        stream.write(text)
    return file


def refusal(config: DataConfig, task: str = "piqa", split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        load_split(config, task, split)
    return str(caught.value)


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


HALF = "Wet \ud800 it."


def fields_of(row: Any, where: str = "") -> list[str]:
    """The places of all texts in a row, as errors name them."""
    if isinstance(row, str):
        return [where]
    if isinstance(row, dict):
        return [p for k, v in row.items() for p in fields_of(v, f"{where}.{k}".lstrip("."))]
    if isinstance(row, list):
        return [p for i, v in enumerate(row) for p in fields_of(v, f"{where}[{i}]")]
    return []


def broken_at(row: Any, place: str, where: str = "") -> Any:
    """The row with half a character in one of its texts."""
    if where == place and isinstance(row, str):
        return row + "\udfff"
    if isinstance(row, dict):
        return {k: broken_at(v, place, f"{where}.{k}".lstrip(".")) for k, v in row.items()}
    if isinstance(row, list):
        return [broken_at(v, place, f"{where}[{i}]") for i, v in enumerate(row)]
    return row


@pytest.mark.parametrize("task", TASK_NAMES)
def test_half_a_character_is_named_with_file_line_and_field(task: str, tmp_path: Path) -> None:
    good = {name: v for name, v in embedded_rows(task, "test", 0)[0].items() if name != "facts"}
    # A field that no task reads is hashed all the same.
    good["note"] = [{"by": "x"}]
    places = fields_of(good)
    assert "note[0].by" in places
    assert len(places) > 3
    for name in places:
        file = write_lines(tmp_path / task / "test.jsonl", good, broken_at(good, name))
        message = refusal(local(tmp_path), task, "test")
        assert f"{file}:2: " in message
        assert f"field '{name}' contains half a character (U+DFFF)" in message
        assert message.isprintable()
    write_lines(tmp_path / task / "test.jsonl", {**good, "\ud800": "x"})
    assert ":1: " in refusal(local(tmp_path), task, "test")


def test_half_a_character_in_bytes_and_in_a_task_of_one_s_own(tmp_path: Path) -> None:
    file = tmp_path / "quiz" / "test.jsonl"
    file.parent.mkdir()
    # Each half on its own in UTF-8, as some programs write it.
    file.write_bytes(b'{"q": "a \xed\xa0\x80 b", "o": ["x", "y"], "a": 0}\n')
    own = CustomTask(question="q", options=["o"], answer="a", answer_as=AnswerKind.index)
    with pytest.raises(UserError, match=r"test\.jsonl:1: .*field 'q' contains half"):
        load_split(local(tmp_path), "quiz", "test", {"quiz": own})


def test_half_a_character_in_generated_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [GOOD, {**GOOD, "x": HALF}]
    monkeypatch.setattr("mixlora_exp.tasks.embedded.rows", lambda *_: drawn)
    with pytest.raises(UserError, match=r"piqa/test\?seed=0 row 2: .*field 'x' contains half"):
        load_split(DataConfig(name=DataSource.embedded), "piqa", "test")


def not_utf8(texts: list[bytes]) -> pyarrow.Array:
    return pyarrow.Array.from_buffers(pyarrow.string(), len(texts), pyarrow.array(texts).buffers())


def test_a_parquet_text_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    columns = {name: [value, value] for name, value in GOOD.items()}
    columns["sol2"] = not_utf8([b"good", b"bad \xed\xa0\x80"])
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "piqa" / "train.parquet")
    message = refusal(local(tmp_path))
    assert "train.parquet row 2: field 'sol2' is not UTF-8 text" in message


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.usefixtures("hub_cache")
def test_half_a_character_in_a_mirror(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "baber" / "piqa"
    if kind == "jsonl":
        write_lines(folder / "piqa_train.jsonl", GOOD, {**GOOD, "sol2": HALF})
        write_lines(folder / "piqa_validation.jsonl", GOOD)
    else:
        folder.mkdir(parents=True)
        columns = {name: [value, value] for name, value in GOOD.items()}
        columns["sol2"] = not_utf8([b"good", b"bad \xed\xa0\x80"])
        for split in ("train", "validation"):
            pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"piqa_{split}.parquet")
    message = refusal(DataConfig(name=DataSource.hub, mirror=str(tmp_path)))
    assert "piqa" in message
    assert ("row 2: " if kind == "parquet" else "piqa_train.jsonl:2: ") in message
    assert "field 'sol2'" in message


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


RAW = {
    "activity_label": "Cooking", "ctx_a": "", "ctx_b": "", "label": "1",
    "ctx": "[header] How to cook rice [title] Wash it. [step]  Use cold water [title] Boil it",
    "endings": [
        "[substeps] Add salt. [title] Stir.", "in a pot [1].", "[step]", "with  [x [y] z]   care."
    ],
}  # fmt: skip
CLEAN = (
    "How to cook rice. Wash it. Use cold water. Boil it",
    ("Add salt.. Stir.", "in a pot .", "[step]", "with z] care."),
)


@pytest.mark.usefixtures("hub_cache")
def test_hellaswag_is_the_same_from_the_hub_and_from_local_files(tmp_path: Path) -> None:
    """The hub's rows have the marks of their articles; those of local copies are often gone."""
    folder = tmp_path / "Rowan" / "hellaswag"
    for split in ("train", "validation"):
        write_lines(folder / "data" / f"{split}.jsonl", RAW)
    hub = load_split(DataConfig(name=DataSource.hub, mirror=str(tmp_path)), "hellaswag", "test")
    write_lines(tmp_path / "hellaswag" / "test.jsonl", RAW)
    raw = load_split(local(tmp_path), "hellaswag", "test")
    cleaned = {**RAW, "ctx": CLEAN[0], "endings": list(CLEAN[1])}
    write_lines(tmp_path / "hellaswag" / "test.jsonl", cleaned)
    clean = load_split(local(tmp_path), "hellaswag", "test")
    assert hub.items == raw.items == clean.items
    assert (clean.items[0].context, clean.items[0].options) == CLEAN


def test_hellaswag_s_raw_rows_give_what_others_cleaned(shared_data: Path) -> None:
    checked = 0
    with gzip.open(shared_data / "hellaswag" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if "ctx_raw" not in row:
                continue
            raw = {**row, "ctx": row["ctx_raw"], "endings": row["endings_raw"]}
            parse = TASKS["hellaswag"].parse
            assert parse(raw, 0) == parse(row, 0)
            assert parse(row, 0).context == row["ctx"].strip(), "what came clean stays as it is"
            checked += 1
    assert checked == 1000


def build_mirror(root: Path) -> None:
    """Folders laid out like the hub repositories, with some embedded rows in them."""
    configs: dict[str, list[str]] = {}
    for task in TASKS.values():
        folder = root / task.hub_id
        # The PIQA repository has neither README nor folders; the others name their configs.
        bare = task.name == "piqa"
        where = "" if bare else (task.hub_config or "data")
        (folder / where).mkdir(parents=True, exist_ok=True)
        for split, hub_split in task.splits.items():
            name = f"piqa_{hub_split}.parquet" if bare else f"{hub_split}-00000-of-00001.parquet"
            rows = embedded_rows(task.name, split, 0)[:12]
            frame = pandas.DataFrame(rows).drop(columns="facts")
            frame.to_parquet(folder / where / name, index=False)
        if not bare:
            files = "".join(
                f"  - split: {s}\n    path: {where}/{s}-*\n" for s in task.splits.values()
            )
            configs.setdefault(task.hub_id, []).append(
                f"- config_name: {task.hub_config or 'default'}\n  data_files:\n{files}"
            )
    for hub_id, entries in configs.items():
        text = "---\nconfigs:\n" + "".join(entries) + "---\n# Card\n"
        (root / hub_id / "README.md").write_text(text)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mirror")
    build_mirror(root)
    return root


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("task", TASK_NAMES)
def test_a_mirror_of_the_hub_repository_is_read(
    task: str, mirror: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = DataConfig(name=DataSource.hub, mirror=str(mirror))
    for split in ("train", "test"):
        loaded = load_split(config, task, split)
        rows = embedded_rows(task, split, 0)[:12]
        expected = [TASKS[task].parse(row, index) for index, row in enumerate(rows)]
        assert loaded.items == expected
        (file,) = loaded.files
        assert file.path.startswith(f"hub:{TASKS[task].hub_id}/")
        assert file.path.endswith(f"/{TASKS[task].splits[split]}@mirror")
        assert (file.rows, len(file.sha256)) == (12, 64)
    assert "it/s" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("hub_cache")
def test_mirror_errors_name_the_way_out(tmp_path: Path, mirror: Path) -> None:
    (tmp_path / "some" / "thing").mkdir(parents=True)
    missing = refusal(DataConfig(name=DataSource.hub, mirror=str(tmp_path)))
    assert "no folder baber/piqa (there: some/thing)" in missing
    (tmp_path / "allenai" / "openbookqa").mkdir(parents=True)
    empty = refusal(DataConfig(name=DataSource.hub, mirror=str(tmp_path)), "obqa")
    assert "could not be read" in empty
    assert "data.path=DIR" in empty


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach the hub\nmore"),
        FileNotFoundError("Dataset doesn't exist"),
        ValueError("BuilderConfig 'main' not found"),
    ],
)
def test_hub_errors_name_the_repository_and_the_way_out(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fail(path: str, config: str | None, **options: object) -> None:
        asked.append((path, config, options))
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)
    message = refusal(DataConfig(name=DataSource.hub), "obqa", "test")
    for part in ("allenai/openbookqa", "data=local data.path=DIR", "data.mirror=DIR", "auth login"):
        assert part in message
    assert "\n" not in message
    revision = TASKS["obqa"].revision
    assert asked == [("allenai/openbookqa", "main", {"split": "test", "revision": revision})]


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
