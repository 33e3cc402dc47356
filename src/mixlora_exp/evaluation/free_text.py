"""Protocols of free text: one thing must be right in an answer that the model generates, greedily.

`exact_match`: the final number, in the format of GSM8K. Nobody guesses a number, so `chance` is 0.
`answer_pattern`: the first of the task's labels that the text names, as in the commonsense suite of
LLM-Adapters (arXiv 2304.01933); `chance` is that of the labels which stand in the question, or of
all if fewer than two do. A text without number or label counts as unparsed and as wrong;
`majority_class` is the share of the most frequent right answer.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from statistics import median

from transformers import PreTrainedTokenizerBase

from mixlora_exp.config.schema import AnswerForm, DataConfig, DataSource, EvaluationConfig, Protocol
from mixlora_exp.data.chat import check_positions, encode_chats
from mixlora_exp.data.encoding import Encoded, encode, prompt_with_answers
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation.forward import Scorer
from mixlora_exp.evaluation.generate import generated_texts
from mixlora_exp.evaluation.scores import ItemScore, TaskScore, summarize
from mixlora_exp.tasks.base import Item
from mixlora_exp.tasks.free_text import final_number, first_named


def encode_free_text(
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    data: DataConfig,
    evaluation: EvaluationConfig,
    protocol: Protocol = Protocol.exact_match,
) -> list[Encoded]:
    """Encode the items' prompts, in the chat template with `data=chat`.

    Raises:
        UserError: an item has neither a number nor labels, or is too long for the model.
    """
    for item in items:
        if not item.labels[0]:
            lacks = "a number: exact_match compares the last one"
            if protocol is Protocol.answer_pattern:
                lacks = (
                    "a label: answer_pattern looks for the item's own among task.custom's labels"
                )
            raise UserError(f"item {item.id} of {item.task} has an answer without {lacks}")
    if data.name is DataSource.chat:
        found = encode_chats(tokenizer, items)
    else:
        questions = [(item.id, *prompt_with_answers(item, AnswerForm.text)) for item in items]
        found = encode(tokenizer, questions, data.cutoff_length)
    for item, encoded in zip(items, found, strict=True):
        check_positions(tokenizer, item, len(encoded.prompt) + evaluation.max_new_tokens)
    usual = median(len(encoded.answers[0]) for encoded in found) if found else 0
    if protocol is Protocol.exact_match and evaluation.max_new_tokens < usual:
        sys.stderr.write(
            f"warning: {items[0].task}: half of its own answers have more than "
            f"{int(usual):,} tokens, and texts are cut off after evaluation.max_new_tokens="
            f"{evaluation.max_new_tokens}: the number that one happens to end with counts\n"
        )
    return found


def score_free_text(
    protocol: Protocol,
    scorer: Scorer,
    tests: Mapping[str, LoadedSplit],
    evaluation: EvaluationConfig,
    encoded: Mapping[str, Sequence[Encoded]],
) -> list[TaskScore]:
    """Score the items of all tasks by the answers that the generated texts name. `encoded`: by
    task, from `encode_free_text`. An item's `prediction` is 0 if its answer is the right one, 1 for
    another, None for none."""
    results = []
    for task, test in tests.items():
        keys = [f"{task}/{item.id}" for item in test.items]
        prompts = [found.prompt for found in encoded[task]]
        texts = generated_texts(scorer, prompts, keys, evaluation.max_new_tokens)
        scores = [_score(protocol, *pair) for pair in zip(test.items, texts, strict=True)]
        unparsed = sum(score.prediction is None for score in scores)
        found = summarize(task, protocol.value, test.items, scores, shortened=0, unparsed=unparsed)
        chance = sum(_chance(protocol, item) for item in test.items) / len(test.items)
        results.append(dataclasses.replace(found, chance=chance))
    return results


def _chance(protocol: Protocol, item: Item) -> float:
    if protocol is Protocol.exact_match:
        return 0.0
    offered = sum(label in item.question for label in item.labels)
    return 1 / (offered if offered > 1 else len(item.labels))


def _score(protocol: Protocol, item: Item, text: str) -> ItemScore:
    if protocol is Protocol.exact_match:
        number = final_number(text)
        found = None if number is None else f"{number:f}"
    else:
        found = first_named(text, item.labels)
    prediction = None if found is None else int(found != item.labels[0])
    return ItemScore(id=item.id, answer=0, prediction=prediction, text=text)
