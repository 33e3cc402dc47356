"""Adapters in the format of the official packages, written from PEFT folders for tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

CONFIG, BIN, SAFETENSORS = "adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"
SAME = ("peft_type", "bias", "r", "lora_alpha", "lora_dropout", "target_modules", "use_dora",
        "use_rslora", "base_model_name_or_path", "task_type")  # fmt: skip
ROUTING = {
    **{name: name for name in ("num_experts", "top_k", "act_fn")},
    "router_aux_loss_coef": "router_loss_coef",
    "router_init_range": "router_init_std",
}
STACK = re.compile(r"(.*)\.mlp\.lora_(A|B|magnitude)_(gate|up|down)")
SUFFIX = {"A": "A.weight", "B": "B.weight", "magnitude": "magnitude_vector"}


def official_tensors(peft: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT folder by the names that moe-peft gives them, magnitudes included."""
    found: dict[str, Tensor] = {}
    tensors = load_file(peft / SAFETENSORS)
    mixture = any(name.endswith("lora_router") for name in tensors)
    for name, tensor in tensors.items():
        if mixture:
            name = name.replace("base_model.model.model.", "mixlora.")
        if stack := STACK.fullmatch(name):
            layer, part, role = stack.groups()
            for e, one in enumerate(tensor):
                name = f"{layer}.mlp.{role}_proj.experts.{e}.lora_{SUFFIX[part]}"
                found[name] = one.clone()
        else:
            found[name.replace("lora_router", "moe_gate.weight")] = tensor
    return found


def official_config(peft: Path) -> dict[str, Any]:
    config = json.loads((peft / CONFIG).read_text())
    found = {name: config[name] for name in SAME}
    if config["peft_type"] == "MIXLORA":
        found |= {"routing_strategy": "mixlora"}
        found |= {theirs: config[ours] for theirs, ours in ROUTING.items()}
        if config["expert_lora"]:
            found["expert_lora"] = config["expert_lora"]
    return found


def write_official(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """A folder as moe-peft writes it: no magnitude has a place in it."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config, indent=4))
    torch.save({n: t for n, t in tensors.items() if "magnitude" not in n}, folder / BIN)
    return folder


def as_official(peft: Path, folder: Path, **changes: Any) -> Path:
    """The adapter in `peft` as an official folder; an entry that `changes` to None is left out."""
    config = official_config(peft) | changes
    config = {name: value for name, value in config.items() if value is not None}
    return write_official(folder, config, official_tensors(peft))
