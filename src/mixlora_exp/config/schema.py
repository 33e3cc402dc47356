"""Typed configuration: one dataclass per group of `conf/`, checked when it is built.

Hydra composes YAML and command line into these schemas; `resolve.to_config` converts the result to
plain objects, and nothing else handles a `DictConfig`. Every check names the field and its value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mixlora_exp.config.checks import MISSING, require, require_name, require_positive
from mixlora_exp.config.choices import (
    AnswerForm,
    AnswerKind,
    ArcLabels,
    Base,
    Compile,
    DataSource,
    Head,
    KernelName,
    LossOn,
    ModelSource,
    Order,
    Parallel,
    Precision,
    Protocol,
    Quantization,
    RouterLoss,
    RouterLossPooling,
    Tracker,
    Weights,
)
from mixlora_exp.config.schema_data import TASK_NAMES, CustomTask, DataConfig, TaskConfig
from mixlora_exp.config.schema_method import (
    ATTENTION_TARGETS,
    FEED_FORWARD_TARGETS,
    LoraMethodConfig,
    MethodConfig,
    MixLoraMethodConfig,
    PeftMethodConfig,
    TrainedMethodConfig,
)
from mixlora_exp.config.schema_model import ModelConfig
from mixlora_exp.config.schema_optimizer import OptimizerSettings

__all__ = [
    "ATTENTION_TARGETS",
    "FEED_FORWARD_TARGETS",
    "TASK_NAMES",
    "AnswerForm",
    "AnswerKind",
    "ArcLabels",
    "Base",
    "Config",
    "CustomTask",
    "DataConfig",
    "DataSource",
    "EvaluationConfig",
    "Head",
    "KernelConfig",
    "KernelName",
    "LoraMethodConfig",
    "LossOn",
    "MethodConfig",
    "MixLoraMethodConfig",
    "ModelConfig",
    "ModelSource",
    "Order",
    "Parallel",
    "PeftMethodConfig",
    "PlanConfig",
    "Precision",
    "PresetConfig",
    "Protocol",
    "Quantization",
    "RouterLoss",
    "RouterLossPooling",
    "TaskConfig",
    "Tracker",
    "TrackerConfig",
    "TrainedMethodConfig",
    "TrainerConfig",
    "Weights",
]


FREE_TEXT_PROTOCOLS = (Protocol.exact_match.value, Protocol.answer_pattern.value)


@dataclass(slots=True, kw_only=True)
class KernelConfig:
    """Implementation of LoRA and DoRA layers and the MixLoRA block."""

    name: KernelName = MISSING


@dataclass(slots=True, kw_only=True)
class TrainerConfig(OptimizerSettings):
    """Optimisation (Table 3; settings the paper does not state follow the official template)."""

    name: str = "paper"
    batch_size: int = 16
    """Examples per optimizer step."""
    micro_batch_size: int = 8
    """Examples per forward pass; gradients of batch_size / micro_batch_size passes accumulate."""
    epochs: float = 2.0
    max_steps: int | None = None
    """Stop after this many optimizer steps; null: after `epochs`."""
    loss_on: LossOn = LossOn.answer
    padding_in_loss: bool = False
    """loss_on=all: include padding tokens in the loss."""
    order: Order = Order.bucketed
    head: Head = Head.auto
    """Way to compute the cross-entropy over the vocabulary; all choices agree up to rounding."""
    precision: Precision = Precision.auto
    compile: Compile = Compile.off
    """off, layer (each decoder layer compiled for itself) or graph (and, on a GPU, its kernels
    recorded in CUDA graphs); the choices agree up to rounding."""
    gradient_checkpointing: bool = False
    parallel: Parallel = Parallel.none
    """none, ddp or fsdp: how the processes that torchrun started train together."""
    auto_micro_batch: bool = False
    """If a micro-batch does not fit in memory, halve it once and continue."""
    logging_steps: int = 10
    save_steps: int = 50
    """Optimizer steps between checkpoints; the last step writes one too."""
    keep_checkpoints: int = 2
    pack_adapters: int = 1
    """With -m: train up to this many runs of the sweep together on one base model."""

    def __post_init__(self) -> None:
        self.check_optimizer()
        for name in (
            "batch_size",
            "micro_batch_size",
            "logging_steps",
            "save_steps",
            "keep_checkpoints",
            "pack_adapters",
        ):
            value = getattr(self, name)
            require(value >= 1, f"trainer.{name}", value, "must be >= 1")
        require(
            self.batch_size % self.micro_batch_size == 0,
            "trainer.micro_batch_size", self.micro_batch_size,
            f"must divide trainer.batch_size={self.batch_size}",
        )  # fmt: skip
        require_positive("trainer.epochs", self.epochs)
        if self.max_steps is not None:
            require(self.max_steps >= 1, "trainer.max_steps", self.max_steps, "must be >= 1")
        require(
            not self.padding_in_loss or self.loss_on is LossOn.all,
            "trainer.padding_in_loss", self.padding_in_loss,
            "it needs the loss on all tokens: add trainer.loss_on=all, or set it to false",
        )  # fmt: skip

    @property
    def accumulation_steps(self) -> int:
        """Number of micro-batches in an optimizer step, over all processes."""
        return self.batch_size // self.micro_batch_size


@dataclass(slots=True, kw_only=True)
class EvaluationConfig:
    """Protocols that score the tasks, and the number of items."""

    name: str = "full"
    protocols: list[Protocol] = field(default_factory=lambda: [Protocol.label_logits])
    limit: int | None = None
    """Score at most this many items per task: the first of a shuffle seeded by `data.seed`."""
    batch_tokens: int = 4096
    """Padded tokens per forward pass."""
    before_training: bool = False
    """Also score the base model before training."""
    max_new_tokens: int = 16
    """Protocol `generate`: maximum number of tokens of an answer."""
    batch_check: int = 16
    """Items per task that `label_logits` rescores one by one, to report the effect of batching."""
    held_out: bool = False
    """Score training rows that `data.train_limit` excludes from training, to tune settings on."""
    dropout: bool = False
    """Apply the adapter's dropout while scoring, drawn from `seed`."""
    shuffle_experts: int | None = None
    """A seed: score with the experts permuted at random, so that tokens get those of others."""
    arc_labels: ArcLabels = ArcLabels.own

    def __post_init__(self) -> None:
        require(bool(self.protocols), "evaluation.protocols", self.protocols, "name at least one")
        if self.limit is not None:
            require(self.limit >= 1, "evaluation.limit", self.limit, "must be >= 1")
        for name, least in (("batch_tokens", 1), ("max_new_tokens", 1), ("batch_check", 0)):
            value = getattr(self, name)
            require(value >= least, f"evaluation.{name}", value, f"must be >= {least}")
        shuffle = self.shuffle_experts
        valid = shuffle is None or 0 <= shuffle < 2**63
        require(valid, "evaluation.shuffle_experts", shuffle, "must be in [0, 2**63), or null")
        require(
            not self.dropout or Protocol.lm_eval not in self.protocols,
            "evaluation.dropout", self.dropout,
            "lm-eval scores without dropout: set it to false, or use another protocol",
        )  # fmt: skip
        require(
            not self.held_out or Protocol.lm_eval not in self.protocols,
            "evaluation.held_out", self.held_out,
            "lm-eval scores its own test sets: set it to false, or use another protocol",
        )  # fmt: skip
        repeated = len(set(self.protocols)) != len(self.protocols)
        names = [protocol.value for protocol in self.protocols]
        require(not repeated, "evaluation.protocols", names, "a protocol is named twice")


