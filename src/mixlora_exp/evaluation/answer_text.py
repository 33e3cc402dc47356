"""Protocol `answer_text`: predicts the option with the most likely text after the question.

The prompt does not list the options. Two accuracies are reported: by the sum of the
log-probabilities of the option's tokens, and by that sum per character of the option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mixlora_exp.data.encoding import Encoded
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.evaluation.forward import Scorer
from mixlora_exp.evaluation.packing import Request
from mixlora_exp.evaluation.scores import ItemScore, TaskScore, summarize
from mixlora_exp.tasks.base import Item


def _item_score(item: Item, likelihoods: Sequence[float]) -> ItemScore:
    normalized = [s / len(o) for s, o in zip(likelihoods, item.options, strict=True)]
    return ItemScore(
        id=item.id,
        answer=item.answer,
        prediction=likelihoods.index(max(likelihoods)),
        scores=list(likelihoods),
        gold_log_likelihood=likelihoods[item.answer],
        prediction_normalized=normalized.index(max(normalized)),
    )


def score_answer_text(
    scorer: Scorer,
    tests: Mapping[str, LoadedSplit],
    encoded: Mapping[str, Sequence[Encoded]],
) -> list[TaskScore]:
    """Score the items of all tasks in one pass. `encoded`: by task, in the form `text`."""
    questions, keys, groups, shortened = [], [], [], {}
    for task, test in tests.items():
        own = encoded[task]
        shortened[task] = sum(e.shortened for e in own)
        questions += [[Request(e.prompt + a, len(a)) for a in e.answers] for e in own]
        keys += [f"{task}/{item.id}" for item in test.items]
        groups += [task] * len(test.items)
    found = iter(scorer.log_likelihoods(questions, keys, groups))
    return [
        summarize(
            task,
            "answer_text",
            test.items,
            [_item_score(item, [value for value, _ in next(found)]) for item in test.items],
            shortened=shortened[task],
            expert_load=scorer.take_expert_load(task),
        )
        for task, test in tests.items()
    ]
