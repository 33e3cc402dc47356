"""Warnings about scores, from a record alone."""

from __future__ import annotations

from typing import Any

import pytest

from mixlora_exp.records.score_warnings import score_warnings


def score(accuracy: float, n: int = 300, protocol: str = "label_logits", **more: Any) -> dict:
    return {"task": "arc_e", "protocol": protocol, "n": n, "accuracy": accuracy,
            "majority_class": 0.3, "unparsed": None, **more}  # fmt: skip


@pytest.mark.parametrize(
    ("one", "told"),
    [
        (score(0.5), None),
        (score(0.5, n=30), None),
        (score(0.5, n=29), "too few items to tell settings apart: arc_e label_logits (29 items)"),
        (score(1.0), "a standard error of 0.0 is no certainty: all items have the same result: "
                     "arc_e label_logits (all right)"),
        (score(0.0, protocol="exact_match"), "a standard error of 0.0 is no certainty: all items "
                                             "have the same result: arc_e exact_match (all wrong)"),
        (score(0.29), "always the most frequent answer scores more: arc_e label_logits (29.0 < "
                      "30.0)"),
        (score(0.3), None),
        (score(0.1, protocol="exact_match"), None),
        (score(0.5, protocol="generate", unparsed=60), None),
        (score(0.5, protocol="generate", unparsed=61), "many texts name no option and count as "
                                                       "wrong: look at predictions/: arc_e "
                                                       "generate (61 of 300)"),
    ],
)  # fmt: skip
def test_each_warning_has_its_bound(one: dict, told: str | None) -> None:
    found = list(score_warnings({"scores": [one]}))
    assert len(found) == (told is not None)
    if told is not None:
        assert found[0].startswith("warning: ")
        assert found[0].endswith(told)


def test_a_kind_is_one_line_for_all_tasks() -> None:
    scores = [score(0.1), {**score(0.2), "task": "boolq"}, score(0.5)]
    (line,) = score_warnings({"scores": scores})
    assert line.endswith("arc_e label_logits (10.0 < 30.0), boolq label_logits (20.0 < 30.0)")
