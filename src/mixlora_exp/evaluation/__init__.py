"""Evaluation: protocols that score the items of tasks with a loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from mixlora_exp.config.schema import AnswerForm, DataConfig, EvaluationConfig, Protocol
from mixlora_exp.data.encoding import encode_questions
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.evaluation.answer_text import score_answer_text
from mixlora_exp.evaluation.forward import Scorer
from mixlora_exp.evaluation.free_text import encode_free_text, score_free_text
from mixlora_exp.evaluation.generate import encode_prompts, score_generate
from mixlora_exp.evaluation.harness_tasks import check_harness
from mixlora_exp.evaluation.label_logits import encode_labels, score_label_logits
from mixlora_exp.evaluation.lockstep import in_lockstep
from mixlora_exp.evaluation.scores import ItemScore, TaskScore
from mixlora_exp.evaluation.share import Share

__all__ = [
    "ItemScore",
    "Scorer",
    "Share",
    "TaskScore",
    "encode_tests",
    "in_lockstep",
    "score_tests",
]


def encode_tests(
    protocol: Protocol,
    tokenizer: PreTrainedTokenizerBase,
    tests: Mapping[str, LoadedSplit],
    data: DataConfig,
    evaluation: EvaluationConfig,
) -> dict[str, Any]:
    """Return the items of each task as the protocol encodes them, for `score_tests`; None if
    lm-eval does.

    Raises:
        UserError: the protocol does not support the tokenizer or a row, or a package is missing.
    """
    found: dict[str, Any] = {}
    for task, test in tests.items():
        match protocol:
            case Protocol.label_logits:
                found[task] = encode_labels(tokenizer, test.items, data, evaluation)
            case Protocol.answer_text:
                found[task] = encode_questions(tokenizer, test.items, AnswerForm.text, data)
            case Protocol.generate:
                found[task] = encode_prompts(tokenizer, test.items, data, evaluation)
            case Protocol.exact_match | Protocol.answer_pattern:
                found[task] = encode_free_text(tokenizer, test.items, data, evaluation, protocol)
            case Protocol.lm_eval:
                found[task] = check_harness(tokenizer, task, test)
    return found


def score_tests(
    protocol: Protocol,
    scorer: Scorer,
    tests: Mapping[str, LoadedSplit],
    data: DataConfig,
    evaluation: EvaluationConfig,
    encoded: Mapping[str, Any] | None = None,
) -> list[TaskScore]:
    """Score all tasks under one protocol, in the order of `tests`. `encoded`: what `encode_tests`
    returned for them; None: they are encoded here."""
    encoded = encoded or encode_tests(protocol, scorer.tokenizer, tests, data, evaluation)
    match protocol:
        case Protocol.label_logits:
            return score_label_logits(scorer, tests, evaluation, encoded)
        case Protocol.answer_text:
            return score_answer_text(scorer, tests, encoded)
        case Protocol.generate:
            return score_generate(scorer, tests, evaluation, encoded)
        case Protocol.exact_match | Protocol.answer_pattern:
            return score_free_text(protocol, scorer, tests, evaluation, encoded)
        case Protocol.lm_eval:
            # Imported late: the package takes seconds to load, and is optional.
            from mixlora_exp.evaluation.harness import score_lm_eval

            return score_lm_eval(scorer, tests)
