"""What was trained is what is loaded back, under the optimizer that the runs use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from mixlora_exp.adapters import load_adapter, save_adapter
from mixlora_exp.adapters.linear import FusedLinear
from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.models import load_model

METHODS = PAPER_METHODS


@pytest.mark.parametrize("method", METHODS)
def test_trained_logits_are_the_reloaded_ones(method: str, train: Callable[..., Any]) -> None:
    """Fused AdamW does not raise a tensor's version: norms kept from before would show here."""
    run = train(f"method={method}", "trainer.max_steps=4", "trainer.learning_rate=0.02")
    assert run.trainer.args.optim == "adamw_torch_fused"
    model: PeftModel = run.trainer.model
    ids = torch.tensor([run.examples[0].input_ids])
    with torch.no_grad():
        trained = model.eval()(input_ids=ids).logits
    save_adapter(model, run.folder / "adapter")
    base = load_model(run.config.model, torch.float32, run.config.seed)
    base.set_attn_implementation("eager")
    loaded = load_adapter(base, run.folder / "adapter", run.config.kernel)
    plain = [module for module in loaded.modules() if isinstance(module, LoraLayer)]
    assert plain
    assert {type(module) for module in plain} == {FusedLinear}, "fast layers again"
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trained)
        # In training mode without dropout the norms are computed anew, and agree.
        for module in loaded.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "block"):
                module.lora_dropout = dict.fromkeys(module.lora_dropout, 0.0)
        torch.testing.assert_close(loaded.train()(input_ids=ids).logits, trained)


def test_warm_up_is_heeded_by_the_constant_schedule(train: Callable[..., Any]) -> None:
    run = train("method=lora", "trainer.max_steps=4", "trainer.warmup_steps=4")
    rates = [entry["learning_rate"] for entry in run.summary.curve]
    assert rates[0] < rates[1] < 2e-4
