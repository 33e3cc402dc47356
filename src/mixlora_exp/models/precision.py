"""The dtype of frozen weights and matrix products."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from mixlora_exp.config.schema import Precision


def _fast_bfloat16(device: torch.device) -> bool:
    """Return whether bf16 matrix products run in hardware (on a CPU: AVX-512 bf16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public query for a CPU.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def resolve_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of frozen weights and matrix products; `auto` is bf16 if the hardware
    supports it."""
    if precision is Precision.auto:
        return torch.bfloat16 if _fast_bfloat16(device) else torch.float32
    return torch.bfloat16 if precision is Precision.bfloat16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return a context that autocasts to bf16 for that `dtype`, and does nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16)
