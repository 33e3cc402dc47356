"""The registered kernels that run on a CPU: a new one is tested wherever these are."""

from __future__ import annotations

from mixlora_exp.kernels import KERNELS

CPU_KERNELS = tuple(name for name, kernel in KERNELS.items() if kernel.device is None)
ONE_OF_EACH_FORM = tuple({KERNELS[name].linear: name for name in reversed(CPU_KERNELS)}.values())
"""For LoRA and DoRA outside of MixLoRA's blocks, a kernel of each form (`Kernel.linear`)."""
