"""Mixtures in linear layers under the training loop: resumed to the bit, and beside others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from encoded import examples_of
from killed import killed_after

from mixlora_exp.adapters import attach_adapter, attach_together
from mixlora_exp.adapters.mixed_adapters import plain_parameters_of
from mixlora_exp.config.command import compose
from mixlora_exp.config.schema import Config
from mixlora_exp.kernels import MIXTURES
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.training import fit, fit_jointly, make_job
from mixlora_exp.training.checkpoints import Checkpoints

SMALL = [
    "experiment=smoke",
    "trainer.precision=float32",
    "data.train_limit=20",
    "trainer.batch_size=8",
    "trainer.micro_batch_size=4",
    "trainer.max_steps=6",
    "trainer.save_steps=2",
    "trainer.schedule=linear",
    "method.dropout=0.2",
]
METHODS = {
    "mola": ["method.num_experts=2/3", "method.router_loss_coef=0.01"],
    "loramoe": ["method.type1_tasks=[arc_e]", "method.mixture_options.d=0.3",
                "method.router_loss_coef=0.1", "method.num_experts=3"],
    "hydralora": [],
    "adamole": ["method.num_experts=4"],
    "goat": ["method.num_experts=4", "method.mixture_options.eta=0.01"],
    "moslora": [],
}  # fmt: skip
ELSEWHERE = {"pissa", "lora_ga"}
"""Trained in test_other_methods."""


def test_every_mixture_is_trained_here_or_there() -> None:
    assert set(METHODS) | ELSEWHERE == set(MIXTURES)


def config_of(method: str, *words: str) -> Config:
    return compose([*SMALL, f"method={method}", *METHODS.get(method, []), *words])


def weights_of(model, adapter: str) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in plain_parameters_of(model, adapter).items()}


def train(config: Config, folder: Path, dtype=torch.float32) -> tuple[dict, Any]:
    folder.mkdir(exist_ok=True)
    base = load_model(config.model, torch.float32, config.seed).to(dtype)
    base.set_attn_implementation("sdpa")
    model = attach_adapter(base, config.method, config.kernel, config.seed)
    before = {name: weight.clone() for name, weight in weights_of(model, "default").items()}
    summary = fit(
        config=config, model=model, tokenizer=load_tokenizer(config.model),
        examples=examples_of(config), folder=folder, dtype=dtype,
        checkpoints=Checkpoints(folder / "checkpoints", {}, config.trainer.keep_checkpoints),
    )  # fmt: skip
    after = weights_of(model, "default")
    assert all(not torch.equal(before[name], after[name]) for name in after)
    return after, summary


@pytest.mark.parametrize(
    "method",
    [m if m in ("goat", "loramoe") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS],
)
def test_resumed_to_the_bit(tmp_path, method: str) -> None:
    config = config_of(method)
    expected, truth = train(config, tmp_path / "whole")
    with killed_after(34):
        train(config, tmp_path / "run")
    found, summary = train(config, tmp_path / "run")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    assert summary.curve == truth.curve
    assert summary.expert_load == truth.expert_load


def test_each_trajectory_is_that_of_a_run_alone(tmp_path) -> None:
    """All methods, MixLoRA and LoRA on one base."""
    words = ["trainer.max_steps=3"]
    configs = {name: config_of(name, *words) for name in (*METHODS, "mixlora", "lora")}
    jobs, base = [], None
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        tokenizer = load_tokenizer(config.model)
        jobs.append(
            make_job(name=f"a_{name}", config=config, examples=examples_of(config),
                     folder=tmp_path / name, tokenizer=tokenizer)
        )  # fmt: skip
        base = base or load_model(config.model, torch.float32, config.seed).double()
    base.set_attn_implementation("sdpa")
    methods = {f"a_{name}": (config.method, config.seed) for name, config in configs.items()}
    model = attach_together(base, methods, configs["mola"].kernel)
    found = fit_jointly(model=model, jobs=jobs, dtype=torch.float64)
    for name, config in configs.items():
        expected, truth = train(config, tmp_path / f"alone-{name}", torch.float64)
        weights = weights_of(model, f"a_{name}")
        assert weights.keys() == expected.keys()
        for key, weight in expected.items():
            torch.testing.assert_close(weights[key], weight, rtol=0, atol=1e-9, msg=f"{name} {key}")
        losses = truth.stability.step_losses
        assert found[f"a_{name}"].stability.step_losses == pytest.approx(losses, abs=1e-6)
        assert found[f"a_{name}"].expert_load == truth.expert_load
