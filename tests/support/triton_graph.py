"""Compiles a decoder layer with experts as for an H100, on a machine without one, and prints which
operators with Triton kernels and which other operations are in its two graphs: a line of JSON for
MixLoRA, then one for MixDoRA.

The graphs are not run. Tensors lie on the CPU, where the compiler cannot tell the difference.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from typing import Any

import torch
import triton
from peft import get_peft_model
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import min_cut_rematerialization_partition
from transformers import AutoModelForCausalLM, LlamaConfig
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from mixlora_exp.adapters import MixLoraConfig, dropout, set_kernel
from mixlora_exp.kernels.triton import block, router


class Hopper(CudaDriver):
    """The driver of a card that is not there: the compiler asks for no more."""

    def __init__(self) -> None:
        pass

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def counted(found: dict[str, int], module: torch.fx.GraphModule, inputs: Any) -> Any:
    """Count what the graph calls; stands in for the compiled graph with zeros."""
    names: Counter[str] = Counter()
    for node in module.graph.nodes:
        if node.op == "call_function":
            # An operator that writes to an argument stands in a call of the compiler's own.
            inner = [a for a in node.args[:1] if isinstance(a, torch._ops.OpOverload)]
            names[str([*inner, node.target][0])] += 1
    found.update(names)
    outputs = [
        None if node is None else node.meta["val"]
        for node in next(node for node in module.graph.nodes if node.op == "output").args[0]
    ]

    def zeros(inputs: list[Any]) -> list[Any]:
        inputs.clear()
        return [
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype).zero_()
            if isinstance(v, torch.Tensor)
            else v
            for v in outputs
        ]

    zeros._boxed_call = True
    return zeros


def show(dora: bool) -> None:
    torch.compiler.reset()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2, vocab_size=32)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    targets = ["gate_proj", "up_proj", "down_proj"]
    adapter = MixLoraConfig(
        r=8, lora_dropout=0.05, use_dora=dora, target_modules=targets, num_experts=4, top_k=2,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, adapter).train()
    set_kernel(model, "triton")
    inner = model.base_model.model.model
    graphs: dict[str, dict[str, int]] = {"forward": {}, "backward": {}}

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        return aot_module_simplified(
            module,
            inputs,
            fw_compiler=functools.partial(counted, graphs["forward"]),
            bw_compiler=functools.partial(counted, graphs["backward"]),
            partition_fn=min_cut_rematerialization_partition,
        )

    x = torch.zeros(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    places = torch.arange(16).unsqueeze(0)
    angles = inner.rotary_emb(x, places)
    layer = torch.compile(inner.layers[0], backend=backend, fullgraph=True)
    y = layer(x, position_embeddings=angles, position_ids=places)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(torch.zeros_like(y))
    print(json.dumps(graphs))  # noqa: T201


def main() -> None:
    triton.runtime.driver.set_active(Hopper())
    block.supports = lambda *_: True
    router.INTERPRETED = True
    dropout.draw_mask = functools.partial(dropout.draw_mask, hashed=True)
    for dora in (False, True):
        show(dora)


if __name__ == "__main__":
    main()
