"""Devices, processes and memory of the machine."""

from __future__ import annotations

import atexit
import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import reduce
from torch import Tensor

from mixlora_exp.errors import NotEnoughMemory, UserError

PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""Process groups in which every process has the whole model and all gradients."""
SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
"""Variables that `accelerate launch` sets if the model is sharded over processes."""

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def processes() -> PartialState:
    """Return accelerate's state of the processes started by torchrun or `accelerate launch`: their
    number, the index of this one, and its device.

    Raises:
        UserError: the launcher is to shard the model. On a CPU accelerate's FSDP trains by DDP
            without a word; elsewhere it would not save an adapter.
    """
    for name, what in SHARDED.items():
        if os.environ.get(name, "false").lower() in ("true", "1", "yes"):
            raise _not_whole(f"{what} ({name}={os.environ[name]})")
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.distributed_type not in PLAIN:
        raise _not_whole(state.distributed_type.value)
    if state.num_processes > 1:
        _leave_at_exit()
    return state


def launcher_setting(name: str) -> str:
    """Return what `accelerate launch` sets a variable to, in small letters; "no" where it does
    not."""
    return os.environ.get(name, "no").lower()


def _not_whole(what: str) -> UserError:
    return UserError(
        f"processes under {what} are not supported: start them with torchrun or `accelerate launch "
        "--multi_gpu` and let trainer.parallel=ddp or fsdp divide the work, or start a single one"
    )


def summed(values: Tensor) -> Tensor:
    """Return the sum of `values` over all processes, all of which must call this function."""
    state = processes()
    return values if state.num_processes == 1 else reduce(values.to(state.device), reduction="sum")


def gathered(value: Any) -> list[Any]:
    """Return the values that all processes gave, in their order, in each of them."""
    state = processes()
    if state.num_processes == 1:
        return [value]
    found = [None] * state.num_processes
    torch.distributed.all_gather_object(found, value)
    return found


@cache
def _leave_at_exit() -> None:
    """Close the process group at exit: otherwise its threads would abort a process that exits
    before the others."""

    def leave() -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    atexit.register(leave)


def resolve_device() -> torch.device:
    """Return this process's CUDA device, or the CPU if there is none."""
    return processes().device


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of `peak_memory_bytes` (on a CPU: if Linux permits it)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            CLEAR_REFS.write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory since the reset: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory() -> None:
    """Free memory of unreachable reference cycles, and torch's cached CUDA memory."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def convert_out_of_memory() -> Iterator[None]:
    """Convert an error of the device's allocator into a `NotEnoughMemory`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(
            "out of memory on the device while the model was loaded or scored; nothing was "
            "recorded: dry_run=true tells what fits which card, and evaluation.batch_tokens=N with "
            "a smaller N scores in less"
        ) from error


def hardware_names() -> list[str]:
    """Return names of the GPUs; empty without one."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
