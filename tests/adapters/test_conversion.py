"""Adapters of the official packages, imported: the same logits, in PEFT's format."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from official_format import (
    BIN,
    CONFIG,
    SAFETENSORS,
    as_official,
    official_config,
    official_tensors,
    write_official,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mixlora_exp.cli.convert import run
from mixlora_exp.cli.generate import run as generate
from mixlora_exp.system.exit_codes import guarded

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCHES = ("single", "right", "left")


def convert(*words: Any) -> int:
    return guarded(run, [str(word) for word in words])


def assert_as_expected(folder: Path, oracle: Path, name: str, key: str = "") -> None:
    """The logits that the official package computed, of three batches."""
    base = AutoModelForCausalLM.from_pretrained(oracle / "tiny-llama")
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    expected = load_file(oracle / name / "expected.safetensors")
    for batch in BATCHES:
        mask = expected[f"{batch}.attention_mask"]
        with torch.no_grad():
            found = model(expected[f"{batch}.input_ids"], attention_mask=mask).logits
        assert (found - expected[f"{key}{batch}.logits"])[mask.bool()].abs().max() < 2e-5


@pytest.mark.parametrize("name", ["llama-lora", "llama-mixlora"])
def test_what_the_official_package_wrote(name: str, shared_oracle: Path, tmp_path: Path) -> None:
    assert convert(shared_oracle / name, tmp_path / "peft") == 0
    assert_as_expected(tmp_path / "peft", shared_oracle, name)


@pytest.mark.parametrize(("files", "key"), [((BIN,), "no_magnitude."), ((BIN, SAFETENSORS), "")])
def test_dora_with_and_without_its_magnitude(
    files: tuple[str, ...], key: str, shared_oracle: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The `.bin` alone is what the official packages compute with it: plain LoRA."""
    source = tmp_path / "in"
    source.mkdir()
    for name in (CONFIG, *files):
        shutil.copy(shared_oracle / "llama-dora" / name, source / name)
    assert convert(source, tmp_path / "out") == 0
    assert ("imported as that" in capsys.readouterr().out) == (files == (BIN,))
    assert_as_expected(tmp_path / "out", shared_oracle, "llama-dora", key)


