"""Parameter counts that follow from shapes alone: nothing is built and nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

from mixlora_exp.config.schema import (
    LoraMethodConfig,
    MethodConfig,
    MixLoraMethodConfig,
    ModelConfig,
)

__all__ = ["Parameters", "count_parameters"]


@dataclass(frozen=True, slots=True)
class Parameters:
    """Counts that follow from shapes alone.

    `trainable` is everything the optimizer updates. `adapter` leaves out DoRA's magnitudes, as the
    paper's #Params column does; `percent_paper` is it over the paper's denominator, where there
    is one; `percent_true` is `trainable` over all parameters of the adapted model.
    """

    base: int
    trainable: int
    adapter: int
    router: int
    magnitude: int
    percent_true: float
    percent_paper: float | None


def _projections(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of each projection of a layer."""
    d, f = model.hidden_size, model.intermediate_size
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "q_proj": (d, heads), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (heads, d),
        "gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d),
    }  # fmt: skip


def count_parameters(model: ModelConfig, method: MethodConfig) -> Parameters:
    """Exact parameter counts of a method on a model."""
    projections = _projections(model)
    layer = sum(i * o for i, o in projections.values()) + 2 * model.hidden_size
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    base = model.depth * layer + embeddings + model.hidden_size
    low_rank = router = magnitude = 0
    if isinstance(method, LoraMethodConfig):
        experts = method.num_experts if isinstance(method, MixLoraMethodConfig) else 1
        for target in method.targets:
            size_in, size_out = projections[target]
            copies = experts if target in ("gate_proj", "up_proj", "down_proj") else 1
            low_rank += copies * method.rank * (size_in + size_out)
            magnitude += copies * size_out if method.dora else 0
        router = experts * model.hidden_size if isinstance(method, MixLoraMethodConfig) else 0
    low_rank, router, magnitude = (n * model.depth for n in (low_rank, router, magnitude))
    adapter = low_rank + router
    trained = isinstance(method, LoraMethodConfig) and method.train_magnitude
    trainable = adapter + (magnitude if trained else 0)
    nominal = model.nominal_parameters if model.depth == model.num_layers else None
    return Parameters(
        base=base,
        trainable=trainable,
        adapter=adapter,
        router=router,
        magnitude=magnitude,
        percent_true=100 * trainable / (base + adapter + magnitude),
        percent_paper=None if nominal is None else 100 * adapter / nominal,
    )
