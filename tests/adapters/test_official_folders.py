"""Official adapters go back as they came, and the files that are met in the wild are told apart."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixlora_exp.cli.generate import run as generate
from mixlora_exp.errors import UserError
from mixlora_exp.official.export import export_official
from mixlora_exp.official.folders import AdapterFiles, read_official, read_peft, write_official
from mixlora_exp.official.imports import import_official
from mixlora_exp.system.guarded import guarded

ROOT = Path(__file__).resolve().parents[2]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CONFIG, BIN, SAFETENSORS = "adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"


def convert(*words: Any) -> int:
    path = ROOT / "scripts" / "convert_adapter.py"
    spec = importlib.util.spec_from_file_location("convert_adapter", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return guarded(module.run, [str(word) for word in words])


def theirs(kit: Any, folder: Path, kind: str = "mixlora", **changes: Any) -> tuple[Path, Tensor]:
    """A folder as the official packages write it, without anything of this project's."""
    source, expected = kit.adapter(folder / "made", kind, **changes)
    files = export_official(read_peft(source)).files
    config = {name: value for name, value in files.config.items() if name != "mixlora_exp"}
    write_official(folder / "theirs", AdapterFiles(config, files.tensors))
    return folder / "theirs", expected


def edit(folder: Path, **changes: Any) -> dict[str, Any]:
    """Change entries of the configuration; None removes one."""
    path = folder / CONFIG
    config = json.loads(path.read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    path.write_text(json.dumps(config))
    return config


def assert_same(one: Path, other: Path) -> None:
    first, second = read_official(one), read_official(other)
    assert first.config == second.config
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[n], t) for n, t in second.tensors.items())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"act_fn": None},
        {"lora_dropout": 0.0},
        {"use_dora": True},
        {"expert_lora": {"use_dora": True}},
        {"name": "mine"},
        {"task_name": "arc-e"},
        {"router_loss": False},
        {"task_type": None, "base_model_name_or_path": None},
        {"target_modules": dict.fromkeys([*ATTENTION, "gate_proj", "up_proj", "down_proj"], True)},
        {"jitter_noise": 0.0, "lora_init": "gaussian"},
    ],
    ids=str,
)
def test_an_official_adapter_goes_back_as_it_came(
    kit: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Also what PEFT's format has no entry for, and what is left to its default."""
    folder, expected = theirs(kit, tmp_path)
    edit(folder, **changes)
    assert convert(folder, tmp_path / "peft") == 0
    assert torch.equal(kit.logits(tmp_path / "peft"), expected)
    assert convert(tmp_path / "peft", tmp_path / "back") == 0
    assert_same(tmp_path / "back", folder)
    assert convert(tmp_path / "back", tmp_path / "again") == 0
    for name in (CONFIG, SAFETENSORS, "official.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()


@pytest.mark.parametrize("targets", [["q_proj"], []], ids=["one", "none"])
def test_routers_over_experts_without_weights_come_back(
    kit: Any, targets: list[str], tmp_path: Path
) -> None:
    """Two layers and few tensors: fewer than the experts of a router."""
    folder, expected = theirs(kit, tmp_path, "lora", target_modules=["q_proj"])
    files = read_official(folder)
    prefix = "base_model.model.model."
    tensors = {n.replace(prefix, "mixlora."): t for n, t in files.tensors.items() if targets}
    for layer in range(2):
        tensors[f"mixlora.layers.{layer}.mlp.moe_gate.weight"] = torch.randn(8, 64)
    config = {**files.config, "peft_type": "MIXLORA", "routing_strategy": "mixlora",
              "num_experts": 8, "target_modules": targets}  # fmt: skip
    write_official(tmp_path / "routers", AdapterFiles(config, tensors))
    if not targets:
        # PEFT has no adapter without a module.
        assert convert(tmp_path / "routers", tmp_path / "peft") == 2
        return
    assert convert(tmp_path / "routers", tmp_path / "peft") == 0
    assert torch.equal(kit.logits(tmp_path / "peft"), expected)
    assert convert(tmp_path / "peft", tmp_path / "back") == 0
    assert_same(tmp_path / "back", tmp_path / "routers")


def test_new_weights_or_settings_are_exported_and_not_the_old(kit: Any, tmp_path: Path) -> None:
    folder, _ = theirs(kit, tmp_path)
    edit(folder, router_loss=False)
    convert(folder, tmp_path / "peft")
    path = tmp_path / "peft" / SAFETENSORS
    save_file({n: t + 1 for n, t in load_file(path).items()}, path, {"format": "pt"})
    convert(tmp_path / "peft", tmp_path / "trained")
    assert read_official(tmp_path / "trained").config["router_loss"] is False
    old = read_official(folder).tensors
    for name, tensor in read_official(tmp_path / "trained").tensors.items():
        assert torch.equal(tensor, old[name] + 1)
    # Settings of its own: the old configuration is not this adapter's any more.
    edit(tmp_path / "peft", lora_alpha=16)
    convert(tmp_path / "peft", tmp_path / "changed")
    config = read_official(tmp_path / "changed").config
    assert config["lora_alpha"] == 16
    assert "router_loss" not in config


def test_half_precision_goes_back_as_it_came(kit: Any, tmp_path: Path) -> None:
    folder, _ = theirs(kit, tmp_path)
    path = folder / BIN
    torch.save({n: t.bfloat16() for n, t in torch.load(path, weights_only=True).items()}, path)
    convert(folder, tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "back")
    assert_same(tmp_path / "back", folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", None, json.dumps({}).encode()], ids=["empty", "text", "other", "json"]
)
def test_a_damaged_original_is_refused(
    kit: Any, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = theirs(kit, tmp_path)
    convert(folder, tmp_path / "peft")
    path = tmp_path / "peft" / "official.safetensors"
    if content is None:
        save_file({}, path, {"original": '{"config": [1], "peft": {}}'})
    else:
        path.write_bytes(content)
    assert convert(tmp_path / "peft", tmp_path / "out") == 2
    assert "official.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_tensor_under_two_names(kit: Any, tmp_path: Path) -> None:
    folder, _ = theirs(kit, tmp_path)
    tensors = torch.load(folder / BIN, weights_only=True)
    names = [n for n in tensors if n.endswith("q_proj.lora_A.weight")]
    for name in names:
        tensors[name] = tensors[names[0]]
    torch.save(tensors, folder / BIN)
    assert convert(folder, tmp_path / "peft") == 0
    found = read_peft(tmp_path / "peft").tensors
    assert sum(torch.equal(t, tensors[names[0]]) for t in found.values()) == len(names) == 2


@pytest.mark.parametrize("kind", ["lora", "mixlora"])
def test_a_folder_with_the_wrong_kind_of_file_is_known(kit: Any, kind: str, tmp_path: Path) -> None:
    """PEFT's with a `.bin`, as before 2024; an official one whose weights are safetensors."""
    source, _ = kit.adapter(tmp_path / "in", kind)
    convert(source, tmp_path / "official")
    torch.save(load_file(source / SAFETENSORS), source / BIN)
    (source / SAFETENSORS).unlink()
    assert convert(source, tmp_path / "out") == 0
    assert_same(tmp_path / "out", tmp_path / "official")
    if kind == "mixlora":
        folder, expected = theirs(kit, tmp_path)
        save_file(torch.load(folder / BIN, weights_only=True), folder / SAFETENSORS)
        (folder / BIN).unlink()
        assert convert(folder, tmp_path / "peft") == 0
        assert torch.equal(kit.logits(tmp_path / "peft"), expected)


def test_the_format_of_old_pytorch_is_named(kit: Any, tmp_path: Path) -> None:
    folder, _ = theirs(kit, tmp_path)
    tensors = torch.load(folder / BIN, weights_only=True)
    torch.save(tensors, folder / BIN, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before PyTorch 1\.6.*torch\.save it again"):
        read_official(folder)


def test_precision_of_both_files_is_named(kit: Any, tmp_path: Path) -> None:
    folder, _ = theirs(kit, tmp_path)
    tensors = torch.load(folder / BIN, weights_only=True)
    save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / SAFETENSORS)
    with pytest.raises(UserError, match=r"float32 in one and torch\.bfloat16 in the other"):
        read_official(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_lora": {"rank": 4}}, r"expert_lora\.rank is not supported"),
        ({"peft_type": "LOHA"}, "peft_type=LOHA"),
        ({"peft_type": ["LORA"]}, r"peft_type=\['LORA'\]"),
        ({"lora_init": "pissa"}, "lora_init='pissa'"),
        ({"router_init_range": -1}, "router_init_range=-1"),
        ({"act_fn": "zzz"}, "act_fn='zzz' is unknown"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path"),
        ({"new\nentry": 1}, r"new\\nentry is not supported"),
        ({"r": 4.0}, "r=4.0 must be a whole number: mend"),
    ],
    ids=str,
)
def test_more_that_is_not_supported_is_named(
    kit: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder, _ = theirs(kit, tmp_path)
    edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        import_official(read_official(folder))


@pytest.mark.parametrize("word", ["dropout=0.1", "act_fn=silu", "magnitude=drop"])
def test_options_for_exporting_are_not_taken_in_silence(
    kit: Any, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = theirs(kit, tmp_path)
    assert convert(folder, tmp_path / "out", word) == 2
    assert f"{word} is for exporting" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_may_have_an_equals_sign(kit: Any, tmp_path: Path) -> None:
    folder, _ = theirs(kit, tmp_path)
    folder.rename(tmp_path / "lr=1")
    assert convert(tmp_path / "lr=1", tmp_path / "seed=2" / "out") == 0
    assert convert(tmp_path / "seed=2" / "out", tmp_path / "dropout=3") == 0


@pytest.mark.parametrize("option", ["adapter={}", "adapters=[{}]"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "convert it first, python scripts/convert_adapter.py"),
        ({"inference_mode": True, "peft_type": "NOPE"}, "peft_type='NOPE'"),
        ({"inference_mode": True, "base_model_name_or_path": ["a"]}, "must be a text or null"),
        ({"inference_mode": True}, "load it with PEFT and save it again"),
    ],
    ids=["official", "type", "base", "bin"],
)
def test_an_adapter_that_cannot_be_used_as_it_is(
    kit: Any,
    option: str,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = theirs(kit, tmp_path)
    edit(folder, **changes)
    if len(changes) == 2:
        save_file(torch.load(folder / BIN, weights_only=True), folder / SAFETENSORS)
    words: Sequence[str] = [option.format(folder), "model=tiny", "prompt=a", "max_new_tokens=1"]
    assert guarded(generate, words) == 2
    assert message in capsys.readouterr().err


def test_converted_files_are_readable_for_others(kit: Any, tmp_path: Path) -> None:
    """safetensors makes files that nobody else may read."""
    source, _ = theirs(kit, tmp_path)
    assert convert(source, tmp_path / "back") == 0
    for path in [*source.iterdir(), *(tmp_path / "back").iterdir()]:
        assert path.stat().st_mode & 0o044 == 0o044, path


def test_a_run_s_folder_is_told_from_its_adapter_s(
    kit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kit.adapter(tmp_path / "run" / "adapter", "lora")
    assert convert(tmp_path / "run", tmp_path / "out") == 2
    assert f"did you mean {tmp_path / 'run' / 'adapter'}?" in capsys.readouterr().err
