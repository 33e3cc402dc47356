"""Protocol `label_logits`: arg-max of the next-token logits over an item's labels.

The prompt lists the options with letters (BoolQ: true, false); one forward pass per item gives the
logits after it. The official implementation scores in the same way, whereas lm-eval compares the
likelihoods of whole answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixlora_exp.config.schema import AnswerForm, ArcLabels, DataConfig, EvaluationConfig
from mixlora_exp.data.encoding import Encoded, check_labels, encode_questions
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation.forward import Scorer
from mixlora_exp.evaluation.scores import ItemScore, TaskScore, summarize
from mixlora_exp.tasks.base import Item

NINE = ("1", "2", "3", "4", "A", "B", "C", "D", "E")
"""Labels among which the official packages choose for every item of ARC."""


def _label_ids(item: Item, encoded: Encoded) -> list[int]:
    for label, ids in zip(item.labels, encoded.answers, strict=True):
        if len(ids) != 1:
            raise UserError(
                f"evaluation.protocols=label_logits needs labels of one token each; this model's "
                f"tokenizer splits {label!r} of {item.id} into {len(ids)}; use answer_text"
            )
    return [ids[0] for ids in encoded.answers]


def _batch_scores(
    items: Sequence[Item], logits: Tensor, labels: Sequence[list[int]], others: Sequence[list[int]]
) -> list[ItemScore]:
    """Score items by the logits of their labels.

    logits: (items, vocabulary); labels: tokens of each item's labels; others: tokens of labels that
    it does not have. Ties go to the first label; one of `others` that leads them all is an answer
    that the item does not have.
    """
    candidates = [
        [*own, *more, own[item.answer]]
        for item, own, more in zip(items, labels, others, strict=True)
    ]
    width = max(map(len, candidates))
    ids = torch.tensor([row + row[-1:] * (width - len(row)) for row in candidates])
    found = logits.gather(1, ids.to(logits.device))
    gold = found[:, -1:] - logits.logsumexp(dim=-1, keepdim=True)
    # One copy to the host for the whole batch.
    values = torch.cat([found, gold], dim=1).tolist()
    return [
        _item_score(item, row[: len(own)], row[len(own) : len(own) + len(more)], row[-1])
        for item, row, own, more in zip(items, values, labels, others, strict=True)
    ]


def _item_score(
    item: Item, scores: list[float], others: list[float], likelihood: float
) -> ItemScore:
    # NaN counts as the largest, as in torch.
    best = max(range(len(scores)), key=lambda i: (isnan(scores[i]), scores[i]))
    return ItemScore(
        id=item.id,
        answer=item.answer,
        prediction=None if others and max(others) > scores[best] else best,
        scores=scores,
        gold_log_likelihood=likelihood,
    )


EncodedLabels = tuple[list[Encoded], list[list[int]], list[list[int]]]
"""Prompts, tokens of each item's labels, and tokens of further labels."""


def encode_labels(
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    data: DataConfig,
    evaluation: EvaluationConfig,
) -> EncodedLabels:
    """Encode the items' prompts. Also returns per item its label tokens, and the tokens of further
    labels that count as answers (`evaluation.arc_labels=nine`).

    Raises:
        UserError: a label is not one token, is unknown or the same as another; or an item is too
            long for the model.
    """
    encoded = encode_questions(tokenizer, items, AnswerForm.label, data)
    labels = [_label_ids(item, e) for item, e in zip(items, encoded, strict=True)]
    if evaluation.arc_labels is not ArcLabels.nine:
        return encoded, labels, [[] for _ in items]
    others = [_other_labels(tokenizer, *pair) for pair in zip(items, labels, strict=True)]
    return encoded, labels, others


def _other_labels(tokenizer: PreTrainedTokenizerBase, item: Item, own: list[int]) -> list[int]:
    """Return the tokens of ARC's nine labels without those of this item. A label of several tokens
    is represented by its last one, as in the official packages."""
    if item.task not in ("arc_e", "arc_c"):
        return []
    ids = [tokenizer(f" {label}", add_special_tokens=False)["input_ids"][-1] for label in NINE]
    check_labels(tokenizer, item.id, NINE, [[found] for found in ids])
    return [found for found in ids if found not in own]


def _check_batching(
    scorer: Scorer, prompts: Sequence[list[int]], labels: Sequence[list[int]]
) -> dict[str, float | int | None]:
    """Score items in one batch and one by one, to measure the effect of batching.

    Items with a token that batching routes to another expert (rounding swaps two nearly tied ones)
    are counted separately and excluded from the logit difference.
    """
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
    tests: Mapping[str, LoadedSplit],
    evaluation: EvaluationConfig,
    encoded: Mapping[str, EncodedLabels],
) -> list[TaskScore]:
    """Score the items of all tasks; the first `evaluation.batch_check` of each task (by id) are
    scored again one by one. `encoded`: by task, from `encode_labels`."""
    items, prompts, labels, groups, shortened = [], [], [], [], {}
    nine = evaluation.arc_labels is ArcLabels.nine
    others: list[list[int]] = []
    for task, test in tests.items():
        own, found, rest = encoded[task]
        shortened[task] = sum(e.shortened for e in own)
        items += test.items
        prompts += [e.prompt for e in own]
        labels += found
        others += rest
        groups += [task] * len(test.items)
    keys = [f"{group}/{item.id}" for group, item in zip(groups, items, strict=True)]

    def scores_of(batch: list[int]) -> list[ItemScore]:
        logits = scorer.logits([prompts[i] for i in batch], 1, [groups[i] for i in batch])[:, 0]
        own, own_labels, own_others = (
            [whole[i] for i in batch] for whole in (items, labels, others)
        )
        return _batch_scores(own, logits, own_labels, own_others)

    scores = scorer.over_batches([len(prompt) for prompt in prompts], keys, scores_of)
    results = []
    for task, test in tests.items():
        mine = [i for i, group in enumerate(groups) if group == task]
        load = scorer.take_expert_load(task)
        # With dropout two passes always differ.
        count = 0 if evaluation.dropout else evaluation.batch_check
        checked = sorted(mine, key=lambda i: items[i].id)[:count]
        check = None
        if checked:
            check = _check_batching(
                scorer, [prompts[i] for i in checked], [labels[i] for i in checked]
            )
            scorer.take_expert_load()
        results.append(
            summarize(
                task,
                "label_logits",
                test.items,
                [scores[i] for i in mine],
                shortened=shortened[task],
                expert_load=load,
                batch_check=check,
                unparsed=sum(scores[i].prediction is None for i in mine) if nine else None,
            )
        )
    return results
