"""Profile of a step: its kernels with their times, and the number of launches per layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mixlora_exp.bench.batch import StepBatch
from mixlora_exp.bench.launches import LaunchCounter
from mixlora_exp.bench.measure import training_step
from mixlora_exp.bench.model import base_of
from mixlora_exp.bench.row_registry import BenchRow


@dataclass(frozen=True, slots=True)
class KernelTime:
    """A kernel of a profile (on a CPU, an operation): how often it ran, and microseconds in all."""

    name: str
    count: int
    us: float


def kernel_times(run: Callable[[], Any], device: torch.device) -> list[KernelTime]:
    """Return the kernels that `run()` starts, the longest first; none where CUPTI may not be
    used."""
    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize()
    found = [
        KernelTime(e.key, e.count, e.self_device_time_total if cuda else e.self_cpu_time_total)
        for e in profiler.key_averages()
        if e.device_type == kind
    ]
    return sorted(found, key=lambda one: -one.us)


def step_profile(step: Callable[[], Any], device: torch.device, *, top: int = 25) -> dict[str, Any]:
    """Return a training step by kernel: `busy_us`, the sum of their times, `kernels`, how many ran,
    and the `top` longest as `by_kernel`."""
    times = kernel_times(step, device)
    return {
        "busy_us": round(sum(one.us for one in times), 1),
        "kernels": sum(one.count for one in times),
        "by_kernel": [
            {"name": one.name, "count": one.count, "us": round(one.us, 1)} for one in times[:top]
        ],
    }


def launches_per_layer(model: nn.Module, row: BenchRow, batch: StepBatch) -> int | None:
    """Return launches of one decoder layer in a training step, forward and backward pass: those of
    the first two layers less those of the first alone. On a GPU they are taken from a profile,
    elsewhere counted as dispatched operations. None for a model of one layer."""
    config, device = base_of(model).config, batch.ids.device
    depth, counts = config.num_hidden_layers, []
    if depth < 2:
        return None
    try:
        for config.num_hidden_layers in (1, 2):
            for module in model.modules():
                if hasattr(module, "routings"):
                    module.routings = {}  # Of the layers that are left out, from a pass before.
            if device.type == "cuda":
                times = kernel_times(lambda: training_step(model, row, batch), device)
                counts.append(sum(one.count for one in times))
            else:
                with LaunchCounter() as counter:
                    training_step(model, row, batch)
                counts.append(counter.total)
    finally:
        config.num_hidden_layers = depth
    # No kernels: the profiler may not be used.
    return counts[1] - counts[0] or None
