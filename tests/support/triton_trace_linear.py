"""Traces a LoRA and a DoRA layer as `torch.compile` does for a GPU, on a machine without any.

Prints a line per graph, forward and backward of each: how often which operation stands in it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import triton
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget

from mixlora_exp.kernels import FrozenLinear, lora
from mixlora_exp.kernels.dropout import HashMask
from mixlora_exp.kernels.low_rank import LowRankPart
from mixlora_exp.kernels.triton import linear_launch


class Driver:
    """What the compiler asks of a GPU to see which tensors a kernel writes to."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def show(graph: torch.fx.GraphModule, inputs: list) -> Any:
    """Print what is in a graph. Run, it gives zeros."""
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    print(dict(Counter(called)))  # noqa: T201

    def run(*args: Any) -> list:
        made = [node and node.meta["val"] for node in graph.graph.output_node().args[0]]
        return [None if one is None else torch.zeros(one.shape, dtype=one.dtype) for one in made]

    return make_boxed_func(run)


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    lora.steps_on = lambda device: linear_launch
    linear_launch.supports = lambda *args: True
    backend = aot_autograd(
        fw_compiler=show, bw_compiler=show, partition_fn=min_cut_rematerialization_partition
    )
    x = torch.randn(64, 48, dtype=torch.bfloat16, requires_grad=True)
    frozen = FrozenLinear(torch.randn(32, 48).bfloat16())
    mask = HashMask.of(torch.arange(64), 5, 0.05, 48)
    for magnitude in (None, torch.rand(32, requires_grad=True)):
        a, b = (torch.randn(shape, requires_grad=True) for shape in ((8, 48), (32, 8)))
        norm = None if magnitude is None else torch.rand(32)
        part = LowRankPart(a, b, 2.0, magnitude, norm, mask)
        torch.compiler.reset()
        compiled = torch.compile(lora.lora_linears, backend=backend, fullgraph=True)
        compiled(x, [frozen], [part])[0].sum().backward()


if __name__ == "__main__":
    main()
