"""A saved adapter's bytes depend on the adapter alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import saved_adapters
import torch
from composed import compose
from peft import LoraConfig, get_peft_model
from saved_adapters import METHODS, save_all

from mixlora_exp.adapters import (
    attach_adapter,
    attach_together,
    load_adapter,
    save_adapter,
    set_kernel,
)
from mixlora_exp.adapters.mixed_adapters import add_guest


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def method_of(name: str, *overrides: str):
    return compose(["model=tiny", f"method={name}", "method.rank=2", *overrides])


@pytest.mark.parametrize("order", [METHODS, METHODS[::-1]], ids=["as listed", "the other way"])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_neighbours_do_not_change_the_files(base_of, tmp_path: Path, family, order) -> None:
    """Each method trained alone, as `default`, and beside the others under another name."""
    configs = {f"run_{name}": method_of(name) for name in order}
    together = attach_together(
        base_of(family),
        {name: (config.method, seed) for seed, (name, config) in enumerate(configs.items())},
        method_of("lora").kernel,
    )
    for seed, (name, config) in enumerate(configs.items()):
        alone = attach_adapter(base_of(family), config.method, config.kernel, seed)
        save_adapter(alone, tmp_path / "alone" / name)
        save_adapter(together, tmp_path / "beside" / name, name)
        found, expected = (contents(tmp_path / where / name) for where in ("beside", "alone"))
        assert found.keys() == expected.keys()
        for file, content in expected.items():
            assert found[file] == content, (name, file)


@pytest.mark.parametrize("changes", [{}, {"act_fn": "gelu"}], ids=["the base's", "its own"])
def test_experts_added_to_a_model_tell_their_activation(
    base_of, config_of, tmp_path: Path, changes
) -> None:
    model = add_guest(base_of("gemma"), "first", config_of(act_fn="silu"))
    add_guest(model, "second", config_of(**changes))
    save_adapter(model, tmp_path / "second", "second")
    saved = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert saved["act_fn"] == changes.get("act_fn", "gelu_pytorch_tanh")


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    """Sets of names have another order under another hash seed, in the files of each kind."""
    save_all(tmp_path / "1")
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    subprocess.run(
        [sys.executable, saved_adapters.__file__, str(tmp_path / "2")],
        env={**os.environ, "PYTHONHASHSEED": other},
        check=True,
        capture_output=True,
    )
    for method in METHODS:
        assert contents(tmp_path / "1" / method) == contents(tmp_path / "2" / method), method
        saved = json.loads((tmp_path / "1" / method / "adapter_config.json").read_text())
        assert saved["target_modules"] == sorted(saved["target_modules"])
    # What PEFT itself writes of this project's own kinds.
    for method in ("mixlora-by-peft", "mixdora-by-peft"):
        assert contents(tmp_path / "1" / method) == contents(tmp_path / "2" / method), method


def test_every_set_of_names_is_sorted(base_of, tmp_path: Path) -> None:
    """Whatever field holds it: `exclude_modules` is one too."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    config = LoraConfig(
        r=2, target_modules="all-linear", exclude_modules=names, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base_of(), config)
    save_adapter(model, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["exclude_modules"] == sorted(names)


def test_files_load_again(base_of, draw, batch, tmp_path: Path) -> None:
    """Guests and experts saved from beside one another, each alone on a base of its own."""
    configs = {name: method_of(name) for name in METHODS}
    model = attach_together(
        base_of(), {f"run_{n}": (c.method, 0) for n, c in configs.items()}, configs["lora"].kernel
    )
    draw(model)
    model.eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for name, config in configs.items():
        model.set_adapter(f"run_{name}")
        set_kernel(model, "exact")
        save_adapter(model, tmp_path / name, f"run_{name}")
        loaded = load_adapter(base_of(), tmp_path / name, config.kernel)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
