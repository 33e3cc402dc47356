"""Base models and tokenizers: configuration, identity, checks, and loading from every source."""

from __future__ import annotations

from mixlora_exp.models.architecture import architecture_of, build_hf_config
from mixlora_exp.models.base_identity import (
    BaseIdentity,
    base_of,
    contradict,
    known_identity,
    of_record,
    read_base,
    same_weights,
    write_base,
)
from mixlora_exp.models.checks import check_model
from mixlora_exp.models.loading import (
    has_local_tokenizer,
    identify,
    load_model,
    load_tokenizer,
)
from mixlora_exp.models.own_shape import with_own_shape
from mixlora_exp.models.special_tokens import settle_special_tokens
from mixlora_exp.models.vocabulary import fit_vocabulary

__all__ = [
    "BaseIdentity",
    "architecture_of",
    "base_of",
    "build_hf_config",
    "check_model",
    "contradict",
    "fit_vocabulary",
    "has_local_tokenizer",
    "identify",
    "known_identity",
    "load_model",
    "load_tokenizer",
    "of_record",
    "read_base",
    "same_weights",
    "settle_special_tokens",
    "with_own_shape",
    "write_base",
]
