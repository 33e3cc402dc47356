"""Base models and tokenizers: families, shapes, and every source they come from."""

from __future__ import annotations

from mixlora_exp.models.families import FAMILIES, FamilyLayout
from mixlora_exp.models.loading import (
    build_hf_config,
    has_local_tokenizer,
    identify,
    load_model,
    load_tokenizer,
)
from mixlora_exp.models.shape import with_folder_shape

__all__ = [
    "FAMILIES",
    "FamilyLayout",
    "build_hf_config",
    "has_local_tokenizer",
    "identify",
    "load_model",
    "load_tokenizer",
    "with_folder_shape",
]
