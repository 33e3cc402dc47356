"""The official adapter format: what cannot be converted is named, and nothing is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from converting import TARGETS, convert
from safetensors.torch import save_file
from torch import Tensor

from mixlora_exp.errors import UserError
from mixlora_exp.official.export import export_official
from mixlora_exp.official.folders import read_official, read_peft, write_official, write_peft
from mixlora_exp.official.imports import import_official
from mixlora_exp.official.tensors import from_peft, to_official


@pytest.mark.parametrize("kind", ["dora", "mixlora"])
def test_trained_magnitudes_are_not_exported_silently(kit: Any, kind: str, tmp_path: Path) -> None:
    changes = {"use_dora": True}
    source, expected = kit.adapter(tmp_path / "in", kind, **changes)
    done = convert(source, tmp_path / "out")
    assert done.returncode == 2
    assert "magnitude=drop" in done.stderr
    assert not (tmp_path / "out").exists()
    done = convert(source, tmp_path / "out", "magnitude=drop")
    assert done.returncode == 0, done.stderr
    assert "magnitudes were dropped" in done.stdout
    written = read_official(tmp_path / "out")
    assert written.config["use_dora"] is True
    assert not any("magnitude" in name for name in written.tensors)
    # What the official packages compute with it: LoRA without the magnitude.
    back = import_official(written)
    assert back.files.config["use_dora"] is False
    write_peft(tmp_path / "back", back.files)
    plain = kit.logits(tmp_path / "back")
    assert not torch.allclose(plain, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": []}, r"act_fn=\[\]"),
        ({"target_modules": [["q_proj"]]}, "not a list of names"),
        ({"lora_dropout": 10**400}, "lora_dropout is out of range"),
        ({"lora_alpha": math.inf}, "lora_alpha is out of range"),
        ({"routing_strategy": "mixlora-dynamic", "top_p": 0.8}, "routing_strategy=mixlora-dynamic"),
        ({"routing_strategy": "mixlora-switch"}, "routing_strategy=mixlora-switch"),
        ({"jitter_noise": 0.1}, "jitter_noise=0.1"),
        ({"peft_type": "MOLA"}, "peft_type=MOLA"),
        ({"peft_type": None, "routing_strategy": "loramoe"}, "peft_type=LORAMOE"),
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
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(
    kit: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source, _ = kit.adapter(tmp_path / "in")
    official, _ = kit.there_and_back(tmp_path, source)
    path = official / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    config.pop("mixlora_exp")
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        import_official(read_official(official))


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
        (reshaped("q_proj.lora_A", lambda t: t * math.nan), "no finite numbers"),
        (renamed("moe_gate", "g\x1b[1m"), r"g\\x1b\[1m\.weight is unknown"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    kit: Any, change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    source, _ = kit.adapter(tmp_path / "in")
    official, _ = kit.there_and_back(tmp_path, source)
    path = official / "adapter_model.bin"
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)
    with pytest.raises(UserError, match=message):
        import_official(read_official(official))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_to_transform": 0}, "layers_to_transform"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_alpha": 7.5}, "lora_alpha=7.5"),
        ({"lora_dropout": 0.0}, "dropout=1e-9"),
        ({"target_modules": "all-linear"}, "target_modules"),
        ({"peft_type": "LOHA"}, "peft_type=LOHA"),
        ({"task_type": "SEQ_CLS"}, "task_type=SEQ_CLS"),
        ({"r": 8}, "does not fit r=8"),
        ({"new_option": 1}, "new_option"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": "four"}, "r='four' must be a whole number"),
        ({"lora_alpha": None}, "lora_alpha=None must be a number"),
        ({"lora_alpha": "8"}, "lora_alpha='8' must be a number"),
        ({"lora_alpha": math.inf}, "lora_alpha is out of range"),
        ({"lora_dropout": None}, "lora_dropout=None"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5"),
        ({"lora_dropout": True}, "lora_dropout=True"),
        ({"use_dora": "yes"}, "use_dora='yes' must be true or false"),
        ({"target_modules": [1, 2]}, r"target_modules=\[1, 2\]"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path=5"),
    ],
    ids=str,
)
def test_what_the_official_format_lacks_is_named(
    kit: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source, _ = kit.adapter(tmp_path / "in", "lora")
    path = source / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        export_official(read_peft(source))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "num_experts=None"),
        ({"top_k": 2.0}, r"top_k=2\.0 must be a whole number"),
        ({"top_k": 9}, "top_k=9"),
        ({"router_loss_coef": "a"}, "router_loss_coef='a'"),
        ({"router_init_std": None}, "router_init_std=None"),
        ({"router_init_std": -1}, "router_init_std=-1"),
        ({"expert_lora": [1]}, r"expert_lora=\[1\]"),
        ({"expert_lora": {"rank": 4}}, "expert_lora"),
        ({"expert_lora": {"lora_alpha": "z"}}, "lora_alpha='z'"),
        ({"act_fn": ["silu"]}, "act_fn="),
        ({"act_fn": "zzz"}, "act_fn='zzz' is unknown"),
    ],
    ids=str,
)
def test_entries_of_a_mixture_that_cannot_be_are_named(
    kit: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source, _ = kit.adapter(tmp_path / "in")
    path = source / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        export_official(read_peft(source))


def test_an_activation_that_does_not_exist_is_not_written(kit: Any, tmp_path: Path) -> None:
    source, _ = kit.adapter(tmp_path / "in")
    with pytest.raises(UserError, match="act_fn='zzz' is unknown"):
        export_official(read_peft(source), act_fn="zzz")


def test_a_router_in_bf16_is_not_exported(kit: Any, tmp_path: Path) -> None:
    source, _ = kit.adapter(tmp_path / "in", router_precision="bfloat16")
    with pytest.raises(UserError, match="router_precision=bfloat16"):
        export_official(read_peft(source))


def test_a_kept_configuration_that_does_not_fit_is_refused(kit: Any, tmp_path: Path) -> None:
    """It came with the file, and may say anything."""
    source, _ = kit.adapter(tmp_path / "in", "lora")
    official, _ = kit.there_and_back(tmp_path, source)
    path = official / "adapter_config.json"
    whole = json.loads(path.read_text())
    for change in (
        {"peft_type": "PROMPT_TUNING"},
        {"r": 64},
        {"modules_to_save": ["lm_head"]},
        {"lora_alpha": "abc"},
        {"lora_alpha": math.inf},
        {"target_modules": [1]},
    ):
        kept = {**whole["mixlora_exp"], "peft": {**whole["mixlora_exp"]["peft"], **change}}
        path.write_text(json.dumps({**whole, "mixlora_exp": kept}))
        with pytest.raises(UserError, match="remove the entry"):
            import_official(read_official(official))
    kept = {**whole["mixlora_exp"], "options": {"dropout": "x"}}
    path.write_text(json.dumps({**whole, "mixlora_exp": kept}))
    with pytest.raises(UserError, match="remove the entry"):
        import_official(read_official(official))
    for kept in (3, {}, {"peft": 3}):
        path.write_text(json.dumps({**whole, "mixlora_exp": kept}))
        with pytest.raises(UserError, match="damaged"):
            import_official(read_official(official))


def test_a_safetensors_file_of_another_adapter_is_refused(kit: Any, tmp_path: Path) -> None:
    source, _ = kit.adapter(tmp_path / "in", "dora")
    files = read_peft(source)
    write_official(tmp_path / "official", export_official(files, drop_magnitude=True).files)
    other = {name: tensor + 1 for name, tensor in to_official(from_peft(files.tensors)).items()}
    save_file(other, tmp_path / "official" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="not of one adapter"):
        read_official(tmp_path / "official")


def test_an_adapter_without_activation_asks_for_it(kit: Any, tmp_path: Path) -> None:
    source, expected = kit.adapter(tmp_path / "in", family="gemma")
    path = source / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config.pop("act_fn") == "gelu_pytorch_tanh"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="act_fn=gelu_pytorch_tanh for Gemma"):
        export_official(read_peft(source))
    _, back = kit.there_and_back(tmp_path, source, act_fn="gelu_pytorch_tanh")
    assert torch.equal(kit.logits(back, "gemma"), expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["one"], "two folders are needed"),
        (["absent", "out"], "absent is no folder"),
        (["{in}", "{in}"], "exists already"),
        (["{in}", "out", "magnitude=lose"], "magnitude=lose"),
        (["{in}", "out", "dropout=2"], "dropout=2"),
        (["{in}", "out", "speed=2"], "speed"),
        (["{empty}", "out"], "holds no adapter (there is no adapter_config.json)"),
    ],
)
def test_the_command_names_mistakes(
    kit: Any, words: list[str], message: str, tmp_path: Path
) -> None:
    source, _ = kit.adapter(tmp_path / "in", "lora")
    (tmp_path / "empty").mkdir()
    places = {"in": source, "empty": tmp_path / "empty"}
    done = convert(*(word.format(**places) for word in words))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