CASES = {
    "lora": ("lora", {}),
    "lora, rslora, two targets": ("lora", {"use_rslora": True, "target_modules": TARGETS[1::4]}),
    "mixlora": ("mixlora", {}),
    "experts of their own": (
        "mixlora", {"expert_lora": {"r": 2, "lora_alpha": 6, "use_rslora": True}},
    ),
    "rslora outside only": ("mixlora", {"use_rslora": True, "expert_lora": {"use_rslora": False}}),
    "partial": ("mixlora", {"target_modules": ["q_proj", "o_proj", "up_proj"], "top_k": 1}),
    "router": ("mixlora", {"router_loss_coef": 0.02, "num_experts": 3, "top_k": 3}),
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_adapter(kit: Any, case: str, family: str, tmp_path: Path) -> None:
    kind, changes = CASES[case]
    source, expected = kit.adapter(tmp_path / "in", kind, family, **changes)
    assert convert(as_official(source, tmp_path / "theirs"), tmp_path / "back") == 0
    assert torch.equal(kit.logits(tmp_path / "back", family), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"use_dora": True, "expert_lora": {"use_dora": False}},
        {"expert_lora": {"use_dora": True}},
    ],
    ids=["both", "attention", "experts"],
)
def test_mixdora_with_magnitudes_beside_the_bin(
    kit: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    source, expected = kit.adapter(tmp_path / "in", **changes)
    official = as_official(source, tmp_path / "theirs")
    assert convert(official, tmp_path / "plain") == 0
    assert json.loads((tmp_path / "plain" / CONFIG).read_text())["use_dora"] is False
    save_file(official_tensors(source), official / SAFETENSORS)
    assert convert(official, tmp_path / "back") == 0
    assert torch.equal(kit.logits(tmp_path / "back"), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"task_type": None},
        {"task_type": "QUESTION_ANS"},
        {"peft_type": None},
        {"act_fn": None},
        {"use_dora": True},
        {"target_modules": dict.fromkeys(TARGETS, True) | {"dense": False}},
        {"target_modules": [*TARGETS, "fc1"]},
        {"router_loss": False},
        {"name": "a", "task_name": "arc-e", "mixlora_exp": {"peft": {}}},
        {"jitter_noise": 0.0, "lora_init": "gaussian"},
    ],
    ids=str,
)
def test_other_ways_to_write_the_same(
    kit: Any, changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mixture of tasks is written with task_type null, for one."""
    source, expected = kit.adapter(tmp_path / "in")
    assert convert(as_official(source, tmp_path / "theirs", **changes), tmp_path / "other") == 0
    assert torch.equal(kit.logits(tmp_path / "other"), expected)
    assert ("fc1 left out" in capsys.readouterr().out) == ("fc1" in str(changes))


def test_settings_are_those_of_the_file(kit: Any, tmp_path: Path) -> None:
    source, before = kit.adapter(tmp_path / "in")
    convert(as_official(source, tmp_path / "theirs", lora_alpha=16), tmp_path / "edited")
    assert json.loads((tmp_path / "edited" / CONFIG).read_text())["lora_alpha"] == 16
    assert not torch.allclose(kit.logits(tmp_path / "edited"), before)


def with_routers(kit: Any, folder: Path, targets: list[str]) -> tuple[Path, Tensor]:
    """moe-peft can have routers over experts without LoRA; here more experts than tensors."""
    source, expected = kit.adapter(folder / "in", "lora", target_modules=["q_proj"])
    tensors = official_tensors(source)
    prefix = "base_model.model.model."
    tensors = {n.replace(prefix, "mixlora."): t for n, t in tensors.items() if targets}
    for layer in range(2):
        tensors[f"mixlora.layers.{layer}.mlp.moe_gate.weight"] = torch.randn(8, 64)
    config = official_config(source) | {
        "peft_type": "MIXLORA", "routing_strategy": "mixlora", "num_experts": 8,
        "target_modules": targets,
    }  # fmt: skip
    return write_official(folder / "theirs", config, tensors), expected


def test_experts_without_weights_leave_the_base_model_s_block(
    kit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official, expected = with_routers(kit, tmp_path, ["q_proj"])
    assert convert(official, tmp_path / "out") == 0
    assert "imported as LoRA" in capsys.readouterr().out
    assert torch.equal(kit.logits(tmp_path / "out"), expected)


def test_routers_alone_are_no_adapter(
    kit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official, _ = with_routers(kit, tmp_path, [])
    assert convert(official, tmp_path / "out") == 2
    assert "nothing to convert" in capsys.readouterr().err


def test_half_precision_stays(kit: Any, tmp_path: Path) -> None:
    source, _ = kit.adapter(tmp_path / "in")
    tensors = {n: t.bfloat16() for n, t in official_tensors(source).items()}
    convert(write_official(tmp_path / "o", official_config(source), tensors), tmp_path / "peft")
    assert {t.dtype for t in load_file(tmp_path / "peft" / SAFETENSORS).values()} == {
        torch.bfloat16
    }


def test_one_tensor_under_two_names(kit: Any, tmp_path: Path) -> None:
    source, _ = kit.adapter(tmp_path / "in")
    tensors = official_tensors(source)
    names = [n for n in tensors if n.endswith("q_proj.lora_A.weight")]
    tensors |= dict.fromkeys(names, tensors[names[0]])
    folder = write_official(tmp_path / "theirs", official_config(source), tensors)
    assert convert(folder, tmp_path / "peft") == 0
    found = load_file(tmp_path / "peft" / SAFETENSORS)
    assert sum(torch.equal(t, tensors[names[0]]) for t in found.values()) == len(names) == 2


def test_an_imported_adapter_needs_one_import_and_peft(shared_oracle: Path, tmp_path: Path) -> None:
    convert(shared_oracle / "llama-mixlora", tmp_path / "out")
    lines = (
        "import mixlora_exp\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(shared_oracle / 'tiny-llama')!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(tmp_path / 'out')!r})\n"
        "print(type(model.base_model).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", lines], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "MixLoraModel", done.stderr


@pytest.mark.parametrize("kind", ["lora", "mixlora"])
def test_what_the_configuration_says_decides_the_format(
    kit: Any, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT's with a `.bin`, as before 2024; an official one whose weights are safetensors."""
    source, expected = kit.adapter(tmp_path / "in", kind)
    official = as_official(source, tmp_path / "theirs")
    torch.save(load_file(source / SAFETENSORS), source / BIN)
    assert convert(source, tmp_path / "out") == 2
    assert "already in PEFT's format" in capsys.readouterr().err
    if kind == "mixlora":
        save_file(official_tensors(source), official / SAFETENSORS)
        (official / BIN).unlink()
        assert convert(official, tmp_path / "peft") == 0
        assert torch.equal(kit.logits(tmp_path / "peft"), expected)


def test_files_and_folders(kit: Any, tmp_path: Path) -> None:
    """A folder may have an equals sign in its name; what is written, others can read."""
    source, _ = kit.adapter(tmp_path / "in")
    as_official(source, tmp_path / "lr=1")
    assert convert(tmp_path / "lr=1", tmp_path / "seed=2" / "out") == 0
    for path in (tmp_path / "seed=2" / "out").iterdir():
        assert path.stat().st_mode & 0o044 == 0o044, path


def test_another_activation_than_the_base_has(kit: Any, tmp_path: Path) -> None:
    """As in the official packages, the adapter's activation is the experts'."""
    source, silu = kit.adapter(tmp_path / "in")
    convert(as_official(source, tmp_path / "theirs", act_fn="gelu"), tmp_path / "out")
    assert not torch.allclose(kit.logits(tmp_path / "out"), silu)


@pytest.mark.parametrize("option", ["adapter={}", "adapters=[{}]"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "convert it first, python scripts/convert_adapter.py"),
        ({"inference_mode": True, "peft_type": "NOPE"}, "peft_type='NOPE'"),
        ({"inference_mode": True, "base_model_name_or_path": ["a"]}, "must be text or null"),
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
    source, _ = kit.adapter(tmp_path / "in")
    folder = as_official(source, tmp_path / "theirs", **changes)
    if len(changes) == 2:
        save_file(official_tensors(source), folder / SAFETENSORS)
    words = [option.format(folder), "model=tiny", "prompt=a", "max_new_tokens=1"]
    assert guarded(generate, words) == 2
    assert message in capsys.readouterr().err


def test_a_run_s_folder_is_distinguished_from_its_adapter_s(
    kit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kit.adapter(tmp_path / "run" / "adapter", "lora")
    assert convert(tmp_path / "run", tmp_path / "out") == 2
    assert f"did you mean {tmp_path / 'run' / 'adapter'}?" in capsys.readouterr().err
