"""Encoded training examples of a configuration."""

from __future__ import annotations

from mixlora_exp.config.schema import Config
from mixlora_exp.data.encoding import Example, encode_examples
from mixlora_exp.data.sources import load_split
from mixlora_exp.models import load_tokenizer


def examples_of(config: Config) -> list[Example]:
    """Those of its first training task."""
    loaded = load_split(config.data, config.task.train[0], "train")
    items = loaded.limited(config.data.train_limit, config.data.seed).items
    return encode_examples(load_tokenizer(config.model), items, config.data)
