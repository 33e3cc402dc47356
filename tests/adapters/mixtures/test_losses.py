"""Reports and losses of routers in linear layers, padding left out."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from small_mixtures import METHODS, ROUTED, make_settings

from mixlora_exp.adapters.mixtures.layer import MixtureLinear
from mixlora_exp.config.command import compose
from mixlora_exp.data.collator import Collator
from mixlora_exp.data.encoding import Example
from mixlora_exp.errors import UserError


def layers_of(model) -> list[MixtureLinear]:
    return [module for module in model.modules() if isinstance(module, MixtureLinear)]


def expected_loss(method: str, model, mask, types=None) -> list[float]:
    """Of each router, from its decision in the last pass."""
    found, real = [], mask.flatten().bool()
    for layer in layers_of(model):
        routing = layer.routings["default"]
        p, experts = routing.probabilities, routing.probabilities.shape[1]
        chosen = torch.zeros_like(p).scatter_add(1, routing.experts, routing.filled.to(p.dtype))
        mean = p[real].mean(0)
        if method in ("mola", "goat"):
            share = torch.eye(experts)[p[real].argmax(1)].mean(0)
        elif method == "adamole":
            share = chosen[real].sum(0) / chosen[real].sum()
        elif method == "hydralora":
            share = mean
        else:
            used = (p * real.unsqueeze(1)).view(*mask.shape, experts).sum(1)
            c = torch.tensor(
                [
                    [1.2 if (i < experts / 2) == (t == 1) else 0.8 for i in range(experts)]
                    for t in types
                ]
            )
            found.append(float((c * used).var() / ((c * used).mean() ** 2 + 1e-10)))
            continue
        found.append(float(experts * (share * mean).sum()))
    return found


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("method", ROUTED)
def test_loss_is_that_of_the_routers(mixed_of, batch, method: str, reduction: str) -> None:
    model = mixed_of(method, router_loss_coef=0.5, router_loss_reduction=reduction).train()
    plain = mixed_of(method, router_loss_coef=0.0).train()
    types = torch.tensor([1, 0])
    output = model(**batch, task_types=types)
    found = model.base_model.router_report
    each = expected_loss(method, model, batch["attention_mask"], types.tolist())
    loss = sum(each) / (1 if reduction == "sum" else len(each))
    assert len(each) == 14
    assert float(output.aux_loss) == pytest.approx(loss, rel=1e-5)
    difference = float(output.loss - plain(**batch, task_types=types).loss)
    assert difference == pytest.approx(0.5 * loss, rel=1e-4)
    experts = METHODS[method]["num_experts"]
    widest = experts if isinstance(experts, int) else max(experts)
    assert found.counts.shape == (14, widest)
    if method == "mola":
        assert not found.counts[:7, 3].any()
        assert found.counts[7:, 3].any()
        assert torch.equal(
            found.counts.sum(1), torch.full((14,), 2.0 * batch["labels"].ne(-100).sum())
        )


@pytest.mark.parametrize("method", ROUTED)
def test_padding_does_not_count(mixed_of, batch, method: str) -> None:
    model = mixed_of(method).train()
    types = torch.tensor([1, 0])
    expected = float(model(**batch, task_types=types).aux_loss)
    other = {
        **batch,
        "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 9),
    }
    assert float(model(**other, task_types=types).aux_loss) == expected


def test_without_types_loramoe_has_no_loss(mixed_of, batch) -> None:
    model = mixed_of("loramoe", router_loss_coef=1.0).train()
    output = model(**batch)
    assert float(output.aux_loss) == 0
    output.loss.backward()


def test_the_half_marked_by_d_gets_less_weight(base_of, batch) -> None:
    """Minimised, the loss has u proportional to 1 / c: with d = 0.5 a third."""
    torch.manual_seed(0)
    settings = make_settings(
        "loramoe", num_experts=4, top_k=4, mixture_options={"d": 0.5}, target_modules=["q_proj"]
    )
    model = get_peft_model(base_of(), settings).train()
    routers = [layer.lora_router["default"] for layer in layers_of(model)]
    optimizer = torch.optim.Adam(routers, lr=0.05)
    types = torch.tensor([1, 1])
    for _ in range(300):
        optimizer.zero_grad()
        model(**batch, task_types=types).aux_loss.backward()
        optimizer.step()
    p = (
        layers_of(model)[0]
        .routings["default"]
        .probabilities[batch["attention_mask"].flatten() == 1]
    )
    assert float(p[:, :2].sum() / p[:, 2:].sum()) == pytest.approx(1 / 3, rel=0.1)


def test_loss_reaches_routers_and_earlier_layers(mixed_of, batch) -> None:
    model = mixed_of("mola").train()
    model(**batch).aux_loss.backward()
    for layer in layers_of(model)[7:]:
        assert layer.lora_router["default"].grad.norm() > 0
    assert layers_of(model)[0].lora_B["default"].grad.norm() > 0


def test_reentrant_checkpointing_is_refused(mixed_of, batch) -> None:
    model = mixed_of("mola").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="of 14 layers with routers"):
        model(**batch, use_cache=False)


def test_batches_tell_types() -> None:
    examples = [Example([5, 6, 7], 1, task) for task in ("boolq", "arc_e", "boolq")]
    batch = Collator(0, compose().trainer.loss_on, type1=("boolq",))(examples)
    assert batch["task_types"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=mola", "method.type1_tasks=[boolq]"], "only mixture=loramoe has a loss of types"),
        (["method=loramoe", "method.router_loss_coef=0.1"], r"set method.type1_tasks=\[...\]"),
        (["method=loramoe", "method.type1_tasks=[piqa]", "task=arc_e"], "the run trains on arc_e"),
    ],
)
def test_types_are_checked(words, message) -> None:
    with pytest.raises(UserError, match=message):
        compose(words)
