"""Evaluation: protocols that score the items of a task with a loaded model."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from mixlora_exp.config.schema import AnswerForm, DataConfig, EvaluationConfig, Protocol
from mixlora_exp.data.encoding import encode_questions
from mixlora_exp.evaluation.answer_text import score_answer_text
from mixlora_exp.evaluation.forward import Scorer
from mixlora_exp.evaluation.label_logits import encode_labels, score_label_logits
from mixlora_exp.evaluation.scores import ItemScore, TaskScore
from mixlora_exp.tasks.base import Item

__all__ = ["ItemScore", "Scorer", "TaskScore", "check_task", "score_task"]


def check_task(
    protocol: Protocol,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    data: DataConfig,
) -> None:
    """Check, without a model, that a protocol can score these items.

    Raises:
        UserError: the tokenizer does not suit the protocol.
    """
    if protocol is Protocol.label_logits:
        encode_labels(tokenizer, items, data)
    else:
        encode_questions(tokenizer, items, AnswerForm.text, data)


def score_task(
    protocol: Protocol,
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    data: DataConfig,
    evaluation: EvaluationConfig,
) -> TaskScore:
    """Score the items of one task under one protocol."""
    match protocol:
        case Protocol.label_logits:
            return score_label_logits(scorer, tokenizer, items, data, evaluation.batch_check)
        case Protocol.answer_text:
            return score_answer_text(scorer, tokenizer, items, data)
