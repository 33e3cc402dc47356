"""FLOPs of a token by formula, against those that torch counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from composed import compose
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixlora_exp.adapters import attach_adapter
from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.config.schema import LoraMethodConfig
from mixlora_exp.models import load_model
from mixlora_exp.models.flops import count_flops

TOKENS = 24
ALL = "method.targets=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"


def in_place(out, one, other, **_: object) -> int:
    return 2 * one[0] * one[1] * other[1]


@torch.no_grad()
def counted(model: nn.Module) -> int:
    """FLOPs of a pass over one sequence, what is computed once for many passes left out."""
    ids = torch.randint(3, 900, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    model.eval()(input_ids=ids)
    # Which the counter does not know.
    more = {torch.ops.aten.addmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        model(input_ids=ids)
    return counter.get_total_flops()


def built(config) -> nn.Module:
    base = load_model(config.model, torch.float32)
    base.set_attn_implementation("eager")
    if not isinstance(config.method, LoraMethodConfig):
        return base
    return attach_adapter(base, config.method, config.kernel, config.seed)


@pytest.fixture(scope="module")
def base() -> int:
    return counted(built(compose(["model=tiny", "method=none"])))


def test_the_base_model(base: int) -> None:
    """Beside the linear layers: queries times keys, and weights times values."""
    config = compose(["model=tiny", "method=none"])
    flops = count_flops(config.model, config.method)
    assert flops.adapter == 0
    attention = 2 * 2 * 2 * TOKENS * TOKENS * 64
    assert base == TOKENS * flops.base + attention


@pytest.mark.parametrize(
    "words",
    [
        *PAPER_METHODS, "mola", "loramoe", "hydralora", "adamole",
        "goat num_experts=2", "moslora",
        "lora targets=[q_proj,down_proj]", "mixdora targets=[q_proj,up_proj]",
        "mixlora expert_rank=5 top_k=3", "mola router=uniform",
        "mola top_k=1 router=switch router_options.z_loss=0",
        "mixlora router=dense", "mixlora router=uniform", "mixlora router=random_frozen",
        "mixlora router=switch router_options.capacity_factor=8",
        "mixlora num_experts=1 top_k=1", "mixdora num_experts=[2,4] top_k=[1,2]",
    ],
)  # fmt: skip
def test_each_method(words: str, base: int) -> None:
    method, *changes = words.split()
    changes = [f"++method.{change}" for change in changes]
    if not any("targets" in change for change in changes):
        changes.append(ALL)
    config = compose(["model=tiny", f"method={method}", "kernel=exact", *changes])
    flops = count_flops(config.model, config.method)
    assert flops.adapter > 0
    assert counted(built(config)) - base == TOKENS * flops.adapter


@pytest.mark.parametrize("router", ["top_p", "threshold"])
@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
def test_routers_that_choose_how_many(method: str, router: str, base: int) -> None:
    """At most what the formula says, and that for the mean number of experts."""
    words = [f"method={method}", f"method.router={router}", "method.router_init_std=0.5"]
    config = compose(["model=tiny", "kernel=exact", *words])
    model = built(config)
    found = counted(model) - base
    assert found < TOKENS * count_flops(config.model, config.method).adapter
    filled = [m.routing.filled.double() for m in model.modules() if hasattr(m, "routings")]
    mean = sum(float(each.sum()) for each in filled) / len(filled) / TOKENS
    assert 1 <= mean < 8
    expected = TOKENS * count_flops(config.model, config.method, mean).adapter
    assert found == pytest.approx(expected, abs=TOKENS)


SIDES = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 176), (64, 176), (176, 64)]
"""Widths of the seven projections of the tiny model, which has two layers."""


@pytest.mark.parametrize(
    ("words", "formula"),
    [
        ("vera method.peft.r=16", lambda inner, outer: 2 * 16 * (inner + outer)),
        ("adalora method.peft.init_r=5 method.peft.target_r=2",
         lambda inner, outer: 2 * 5 * (inner + outer)),
        # The matrices are made once in a pass; rows are multiplied with them.
        ("fedpara method.peft.r=4", lambda inner, outer: 2 * inner * outer),
        ("hira method.peft.r=4", lambda inner, outer: 2 * inner * outer),
        ("peft method.peft_type=IA3", lambda inner, outer: 0),
        ("peft method.peft_type=FOURIERFT", None),
        ("peft method.peft_type=WAVEFT method.peft={n_frequency:50}", None),
    ],
)  # fmt: skip
def test_pefts_own_types(words: str, formula: Callable[[int, int], int] | None) -> None:
    config = compose(["model=tiny", *f"method={words}".split()])
    expected = None if formula is None else 2 * sum(formula(*sides) for sides in SIDES)
    assert count_flops(config.model, config.method).adapter == expected


def test_pefts_own_types_as_in_a_whole_pass(base: int) -> None:
    """Of AdaLoRA nothing is computed once in a pass."""
    config = compose(["model=tiny", "method=adalora"])
    model = load_model(config.model, torch.float32)
    model.set_attn_implementation("eager")
    model = attach_adapter(model, config.method, config.kernel, config.seed)
    assert counted(model) - base == TOKENS * count_flops(config.model, config.method).adapter
