"""Kernels of a compiled decoder layer, forward and backward, as inductor writes them for a CPU with
the Triton operators of a GPU in it, each of which counts as the kernels that it launches.

What the compiler writes is read and not compiled. Other versions of torch fuse otherwise.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from card_layers import run_as_on_a_card, small_llama, with_adapter
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering

from mixlora_exp.config.choices import Compile
from mixlora_exp.kernels import DropoutStream
from mixlora_exp.training.compiled import compiled_layers

pytest.importorskip("triton", reason="Triton is not installed")

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
    run_as_on_a_card(monkeypatch, lambda *arguments, **named: None)
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield found
    torch.compiler.reset()


def kernels_of(method: str, written: list[str]) -> Counter[str]:
    """Of the layers after the first, whose input has a gradient."""
    base, stream = small_llama(layers=4), DropoutStream(1)
    model = with_adapter(base, method, stream)
    rows = torch.arange(128)
    stream.begin(0, rows // 64, rows % 64)
    ids = torch.randint(0, 60, (2, 64))
    with compiled_layers(base, Compile.layer) as refusal, torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert refusal.reason is None
    found: Counter[str] = Counter()
    assert len(written) <= 4  # The second layer's code serves the others.
    # Its forward and backward pass.
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
    [("frozen", 26), ("lora", 64), ("dora", 59), ("mixlora", 60), ("mixdora", 57)],
)
def test_budget(written, method, budget) -> None:
    found = kernels_of(method, written)
    assert found.total() == budget, dict(sorted(found.items()))
    assert found["mm"] >= 14
    assert method == "frozen" or found["lora_low"] >= 2
