"""Adapters from strangers: no program runs, no memory is filled, every refusal is one message."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixlora_exp.errors import UserError
from mixlora_exp.official.folders import read_official

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": []}


class Program:
    """What a pickle may hold: here it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.path, "run"))


class Allocates:
    def __init__(self, size: int) -> None:
        self.size = size

    def __reduce__(self) -> tuple:
        return (bytearray, (self.size,))


def later_zip(content: bytes) -> bytes:
    """The archive with a version in its directory that no reader knows."""
    changed = bytearray(content)
    place = changed.find(b"PK\x01\x02")
    changed[place + 6 : place + 8] = (200).to_bytes(2, "little")
    return bytes(changed)


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def compressed(content: bytes) -> bytes:
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as source,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return stream.getvalue()


WEIGHTS: dict[str, Callable[[Path], bytes]] = {
    "a program": lambda to: saved({"w": Program(to)}),
    "a bare pickle": lambda to: pickle.dumps(Program(to)),
    "an old pickle of tensors": lambda to: pickle.dumps({"w": 1}),
    "nothing": lambda to: b"",
    "noise": lambda to: bytes(range(256)) * 40,
    "a bomb": lambda to: compressed(saved({"w": torch.zeros(2_000_000)})),
    "a view of one number": lambda to: saved({"w": torch.zeros(1).expand(10**9)}),
    "many names for one tensor": lambda to: saved(dict.fromkeys(map(str, range(999)), SHARED)),
    "a list": lambda to: saved([torch.zeros(2)]),
    "no tensor": lambda to: saved({"w": 3}),
    "a number for a name": lambda to: saved({3: torch.zeros(2)}),
    "a sparse tensor": lambda to: saved({"w": torch.zeros(2, 2).to_sparse()}),
    "whole numbers": lambda to: saved({"w": torch.zeros(2, dtype=torch.int64)}),
    "an empty dictionary": lambda to: saved({}),
    # Types that `weights_only` allows, and that fill the memory by a number in a few bytes.
    "a large bytearray": lambda to: saved({"w": Allocates(2**28)}),
    "an impossible bytearray": lambda to: saved({"w": Allocates(2**50)}),
    "a member of a later zip": lambda to: later_zip(saved({"w": torch.zeros(2)})),
}
SHARED = torch.zeros(1000)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_hostile_weights_are_refused(kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "written"
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "adapter_model.bin").write_bytes(WEIGHTS[kind](marker))
    with pytest.raises(UserError, match=r"adapter_model\.bin"):
        read_official(tmp_path)
    assert not marker.exists()


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    content = saved({"w": torch.randn(40, 40), "v": torch.randn(7)})
    path = tmp_path / "adapter_model.bin"
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="truncated"):
            read_official(tmp_path)
    path.write_bytes(content)
    assert read_official(tmp_path).tensors["v"].shape == (7,)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"r": ', "\x00", "[" * 100_000, " " * (2**20 + 1)],
    ids=["empty", "open", "list", "number", "cut", "zero", "deep", "huge"],
)
def test_hostile_configurations_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "adapter_model.bin").write_bytes(saved({"w": torch.zeros(2)}))
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        read_official(tmp_path)
