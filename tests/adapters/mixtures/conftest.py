"""Tiny models with mixtures in their linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_mixtures import make_settings


@pytest.fixture
def mixed_of(base_of, draw) -> Callable[..., PeftModel]:
    """A tiny model with the adapter of a method, no weight of which is 0."""

    def made(method: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PeftModel:
        torch.manual_seed(0)
        model = get_peft_model(base_of("llama", dtype), make_settings(method, **changes))
        draw(model)
        return model

    return made
