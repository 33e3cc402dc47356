"""Settings of each mixture for tiny models of two layers."""

from __future__ import annotations

from typing import Any

from mixlora_exp.adapters import MixtureConfig
from mixlora_exp.kernels import MIXTURES

OWN: dict[str, dict[str, Any]] = {
    "mola": {"num_experts": [3, 4]},
    "loramoe": {"num_experts": 3, "top_k": 3, "mixture_options": {"d": 0.2}},
    "hydralora": {"num_experts": 3, "top_k": 3},
}
ROUTED = [name for name, mixture in MIXTURES.items() if mixture.router is not None]
METHODS = {
    name: {
        "num_experts": 4 if name in ROUTED else 1,
        "top_k": 2 if name in ROUTED else 1,
        **OWN.get(name, {}),
    }
    for name in MIXTURES
}


def make_settings(method: str, **changes: Any) -> MixtureConfig:
    values = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", **METHODS[method], **changes}
    return MixtureConfig(mixture=method, **values)
