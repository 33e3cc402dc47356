"""Mixtures under a training loop that does not do what theirs needs."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model
from small_mixtures import make_settings

from mixlora_exp.training.hooks.lora_ga import GradientStart


def test_lora_ga_without_its_pass_is_refused(base_of, batch) -> None:
    model = get_peft_model(base_of("llama"), make_settings("lora_ga")).train()
    with pytest.raises(ValueError, match=r"mixture=lora_ga of adapter 'default' starts from the"):
        model(**batch)
    with torch.no_grad():
        model(**batch)
    model.eval()(**batch)
    GradientStart(model, "default").begin(lambda: iter([model.train()(**batch).loss]))
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_loramoe_without_types_warns(base_of, batch) -> None:
    types = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    for coefficient, given, said in (
        (0.1, {}, 1),
        (0.1, {"task_types": types}, 0),
        (0.0, {}, 0),
    ):
        settings = make_settings("loramoe", router_loss_coef=coefficient)
        model = get_peft_model(base_of("llama"), settings).train()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("default")
            for _ in range(2):
                model(**batch, **given)
        texts = [str(one.message) for one in found if "task_types" in str(one.message)]
        assert len(texts) == said
        assert all("router_loss_coef=0.1" in text for text in texts)
