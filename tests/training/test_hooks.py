"""Methods that act at points of the training loop: AdaLoRA, LoRA-FA, LoRA-GA, and PiSSA's start."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.lora import LoraLayer, preprocess_loraga
from safetensors.torch import load_file
from small_methods import base_of, config_of, first_losses, new_model, run, train, weights_of
from torch import Tensor
from torch.nn import functional

from mixlora_exp.adapters import save_adapter
from mixlora_exp.config.schema import Config
from mixlora_exp.errors import UserError
from mixlora_exp.training.hooks.lora_fa import LoraFa
from mixlora_exp.training.hooks.lora_ga import GradientStart


def test_adalora_takes_ranks_away(tmp_path: Path) -> None:
    """Of 14 projections with 5 ranks each, 2 on average are left; the file has only those."""
    model, _ = train(config_of("adalora"), tmp_path / "run")
    assert model.peft_config["default"].total_step == 6
    kept = {n: p != 0 for n, p in weights_of(model).items() if n.endswith("lora_E")}
    assert len(kept) == 14
    assert sum(int(mask.sum()) for mask in kept.values()) == 14 * 2
    save_adapter(model, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert sum(len(t) for n, t in tensors.items() if n.endswith("lora_E")) == 14 * 2
    written = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (written["total_step"], written["orth_reg_weight"]) == (6, 0.5)


def test_adaloras_own_loss_counts_once_a_step(tmp_path: Path) -> None:
    """Whatever the number of micro-batches."""
    losses = []
    for size in (8, 2):
        config = config_of(
            "adalora", "method.peft.lora_dropout=0", f"trainer.micro_batch_size={size}",
            "+method.peft.orth_reg_weight=10", "trainer.max_steps=3",
        )  # fmt: skip
        _, summary = train(config, tmp_path / f"run-{size}")
        losses.append(summary.stability.step_losses)
    # A and B have 5 rows of small numbers: |A A^T - I| is about sqrt(5).
    assert losses[0][0] > 20
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_adalora_needs_steps(tmp_path: Path) -> None:
    config = config_of("adalora", "trainer.max_steps=null", "trainer.epochs=1")
    config.data.train_limit = 8
    with pytest.raises(UserError, match="tinit=1 and tfinal=1 needs at least 3 optimizer steps"):
        train(config, tmp_path / "run")


def test_lora_fa_is_pefts(monkeypatch) -> None:
    """Three steps with given gradients, beside the optimizer of PEFT without its bfloat16."""
    lorafa = importlib.import_module("peft.optimizers.lorafa")
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    config, found = config_of("lora_fa"), []
    for ours in (True, False):
        model = new_model(config)
        layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
        trained = [m.lora_B["default"].weight for m in layers]
        if ours:
            hook = LoraFa(model, "default")
            optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0, eps=1e-12)
        else:
            alpha = int(config.method.alpha)
            optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=alpha, lr=1e-2)
            optimizer.param_groups[0]["eps"] = 1e-12
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            for weight in trained:
                weight.grad = torch.randn(weight.shape, generator=generator)
            if ours:
                hook.before_step()
            optimizer.step()
        found.append([weight.detach().clone() for weight in trained])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def stock(config: Config, change: Callable[[Any, Any], None], **settings: Any) -> PeftModel:
    """PEFT's LoRA of the same sizes on the same base, which `change` prepares."""
    method, base = config.method, base_of(config)
    settings |= {"r": method.rank, "lora_alpha": method.alpha, "task_type": "CAUSAL_LM"}
    lora = LoraConfig(target_modules=list(method.targets), **settings)
    change(base, lora)
    return get_peft_model(base, lora)


def test_pissa_is_pefts() -> None:
    """PEFT's, which changes the base, after the same change of B."""
    config = config_of("pissa", "method.dropout=0")
    own, plain = new_model(config), run(base_of(config))
    assert torch.equal(run(own), plain)
    theirs = stock(config, lambda *_: None, init_lora_weights="pissa")
    for model in (own, theirs):
        for name, weight in model.named_parameters():
            if "lora_B" in name and weight.requires_grad:
                # The signs of singular vectors do not matter to it.
                weight.data.mul_(1.3)
    torch.testing.assert_close(run(own), run(theirs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run(own), plain, atol=1e-3)


def test_lora_ga_starts_as_pefts(tmp_path: Path, monkeypatch) -> None:
    """A0 and B0 are those that PEFT takes from the gradient of the same batch, but for the signs of
    singular vectors and a randomised decomposition."""
    config = config_of("lora_ga", "method.dropout=0", "trainer.max_steps=1")
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    real = GradientStart.begin

    def begin(self, losses):
        real(self, losses)
        for name, layer in self.model.named_modules():
            if hasattr(layer, "mixture"):
                a, b = layer.lora_A0["default"][0], layer.lora_B0["default"][0]
                assert torch.equal(a, layer.lora_A["default"][0])
                starts[name] = a.detach().clone(), b.detach().T.clone()

    def prepare(base: Any, lora: Any) -> None:
        def pass_once() -> None:
            for loss in first_losses(base, config, tmp_path):
                # PEFT divides by the number of passes.
                (2 * loss).backward()

        preprocess_loraga(base, lora, pass_once)

    monkeypatch.setattr(GradientStart, "begin", begin)
    train(config, tmp_path / "run")
    assert len(starts) == 14
    ga = LoraGAConfig(scale="stable")
    theirs = stock(config, prepare, init_lora_weights="lora_ga", lora_ga_config=ga)
    for name, layer in theirs.named_modules():
        if isinstance(layer, LoraLayer):
            held = layer.lora_A["default"].weight, layer.lora_B["default"].weight.T
            for own, other in zip(starts[name], held, strict=True):
                assert other.norm() > 0
                torch.testing.assert_close(own.norm(dim=1), other.norm(dim=1), rtol=0.05, atol=0)
                cosines = functional.normalize(own) @ functional.normalize(other).T
                # 4 directions span the same space.
                assert float(cosines.square().sum()) == pytest.approx(4, rel=0.02), name


def test_lora_ga_changes_nothing_before_it_trains(tmp_path: Path, monkeypatch) -> None:
    config = config_of("lora_ga", "trainer.max_steps=1")
    model, seen = new_model(config), []
    real = GradientStart.begin

    def begin(self, losses):
        real(self, losses)
        seen.append(run(self.model))
        self.model.train()

    monkeypatch.setattr(GradientStart, "begin", begin)
    train(config, tmp_path / "run", model)
    assert torch.equal(seen[0], run(base_of(config)))
