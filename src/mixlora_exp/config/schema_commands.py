"""The configurations of `evaluate.py` and `generate.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from mixlora_exp.config.checks import MISSING, require
from mixlora_exp.config.choices import Base, Precision, Protocol
from mixlora_exp.config.schema import Config, KernelConfig
from mixlora_exp.config.schema_method import TrainedMethodConfig
from mixlora_exp.config.schema_model import ModelConfig


@dataclass(slots=True, kw_only=True)
class EvaluateConfig(Config):
    """A run that only scores."""

    run: Any = None
    """Folder of a finished run, or several; their records supply all settings not given."""
    protocol: list[Protocol] = field(default_factory=list)
    """Abbreviation of `evaluation.protocols`."""

    def __post_init__(self) -> None:
        if self.protocol:
            self.evaluation = replace(self.evaluation, protocols=self.protocol)
        require(
            not isinstance(self.method, TrainedMethodConfig),
            "method", self.method.name,
            "evaluate.py trains nothing; leave it out, or use train.py",
        )  # fmt: skip
        Config.__post_init__(self)

    def settled(self) -> Config:
        """Return the run as a plain `Config`, as `train.py` composes it."""
        return Config(**{item.name: getattr(self, item.name) for item in fields(Config)})


@dataclass(slots=True, kw_only=True)
class PrecisionConfig:
    """Group `trainer` of `generate`: the precision alone."""

    precision: Precision = Precision.auto


@dataclass(slots=True, kw_only=True)
class GenerateConfig:
    """Text generation with a base model, an adapter, or several adapters in the same batches."""

    adapter: str | None = None
    adapters: list[str] = field(default_factory=list)
    prompt: str | None = None
    prompts: str | None = None
    """File with a prompt per line; JSONL: fields `prompt` and, with several adapters, `adapter`."""
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 8
    chat: bool = False
    random_seed: int = 0
    """Seed of sampling; `seed` is the seed of a random base model."""
    model: ModelConfig = MISSING
    kernel: KernelConfig = MISSING
    seed: int = 42
    trainer: PrecisionConfig = field(default_factory=PrecisionConfig)
    base: Base = Base.check

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("random_seed", 0)):
            value = getattr(self, name)
            require(value >= least, name, value, f"must be >= {least}")
        require(self.random_seed < 2**63, "random_seed", self.random_seed, "must be below 2**63")
        # Logits are divided by the temperature: below 1e-4 they can overflow.
        require(
            self.temperature == 0 or 1e-4 <= self.temperature <= 1e4,
            "temperature", self.temperature, "must be 0 (greedy), or from 1e-4 to 1e4",
        )  # fmt: skip
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1")
        for name in ("adapter", "prompts"):
            require(getattr(self, name) != "", name, "", "give a value, or leave it out")
        require(
            self.prompt is None or bool(self.prompt.strip()),
            "prompt", "", "it is empty: give some text, or leave it out to type prompts",
        )  # fmt: skip
        for one, other in (("prompt", "prompts"), ("adapter", "adapters")):
            both = getattr(self, one) is not None and getattr(self, other)
            require(not both, other, getattr(self, other), f"{one} is also given: give one of them")
        require(
            not (self.adapters and self.chat),
            "chat", self.chat, "it works with one adapter: give adapter=DIR instead of adapters",
        )  # fmt: skip
