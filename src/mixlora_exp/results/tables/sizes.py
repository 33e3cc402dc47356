"""The #Params column of models without records: parameter counts of Llama and Gemma models from
their configurations, without torch."""

from __future__ import annotations

from mixlora_exp.config.schema import (
    ATTENTION_TARGETS,
    FEED_FORWARD_TARGETS,
    LoraMethodConfig,
    MixLoraMethodConfig,
    ModelConfig,
)


def percentages(model: ModelConfig, method: LoraMethodConfig) -> tuple[float, float]:
    """Return (adapter without magnitudes in percent of the paper's denominator, 0 without one;
    trained parameters in percent of all parameters of the adapted model)."""
    c = model.config
    d, f, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    heads, kv = (c[n] * c["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))
    shapes = {
        **dict(zip(ATTENTION_TARGETS, [(d, heads), (d, kv), (d, kv), (heads, d)], strict=True)),
        **dict(zip(FEED_FORWARD_TARGETS, [(d, f), (d, f), (f, d)], strict=True)),
    }
    embeddings = c["vocab_size"] * d * (1 if c["tie_word_embeddings"] else 2)
    base = layers * (sum(i * o for i, o in shapes.values()) + 2 * d) + embeddings + d
    mixed, experts = isinstance(method, MixLoraMethodConfig), 0
    if mixed:
        experts = sum(own for own, _ in method.experts_by_layer(layers))
    adapter = experts * d
    magnitude = 0
    for target in method.targets:
        copies = experts if mixed and target in FEED_FORWARD_TARGETS else layers
        adapter += copies * method.rank * sum(shapes[target])
        magnitude += copies * shapes[target][1] if method.dora else 0
    trained = adapter + (magnitude if method.train_magnitude else 0)
    nominal, whole = model.nominal_parameters, base + adapter + magnitude
    return (100 * adapter / nominal if nominal else 0.0), 100 * trained / whole
