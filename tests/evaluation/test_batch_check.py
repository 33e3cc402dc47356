"""The check of what batching moves: answers, logits and routes against each item alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scored_items import labels
from transformers import PreTrainedTokenizerBase

from mixlora_exp.config.schema import DataConfig

Make = Callable[..., Any]


def test_batch_check_reports_what_batching_moves(
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    items: Make,
    scorer: Make,
) -> None:
    chosen = items("arc_e", 8)
    model = make_model("mixlora")
    for asked, checked in ((5, 5), (50, 8)):
        check = labels(scorer(model), chosen, data, asked).batch_check
        assert check["items"] == checked
        assert check["answers_flipped"] == 0
        assert 0 <= check["max_logit_difference"] < 1e-4
        assert check["items_rerouted"] == 0
    assert labels(scorer(model), chosen, data, 0).batch_check is None
    # Asking for it changes neither the scores nor the expert load.
    with_check = labels(scorer(model), chosen, data, 8)
    without = labels(scorer(model), chosen, data, 0)
    assert with_check.items == without.items
    assert with_check.expert_load == without.expert_load


def test_batch_check_in_bf16(
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    items: Make,
    scorer: Make,
) -> None:
    bf16 = torch.bfloat16
    model = make_model("mixlora", dtype=bf16)
    result = labels(scorer(model, dtype=bf16), items("arc_e", 8), data, 8)
    check = result.batch_check
    assert check["items"] == 8
    assert 0 <= check["answers_flipped"] <= 8
    assert check["max_logit_difference"] < 0.5
    assert all(math.isfinite(s) for found in result.items for s in found.scores)


def test_batch_check_counts_flips(
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    items: Make,
    scorer: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that answers otherwise when it is asked alone."""
    score = scorer(make_model("none"))
    honest = score.logits
    monkeypatch.setattr(
        score,
        "logits",
        lambda rows, keep, groups=None: honest(rows, keep) * (-1 if len(rows) == 1 else 1),
    )
    chosen = [dataclasses.replace(i, id=f"x-{n}") for n, i in enumerate(items("arc_e", 1) * 4)]
    check = labels(score, chosen, data, 4).batch_check
    assert check["answers_flipped"] == 4
    assert check["max_logit_difference"] > 1e-3


def test_rerouted_items_are_left_out_of_the_difference(
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    items: Make,
    scorer: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alone, every token seems to go to other experts."""
    score = scorer(make_model("mixlora"))
    honest = score.routes

    def elsewhere(lengths: list[int]) -> list[list[torch.Tensor]]:
        found = honest(lengths)
        return found if len(lengths) > 1 else [[(layer + 1) % 8 for layer in row] for row in found]

    monkeypatch.setattr(score, "routes", elsewhere)
    check = labels(score, items("arc_e", 4), data, 4).batch_check
    assert check["items_rerouted"] == 4
    assert check["max_logit_difference"] is None
