"""Task files for lm-eval that read this project's rows instead of a download.

Each file includes the harness's own task and changes only the source of the rows, so prompts,
targets and metrics are the harness's. `lm_eval run --include_path DIR --tasks arc_easy` can read
them too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from mixlora_exp.data.encoding import check_labels, encode
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.errors import UserError
from mixlora_exp.tasks.base import Item, Prompt

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class HarnessTask:
    """A task of lm-eval.

    `name` and `file` (in the package); `row`: the fields that its templates read, from a row and
    its item; `choices`: the item's option for each choice (None: same order); `words`: its choices
    if all items share them.
    """

    name: str
    file: str
    row: Callable[[Row, Item], dict[str, Any]]
    choices: tuple[int, ...] | None = None
    words: tuple[str, ...] = ()


# Texts come from the row, since the harness preprocesses them itself. The gold answer comes from
# the item, where it has been parsed and checked (files may contain "B\r" or " 1").


def _take(row: Row, *names: str) -> dict[str, Any]:
    absent = [name for name in names if row.get(name) is None]
    if absent:
        raise ValueError(f"the field {absent[0]!r}, which lm-eval's task reads, is missing")
    return {name: row[name] for name in names}


def _choices(row: Row, item: Item) -> dict[str, Any]:
    texts = _take(row, "choices")["choices"]["text"]
    key = item.labels[item.answer]
    return {"choices": {"text": texts, "label": list(item.labels)}, "answerKey": key}


def _arc(row: Row, item: Item) -> dict[str, Any]:
    return {**_take(row, "question"), **_choices(row, item)}


def _obqa(row: Row, item: Item) -> dict[str, Any]:
    return {**_take(row, "question_stem"), **_choices(row, item)}


def _boolq(row: Row, item: Item) -> dict[str, Any]:
    # The harness reads SuperGLUE's `label` and would silently ignore `answer`.
    return {**_take(row, "passage", "question"), "label": NO_YES.index(item.answer)}


def _piqa(row: Row, item: Item) -> dict[str, Any]:
    return {**_take(row, "goal", "sol1", "sol2"), "label": item.answer}


def _siqa(row: Row, item: Item) -> dict[str, Any]:
    texts = _take(row, "context", "question", "answerA", "answerB", "answerC")
    return {**texts, "label": str(item.answer + 1)}


def _hellaswag(row: Row, item: Item) -> dict[str, Any]:
    # The harness joins `ctx_a` and `ctx_b`; a full `ctx` is passed as `ctx_a` alone.
    parts = (row["ctx_a"], row["ctx_b"]) if row.get("ctx_b") and row.get("ctx_a") else None
    first, second = parts or (_take(row, "ctx")["ctx"], "")
    kept = _take(row, "activity_label", "endings")
    return {**kept, "ctx_a": first, "ctx_b": second, "label": str(item.answer)}


def _winogrande(row: Row, item: Item) -> dict[str, Any]:
    texts = _take(row, "sentence", "option1", "option2")
    return {**texts, "answer": str(item.answer + 1)}


NO_YES = (1, 0)
"""BoolQ: the harness's choices are no and yes; this project's options are true and false."""

HARNESS_TASKS: dict[str, HarnessTask] = {
    "arc_e": HarnessTask("arc_easy", "arc/arc_easy.yaml", _arc),
    "arc_c": HarnessTask("arc_challenge", "arc/arc_challenge.yaml", _arc),
    "boolq": HarnessTask("boolq", "super_glue/boolq/default.yaml", _boolq, NO_YES, ("no", "yes")),
    "obqa": HarnessTask("openbookqa", "openbookqa/openbookqa.yaml", _obqa),
    "piqa": HarnessTask("piqa", "piqa/piqa.yaml", _piqa),
    "siqa": HarnessTask("social_iqa", "siqa/siqa.yaml", _siqa),
    "hellaswag": HarnessTask("hellaswag", "hellaswag/hellaswag.yaml", _hellaswag),
    "winogrande": HarnessTask("winogrande", "winogrande/default.yaml", _winogrande),
}
"""The harness's task by this project's task name."""


def _package_tasks() -> Path:
    # Without importing the package, which takes seconds.
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "evaluation.protocols=lm_eval needs the package lm-eval, which is not installed: "
            "run `pip install lm-eval`, or choose another protocol"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"


def harness_rows(task: str, test: LoadedSplit) -> list[dict[str, Any]]:
    """Return the rows of a split in the format of the harness's task.

    Raises:
        UserError: the harness has no such task, or a row lacks a field that its task reads.
    """
    _package_tasks()
    if task not in HARNESS_TASKS:
        raise UserError(
            f"evaluation.protocols=lm_eval: lm-eval has no task for {task}; "
            f"it has one for {', '.join(HARNESS_TASKS)}: choose another protocol"
        )
    rows = []
    for item, row in zip(test.items, test.rows, strict=True):
        try:
            rows.append(HARNESS_TASKS[task].row(row, item))
        except ValueError as error:
            raise UserError(
                f"evaluation.protocols=lm_eval: {item.id} of {task}: {error}; "
                "choose another protocol, or add the field"
            ) from None
    return rows


def check_harness(tokenizer: PreTrainedTokenizerBase, task: str, test: LoadedSplit) -> None:
    """Check that the harness can score a split with this tokenizer.

    Raises:
        UserError: as `harness_rows`, or the choices that all items share are the same token or
            unknown to the tokenizer.
    """
    harness_rows(task, test)
    words = list(HARNESS_TASKS[task].words)
    if words:
        questions = [(f"every item of {task}", Prompt("", "", "Answer:"), words)]
        (encoded,) = encode(tokenizer, questions, cutoff=tokenizer.model_max_length)
        check_labels(tokenizer, questions[0][0], words, encoded.answers)


def write_tasks(folder: Path, tests: Mapping[str, LoadedSplit]) -> list[str]:
    """Write `<name>.yaml` and `<name>.jsonl` of each task to `folder`; returns the task names.

    Raises:
        UserError: as `harness_rows`, or the installed lm-eval lacks a task's file.
    """
    names = []
    for task, test in tests.items():
        rows, spec = harness_rows(task, test), HARNESS_TASKS[task]
        source = _package_tasks() / spec.file
        if not source.is_file():
            raise UserError(
                f"evaluation.protocols=lm_eval: the installed lm-eval has no {spec.file}: "
                "install the version in requirements/constraints.txt"
            )
        data = folder.resolve() / f"{spec.name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = {
            "include": str(source),
            "task": spec.name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {"test": str(data)},
                "cache_dir": str(folder.resolve() / "cache"),
            },
            "training_split": None,
            "validation_split": None,
            "fewshot_split": None,
            "test_split": "test",
        }
        (folder / f"{spec.name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        names.append(spec.name)
    return names
