"""Device, precision, seeds and memory: what the machine decides, in one place."""

from __future__ import annotations

import atexit
import resource
import sys
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path

import torch
from accelerate import PartialState

from mixlora_exp.config.schema import Precision

__all__ = [
    "autocast",
    "hardware_names",
    "peak_memory_bytes",
    "processes",
    "reset_peak_memory",
    "resolve_device",
    "resolve_dtype",
]

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def processes() -> PartialState:
    """accelerate's view of the processes that torchrun or `accelerate launch` started: how many,
    which this one is, and its device."""
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes > 1:
        _leave_at_exit()
    return state


@cache
def _leave_at_exit() -> None:
    """Close the group of processes before Python ends: its threads would abort a process that ends
    while another still works."""

    def leave() -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    atexit.register(leave)


def resolve_device() -> torch.device:
    """This process's CUDA device if there is one, else the CPU."""
    return processes().device


def _fast_bfloat16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware (on a CPU: AVX-512 bf16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public query for these on a CPU.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def resolve_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the frozen weights and of matrix products; `auto` is bf16 where it is fast."""
    if precision is Precision.auto:
        return torch.bfloat16 if _fast_bfloat16(device) else torch.float32
    return torch.bfloat16 if precision is Precision.bfloat16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to bf16 as in training; nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16)


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_bytes` count from here (on a CPU: where Linux lets it)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            CLEAR_REFS.write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory since the reset: allocated on the GPU, or resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def hardware_names() -> list[str]:
    """Names of the GPUs, none on a CPU."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
