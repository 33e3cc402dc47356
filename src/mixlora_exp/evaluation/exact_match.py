"""Protocol `exact_match`: the model generates a solution, whose final number must be the right one.

For free text that ends with a number, in the format of GSM8K. Decoding is greedy. A text without a
number counts as unparsed and as wrong. Nobody guesses a number, so `chance` is 0; `majority_class`
is the share of the most frequent number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from mixlora_exp.config.schema import AnswerForm, DataConfig, DataSource, EvaluationConfig
from mixlora_exp.data.chat import check_positions, encode_chats
from mixlora_exp.data.encoding import Encoded, ask, encode
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation.forward import Scorer
from mixlora_exp.evaluation.generate import generated_texts
from mixlora_exp.evaluation.scores import ItemScore, TaskScore, summarize
from mixlora_exp.tasks.base import Item
from mixlora_exp.tasks.free_text import final_number


def encode_free_text(
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    data: DataConfig,
    evaluation: EvaluationConfig,
) -> list[Encoded]:
    """Encode the items' prompts, in the chat template with `data=chat`.

    Raises:
        UserError: an item's answer has no number, or it is too long for the model.
    """
    for item in items:
        if not item.labels[0]:
            raise UserError(
                f"item {item.id} of {item.task} has an answer without a number: exact_match "
                "compares the last one"
            )
    if data.name is DataSource.chat:
        found = encode_chats(tokenizer, items)
    else:
        asked = [(item.id, *ask(item, AnswerForm.text)) for item in items]
        found = encode(tokenizer, asked, data.cutoff_length)
    for item, encoded in zip(items, found, strict=True):
        check_positions(tokenizer, item, len(encoded.prompt) + evaluation.max_new_tokens)
    return found


def score_exact_match(
    scorer: Scorer,
    tests: Mapping[str, LoadedSplit],
    evaluation: EvaluationConfig,
    encoded: Mapping[str, Sequence[Encoded]],
) -> list[TaskScore]:
    """Score the items of all tasks by the final numbers of the generated texts. `encoded`: by task,
    from `encode_free_text`. An item's `prediction` is 0 if its number is the right one, 1 for
    another, None for none."""
    results = []
    for task, test in tests.items():
        keys = [f"{task}/{item.id}" for item in test.items]
        prompts = [found.prompt for found in encoded[task]]
        texts = generated_texts(scorer, prompts, keys, evaluation.max_new_tokens)
        scores = [_score(item, text) for item, text in zip(test.items, texts, strict=True)]
        unparsed = sum(score.prediction is None for score in scores)
        found = summarize(task, "exact_match", test.items, scores, shortened=0, unparsed=unparsed)
        results.append(dataclasses.replace(found, chance=0.0))
    return results


def _score(item: Item, text: str) -> ItemScore:
    number = final_number(text)
    right = number is not None and f"{number:f}" == item.labels[0]
    prediction = None if number is None else 0 if right else 1
    return ItemScore(id=item.id, answer=0, prediction=prediction, text=text)
