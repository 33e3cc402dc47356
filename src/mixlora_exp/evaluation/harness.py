"""Protocol `lm_eval`: tasks and metrics of the lm-eval package, run by its own evaluator.

`SharedPrefixLM` is lm-eval's `HFLM` with one change: all options of a question are computed in one
row after their common prefix, instead of one row each.
"""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn

from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation.forward import Scorer
from mixlora_exp.evaluation.harness_tasks import HARNESS_TASKS, write_tasks
from mixlora_exp.evaluation.packing import Request
from mixlora_exp.evaluation.scores import ItemScore, TaskScore, summarize
from mixlora_exp.tasks.base import Item

OURS = {spec.name: task for task, spec in HARNESS_TASKS.items()}


class SharedPrefixLM(HFLM):
    """lm-eval's `HFLM` on top of a `Scorer`: same requests, truncation and sums."""

    def __init__(self, scorer: Scorer) -> None:
        with _weights_left(scorer.model), _quiet():
            super().__init__(pretrained=scorer.model, tokenizer=scorer.tokenizer, backend="causal")
        self.scorer = scorer
        self._documents: list[tuple[str, int]] | None = None
        self.cut: set[tuple[str, int]] = set()
        """(task, number) of each document whose context was truncated from the left."""

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        """Answer lm-eval's requests, those of one document in one row with a shared prefix."""
        # Encoded requests lack the question (document) that they belong to.
        self._documents = [(request.task_name, request.doc_id) for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._documents = None

    def _loglikelihood_tokens(self, requests: list, *args: Any, **kwargs: Any) -> list:
        documents = self._documents or [("", i) for i in range(len(requests))]
        members: dict[tuple[str, int], list[int]] = {}
        for index, document in enumerate(documents):
            members.setdefault(document, []).append(index)
        questions = [
            [self._request(document, *requests[i][1:]) for i in own]
            for document, own in members.items()
        ]
        keys = [f"{task}/{number}" for task, number in members]
        groups = [OURS.get(task, task) for task, _ in members]
        found = self.scorer.log_likelihoods(questions, keys, groups)
        results: list[Any] = [None] * len(requests)
        for own, answers in zip(members.values(), found, strict=True):
            for index, answer in zip(own, answers, strict=True):
                results[index] = answer
                # lm-eval's optional cache of answers on disk.
                self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
        return results

    def _request(
        self, document: tuple[str, int], context: list[int], continuation: list[int]
    ) -> Request:
        """Return a request truncated from the left to the model's positions, as in `HFLM`.

        Raises:
            UserError: the continuation alone is too long.
        """
        if len(continuation) > self.max_length:
            raise UserError(
                f"evaluation.protocols=lm_eval: an answer of document {document[1]} of "
                f"{document[0]} has {len(continuation):,} tokens, and the model has "
                f"{self.max_length:,} positions: remove the row, or choose another model"
            )
        tokens = context + continuation
        kept = tokens[-(self.max_length + 1) :]
        if len(kept) < len(tokens):
            self.cut.add(document)
        return Request(kept, min(len(continuation), len(kept) - 1))


@contextmanager
def _weights_left(model: nn.Module) -> Iterator[None]:
    """Disable `tie_weights` within the context: lm-eval calls it on a given model, which fails if
    the embedding or the output projection has an adapter."""
    model.tie_weights = lambda: None
    try:
        yield
    finally:
        del model.tie_weights


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress lm-eval's log messages below errors and its progress bars; exceptions still
    propagate."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def evaluate_tasks(model: HFLM, tests: Mapping[str, LoadedSplit]) -> dict[str, Any]:
    """Return lm-eval's results for `model` on the items of `tests`, with one sample per item."""
    with tempfile.TemporaryDirectory() as folder:
        return evaluate_files(model, write_tasks(Path(folder), tests), folder)


def evaluate_files(model: HFLM, names: Sequence[str], folder: str) -> dict[str, Any]:
    """Return lm-eval's zero-shot results for the tasks `names`, whose files are in `folder`."""
    with _quiet():
        return simple_evaluate(
            model=model,
            tasks=list(names),
            num_fewshot=0,
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
            # Nothing is sampled, and the run's random state must not change.
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )


def _item_score(task: str, item: Item, sample: Mapping[str, Any]) -> ItemScore:
    spec = HARNESS_TASKS[task]
    likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
    # The harness measures a choice without the space that joins it to the prompt.
    lengths = [len(arguments[1].removeprefix(" ")) for arguments in sample["arguments"]]
    normalized = [value / length for value, length in zip(likelihoods, lengths, strict=True)]
    order = spec.choices or range(len(likelihoods))
    best = order[likelihoods.index(max(likelihoods))]
    best_normalized = order[normalized.index(max(normalized))] if "acc_norm" in sample else None
    for metric, chosen in (("acc", best), ("acc_norm", best_normalized)):
        if chosen is not None and bool(sample[metric]) != (chosen == item.answer):
            raise UserError(
                f"evaluation.protocols=lm_eval: lm-eval's {metric} of item {item.id} of {task} "
                "contradicts its likelihoods: install the version in requirements/constraints.txt"
            )
    scores = [0.0] * len(likelihoods)
    for choice, value in zip(order, likelihoods, strict=True):
        scores[choice] = value
    return ItemScore(
        id=item.id,
        answer=item.answer,
        prediction=best,
        scores=scores,
        gold_log_likelihood=scores[item.answer],
        prediction_normalized=best_normalized,
    )


def task_scores(
    results: Mapping[str, Any],
    tests: Mapping[str, LoadedSplit],
    model: SharedPrefixLM | None = None,
) -> list[TaskScore]:
    """Convert lm-eval's results: `acc` becomes `accuracy`, `acc_norm` (if the task has it) becomes
    `accuracy_normalized`. `model`, which computed them, supplies truncation and expert load."""
    scores = []
    for task, test in tests.items():
        name = HARNESS_TASKS[task].name
        samples: Sequence[Mapping[str, Any]] = sorted(
            results["samples"][name], key=lambda sample: sample["doc_id"]
        )
        scores.append(
            summarize(
                task,
                "lm_eval",
                test.items,
                [_item_score(task, *pair) for pair in zip(test.items, samples, strict=True)],
                shortened=0 if model is None else sum(cut == name for cut, _ in model.cut),
                expert_load=None if model is None else model.scorer.take_expert_load(task),
            )
        )
    return scores


def score_lm_eval(scorer: Scorer, tests: Mapping[str, LoadedSplit]) -> list[TaskScore]:
    """Score the items of all tasks in one pass.

    Raises:
        UserError: lm-eval has no such task, a row lacks a field that its task reads, or an answer
            is too long for the model.
    """
    model = SharedPrefixLM(scorer)
    return task_scores(evaluate_tasks(model, tests), tests, model)