@dataclass(slots=True, kw_only=True)
class TrackerConfig:
    """Destinations of training progress in addition to the run's folder."""

    name: Tracker = Tracker.none
    project: str = "mixlora-exp"
    mode: str = "online"
    """tracker=wandb: online, or offline (`wandb sync` sends it later)."""
    group: str | None = None
    """Name that groups the runs of a sweep; null: the experiment's name."""

    def __post_init__(self) -> None:
        require(
            self.mode in ("online", "offline"),
            "tracker.mode", self.mode, "choose online or offline",
        )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class PresetConfig:
    """Values of the switches between this project's behaviour and the official packages'.

    The corresponding fields of other groups take these values unless they are set themselves."""

    name: str = MISSING
    loss_on: LossOn = LossOn.answer
    padding_in_loss: bool = False
    order: Order = Order.bucketed
    train_magnitude: bool = True
    router_loss: RouterLoss = RouterLoss.argmax
    router_loss_pooling: RouterLossPooling = RouterLossPooling.layer
    router_loss_coef: float = 1e-3
    boolq_passage: bool = True
    arc_labels: ArcLabels = ArcLabels.own
    dropout_at_evaluation: bool = False

    def __post_init__(self) -> None:
        require_name("preset.name", self.name)


@dataclass(slots=True, kw_only=True)
class PlanConfig:
    """Settings of the plan that `dry_run=true` prints."""

    probe: bool = False
    """Load the model and measure the speed of three steps."""


