"""The registered kernels that run on a CPU: a new one is tested wherever these are."""

from __future__ import annotations

from mixlora_exp.kernels import KERNELS

CPU_KERNELS = tuple(name for name, kernel in KERNELS.items() if kernel.device is None)
