"""Fields of the groups `task` and `data`: which tasks, and where their rows come from."""

from __future__ import annotations

from dataclasses import dataclass, field

from mixlora_exp.config.checks import MISSING, require, require_name
from mixlora_exp.config.choices import AnswerForm, AnswerKind, DataSource
from mixlora_exp.tasks import TASKS
from mixlora_exp.tasks.free_text import TEMPLATE

TASK_NAMES = tuple(TASKS)


@dataclass(slots=True, kw_only=True)
class CustomTask:
    """A custom task (data=local, data=chat), multiple-choice or free text: the names of the fields
    in a row."""

    question: str = MISSING
    options: list[str] = field(default_factory=list)
    """One field with a list of texts, or several fields with one text each."""
    answer: str = MISSING
    answer_as: AnswerKind = MISSING
    count_from: int = 0
    """answer_as=index: the index of the first option."""
    context: str | None = None
    """Field with a passage that the question refers to; of free text, one that follows it and may
    be empty."""
    instruction: str = ""
    """Free text: words after each question, as in "Think step by step."."""
    template: str = TEMPLATE
    """Free text without a chat template: the prompt, with {question} in the place of the
    question."""
    labels: list[str] = field(default_factory=list)
    """Free text: the answers of which a generated text names one (protocol answer_pattern)."""
    label: str | None = None
    """Free text: the field with the right one of `labels`."""

    def __post_init__(self) -> None:
        free = self.answer_as != MISSING and self.answer_as.free
        rule = "free text has none" if free else "name at least one field"
        require(free != bool(self.options), "task.custom.options", self.options, rule)
        same = self.answer_as is not AnswerKind.messages or self.answer == self.question
        require(same, "task.custom.answer", self.answer, "messages are one field, the question's")
        one = self.template.count("{question}") == 1
        require(one, "task.custom.template", self.template, "it must contain {question} once")
        for name, default in (("template", TEMPLATE), ("labels", []), ("label", None)):
            given = getattr(self, name)
            rule = "it belongs to free text (answer_as: completion or messages)"
            require(free or given == default, f"task.custom.{name}", given, rule)
        require(
            bool(self.labels) == (self.label is not None) and len(self.labels) != 1,
            "task.custom.labels", self.labels,
            "name two or more, and in task.custom.label the field with the right one; or neither",
        )  # fmt: skip
        require("" not in self.labels, "task.custom.labels", self.labels, "one is empty")


@dataclass(slots=True, kw_only=True)
class TaskConfig:
    """Tasks to train on (mixed) and tasks to score."""

    name: str = MISSING
    train: list[str] = MISSING
    evaluate: list[str] = MISSING
    custom: dict[str, CustomTask] = field(default_factory=dict)
    """Custom tasks by name (docs/extending/task.md)."""

    def __post_init__(self) -> None:
        require_name("task.name", self.name)
        for task in self.custom:
            require_name("task.custom", task)
            require(
                task not in TASK_NAMES,
                "task.custom",
                task,
                "a task of the paper has this name, choose another",
            )
        known = (*TASK_NAMES, *self.custom)
        for name in ("train", "evaluate"):
            tasks = getattr(self, name)
            require(bool(tasks), f"task.{name}", tasks, "name at least one task")
            for task in tasks:
                require(task in known, f"task.{name}", task, f"choose from {', '.join(known)}")
            require(len(set(tasks)) == len(tasks), f"task.{name}", tasks, "a task is named twice")


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Sources of the data sets and how an item becomes tokens."""

    name: DataSource = MISSING
    path: str | None = None
    """data=local: a folder with `<task>/<split>.jsonl[.gz]` or `.parquet`; default: `data`."""
    mirror: str | None = None
    """data=hub: a folder of downloaded hub repositories, `<owner>/<name>`, to read instead."""
    seed: int = 0
    """data=embedded: seed of the generator."""
    train_limit: int | None = None
    """Maximum number of training rows per task: the first of a shuffle seeded by `data.seed`."""
    train_limits: dict[str, int] = field(default_factory=dict)
    """Limits of training rows for single tasks by name; take precedence over `train_limit`."""
    cutoff_length: int = 512
    """Maximum tokens per example; only context is truncated, never question, options or answer."""
    packing: bool = False
    """Train the examples of a micro-batch as one row of tokens, without padding. Attention stays
    within each example; loss and gradients are those of padded examples up to rounding."""
    boolq_passage: bool = True
    forms: list[AnswerForm] = field(default_factory=lambda: [AnswerForm.label])
    """Each training row becomes one example in each of these forms."""

    def __post_init__(self) -> None:
        require(self.cutoff_length >= 16, "data.cutoff_length", self.cutoff_length, "must be >= 16")
        if self.train_limit is not None:
            require(self.train_limit >= 1, "data.train_limit", self.train_limit, "must be >= 1")
        for task, limit in self.train_limits.items():
            valid = isinstance(limit, int) and limit >= 1
            require(valid, f"data.train_limits.{task}", limit, "must be >= 1")
        require(bool(self.forms), "data.forms", self.forms, "name at least one of label, text")
        require(
            len(set(self.forms)) == len(self.forms),
            "data.forms", [form.value for form in self.forms], "a form is named twice",
        )  # fmt: skip
        require(
            not self.reads_folder or self.path is not None,
            "data.path", self.path,
            f"data={self.name.value} needs data.path=DIR, a folder <task>/<split>.jsonl",
        )  # fmt: skip
        require(
            self.reads_folder or self.path is None,
            "data.path",
            self.path,
            f"data={self.name.value} reads no folder: add data=local, or leave it out",
        )
        require(
            self.name is DataSource.hub or self.mirror is None,
            "data.mirror",
            self.mirror,
            f"data={self.name.value} reads nothing from the hub: leave it out",
        )

    @property
    def reads_folder(self) -> bool:
        """True if rows are read from files in `path`."""
        return self.name in (DataSource.local, DataSource.chat)

    def train_limit_of(self, task: str) -> int | None:
        """Maximum number of training rows of `task`; None: all."""
        return self.train_limits.get(task, self.train_limit)
