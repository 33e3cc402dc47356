"""The official adapter format, both ways: the same logits, and nothing lost that it can hold."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from converting import ROOT, TARGETS, convert
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mixlora_exp.errors import UserError
from mixlora_exp.official.export import export_official
from mixlora_exp.official.folders import (
    AdapterFiles,
    read_official,
    read_peft,
    write_official,
    write_peft,
)
from mixlora_exp.official.imports import import_official
from mixlora_exp.official.tensors import from_peft, to_official

BATCHES = ("single", "right", "left")


@pytest.mark.parametrize("name", ["llama-lora", "llama-mixlora"])
def test_fixtures_through_import_export_and_import(
    name: str, shared_oracle: Path, tmp_path: Path
) -> None:
    folder = shared_oracle / name
    assert convert(folder, tmp_path / "peft").returncode == 0
    assert convert(tmp_path / "peft", tmp_path / "official").returncode == 0
    assert convert(tmp_path / "official", tmp_path / "again").returncode == 0
    expected = load_file(folder / "expected.safetensors")
    for peft in ("peft", "again"):
        base = AutoModelForCausalLM.from_pretrained(shared_oracle / "tiny-llama")
        model = PeftModel.from_pretrained(base, str(tmp_path / peft)).eval()
        for batch in BATCHES:
            mask = expected[f"{batch}.attention_mask"]
            with torch.no_grad():
                found = model(expected[f"{batch}.input_ids"], attention_mask=mask).logits
            difference = (found - expected[f"{batch}.logits"])[mask.bool()]
            assert difference.abs().max() < 2e-5
    # What the official packages wrote comes out again.
    written, original = (read_official(f) for f in (tmp_path / "official", folder))
    assert written.tensors.keys() == original.tensors.keys()
    assert all(torch.equal(written.tensors[n], t) for n, t in original.tensors.items())
    assert original.config.items() <= written.config.items()


@pytest.mark.parametrize(("files", "key"), [("bin", "no_magnitude."), ("both", "")])
def test_dora_with_and_without_its_magnitude(
    files: str, key: str, shared_oracle: Path, tmp_path: Path
) -> None:
    """The `.bin` alone is what the official packages compute with it: plain LoRA."""
    source = tmp_path / "in"
    source.mkdir()
    names = ["adapter_config.json", "adapter_model.bin"]
    names += ["adapter_model.safetensors"] if files == "both" else []
    for name in names:
        shutil.copy(shared_oracle / "llama-dora" / name, source / name)
    done = convert(source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert ("imported as that" in done.stdout) == (files == "bin")
    base = AutoModelForCausalLM.from_pretrained(shared_oracle / "tiny-llama")
    model = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    expected = load_file(shared_oracle / "llama-dora" / "expected.safetensors")
    for batch in BATCHES:
        mask = expected[f"{batch}.attention_mask"]
        with torch.no_grad():
            found = model(expected[f"{batch}.input_ids"], attention_mask=mask).logits
        difference = (found - expected[f"{key}{batch}.logits"])[mask.bool()]
        assert difference.abs().max() < 2e-5


CASES = {
    "lora": ("lora", {}),
    "lora, rslora, two targets": ("lora", {"use_rslora": True, "target_modules": TARGETS[1::4]}),
    "mixlora": ("mixlora", {}),
    "experts of their own": (
        "mixlora", {"expert_lora": {"r": 2, "lora_alpha": 6, "use_rslora": True}},
    ),
    "rslora outside only": ("mixlora", {"use_rslora": True, "expert_lora": {"use_rslora": False}}),
    "partial": ("mixlora", {"target_modules": ["q_proj", "o_proj", "up_proj"], "top_k": 1}),
    "router": (
        "mixlora",
        {"router_loss_coef": 0.02, "router_loss_pooling": "all", "num_experts": 3, "top_k": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("case", CASES)
def test_export_and_import_give_the_same_bytes(
    kit: Any, case: str, family: str, tmp_path: Path
) -> None:
    kind, changes = CASES[case]
    source, expected = kit.adapter(tmp_path / "in", kind, family, **changes)
    official, back = kit.there_and_back(tmp_path, source)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    assert torch.equal(kit.logits(back, family), expected)
    # And from what the official packages themselves would have written.
    config = json.loads((official / "adapter_config.json").read_text())
    del config["mixlora_exp"]
    (official / "adapter_config.json").write_text(json.dumps(config))
    write_peft(tmp_path / "plain", import_official(read_official(official)).files)
    assert torch.equal(kit.logits(tmp_path / "plain", family), expected)


def test_half_precision_comes_back(kit: Any, tmp_path: Path) -> None:
    source, _ = kit.adapter(tmp_path / "in")
    path = source / "adapter_model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(path).items()}, path, {"format": "pt"})
    official, back = kit.there_and_back(tmp_path, source)
    assert all(t.dtype is torch.float32 for t in read_official(official).tensors.values())
    assert (back / path.name).read_bytes() == path.read_bytes()


def test_an_edited_configuration_counts_and_not_the_kept_one(kit: Any, tmp_path: Path) -> None:
    source, before = kit.adapter(tmp_path / "in")
    official, _ = kit.there_and_back(tmp_path, source)
    path = official / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 16}))
    write_peft(tmp_path / "edited", import_official(read_official(official)).files)
    config = json.loads((tmp_path / "edited" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 16
    assert not torch.allclose(kit.logits(tmp_path / "edited"), before)


def test_mixdora_with_magnitudes_beside_the_bin(kit: Any, tmp_path: Path) -> None:
    source, expected = kit.adapter(tmp_path / "in", use_dora=True)
    files = read_peft(source)
    write_official(tmp_path / "official", export_official(files, drop_magnitude=True).files)
    save_file(
        to_official(from_peft(files.tensors)), tmp_path / "official" / "adapter_model.safetensors"
    )
    write_peft(tmp_path / "back", import_official(read_official(tmp_path / "official")).files)
    assert torch.equal(kit.logits(tmp_path / "back"), expected)


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


@pytest.mark.parametrize(
    "changes",
    [
        {"task_type": None},
        {"task_type": "QUESTION_ANS"},
        {"peft_type": None},
        {"target_modules": dict.fromkeys(TARGETS, True) | {"dense": False}},
        {"target_modules": [*TARGETS, "fc1"]},
        {"router_loss": False},
        {"name": "a"},
    ],
    ids=str,
)
def test_other_ways_to_write_the_same(kit: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    """A mixture of tasks is written with task_type null, for one."""
    source, expected = kit.adapter(tmp_path / "in")
    official, _ = kit.there_and_back(tmp_path, source)
    path = official / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["mixlora_exp"]
    config |= changes
    path.write_text(json.dumps({n: v for n, v in config.items() if n != "peft_type" or v}))
    found = import_official(read_official(official))
    write_peft(tmp_path / "other", found.files)
    assert torch.equal(kit.logits(tmp_path / "other"), expected)
    assert any("fc1 left out" in note for note in found.notes) == ("fc1" in str(changes))


def test_modules_named_by_their_block(kit: Any, tmp_path: Path) -> None:
    source, expected = kit.adapter(
        tmp_path / "in", "lora", target_modules=["self_attn.q_proj", "mlp.up_proj"]
    )
    official, back = kit.there_and_back(tmp_path, source)
    assert read_official(official).config["target_modules"] == ["q_proj", "up_proj"]
    assert torch.equal(kit.logits(back), expected)


@pytest.mark.parametrize("outside", [False, True])
def test_dora_on_attention_or_on_experts_alone(kit: Any, outside: bool, tmp_path: Path) -> None:
    changes = {"use_dora": outside, "expert_lora": {"use_dora": not outside}}
    source, expected = kit.adapter(tmp_path / "in", **changes)
    files = read_peft(source)
    assert from_peft(files.tensors).magnitudes > 0
    with pytest.raises(UserError, match="magnitude=drop"):
        export_official(files)
    write_official(tmp_path / "official", export_official(files, drop_magnitude=True).files)
    plain = import_official(read_official(tmp_path / "official")).files.config
    assert not plain["use_dora"]
    save_file(
        to_official(from_peft(files.tensors)), tmp_path / "official" / "adapter_model.safetensors"
    )
    write_peft(tmp_path / "back", import_official(read_official(tmp_path / "official")).files)
    assert torch.equal(kit.logits(tmp_path / "back"), expected)


def test_experts_without_weights_leave_the_base_model_s_block(kit: Any, tmp_path: Path) -> None:
    """moe-peft can have routers over experts that have no LoRA: what they route is the same."""
    attention = TARGETS[:4]
    source, expected = kit.adapter(tmp_path / "in", "lora", target_modules=attention)
    official, _ = kit.there_and_back(tmp_path, source)
    files = read_official(official)
    prefix = "base_model.model.model."
    tensors = {name.replace(prefix, "mixlora."): t for name, t in files.tensors.items()}
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in files.tensors}
    for i in layers:
        tensors[f"mixlora.layers.{i}.mlp.moe_gate.weight"] = torch.randn(4, 64)
    config = {n: v for n, v in files.config.items() if n != "mixlora_exp"}
    config |= {"peft_type": "MIXLORA", "routing_strategy": "mixlora", "num_experts": 4}
    found = import_official(AdapterFiles(config, tensors))
    assert any("imported as LoRA" in note for note in found.notes)
    write_peft(tmp_path / "out", found.files)
    assert torch.equal(kit.logits(tmp_path / "out"), expected)


def test_a_small_configuration_has_peft_s_defaults(kit: Any, tmp_path: Path) -> None:
    source, expected = kit.adapter(tmp_path / "in", "lora", lora_dropout=0.0)
    path = source / "adapter_config.json"
    small = {"peft_type": "LORA", "r": 4, "target_modules": TARGETS}
    path.write_text(json.dumps(small))
    official, back = kit.there_and_back(tmp_path, source, dropout=1e-9)
    assert read_official(official).config["lora_alpha"] == 8
    assert json.loads((back / path.name).read_text()) == small
    assert torch.equal(kit.logits(back), expected)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "top_k": 1, "num_experts": 3}])
def test_the_official_package_computes_the_same(
    changes: dict[str, Any], kit: Any, shared_oracle: Path, tmp_path: Path
) -> None:
    python = ROOT / "outputs" / "peers-venv" / "bin" / "python"
    if not python.is_file():
        pytest.skip("the package mixlora is not installed (scripts/bench_peers.py does so)")
    base = AutoModelForCausalLM.from_pretrained(shared_oracle / "tiny-llama")
    model = get_peft_model(base, kit.config_of(lora_dropout=0.05, **changes))
    kit.draw(model)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    # Its dropout stays on, whatever the mode.
    files = export_official(read_peft(tmp_path / "peft"), dropout=1e-9).files
    write_official(tmp_path / "official", files)
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    code = (
        "import sys\nfrom mixlora import MixLoraModelForCausalLM\n"
        "from safetensors.torch import load_file, save_file\n"
        "model, _ = MixLoraModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = load_file(sys.argv[2])['ids']\n"
        "save_file({'logits': model(ids).logits.detach().contiguous()}, sys.argv[3])\n"
    )
    names = [tmp_path / name for name in ("official", "ids.safetensors", "out.safetensors")]
    done = subprocess.run(
        [python, "-W", "ignore", "-c", code, *map(str, names)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        expected = model.eval()(ids).logits
    assert (load_file(names[2])["logits"] - expected).abs().max() < 2e-5


def test_another_activation_than_the_base_has(kit: Any, tmp_path: Path) -> None:
    """As in the official packages, the adapter's activation is the experts'."""
    source, silu = kit.adapter(tmp_path / "in")
    path = source / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"act_fn": "gelu"}))
    assert not torch.allclose(kit.logits(source), silu)
