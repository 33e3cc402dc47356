"""A model that is small, but wide enough that no layer's small tensors count."""

from __future__ import annotations

from composed import compose

from mixlora_exp.config.schema import Config

SHAPE = {
    "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 1000,
}  # fmt: skip


def small(*words: str, layers: int | None = None) -> Config:
    config = compose(["model=smollm2_135m", "model.weights=random", *words])
    config.model.config.update(SHAPE)
    if layers is not None:
        config.model.config["num_hidden_layers"] = layers
    return config
