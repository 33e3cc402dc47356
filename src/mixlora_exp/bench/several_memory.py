"""Memory of several adapters on one base: by accounting, and resident in a process of its own.

Run as `python -m mixlora_exp.bench.several_memory`, with the settings as JSON on standard input, it
prints the resident memory of one training step and one forward pass in this process.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import torch

from mixlora_exp.adapters.mixed_adapters import parameters_of
from mixlora_exp.bench.memory import in_fresh_process
from mixlora_exp.bench.model import base_model, model_config
from mixlora_exp.bench.several_steps import AdapterOptions, Joint
from mixlora_exp.system.device import peak_memory_bytes, reset_peak_memory
from mixlora_exp.training.packed import packed_attention


def _parameters(joint: Joint) -> int:
    names = joint.batches
    return sum(p.numel() for n in names for p in parameters_of(joint.model, n).values())


def account(config: AdapterOptions) -> dict[str, Any]:
    """Memory per model of M adapters, in bytes, each with `sequences / max(counts)` sequences.

    Parameters and what autograd keeps are counted at one and two layers and extended to the true
    depth, in which both are linear; nothing here depends on the machine. `expected` is
    (base / M + a) / (base + a) with a that of the one adapter alone (or, of `mixed`, of the mean).
    """
    depth = model_config(config.model, None).config["num_hidden_layers"]
    sequences = max(1, config.sequences // max(config.counts))
    found: dict[int, dict[int, dict[str, int]]] = {}
    for layers in (1, 2):
        shape = model_config(config.model, layers)
        base = base_model(shape, getattr(torch, config.dtype), "cpu", config.seed)
        base.set_attn_implementation("sdpa")
        frozen = sum(p.nbytes for p in base.parameters())
        for count in config.counts:
            joint = Joint(config, base, count, sequences)
            parameters = _parameters(joint)
            found.setdefault(count, {})[layers] = {
                "base": frozen,
                "adapter": 4 * parameters,
                "gradient": 4 * parameters,
                "adamw": 8 * parameters,
                "activations": joint.saved(),
            }
    rows = {}
    for count, by_depth in found.items():
        whole = {
            item: by_depth[1][item] + (by_depth[2][item] - by_depth[1][item]) * (depth - 1)
            for item in by_depth[1]
        }
        rows[count] = {"bytes": whole, **_per_model(whole, count)}
    for count, row in rows.items():
        for use in ("train", "infer", "infer_bf16"):
            one = rows[1][use]
            row[f"{use}_percent"] = round(100 * row[use] / one, 2)
            own = row[use] - row["bytes"]["base"] / count
            a = own if config.method == "mixed" else one - rows[1]["bytes"]["base"]
            frozen = row["bytes"]["base"]
            row[f"{use}_expected_percent"] = round(
                100 * (frozen / count + a) / (one if config.method == "mixed" else frozen + a), 2
            )
    named = {str(count): row for count, row in rows.items()}
    return {"depth": depth, "sequences": sequences, "length": config.length, "rows": named}


def _per_model(whole: dict[str, int], count: int) -> dict[str, float]:
    adapter = whole["adapter"]
    return {
        "train": sum(whole.values()) / count,
        "infer": (whole["base"] + adapter) / count,
        "infer_bf16": (whole["base"] + adapter / 2) / count,
        "train_adamw_8bit": (sum(whole.values()) - 0.75 * whole["adamw"]) / count,
    }


def resident_here(config: AdapterOptions, count: int) -> dict[str, int]:
    """Return bytes beyond what this process held before, at `config.layers`: of a forward pass, and
    of a training step with AdamW."""
    device = torch.device("cpu")
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    reset_peak_memory(device)
    before = peak_memory_bytes(device)
    shape = model_config(config.model, config.layers)
    base = base_model(shape, getattr(torch, config.dtype), "cpu", config.seed)
    base.set_attn_implementation("sdpa")
    joint = Joint(config, base, count, max(1, config.sequences // max(config.counts)))
    joint.infer()
    inference = peak_memory_bytes(device) - before
    trained = [p for n in joint.batches for p in parameters_of(joint.model, n).values()]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    reset_peak_memory(device)
    for _ in range(2):
        with packed_attention(joint.model.base_model.model) as attention:
            joint.model.train()
            joint.loss(attention).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"infer": inference, "train": peak_memory_bytes(device) - before}


def resident(config: AdapterOptions, count: int) -> dict[str, Any]:
    """Return `resident_here` in a fresh process."""
    settings = {"config": asdict(config), "count": count}
    return in_fresh_process("mixlora_exp.bench.several_memory", settings)


def main() -> None:
    """Measure the adapters that standard input describes and print the result as JSON."""
    settings = json.loads(sys.stdin.read())
    config = AdapterOptions(**settings["config"])
    if config.threads:
        torch.set_num_threads(config.threads)
    sys.stdout.write(json.dumps(resident_here(config, settings["count"])) + "\n")


if __name__ == "__main__":
    main()
