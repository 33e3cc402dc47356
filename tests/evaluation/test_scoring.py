"""Scores: equal to a slow loop over single items, whatever the batches and their order."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scored_items import PROTOCOLS, labels, texts
from torch import nn
from transformers import PreTrainedTokenizerBase

from mixlora_exp.config.schema import AnswerForm, DataConfig, EvaluationConfig, Protocol
from mixlora_exp.data.encoding import prompt_with_answers
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation import score_tests
from mixlora_exp.evaluation.forward import batches
from mixlora_exp.evaluation.scores import ItemScore, summarize
from mixlora_exp.tasks import Item

Make = Callable[..., Any]
# Two routes of a token this close may swap by rounding, and its logits jump with them.
NEAR_TIE = 1e-4


def near_tied(scorer: Any, ids: list[int]) -> bool:
    """Whether some token of the row is routed by a hair, so that its logits may jump."""
    scorer.logits([ids], keep=1)
    gap = float("inf")
    for module in scorer.model.modules():
        routing = getattr(module, "routing", None)
        if routing is not None:
            top = routing.logits.topk(routing.experts.shape[-1] + 1, dim=-1).values
            gap = min(gap, float((top[:, -2] - top[:, -1]).min()))
    return gap < NEAR_TIE


@torch.no_grad()
def slow_labels(model: nn.Module, tokenizer: PreTrainedTokenizerBase, item: Item) -> list[float]:
    prompt, labels = prompt_with_answers(item, AnswerForm.label)
    ids = tokenizer(prompt.text, return_tensors="pt")["input_ids"]
    logits = model(ids).logits[0, -1]
    tokens = [tokenizer(f" {label}")["input_ids"] for label in labels]
    assert {len(token) for token in tokens} == {1}
    return [float(logits[token[0]]) for token in tokens]


@torch.no_grad()
def slow_texts(model: nn.Module, tokenizer: PreTrainedTokenizerBase, item: Item) -> list[float]:
    prompt, answers = prompt_with_answers(item, AnswerForm.text)
    start = len(tokenizer(prompt.text)["input_ids"])
    sums = []
    for answer in answers:
        ids = tokenizer(f"{prompt.text} {answer}", return_tensors="pt")["input_ids"]
        likelihoods = model(ids).logits[0].log_softmax(-1)
        sums.append(sum(float(likelihoods[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])))
    return sums


@pytest.mark.parametrize("method", ["none", "dora", "mixlora", "mixdora"])
@pytest.mark.parametrize("model_name", ["tiny", "tiny_gemma"])
def test_labels_equal_a_slow_loop(
    method: str,
    model_name: str,
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    items: Make,
    scorer: Make,
) -> None:
    model = make_model(method, model_name)
    chosen = [*items("arc_e", 6), *items("boolq", 6)]
    score = scorer(model)
    result = labels(score, chosen, data)
    compared = 0
    for item, found in zip(chosen, result.items, strict=True):
        expected = slow_labels(model, tokenizer, item)
        prompt, _ = prompt_with_answers(item, AnswerForm.label)
        if near_tied(score, tokenizer(prompt.text)["input_ids"]):
            continue
        compared += 1
        assert found.scores == pytest.approx(expected, abs=1e-4)
        ranked = sorted(expected, reverse=True)
        if ranked[0] - ranked[1] > 2e-4:
            assert found.prediction == expected.index(ranked[0])
        assert (found.id, found.answer) == (item.id, item.answer)
    assert compared >= 8
    right = [found.prediction == item.answer for item, found in zip(chosen, result.items)]  # noqa: B905
    assert result.accuracy == sum(right) / 12


@pytest.mark.parametrize("method", ["none", "mixlora"])
def test_texts_equal_a_slow_loop(
    method: str,
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    items: Make,
    scorer: Make,
) -> None:
    model = make_model(method)
    chosen = [*items("piqa", 4), *items("hellaswag", 3), *items("winogrande", 3)]
    score = scorer(model)
    result = texts(score, chosen, data)
    compared = 0
    for item, found in zip(chosen, result.items, strict=True):
        prompt, answers = prompt_with_answers(item, AnswerForm.text)
        rows = [tokenizer(f"{prompt.text} {answer}")["input_ids"] for answer in answers]
        if any(near_tied(score, row) for row in rows):
            continue
        compared += 1
        expected = slow_texts(model, tokenizer, item)
        assert found.scores == pytest.approx(expected, abs=2e-3)
        assert found.prediction == found.scores.index(max(found.scores))
        per_character = [s / len(o) for s, o in zip(found.scores, item.options, strict=True)]
        assert found.prediction_normalized == per_character.index(max(per_character))
        assert found.gold_log_likelihood == found.scores[item.answer]
    assert compared >= 6
    pairs = list(zip(chosen, result.items, strict=True))
    assert result.accuracy == sum(f.prediction == i.answer for i, f in pairs) / 10
    assert (
        result.accuracy_normalized
        == sum(f.prediction_normalized == i.answer for i, f in pairs) / 10
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("method", ["lora", "mixdora"])
def test_order_of_items_changes_no_bit(
    protocol: str,
    method: str,
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    items: Make,
    scorer: Make,
) -> None:
    model = make_model(method)
    chosen = items("siqa", 12)
    first = PROTOCOLS[protocol](scorer(model), chosen, data)
    mixed = random.Random(3).sample(chosen, len(chosen))
    second = PROTOCOLS[protocol](scorer(model), mixed, data)
    assert [item.id for item in second.items] == [item.id for item in mixed]
    by_id = {item.id: item for item in second.items}
    assert first.items == [by_id[item.id] for item in chosen]
    assert (first.accuracy, first.expert_load) == (second.accuracy, second.expert_load)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("method", ["none", "mixlora"])
def test_batch_size_changes_only_rounding(
    protocol: str,
    method: str,
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    items: Make,
    scorer: Make,
) -> None:
    model = make_model(method)
    chosen = items("obqa", 12)
    form = AnswerForm.label if protocol == "label_logits" else AnswerForm.text
    results = [
        PROTOCOLS[protocol](scorer(model, batch_tokens), chosen, data)
        for batch_tokens in (1, 130, 100_000)
    ]
    single = scorer(model)
    compared = 0
    for index, item in enumerate(chosen):
        prompt, answers = prompt_with_answers(item, form)
        ends = [""] if form is AnswerForm.label else [f" {answer}" for answer in answers]
        if any(near_tied(single, tokenizer(prompt.text + end)["input_ids"]) for end in ends):
            continue
        compared += 1
        for other in results[1:]:
            assert other.items[index].scores == pytest.approx(
                results[0].items[index].scores, abs=1e-4
            )
    assert compared >= 8
    if method == "mixlora":
        loads = [torch.tensor(result.expert_load) for result in results]
        assert loads[0].shape == (2, 8)
        torch.testing.assert_close(loads[0], loads[2], rtol=0, atol=1e-3)


@pytest.mark.parametrize("batch_tokens", [1, 50, 77, 1000])
def test_batches_hold_every_row_once_within_their_size(batch_tokens: int) -> None:
    lengths = [random.Random(i).randint(1, 60) for i in range(40)]
    keys = [str(i) for i in range(40)]
    found = list(batches(lengths, keys, batch_tokens))
    assert sorted(i for batch in found for i in batch) == list(range(40))
    for batch in found:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= batch_tokens or len(batch) == 1
    order = random.Random(1).sample(range(40), 40)
    mixed = batches([lengths[i] for i in order], [keys[i] for i in order], batch_tokens)
    assert [[order[i] for i in batch] for batch in mixed] == found
    assert list(batches([], [], 10)) == []


def test_labels_of_several_tokens_are_refused(
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    items: Make,
    scorer: Make,
) -> None:
    (item,) = items("siqa", 1)
    long = dataclasses.replace(item, labels=("A", "second answer", "C"))
    with pytest.raises(UserError, match=f"'second answer' of {item.id} into .* use answer_text"):
        labels(scorer(make_model("none")), [item, long], data)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("method", ["lora", "mixlora"])
def test_dropout_is_off(
    protocol: str,
    method: str,
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    items: Make,
    scorer: Make,
) -> None:
    chosen = items("arc_c", 4)
    model = make_model(method)
    expected = PROTOCOLS[protocol](scorer(model.eval()), chosen, data)
    found = PROTOCOLS[protocol](scorer(model.train()), chosen, data)
    assert found.items == expected.items


def test_scoring_leaves_no_gradient_and_no_change(
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    items: Make,
    scorer: Make,
) -> None:
    model = make_model("mixdora")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    labels(scorer(model), items("arc_e", 4), data)
    for name, weight in model.named_parameters():
        assert weight.grad is None
        assert torch.equal(weight, before[name])


def item(options: int, answer: int) -> Item:
    letters = tuple("ABCDE"[:options])
    return Item("arc_e", f"{options}-{answer}", "q", letters, answer, letters)


def test_statistics_by_hand() -> None:
    chosen = [item(4, 0), item(4, 0), item(4, 2), item(5, 1), item(3, 0)]
    predictions = [0, 1, 2, 1, 2]
    scores = [
        ItemScore(i.id, i.answer, p, [0.0], -1.0 * n, prediction_normalized=i.answer)
        for n, (i, p) in enumerate(zip(chosen, predictions, strict=True))
    ]
    result = summarize("arc_e", "p", chosen, scores, shortened=1)
    assert (result.n, result.accuracy) == (5, 0.6)
    assert result.stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    assert result.majority_class == 0.6
    assert result.chance == pytest.approx((1 / 4 + 1 / 4 + 1 / 4 + 1 / 5 + 1 / 3) / 5)
    assert result.accuracy_normalized == 1.0
    assert result.gold_log_likelihood == pytest.approx(-2.0)
    plain = [dataclasses.replace(score, prediction_normalized=None) for score in scores]
    rest = {"shortened": 0}
    assert summarize("arc_e", "p", chosen, plain, **rest).accuracy_normalized is None


def test_bf16_logits_are_not_rounded_to_bf16(
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    items: Make,
    scorer: Make,
) -> None:
    """A bf16 head would give logits of 8 bits, and ties between options."""
    bf16 = torch.bfloat16
    model = make_model("none", dtype=bf16)
    result = labels(scorer(model, dtype=bf16), items("arc_e", 8), data)
    scores = torch.tensor([found.scores for found in result.items])
    assert (scores != scores.to(bf16).float()).float().mean() > 0.9
    assert result.tied == 0


def test_task_is_scored_by_its_protocol(
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    items: Make,
    scorer: Make,
) -> None:
    evaluation = EvaluationConfig(batch_check=2)
    model = make_model("mixlora")
    tests = {"boolq": LoadedSplit(items("boolq", 4), []), "obqa": LoadedSplit(items("obqa", 3), [])}
    for protocol in (Protocol.label_logits, Protocol.answer_text):
        result, other = score_tests(protocol, scorer(model), tests, data, evaluation)
        assert (other.task, other.n) == ("obqa", 3)
        assert (result.task, result.protocol, result.n) == ("boolq", protocol.value, 4)
        assert (result.batch_check is not None) is (protocol is Protocol.label_logits)
        assert (result.accuracy_normalized is not None) is (protocol is Protocol.answer_text)
        assert [len(layer) for layer in result.expert_load] == [8, 8]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shortened_items_are_counted(
    protocol: str,
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    items: Make,
    scorer: Make,
) -> None:
    chosen = items("boolq", 3)
    chosen[1] = dataclasses.replace(chosen[1], context="a long story of the sea. " * 90)
    result = PROTOCOLS[protocol](scorer(make_model("none")), chosen, data)
    assert result.shortened == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scores_that_are_no_numbers_are_refused(
    protocol: str,
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    items: Make,
    scorer: Make,
) -> None:
    """An arg-max over NaN would be counted as an answer."""
    model = make_model("none")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(UserError, match="of arc_e are not finite"):
        PROTOCOLS[protocol](scorer(model), items("arc_e", 2), data)
