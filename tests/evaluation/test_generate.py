"""Free answers: what is read from them, and that they are the model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from mixlora_exp.config.schema import AnswerForm, DataConfig, EvaluationConfig, Protocol
from mixlora_exp.data.encoding import prompt_with_answers
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.evaluation import score_tests
from mixlora_exp.evaluation.generate import parse_answer
from mixlora_exp.tasks import Item

Make = Callable[..., Any]
OPTIONS = ("a dog", "a dog house", "water", "ice")
ITEM = Item("arc_e", "1", "q", OPTIONS, 2, ("A", "B", "C", "D"))
BOOL = Item("boolq", "2", "q", ("true", "false"), 0, ("true", "false"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" C", 2),
        (" C.", 2),
        ("(B) a dog house", 1),
        ("D) ice\nQuestion: more", 3),
        ("The answer is C.", 2),
        ("The correct answer is: water, of course", 2),
        ("Answer: D", 3),
        ("A dog", 0),
        ("a dog house is bigger", 1),
        ("It is water", 2),
        ("\n\n  ice", 3),
        ("A", 0),
        # Nothing, several, or a word that only begins like a label.
        ("", None),
        ("A, B", None),
        ("A) or B)", None),
        ("E", None),
        ("Cats", None),
        ("either water or ice", None),
        ("iced tea", None),
        ("I do not know", None),
    ],
)
def test_answers_are_read(text: str, expected: int | None) -> None:
    assert parse_answer(text, ITEM) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [(" true", 0), ("False.", 1), ("true\nfalse", 0), ("yes", None)]
)
def test_true_and_false_are_read(text: str, expected: int | None) -> None:
    assert parse_answer(text, BOOL) == expected


@pytest.mark.parametrize("method", ["none", "mixlora"])
def test_equal_to_a_greedy_loop(
    method: str,
    make_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    items: Make,
    scorer: Make,
) -> None:
    model = make_model(method, dtype=torch.float64)
    # transformers' eager attention makes NaN of padding in float64.
    (model if method == "none" else model.get_base_model()).set_attn_implementation("sdpa")
    tests = {
        "arc_e": LoadedSplit(items("arc_e", 5), []),
        "boolq": LoadedSplit(items("boolq", 4), []),
    }
    evaluation = EvaluationConfig(max_new_tokens=4)
    scores = score_tests(Protocol.generate, scorer(model), tests, data, evaluation)
    for score, test in zip(scores, tests.values(), strict=True):
        assert score.unparsed == sum(item.prediction is None for item in score.items)
        assert score.gold_log_likelihood is None
        right = sum(found.prediction == found.answer for found in score.items)
        assert score.accuracy == right / len(test.items)
        for item, found in zip(test.items, score.items, strict=True):
            prompt, _ = prompt_with_answers(item, AnswerForm.label)
            ids = tokenizer(prompt.text)["input_ids"]
            start = len(ids)
            with torch.no_grad():
                while len(ids) < start + 4 and ids[-1] != tokenizer.eos_token_id:
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            assert found.text == tokenizer.decode(ids[start:], skip_special_tokens=True)
            assert found.prediction == parse_answer(found.text, item)
