"""Protocol `label_logits`: arg-max of the next-token logits over the labels that an item has.

The prompt lists the options under letters (BoolQ: true, false) and one forward pass per item reads
the logits after it, as the official implementation scores (peers differ: lm-eval compares the
likelihood of whole answers).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixlora_exp.config.schema import AnswerForm, DataConfig
from mixlora_exp.data.encoding import Encoded, encode_questions
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation.forward import Scorer, batches
from mixlora_exp.evaluation.scores import ItemScore, TaskScore, summarize
from mixlora_exp.tasks.base import Item

__all__ = ["encode_labels", "score_label_logits"]


def _label_ids(item: Item, encoded: Encoded) -> list[int]:
    for label, ids in zip(item.labels, encoded.answers, strict=True):
        if len(ids) != 1:
            raise UserError(
                f"evaluation.protocols=label_logits needs labels of one token each; this model's "
                f"tokenizer splits {label!r} of {item.id} into {len(ids)}; use answer_text"
            )
    return [ids[0] for ids in encoded.answers]


def _item_score(item: Item, logits: Tensor, labels: list[int]) -> ItemScore:
    """logits: (vocabulary,). Ties go to the first label."""
    scores = logits[labels]
    return ItemScore(
        id=item.id,
        answer=item.answer,
        prediction=int(scores.argmax()),
        scores=scores.tolist(),
        gold_log_likelihood=float(logits.log_softmax(dim=-1)[labels[item.answer]]),
    )


def encode_labels(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], data: DataConfig
) -> tuple[list[Encoded], list[list[int]]]:
    """The items' prompts, and the token of each of their labels.

    Raises:
        UserError: a label is not one token.
    """
    encoded = encode_questions(tokenizer, items, AnswerForm.label, data)
    return encoded, [_label_ids(item, e) for item, e in zip(items, encoded, strict=True)]


def _check_batching(
    scorer: Scorer, encoded: Sequence[Encoded], labels: Sequence[list[int]]
) -> dict[str, float | int | None]:
    """Score some items in one batch and one by one: what does batching move?

    An item with a token that batching sends to another expert (two nearly tied ones swap by
    rounding) is counted apart and left out of the difference of logits.
    """
    prompts = [question.prompt for question in encoded]
    together = scorer.logits(prompts, keep=1)[:, 0]
    routes = scorer.routes([len(prompt) for prompt in prompts])
    differences, flips, rerouted = [], 0, 0
    for prompt, ids, row, route in zip(prompts, labels, together, routes, strict=True):
        alone = scorer.logits([prompt], keep=1)[0, 0]
        flips += int(alone[ids].argmax() != row[ids].argmax())
        (alone_route,) = scorer.routes([len(prompt)])
        if all(torch.equal(a, b) for a, b in zip(alone_route, route, strict=True)):
            differences.append(float((alone[ids] - row[ids]).abs().max()))
        else:
            rerouted += 1
    return {
        "items": len(prompts),
        "answers_flipped": flips,
        "items_rerouted": rerouted,
        "max_logit_difference": max(differences, default=None),
    }


def score_label_logits(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    data: DataConfig,
    batch_check: int = 0,
) -> TaskScore:
    """Score items of one task; the first `batch_check` (by id) once more, one by one.

    Raises:
        UserError: a label is not one token.
    """
    start = time.perf_counter()
    encoded, labels = encode_labels(tokenizer, items, data)
    scores: list[ItemScore | None] = [None] * len(items)
    lengths = [len(e.prompt) for e in encoded]
    for batch in batches(lengths, [item.id for item in items], scorer.batch_tokens):
        logits = scorer.logits([encoded[i].prompt for i in batch], keep=1)[:, 0]
        for i, row in zip(batch, logits, strict=True):
            scores[i] = _item_score(items[i], row, labels[i])
    load = scorer.take_expert_load()
    seconds = time.perf_counter() - start
    checked = sorted(range(len(items)), key=lambda i: items[i].id)[:batch_check]
    check = None
    if checked:
        check = _check_batching(scorer, [encoded[i] for i in checked], [labels[i] for i in checked])
        scorer.take_expert_load()
    return summarize(
        items[0].task,
        "label_logits",
        items,
        scores,
        shortened=sum(e.shortened for e in encoded),
        seconds=round(seconds, 3),
        expert_load=load,
        batch_check=check,
    )
