"""Scores of a few items by one protocol."""

from __future__ import annotations

from mixlora_exp.config.schema import DataConfig, EvaluationConfig
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.evaluation import Scorer, TaskScore
from mixlora_exp.evaluation.answer_text import score_answer_text
from mixlora_exp.evaluation.label_logits import score_label_logits
from mixlora_exp.tasks import Item


def labels(scorer: Scorer, items: list[Item], data: DataConfig, batch_check: int = 0) -> TaskScore:
    tests = {"arc_e": LoadedSplit(items, [])}
    (score,) = score_label_logits(scorer, tests, data, EvaluationConfig(batch_check=batch_check))
    return score


def texts(scorer: Scorer, items: list[Item], data: DataConfig) -> TaskScore:
    (score,) = score_answer_text(
        scorer, {"arc_e": LoadedSplit(items, [])}, data, EvaluationConfig()
    )
    return score


PROTOCOLS = {"label_logits": labels, "answer_text": texts}
