"""Rows of hub repositories and of their mirrors: the same items as from local files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pandas
import pytest
from rows_on_disk import local, refusal, write_lines

from mixlora_exp.config.schema import TASK_NAMES, DataConfig, DataSource
from mixlora_exp.data.sources import load_split
from mixlora_exp.tasks import TASKS
from mixlora_exp.tasks.embedded import rows as embedded_rows

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
