"""Kernels of a compiled decoder layer, forward and backward, as inductor writes them for a CPU with
the Triton operators of a GPU in it, each of which counts as the kernels that it launches.

What the compiler writes is read and not compiled. Other versions of torch fuse otherwise.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from transformers import AutoModelForCausalLM, LlamaConfig

from mixlora_exp.adapters import MixLoraConfig, set_kernel
from mixlora_exp.adapters.dropout import use_dropout_stream
from mixlora_exp.config.choices import Compile
from mixlora_exp.kernels import DropoutStream, lora, resolve_kernel
from mixlora_exp.training.compiled import compiled_layers

pytest.importorskip("triton", reason="Triton is not installed")

from mixlora_exp.kernels.triton import block, linear_launch, router  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEVERAL = {"order": 2}
"""Kernels of operators that launch more than one."""
CALL = re.compile(
    r"^ +(?:\w+ = )?(?:(cpp_fused|extern_kernels\.|torch\.ops\.)[\w.]*?(\w+)(?:\.default)?)\(",
    re.MULTILINE,
)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What inductor writes, which does nothing when it runs; operators as on a GPU."""
    found: list[str] = []
    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(found.append))
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *given: lambda *arguments: None)
    for name, module in list(sys.modules.items()):
        if name.startswith("mixlora_exp.kernels.triton.") and hasattr(module, "start"):
            monkeypatch.setattr(module, "start", lambda *arguments, **named: None)
    monkeypatch.setattr(lora, "steps_on", lambda device: linear_launch)
    monkeypatch.setattr(linear_launch, "supports", lambda *arguments: True)
    monkeypatch.setattr(block, "supports", lambda *arguments: True)
    monkeypatch.setattr(router, "INTERPRETED", True)
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield found
    torch.compiler.reset()


def kernels_of(method: str, written: list[str]) -> Counter[str]:
    """Of the second of two layers, whose input has a gradient."""
    config = LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=64, use_cache=False,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    stream = DropoutStream(1)
    if method == "frozen":
        base.model.embed_tokens.weight.requires_grad_(True)
        model: Any = base
    else:
        mixture = method.startswith("mix")
        common = {"r": 16 if mixture else 80, "lora_alpha": 32, "lora_dropout": 0.05,
                  "use_dora": method.endswith("dora"), "target_modules": TARGETS}  # fmt: skip
        settings = MixLoraConfig(**common, num_experts=8, top_k=2) if mixture else (
            LoraConfig(**common, task_type="CAUSAL_LM")
        )  # fmt: skip
        model = get_peft_model(base, settings)
        set_kernel(model, "triton" if mixture else resolve_kernel("auto", "cuda"))
        use_dropout_stream(model, "default", stream)
    model.train()
    rows = torch.arange(128)
    stream.begin(0, rows // 64, rows % 64)
    ids = torch.randint(0, 60, (2, 64))
    with compiled_layers(base, Compile.layer) as refusal, torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert refusal.reason is None
    found: Counter[str] = Counter()
    # Forward and backward pass of the last layer that was compiled.
    for code in written[-2:]:
        for kind, name in CALL.findall(code):
            fused = kind == "cpp_fused"
            found["fused" if fused else name] += 1 if fused else SEVERAL.get(name, 1)
    return found


@pytest.mark.slow  # The compiler takes half a minute for each.
@pytest.mark.skipif(
    torch.__version__.split(".")[:2] != ["2", "13"], reason="counted with torch 2.13"
)
@pytest.mark.parametrize(
    ("method", "budget"),
    [("frozen", 26), ("lora", 73), ("dora", 68), ("mixlora", 66), ("mixdora", 63)],
)
def test_budget(written, method, budget) -> None:
    found = kernels_of(method, written)
    assert found.total() <= budget, dict(sorted(found.items()))
    assert found["mm"] >= 14
    assert method == "frozen" or found["lora_low"] >= 4
