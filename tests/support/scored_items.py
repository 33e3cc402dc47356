"""Scores of a few items by one protocol."""

from __future__ import annotations

from mixlora_exp.config.schema import DataConfig, EvaluationConfig, Protocol
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.evaluation import Scorer, TaskScore, score_tests
from mixlora_exp.tasks import Item


def labels(scorer: Scorer, items: list[Item], data: DataConfig, batch_check: int = 0) -> TaskScore:
    tests = {"arc_e": LoadedSplit(items, [])}
    evaluation = EvaluationConfig(batch_check=batch_check)
    (score,) = score_tests(Protocol.label_logits, scorer, tests, data, evaluation)
    return score


def texts(scorer: Scorer, items: list[Item], data: DataConfig) -> TaskScore:
    tests = {"arc_e": LoadedSplit(items, [])}
    (score,) = score_tests(Protocol.answer_text, scorer, tests, data, EvaluationConfig())
    return score


PROTOCOLS = {"label_logits": labels, "answer_text": texts}
