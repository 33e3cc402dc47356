from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest

from mixlora_exp.errors import UserError
from mixlora_exp.records import record as record_module
from mixlora_exp.records.record import (
    SCHEMA_VERSION,
    finish_record,
    provenance,
    read_record,
    write_json,
    write_jsonl,
)


class Colour(Enum):
    red = "red"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "record.json"
    write_json(path, finish_record({"score": 0.5, "name": "é", "nested": {"k": [1, 2]}}))
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    record = finish_record(
        {
            "tuple": (1, 2),
            "enum": Colour.red,
            "path": Path("a/b"),
            "loss": float("nan"),
            "bound": float("inf"),
            "third": 1 / 3,
            "lone": "\ud800",
        }
    )
    assert record["schema_version"] == SCHEMA_VERSION
    assert record["tuple"] == [1, 2]
    assert record["enum"] == "red"
    assert record["path"] == "a/b"
    assert record["loss"] is None
    assert record["bound"] is None
    path = tmp_path / "new" / "folder" / "record.json"
    write_json(path, record)
    assert read_record(path) == record
    assert names(path.parent) == ["record.json"]


def test_finishing_twice_changes_nothing() -> None:
    record = finish_record({"a": 1})
    assert finish_record(record) == record
    assert finish_record({"b": 2, "a": 1}) == finish_record({"a": 1, "b": 2})


@pytest.mark.parametrize("value", [{"key": object()}, {1: "number as key"}, {"set": {1}}])
def test_only_json_values_are_taken(value: dict) -> None:
    with pytest.raises(TypeError, match="a record"):
        finish_record(value)


def test_written_with_the_usual_permissions(written: Path) -> None:
    plain = written.with_name("plain")
    plain.write_text("")
    assert written.stat().st_mode == plain.stat().st_mode


def test_cut_off_record_is_refused(written: Path) -> None:
    whole = written.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 3):
        written.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"record\.json is not a record: it is truncated"):
            read_record(written)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1]", b"null", b"not json"])
def test_something_else_is_refused(written: Path, content: bytes) -> None:
    written.write_bytes(content)
    with pytest.raises(UserError, match="is not a record"):
        read_record(written)


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, None, "1"])
def test_other_schema_version_is_refused(written: Path, version: object) -> None:
    record = json.loads(written.read_text())
    record["schema_version"] = version
    written.write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"schema_version={version} is (not supported|of a later)"):
        read_record(written)


def test_hand_edited_record_is_refused(written: Path) -> None:
    original = written.read_text()
    written.write_text(original.replace("0.5", "0.9"))
    with pytest.raises(UserError, match="changed after it was written"):
        read_record(written)
    record = json.loads(original)
    del record["content_sha256"]
    written.write_text(json.dumps(record))
    with pytest.raises(UserError, match="changed after it was written"):
        read_record(written)
    # Another layout of the same values is the same record.
    written.write_text(json.dumps(json.loads(original), indent=8, sort_keys=True))
    assert read_record(written)["score"] == 0.5


def test_missing_record_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.json: No such file or directory; give the folder"):
        read_record(tmp_path / "none.json")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_keeps_the_old_file(
    written: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = written.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(record_module.os, "fsync", full)
    with pytest.raises(UserError) as caught:
        write_json(written, {"a": 1})
    assert str(written) in str(caught.value)
    assert "the disk is full; nothing was recorded" in str(caught.value)
    assert written.read_bytes() == before
    assert names(written.parent) == ["record.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the Linux device /dev/full")
def test_full_disk_as_the_system_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "open", lambda self, *_, **__: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(UserError, match="the disk is full; nothing was recorded"):
        write_jsonl(tmp_path / "items.jsonl", [{"row": 1}])
    assert names(tmp_path) == []


def test_folder_in_the_way_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="nothing was recorded"):
        write_json(tmp_path / "file" / "record.json", {})


def test_interrupted_jsonl_leaves_nothing(tmp_path: Path) -> None:
    def rows():
        yield {"row": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(tmp_path / "items.jsonl", rows())
    assert names(tmp_path) == []


def test_jsonl_holds_one_row_per_line(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    rows = [{"text": "two\nlines\u2028"}, {"score": float("-inf")}]
    write_jsonl(path, iter(rows))
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [rows[0], {"score": None}]
    write_jsonl(path, [])
    assert path.read_bytes() == b""


def test_provenance_fits_into_a_record(tmp_path: Path) -> None:
    found = provenance(tmp_path, ["A GPU"])
    assert found["hardware"]["gpus"] == ["A GPU"]
    assert found["hardware"]["cpu"]
    assert found["hardware"]["memory_bytes"] > 0
    assert found["packages"]["torch"]
    assert finish_record(found)["python"] == found["python"]


def test_torch_is_not_imported() -> None:
    code = "import sys, mixlora_exp.records.record; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_the_processor_is_called_as_the_system_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "processor\t: 0\ncpu family\t: 6\nmodel name\t: A Processor\nvendor_id\t: x\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: told)
    assert record_module.hardware(["a GPU"])["cpu"] == "A Processor"
    assert record_module.hardware(["a GPU"])["gpus"] == ["a GPU"]
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: "")
    for processor, machine in (("", "arm64"), ("i386", "arm64")):
        monkeypatch.setattr("platform.processor", lambda told=processor: told)
        monkeypatch.setattr("platform.machine", lambda told=machine: told)
        assert record_module.hardware([])["cpu"] == (processor or machine)