@dataclass(slots=True, kw_only=True)
class Config:
    """One run: everything that `runs.run.run` needs."""

    seed: int = 42
    output_dir: str = "outputs"
    dry_run: bool = False
    plan: PlanConfig = field(default_factory=PlanConfig)
    adapter: str | None = None
    """Score the adapter in this folder (with method=none); train nothing."""
    base: Base = Base.check
    """`accept`: score the adapter even if it was trained on weights other than the model's."""
    force: bool = False
    """Run again even if a finished record of the same fingerprint exists."""
    adapters: list[Any] = field(default_factory=list)
    """Adapters to train together: each a method's name or a mapping of settings."""
    preset: PresetConfig = MISSING
    model: ModelConfig = MISSING
    method: MethodConfig = MISSING
    task: TaskConfig = MISSING
    data: DataConfig = MISSING
    kernel: KernelConfig = MISSING
    trainer: TrainerConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    tracker: TrackerConfig = MISSING

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", self.seed, "must be in [0, 2**32)")
        require(
            self.dry_run or not self.plan.probe,
            "plan.probe", self.plan.probe, "it is part of a plan: add dry_run=true",
        )  # fmt: skip
        trains = isinstance(self.method, TrainedMethodConfig)
        require(
            self.adapter is None or not trains,
            "adapter",
            self.adapter,
            "an existing adapter is scored, not trained: add method=none",
        )
        for task in getattr(self.method, "type1_tasks", ()):
            require(
                task in self.task.train,
                "method.type1_tasks", task, f"the run trains on {', '.join(self.task.train)}",
            )  # fmt: skip
        known = (*self.task.train, *self.task.evaluate)
        for task in self.data.train_limits:
            require(
                task in known,
                "data.train_limits", task, f"the run's tasks are {', '.join(dict.fromkeys(known))}",
            )  # fmt: skip
        unlimited = [t for t in self.task.evaluate if self.data.train_limit_of(t) is None]
        require(
            not self.evaluation.held_out or not unlimited,
            "evaluation.held_out",
            self.evaluation.held_out,
            "it uses the rows that data.train_limit excludes from training: set data.train_limit=N"
            + (f" or data.train_limits for {', '.join(unlimited)}" if unlimited else ""),
        )
        own = [task for task in (*self.task.train, *self.task.evaluate) if task in self.task.custom]
        require(
            not own or self.data.reads_folder,
            "data",
            self.data.name.value,
            f"{', '.join(dict.fromkeys(own))} is a custom task: add data=local data.path=DIR",
        )
        self._check_free_text()
        require(
            self.tracker.name is Tracker.none or trains,
            "tracker",
            self.tracker.name.value,
            "it follows training, and method=none trains nothing: use tracker=none",
        )

    def _check_free_text(self) -> None:
        """Free text has a form, a protocol and a source of its own."""
        tasks = dict.fromkeys((*self.task.train, *self.task.evaluate))
        kinds = {t: self.task.custom[t].answer_as for t in tasks if t in self.task.custom}
        free = [task for task, kind in kinds.items() if kind.free]
        named = f"{', '.join(free)} is free text"
        require(
            not free or self.data.forms == [AnswerForm.text],
            "data.forms", [form.value for form in self.data.forms], f"{named}: set it to [text]",
        )  # fmt: skip
        require(
            self.data.name is not DataSource.chat or len(free) == len(tasks),
            "data", "chat", "it takes tasks of free text only (answer_as: completion or messages)",
        )  # fmt: skip
        for task in free:
            require(
                kinds[task] is AnswerKind.completion or self.data.name is DataSource.chat,
                "data", self.data.name.value, f"{task} has messages: use data=chat",
            )  # fmt: skip
        wanted = {self._protocol_of(task) for task in self.task.evaluate}
        given = [protocol.value for protocol in self.evaluation.protocols]
        (only,) = wanted if len(wanted) == 1 else (None,)
        fits = set(given) == {only} if only else not set(given) & set(FREE_TEXT_PROTOCOLS)
        require(
            len(wanted) == 1 and fits,
            "evaluation.protocols", given,
            f"{named}, which {only or ' and '.join(sorted(wanted - {''}))} scores" if free
            else "exact_match and answer_pattern score free text only (answer_as: completion or "
            "messages)",
        )  # fmt: skip

    def _protocol_of(self, task: str) -> str:
        """Return the one protocol that scores a task of free text; "" for another task."""
        own = self.task.custom.get(task)
        if own is None or not own.answer_as.free:
            return ""
        return Protocol.answer_pattern.value if own.labels else Protocol.exact_match.value
