"""The logged router loss is weighed as the objective weighs it: one less the other is the model's
own loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from composed import compose

from mixlora_exp.adapters import attach_adapter, attach_together
from mixlora_exp.config.schema import Config
from mixlora_exp.data.encoding import Example
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.training import fit, fit_jointly, make_job

COEFFICIENT = 0.7
WORDS = [
    "experiment=smoke", "method=mixlora", "method.rank=4", "method.dropout=0",
    f"method.router_loss_coef={COEFFICIENT}", "trainer.precision=float32", "trainer.head=full",
    "trainer.batch_size=6", "trainer.micro_batch_size=2", "trainer.max_steps=6",
    "trainer.logging_steps=2", "trainer.learning_rate=1e-2",
]  # fmt: skip
# Answers of 1 to 9 tokens: micro-batches of one step have shares that differ.
EXAMPLES = [Example([1, *range(3, 9 + n), 2], 1 + n % 9, "arc_e") for n in range(18)]
MICRO_BATCHES = 18
LOSS_ON = pytest.mark.parametrize("loss_on", ["answer", "all"])


def base_and_own_losses(config: Config):
    """A base model, and the losses that it computes itself, one after another."""
    base, seen = load_model(config.model, torch.float32, seed=7), []
    base.set_attn_implementation("eager")
    stock = base.loss_function

    def loss_function(*args, **kwargs):
        loss = stock(*args, **kwargs)
        seen.append(float(loss.detach()))
        return loss

    base.loss_function = loss_function
    return base, seen


def means(losses: list[float]) -> list[float]:
    """Of the windows of the log: two steps, three micro-batches each, after the pass that checks
    gradients before the first step."""
    losses = losses[1:]
    return [sum(losses[i : i + 6]) / 2 for i in range(0, MICRO_BATCHES, 6)]


def own_part(curve: list[dict]) -> list[float]:
    return [entry["loss"] - COEFFICIENT * entry["router_loss"] for entry in curve]


@LOSS_ON
def test_loss_is_own_loss_and_router_loss(loss_on: str, tmp_path: Path) -> None:
    config = compose([*WORDS, f"trainer.loss_on={loss_on}"])
    base, seen = base_and_own_losses(config)
    model = attach_adapter(base, config.method, config.kernel, config.seed)
    watched: list[float] = []
    summary = fit(
        config=config, model=model, tokenizer=load_tokenizer(config.model), examples=EXAMPLES,
        folder=tmp_path, dtype=torch.float32,
        watch=lambda _, loss: watched.append(loss),
    )  # fmt: skip
    assert own_part(summary.curve) == pytest.approx(means(seen), abs=1e-6)
    assert watched == pytest.approx(means(seen), abs=1e-6)


@LOSS_ON
def test_so_it_is_for_adapters_together(loss_on: str, tmp_path: Path) -> None:
    words = [*WORDS, f"trainer.loss_on={loss_on}"]
    configs = {"one": compose(words), "two": compose([*words, "seed=5"])}
    base, seen = base_and_own_losses(configs["one"])
    methods = {name: (config.method, config.seed) for name, config in configs.items()}
    model, jobs = attach_together(base, methods, configs["one"].kernel), []
    for name, config in configs.items():
        folder = tmp_path / name
        folder.mkdir()
        tokenizer = load_tokenizer(config.model)
        jobs.append(
            make_job(
                name=name, config=config, examples=EXAMPLES, folder=folder, tokenizer=tokenizer
            )
        )
    found = fit_jointly(model=model, jobs=jobs, dtype=torch.float32)
    for number, name in enumerate(configs):
        assert own_part(found[name].curve) == pytest.approx(means(seen[number::2]), abs=1e-6)
