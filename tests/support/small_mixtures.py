"""Settings of each mixture for tiny models of two layers."""

from __future__ import annotations

from typing import Any

from mixlora_exp.adapters import MixtureConfig

METHODS: dict[str, dict[str, Any]] = {
    "mola": {"num_experts": [3, 4], "top_k": 2},
    "loramoe": {"num_experts": 3, "top_k": 3, "mixture_options": {"d": 0.2}},
    "hydralora": {"num_experts": 3, "top_k": 3},
    "adamole": {"num_experts": 4, "top_k": 4},
    "goat": {"num_experts": 4, "top_k": 2},
    "moslora": {"num_experts": 1, "top_k": 1},
    "pissa": {"num_experts": 1, "top_k": 1},
    "lora_ga": {"num_experts": 1, "top_k": 1},
}
ROUTED = [name for name, settings in METHODS.items() if settings["num_experts"] != 1]


def make_settings(method: str, **changes: Any) -> MixtureConfig:
    values = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", **METHODS[method], **changes}
    return MixtureConfig(mixture=method, **values)
