"""Gradient norms and spikes in the record; a run whose numbers break ends with step and layer."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import load_peft_weights

from mixlora_exp.adapters.linear import FusedLinear
from mixlora_exp.errors import UserError
from mixlora_exp.records.spikes import spikes
from mixlora_exp.training import MixLoraTrainer

Train = Callable[..., Any]


def test_spikes_by_hand() -> None:
    calm = [1.0, 1.1, 0.9] * 10
    assert spikes(calm) == []
    assert spikes([*calm, 1.2]) == []
    assert spikes([*calm, 3.0, 1.0]) == [30]
    assert spikes([*calm[:3], 9.0]) == [], "nothing to stand out from"
    assert spikes([*calm[:4], 9.0]) == [4], "in the first steps"
    assert spikes([1.0] * 20 + [1.49]) == []
    assert spikes([1.0] * 20 + [1.51]) == [20]
    assert spikes([9.0] + [1.0] * 20 + [1.51]) == [21], "long ago"


def test_a_mixture_of_easy_and_hard_batches_is_no_spike() -> None:
    generator = random.Random(0)
    # The first steps have all kinds; else the first hard batch after easy ones would count.
    mixed = [4.0] + [generator.choice([0.7, 2.5, 4.0]) for _ in range(399)]
    assert spikes(mixed) == []
    mixed[300] = 40.0
    assert spikes(mixed) == [300]


@pytest.mark.parametrize("method", ["lora", "mixdora"])
def test_every_step_s_loss_and_norm_are_noted(method: str, train: Train) -> None:
    run = train(f"method={method}", "trainer.max_steps=4", "trainer.logging_steps=1")
    found = run.summary.stability
    assert found.step_losses == pytest.approx(run.losses, abs=1e-4)
    norms = [entry["grad_norm"] for entry in run.summary.curve]
    assert found.step_gradient_norms == pytest.approx(norms, rel=1e-4)
    assert found.gradient_norm_max == pytest.approx(max(norms), rel=1e-5)
    assert norms[found.gradient_norm_max_step - 1] == max(norms)
    assert found.gradient_spikes == found.loss_spikes == []


def test_norms_are_those_before_clipping(train: Train) -> None:
    words = ["method=lora", "trainer.max_steps=1"]
    free, clipped = train(*words), train(*words, "trainer.max_grad_norm=1e-3")
    assert clipped.summary.stability.step_gradient_norms == pytest.approx(
        free.summary.stability.step_gradient_norms
    )


def break_at(
    monkeypatch: pytest.MonkeyPatch, step: int, change: Callable[[MixLoraTrainer], None]
) -> None:
    """Change a trainer before its micro-batches of an optimizer step."""
    original = MixLoraTrainer.compute_loss

    def compute_loss(self: MixLoraTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step:
            change(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MixLoraTrainer, "compute_loss", compute_loss)


def layer(trainer: MixLoraTrainer, name: str) -> torch.nn.Module:
    return next(m for n, m in trainer.model.named_modules() if n.endswith(name))


def nan_output(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * math.nan


@pytest.mark.parametrize("method", ["lora", "mixlora"])
def test_a_layer_with_nan_is_named(
    method: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(trainer: MixLoraTrainer) -> None:
        layer(trainer, "layers.1.post_attention_layernorm").register_forward_hook(nan_output)

    break_at(monkeypatch, 3, change)
    folder = tmp_path / "broken"
    with pytest.raises(UserError) as caught:
        train(f"method={method}", "trainer.max_steps=5", folder=folder)
    message = str(caught.value)
    assert "the loss became nan at step 3" in message
    assert "layers.1.post_attention_layernorm" in message
    assert "No earlier adapter was saved, because trainer.save_steps=" in message
    assert not (folder / "last_good").exists(), "the adapter of now is not known to be good"


def test_one_nan_batch_leaves_the_adapter_good(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it gives numbers for, as before, shows that the weights are not the reason."""
    good = train("method=lora", "trainer.max_steps=2").after
    ids: list[torch.Tensor] = []

    def only_there(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * math.nan if torch.equal(args[0], ids[0]) else output

    original = MixLoraTrainer.compute_loss

    def compute_loss(self: MixLoraTrainer, model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
        if self.state.global_step == 2 and not ids:
            ids.append(inputs["default"]["input_ids"])
            layer(self, "embed_tokens").register_forward_hook(only_there)
        return original(self, model, inputs, *args, **more)

    monkeypatch.setattr(MixLoraTrainer, "compute_loss", compute_loss)
    folder = tmp_path / "broken"
    with pytest.raises(UserError, match="the loss became nan at step 3") as caught:
        train("method=lora", "trainer.max_steps=5", folder=folder)
    assert f"from step 2, is in {folder / 'last_good'}" in str(caught.value)
    kept = load_peft_weights(str(folder / "last_good"), device="cpu")
    assert kept
    ours = {name.replace(".default", ""): weight for name, weight in good.items()}
    assert all(torch.equal(weight, ours[name]) for name, weight in kept.items())


def test_a_gradient_that_is_no_number_is_named(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(trainer: MixLoraTrainer) -> None:
        module = layer(trainer, "layers.0.self_attn.v_proj")
        assert isinstance(module, FusedLinear)
        module.lora_B["default"].weight.register_hook(lambda gradient: gradient * math.inf)

    break_at(monkeypatch, 1, change)
    with pytest.raises(UserError) as caught:
        train("method=lora", "trainer.max_steps=2", folder=tmp_path / "broken")
    message = str(caught.value)
    assert "gradient norm became" in message
    assert "at step 1" in message
    assert "in the gradient of" in message
    assert "layers.0.self_attn.v_proj.lora_B" in message
    assert not (tmp_path / "broken" / "last_good").exists(), "nothing was learned yet"
