"""A base model is known by its weights, wherever and in however many files they lie."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixlora_exp.config.schema import ModelConfig, ModelSource, Weights
from mixlora_exp.errors import UserError
from mixlora_exp.models import (
    BaseIdentity,
    base_of,
    known_identity,
    load_model,
    read_base,
    same_weights,
    write_base,
)
from mixlora_exp.models.base_identity import BASE_FILE
from mixlora_exp.models.weight_files import fingerprint, stored_tensors, weight_files

Tiny = Callable[..., ModelConfig]


def sharded(folder: Path, target: Path) -> Path:
    """The same model with its tensors in three files."""
    tensors = load_file(folder / "model.safetensors")
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    index = {}
    for number in range(3):
        name = f"model-{number + 1:05d}-of-00003.safetensors"
        part = {key: tensors[key] for key in sorted(tensors, reverse=True)[number::3]}
        save_file(part, target / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return target


def test_it_is_that_of_the_tensors_not_of_their_files(folder: Path, tmp_path: Path) -> None:
    other = sharded(folder, tmp_path / "sharded")
    assert len(weight_files(other)) == 3
    assert fingerprint(other) == fingerprint(folder)
    # Files that transformers does not read say nothing.
    save_file({"stray": torch.zeros(2)}, folder / "adapter_model.safetensors")
    assert fingerprint(other) == fingerprint(folder)


@pytest.mark.parametrize("change", ["value", "first", "last", "dtype", "shape", "name", "less"])
def test_other_tensors_have_another(change: str, folder: Path) -> None:
    before = fingerprint(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = tensors.pop(name)
    if change == "value":
        weight = weight * 1.001
    elif change in ("first", "last"):
        weight.view(-1)[0 if change == "first" else -1] += 1
    elif change == "dtype":
        weight = weight.bfloat16()
    elif change == "shape":
        weight = weight.view(weight.shape[1], weight.shape[0])
    if change != "less":
        tensors[name + ("x" if change == "name" else "")] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) != before


def test_the_precision_of_loading_says_nothing(tiny: Tiny, folder: Path) -> None:
    config = tiny(path=str(folder))
    found = [base_of(load_model(config, dtype)) for dtype in (torch.float32, torch.bfloat16)]
    assert found[0] == found[1] == known_identity(config, 0)
    assert found[0].fingerprint == f"files-1:{fingerprint(folder)}"


def test_random_weights_are_known_by_shape_and_seed(tiny: Tiny) -> None:
    base = base_of(load_model(tiny(), torch.float32, seed=3))
    assert base.fingerprint.endswith(":cpu")
    same = [tiny(), tiny(name="other"), tiny(source=ModelSource.hub, weights=Weights.random)]
    for config in same:
        assert same_weights(base, known_identity(config, 3))
    for config, seed in (
        (tiny(), 4),
        (tiny(num_hidden_layers=3), 3),
        (tiny(num_hidden_layers=1), 3),
    ):
        assert same_weights(base, known_identity(config, seed)) is False
    on_gpu = BaseIdentity("tiny", "random", "tiny", 3, base.fingerprint.replace("cpu", "cuda"))
    assert same_weights(base, on_gpu) is False


def test_it_is_not_known_without_files(tiny: Tiny) -> None:
    away = known_identity(tiny(source=ModelSource.hub, hub_id="owner/none"), 0)
    assert away.fingerprint is None
    assert same_weights(away, away) is None


def large(folder: Path) -> int:
    """Files of the size of a 7B model that take no room on the disk; returns their bytes."""
    shapes = {"model.embed_tokens.weight": [32000, 4096], "lm_head.weight": [32000, 4096],
              "model.norm.weight": [4096]}  # fmt: skip
    for layer in range(32):
        own = {
            **{f"self_attn.{p}_proj.weight": [4096, 4096] for p in "qkvo"},
            **{f"mlp.{p}_proj.weight": [11008, 4096] for p in ("gate", "up", "down")},
            "input_layernorm.weight": [4096],
            "post_attention_layernorm.weight": [4096],
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    header, start = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + start)
    return start


def read_by_this_process() -> int:
    path = Path("/proc/self/io")
    if not path.is_file():
        pytest.skip("this system does not count what a process reads")
    return int(path.read_text().split("rchar: ")[1].split()[0])


def test_little_is_read_of_a_large_model(tmp_path: Path) -> None:
    size = large(tmp_path)
    assert size > 13e9
    before, start = read_by_this_process(), time.perf_counter()
    fingerprint(tmp_path)
    assert time.perf_counter() - start < 2
    assert read_by_this_process() - before < 1e6
    (tmp_path / "model.safetensors").unlink()


HEADERS = {
    "no JSON": b"{",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "an entry that is none": b'{"a": 3}',
    "a fraction": b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
    "a negative size": b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    "more than the file": b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}',
    "another size": b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    "true": b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
}


@pytest.mark.parametrize("kind", HEADERS)
def test_hostile_headers_are_refused(kind: str, tmp_path: Path) -> None:
    text = HEADERS[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(UserError, match="is truncated or damaged: copy the model again"):
        fingerprint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x00" * 7])
def test_files_without_a_header_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is truncated or damaged"):
        stored_tensors(tmp_path)


def test_an_index_names_files_of_its_own_folder(folder: Path, tmp_path: Path) -> None:
    other = sharded(folder, tmp_path / "sharded")
    index = other / "model.safetensors.index.json"
    outside = os.path.relpath(folder / "model.safetensors", other)
    index.write_text(json.dumps({"weight_map": {"a": outside}}))
    with pytest.raises(UserError, match="is incomplete, it lacks "):
        weight_files(other)
    index.write_text("[" * 100_000)
    with pytest.raises(UserError, match="is truncated or damaged"):
        weight_files(other)


def test_what_stands_beside_an_adapter(tmp_path: Path) -> None:
    assert read_base(tmp_path) is None
    noted = BaseIdentity("tiny", "random", "tiny", 3, f"random-2:{'0' * 64}:cpu")
    write_base(tmp_path, noted)
    assert read_base(tmp_path) == noted
    # A later version's is not understood, and says nothing.
    path = tmp_path / BASE_FILE
    path.write_text(path.read_text().replace("random-2", "random-9"))
    assert read_base(tmp_path).fingerprint is None
    shown = str(BaseIdentity("a\x1b[2J", "hub", "b" * 999))
    assert shown.startswith("a\\x1b[2J (hub bbb")
    assert len(shown) < 200


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[" * 100_000, '{"model": 1}', " " * 2**17], ids=range(6)
)
def test_a_damaged_note_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / BASE_FILE).write_text(text)
    with pytest.raises(UserError, match=r"base_model\.json is damaged"):
        read_base(tmp_path)


def test_a_note_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / BASE_FILE)
    with pytest.raises(UserError, match="is damaged"):
        read_base(tmp_path)
