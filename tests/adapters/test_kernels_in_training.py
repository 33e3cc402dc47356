"""Whole trainings with one kernel follow those with another, step by step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mixlora_exp.adapters import set_kernel

STEPS = 50
TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def train(
    model: nn.Module, batches: list[dict], optimizer: type[torch.optim.Optimizer], **options
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and the parameters that were trained."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    stepper = optimizer(weights.values(), **options)
    torch.manual_seed(5)
    losses = []
    for step in range(STEPS):
        loss = model.train()(**batches[step % len(batches)]).loss
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in weights.items()}


def check_same_course(
    make: Callable[[], nn.Module], kernels: tuple[str, str], batches: list[dict], **options
) -> None:
    """`make`'s model under both kernels: losses and trained parameters within 1e-9."""
    courses = []
    for kernel in kernels:
        model = make()
        assert set_kernel(model, kernel) == kernel
        courses.append(train(model, batches, **options))
    (losses, weights), (expected, truth) = courses
    assert expected[-1] < expected[0] - 0.1, "nothing was learned"
    assert losses == pytest.approx(expected, rel=1e-9, abs=1e-9)
    start = {name: p.detach() for name, p in make().named_parameters()}
    for name, value in weights.items():
        torch.testing.assert_close(value, truth[name], rtol=1e-9, atol=1e-9, msg=name)
        assert not torch.equal(value, start[name]), f"{name} did not move"


@pytest.fixture
def batches(batch_of) -> list[dict]:
    return [batch_of(seed=seed, length=6) for seed in range(3)]


ADAMW = {"optimizer": torch.optim.AdamW, "lr": 2e-3}
SGD = {"optimizer": torch.optim.SGD, "lr": 0.05}


@pytest.mark.parametrize(
    ("experts_dora", "dropout", "options"),
    [
        pytest.param(False, 0.0, ADAMW, id="MixLoRA, AdamW"),
        pytest.param(True, 0.0, ADAMW, id="MixDoRA, AdamW", marks=pytest.mark.slow),
        pytest.param(True, 0.2, SGD, id="MixDoRA, SGD, dropout of one seed"),
    ],
)
def test_exact_follows_reference(model_of, batches, experts_dora, dropout, options) -> None:
    """With LoRA or DoRA in attention, in float64."""
    check_same_course(
        lambda: model_of(dtype=torch.float64, use_dora=experts_dora, lora_dropout=dropout),
        ("exact", "reference"),
        batches,
        **options,
    )


@pytest.mark.parametrize(
    ("plain_dora", "dropout", "other"),
    [
        pytest.param(False, 0.0, "peft", id="LoRA, PEFT"),
        pytest.param(True, 0.0, "peft", id="DoRA, PEFT, whose dropout is another"),
        pytest.param(True, 0.2, "reference", id="DoRA, plain operations, dropout of one seed"),
    ],
)
def test_fused_linear_follows(base_of, draw, batches, plain_dora, dropout, other) -> None:
    """Of plain LoRA and DoRA, in float64."""
    config = LoraConfig(
        r=4,
        target_modules=TARGETS,
        use_dora=plain_dora,
        lora_dropout=dropout,
        task_type="CAUSAL_LM",
    )

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = get_peft_model(base_of(dtype=torch.float64), config)
        draw(model)
        return model

    check_same_course(make, ("exact", other), batches, **ADAMW)
