"""lm-eval's protocol: its own tasks on local rows, with the prefix of a question shared."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from mixlora_exp.config.schema import TASK_NAMES, DataConfig, DataSource
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.data.sources import load_split
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation.harness_tasks import HARNESS_TASKS, harness_rows, write_tasks

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
from lm_eval.models.huggingface import HFLM

from mixlora_exp.evaluation.harness import evaluate_tasks, score_lm_eval, task_scores

Make = Callable[..., Any]
COUNT = 6
MANY = 48


@pytest.fixture(scope="module")
def tests_of(data: DataConfig) -> dict[str, LoadedSplit]:
    """A few items of each of the eight tasks."""
    return some(data, COUNT)


def some(data: DataConfig, count: int) -> dict[str, LoadedSplit]:
    loaded = {task: load_split(data, task, "test") for task in TASK_NAMES}
    return {task: split.limited(count, 0) for task, split in loaded.items()}


@pytest.mark.parametrize("method", ["none", "mixlora"])
def test_same_results_as_the_package_s_own_loop(
    method: str,
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    tests_of: dict[str, LoadedSplit],
    scorer: Make,
) -> None:
    # In float64, so that no token is routed elsewhere by rounding.
    model = make_model(method, dtype=torch.float64)
    own = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4)
    expected = task_scores(evaluate_tasks(own, tests_of), tests_of)
    found = score_lm_eval(scorer(model), tests_of)
    assert [score.task for score in found] == list(TASK_NAMES)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.accuracy, ours.accuracy_normalized) == (
            theirs.accuracy,
            theirs.accuracy_normalized,
        )
        for item, other in zip(ours.items, theirs.items, strict=True):
            assert item.scores == pytest.approx(other.scores, abs=1e-3)
            assert (item.id, item.prediction) == (other.id, other.prediction)
        assert (ours.expert_load is not None) == (method == "mixlora")


def test_normalised_accuracy_where_the_harness_has_one(
    make_model: Make, tests_of: dict[str, LoadedSplit], scorer: Make
) -> None:
    scores = {score.task: score for score in score_lm_eval(scorer(make_model("none")), tests_of)}
    without = {task for task, score in scores.items() if score.accuracy_normalized is None}
    assert without == {"boolq", "siqa", "winogrande"}
    assert all(score.n == COUNT and score.protocol == "lm_eval" for score in scores.values())


def test_boolq_is_mapped_to_the_harness_s_label(tests_of: dict[str, LoadedSplit]) -> None:
    test = tests_of["boolq"]
    rows = harness_rows("boolq", test)
    assert {row["label"] for row in rows} == {0, 1}
    choices = HARNESS_TASKS["boolq"].choices
    for item, row in zip(test.items, rows, strict=True):
        assert "answer" not in row
        # The harness's choices are no and yes; ours true and false.
        assert choices[row["label"]] == item.answer


@pytest.mark.parametrize(
    ("task", "field"),
    [("hellaswag", "activity_label"), ("boolq", "passage"), ("piqa", "sol2"), ("arc_e", "choices")],
)
def test_a_missing_field_is_named(task: str, field: str, tests_of: dict[str, LoadedSplit]) -> None:
    rows = [dict(row) for row in tests_of[task].rows]
    del rows[2][field]
    broken = dataclasses.replace(tests_of[task], rows=rows)
    with pytest.raises(UserError, match=f"{tests_of[task].items[2].id}.*'{field}'"):
        harness_rows(task, broken)


def test_a_task_that_the_harness_lacks_is_named(tests_of: dict[str, LoadedSplit]) -> None:
    with pytest.raises(UserError, match="no task for my_quiz"):
        harness_rows("my_quiz", tests_of["arc_e"])


def test_a_package_that_scores_otherwise_is_noticed(
    make_model: Make, tokenizer: PreTrainedTokenizerBase, tests_of: dict[str, LoadedSplit]
) -> None:
    tests = {"obqa": tests_of["obqa"]}
    own = HFLM(pretrained=make_model("none"), tokenizer=tokenizer, backend="causal", batch_size=4)
    results = evaluate_tasks(own, tests)
    results["samples"]["openbookqa"][3]["acc"] = 1.0 - results["samples"]["openbookqa"][3]["acc"]
    with pytest.raises(UserError, match="contradicts its likelihoods"):
        task_scores(results, tests)


def test_what_the_harness_cuts_is_counted(
    make_model: Make, tests_of: dict[str, LoadedSplit], scorer: Make
) -> None:
    tests = {task: tests_of[task] for task in ("boolq", "winogrande")}
    score = scorer(make_model("none"))
    whole = {s.task: s.shortened for s in score_lm_eval(score, tests)}
    assert whole == {"boolq": 0, "winogrande": 0}
    score.model.config.max_position_embeddings = 60
    cut = {s.task: s.shortened for s in score_lm_eval(score, tests)}
    assert cut["boolq"] >= COUNT - 1
    assert cut["winogrande"] == 0
    score.model.config.max_position_embeddings = 2
    with pytest.raises(UserError, match="of winogrande has .* tokens, and the model has 2 pos"):
        score_lm_eval(score, {"winogrande": tests["winogrande"]})


STRAY = ("{}\r", " {}\n", "\t{} ", "\ufeff{}", "{}\u200b")


@pytest.mark.parametrize("stray", STRAY)
def test_stray_signs_around_labels_do_not_reach_the_harness(
    stray: str, data: DataConfig, tmp_path: Path
) -> None:
    """Its tasks look labels up as they are: "B\\r" is not in the list."""
    found = {}
    for name in ("clean", "stray"):
        for task in TASK_NAMES:
            rows = [dict(row) for row in load_split(data, task, "test").rows[:4]]
            if name == "stray":
                rows = [_with_stray(row, stray) for row in rows]
            (tmp_path / name / task).mkdir(parents=True)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / name / task / "test.jsonl").write_text(text)
        source = DataConfig(name=DataSource.local, path=str(tmp_path / name))
        tests = {task: load_split(source, task, "test") for task in TASK_NAMES}
        found[name] = (
            {task: harness_rows(task, test) for task, test in tests.items()},
            {task: test.items for task, test in tests.items()},
        )
    assert found["stray"] == found["clean"]


def _with_stray(row: dict[str, Any], stray: str) -> dict[str, Any]:
    for name in ("id", "label", "answer", "answerKey"):
        if name in row and not isinstance(row[name], bool):
            row[name] = stray.format(row[name])
    if "choices" in row:
        labels = [stray.format(label) for label in row["choices"]["label"]]
        row["choices"] = {**row["choices"], "label": labels}
    return row


@pytest.mark.slow
def test_same_accuracies_as_the_command_line_on_a_merged_checkpoint(
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    scorer: Make,
    tmp_path: Path,
) -> None:
    model, tests = make_model("lora"), some(data, MANY)
    found = {score.task: score for score in score_lm_eval(scorer(model), tests)}
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    names = write_tasks(tasks, tests)
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf",
        "--model_args", f"pretrained={tmp_path / 'merged'},dtype=float32",
        "--include_path", str(tasks), "--tasks", ",".join(names), "--device", "cpu",
        "--batch_size", "4", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    for task, score in found.items():
        theirs = results[HARNESS_TASKS[task].name]
        assert theirs["acc,none"] == pytest.approx(score.accuracy), task
        if score.accuracy_normalized is not None:
            assert theirs["acc_norm,none"] == pytest.approx(score.accuracy_normalized), task
