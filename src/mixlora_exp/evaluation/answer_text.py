"""Protocol `answer_text`: the option whose text is the likeliest continuation of the question.

The prompt leaves the options out. Reported twice: by the sum of the log-likelihoods of the
option's tokens, and by that sum per character of the option.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from mixlora_exp.config.schema import AnswerForm, DataConfig
from mixlora_exp.data.encoding import encode_questions
from mixlora_exp.evaluation.forward import Scorer, batches
from mixlora_exp.evaluation.scores import ItemScore, TaskScore, summarize
from mixlora_exp.tasks.base import Item

__all__ = ["score_answer_text"]


def score_answer_text(
    scorer: Scorer, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], data: DataConfig
) -> TaskScore:
    """Score items of one task."""
    start = time.perf_counter()
    encoded = encode_questions(tokenizer, items, AnswerForm.text, data)
    pairs = [(i, k) for i, e in enumerate(encoded) for k in range(len(e.answers))]
    # The last token of an answer is predicted, never fed.
    rows = [encoded[i].prompt + encoded[i].answers[k][:-1] for i, k in pairs]
    keys = [f"{items[i].id}/{k}" for i, k in pairs]
    sums = [[0.0] * len(e.answers) for e in encoded]
    for batch in batches([len(row) for row in rows], keys, scorer.batch_tokens):
        targets = [encoded[pairs[b][0]].answers[pairs[b][1]] for b in batch]
        keep = max(len(target) for target in targets)
        logits = scorer.logits([rows[b] for b in batch], keep).log_softmax(dim=-1)
        for b, target, row in zip(batch, targets, logits, strict=True):
            ids = torch.tensor(target, device=row.device).unsqueeze(-1)
            likelihood = row[-len(target) :].gather(1, ids).sum()
            sums[pairs[b][0]][pairs[b][1]] = float(likelihood)
    scores = []
    for item, likelihoods in zip(items, sums, strict=True):
        normalized = [s / len(o) for s, o in zip(likelihoods, item.options, strict=True)]
        scores.append(
            ItemScore(
                id=item.id,
                answer=item.answer,
                prediction=likelihoods.index(max(likelihoods)),
                scores=likelihoods,
                gold_log_likelihood=likelihoods[item.answer],
                prediction_normalized=normalized.index(max(normalized)),
            )
        )
    return summarize(
        items[0].task,
        "answer_text",
        items,
        scores,
        shortened=sum(e.shortened for e in encoded),
        seconds=round(time.perf_counter() - start, 3),
        expert_load=scorer.take_expert_load(),
    )
