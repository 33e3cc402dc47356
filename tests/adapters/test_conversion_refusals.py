"""The official adapter format: what cannot be converted is named, and nothing is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from official_format import (
    BIN,
    SAFETENSORS,
    as_official,
    official_config,
    official_tensors,
    write_official,
)
from safetensors.torch import save_file
from torch import Tensor

from mixlora_exp.cli.convert import run
from mixlora_exp.errors import UserError
from mixlora_exp.official.folders import AdapterFiles, read_official
from mixlora_exp.official.imports import import_official
from mixlora_exp.system.exit_codes import guarded

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def files(kit: Any, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of an official mixture."""
    source, _ = kit.adapter(tmp_path / "in")
    return official_config(source), official_tensors(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": []}, r"act_fn=\[\]"),
        ({"target_modules": [["q_proj"]]}, "not a list of names"),
        ({"lora_dropout": 10**400}, "lora_dropout is out of range"),
        ({"lora_alpha": math.inf}, "lora_alpha is out of range"),
        ({"routing_strategy": "mixlora-dynamic"}, "top_k is not supported"),
        ({"routing_strategy": "mixlora-noisy"}, "routing_strategy=mixlora-noisy is not supported"),
        ({"jitter_noise": 0.1}, "jitter_noise=0.1"),
        ({"peft_type": "MOLA"}, "peft_type=MOLA has mola"),
        ({"peft_type": None, "routing_strategy": "loramoe"}, "top_k is not supported"),
        ({"task_type": "SEQ_CLS"}, "task_type=SEQ_CLS"),
        ({"temperature": 0.5}, "temperature"),
        ({"r": 8}, r"r=8"),
        ({"r": True}, "r=True"),
        ({"r": "4"}, "r='4'"),
        ({"r": -1}, "r=-1"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5"),
        ({"num_experts": 10**12}, "num_experts=1000000000000"),
        ({"num_experts": 5}, "num_experts=5"),
        ({"num_experts": 3}, "num_experts=3"),
        ({"top_k": 9}, "top_k=9"),
        ({"act_fn": "nothing"}, "act_fn='nothing'"),
        ({"bias": "all"}, "bias='all'"),
        ({"target_modules": "all-linear"}, "target_modules='all-linear'"),
        ({"target_modules": TARGETS[:-1]}, "down_proj"),
        ({"target_modules": [*TARGETS[:4]]}, "not among target_modules"),
        ({"expert_lora": {"r": 2}}, "r=2"),
        ({"expert_lora": 3}, "expert_lora=3"),
        ({"peft_type": "LORA"}, "routing_strategy"),
        ({"expert_lora": {"rank": 4}}, r"expert_lora\.rank is not supported"),
        ({"peft_type": "LOHA"}, "peft_type=LOHA"),
        ({"peft_type": ["LORA"]}, r"peft_type=\['LORA'\]"),
        ({"lora_init": "pissa"}, "lora_init='pissa'"),
        ({"router_init_range": -1}, "router_init_range=-1"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path"),
        ({"new\nentry": 1}, r"new\\nentry is not supported"),
        ({"r": 4.0}, "r=4.0 must be an integer: correct"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(
    files: tuple[dict[str, Any], dict[str, Tensor]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        import_official(AdapterFiles(files[0] | changes, files[1]))


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[next(n for n in tensors if name in n)]

    return change


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = next(n for n in tensors if old in n)
        tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def reshaped(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        key = next(n for n in tensors if name in n)
        tensors[key] = change(tensors[key]).contiguous()

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("moe_gate"), "router is missing|layers"),
        (without("experts.3.lora_A"), "experts"),
        (without("q_proj.lora_B"), "q_proj is missing"),
        (renamed("moe_gate", "gate"), "unknown"),
        (renamed("layers.1.", "layers.7."), "layer"),
        (renamed("q_proj.lora_A", "qkv_proj.lora_A"), "qkv_proj is not a projection"),
        (renamed("up_proj.experts.0", "q_proj.experts.0"), "q_proj is not a projection"),
        (reshaped("q_proj.lora_A", lambda t: t[:2]), "does not fit r=4"),
        (reshaped("q_proj.lora_A", lambda t: t[:, :-1]), "the other layers|does not fit"),
        (reshaped("q_proj.lora_A", lambda t: t[0]), "does not fit"),
        (reshaped("down_proj.experts.0.lora_B", lambda t: t.T), "differ in shape"),
        (reshaped("moe_gate", lambda t: t[:, :-1]), "router"),
        (reshaped("moe_gate", lambda t: t.long()), "floating-point"),
        (reshaped("moe_gate", lambda t: t[0, 0]), "0 dimensions"),
        (reshaped("q_proj.lora_A", lambda t: t[0, 0]), "0 dimensions"),
        (reshaped("q_proj.lora_A", lambda t: t * math.nan), "not finite"),
        (renamed("moe_gate", "g\x1b[1m"), r"g\\x1b\[1m\.weight is unknown"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    files: tuple[dict[str, Any], dict[str, Tensor]],
    change: Callable[[dict[str, Tensor]], None],
    message: str,
    tmp_path: Path,
) -> None:
    config, tensors = files
    change(tensors)
    folder = write_official(tmp_path / "theirs", config, tensors)
    with pytest.raises(UserError, match=message):
        import_official(read_official(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t + 1, "not of one adapter"),
        (lambda t: t.bfloat16(), r"float32 in one and torch\.bfloat16 in the other"),
    ],
    ids=["values", "precision"],
)
def test_a_safetensors_file_of_another_adapter_is_refused(
    kit: Any, change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    source, _ = kit.adapter(tmp_path / "in", "dora")
    folder = as_official(source, tmp_path / "theirs")
    save_file({n: change(t) for n, t in official_tensors(source).items()}, folder / SAFETENSORS)
    with pytest.raises(UserError, match=message):
        read_official(folder)


def test_the_format_of_old_pytorch_is_refused(kit: Any, tmp_path: Path) -> None:
    source, _ = kit.adapter(tmp_path / "in")
    folder = as_official(source, tmp_path / "theirs")
    tensors = torch.load(folder / BIN, weights_only=True)
    torch.save(tensors, folder / BIN, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="not a zip file"):
        read_official(folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["one"], "the following arguments are required: OUT"),
        (["absent", "out"], "absent is not a folder"),
        (["{in}", "{in}"], "already exists"),
        (["{in}", "out"], "already in PEFT's format"),
        (["{in}", "out", "--magnitude=drop"], "there is no option --magnitude"),
        (["{in}", "out", "third"], "unrecognized arguments: third"),
        (["{empty}", "out"], "has no adapter_config.json"),
    ],
)
def test_the_command_names_mistakes(
    kit: Any, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = kit.adapter(tmp_path / "in", "lora")
    (tmp_path / "empty").mkdir()
    places = {"in": source, "empty": tmp_path / "empty"}
    assert guarded(run, [word.format(**places) for word in words]) == 2
    assert message in capsys.readouterr().err
