"""The items that two sides of a comparison answer differently, as plain values for a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from mixlora_exp.errors import UserError, shown
from mixlora_exp.results.comparison import Compared, Side
from mixlora_exp.results.runs import RecordedRun

Items = Callable[[RecordedRun, str], Sequence[Any]]
"""The items of a task that a run scored, in the order of its predictions."""


def _answers(side: Side, task: str, protocol: str, item: str) -> dict[str, Any]:
    """Return what a side answers: the predictions of its seeds, the generated text of the first,
    and the scores of the options, averaged over the seeds."""
    rows = [run.predictions[task, protocol][item] for run in side.runs]
    scores = [row.get("scores") or [] for row in rows]
    whole = len({len(one) for one in scores}) == 1
    return {
        "chosen": [row["prediction"] for row in rows],
        "scores": [round(mean(column), 3) for column in zip(*scores, strict=True)] if whole else [],
        "text": shown(str(rows[0].get("text") or ""), 2000, keep="\n"),
    }


def _right(answers: Mapping[str, Any], answer: Any) -> float:
    return mean(choice == answer for choice in answers["chosen"])


def _questions(
    items: Items, run: RecordedRun, task: str, protocol: str
) -> tuple[dict[str, Any], str]:
    """Item -> its question, and why there are none."""
    keys = list(run.predictions[task, protocol])
    try:
        found = items(run, task)
    except (UserError, OSError) as error:
        return {}, shown(str(error), 300)
    # A repeated id has a suffix among the predictions.
    pairs = list(zip(keys, found, strict=False))
    if len(found) != len(keys) or any(key.partition("#")[0] != one.id.partition("#")[0]
                                      for key, one in pairs):  # fmt: skip
        return {}, f"{task}: the data hold other items than were scored"
    return dict(pairs), ""


def differing_items(compared: Compared, items: Items) -> tuple[list[dict[str, Any]], list[str]]:
    """Return one entry for each item, task, protocol and side that is answered otherwise than by
    the first side, and the reasons why questions are missing."""
    entries, missing = [], {}
    known: dict[tuple[str, str], dict[str, Any]] = {}
    for one in compared.measured:
        if one.metric != "accuracy":
            continue
        task, protocol, base = one.task, one.protocol, one.scores[0].side
        for versus in one.differences:
            if versus.comparison is None:
                continue
            if (task, protocol) not in known:
                found, why = _questions(items, base.runs[0], task, protocol)
                known[task, protocol] = found
                if why:
                    missing[why] = None
            for key, row in base.runs[0].predictions[task, protocol].items():
                a, b = (_answers(side, task, protocol, key) for side in (base, versus.side))
                rights = [_right(answers, row["answer"]) for answers in (a, b)]
                if a["chosen"] == b["chosen"] and rights[0] == rights[1]:
                    continue
                item = known[task, protocol].get(key)
                entries.append(
                    {
                        "pair": f"{versus.side.letter} - {base.letter}",
                        "task": task,
                        "protocol": protocol,
                        "id": key,
                        "answer": row["answer"],
                        "question": "" if item is None else item.question,
                        "context": "" if item is None else item.context,
                        "options": [] if item is None else list(item.options),
                        "a": {**a, "right": rights[0]},
                        "b": {**b, "right": rights[1]},
                    }
                )
    return entries, list(missing)
