"""From an item to tokens: prompt, answer, and what is cut when they are too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from mixlora_exp.config.schema import AnswerForm, DataConfig
from mixlora_exp.errors import UserError
from mixlora_exp.tasks import TASKS, Item, Prompt
from mixlora_exp.tasks.custom import ask_label, ask_text

__all__ = ["Encoded", "Example", "ask", "encode", "encode_examples", "encode_questions"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt's tokens and those of each possible answer after it."""

    prompt: list[int]
    answers: list[list[int]]
    shortened: bool


@dataclass(frozen=True, slots=True)
class Example:
    """A training example: `input_ids`, of which the last `answer_length` are the answer (with its
    end-of-sequence token). `shortened`: its context was cut."""

    input_ids: list[int]
    answer_length: int
    task: str
    shortened: bool = False


def ask(item: Item, form: AnswerForm, *, boolq_passage: bool = True) -> tuple[Prompt, list[str]]:
    """The prompt of an item in one form and the answers it can have, one per option."""
    if item.task == "boolq" and not boolq_passage:
        item = replace(item, context="")
    task = TASKS.get(item.task)
    if form is AnswerForm.label:
        return (task.ask_label if task else ask_label)(item), list(item.labels)
    return (task.ask_text if task else ask_text)(item), list(item.options)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids with the tokenizer's own start token and no end token."""
    batch = tokenizer(texts)["input_ids"]
    end = tokenizer.eos_token_id
    return [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in batch]


def _shorten(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, excess: int) -> Prompt:
    """Drop `excess` tokens or a little more from the end of the context."""
    offsets = tokenizer(prompt.text, return_offsets_mapping=True)["offset_mapping"]
    start, end = len(prompt.before), len(prompt.before) + len(prompt.context)
    ends = [stop for _, stop in offsets if start < stop <= end]
    # A character of several tokens gives them all the same end: it goes whole.
    kept = [stop for stop in ends[:-excess] if stop < ends[-excess]]
    keep = kept[-1] - start if kept else 0
    return replace(prompt, context=prompt.context[:keep].rstrip())


def _split(full: list[int], prompt: list[int], name: str, answer: str) -> list[int]:
    if full[: len(prompt)] != prompt or len(full) == len(prompt):
        raise UserError(
            f"model: its tokenizer joins the prompt of item {name} and the answer {answer!r} "
            "into one token, so the answer cannot be scored"
        )
    return full[len(prompt) :]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[tuple[str, Prompt, list[str]]],
    cutoff: int,
) -> list[Encoded]:
    """Encode (item id, prompt, answers) triples; the longest answer decides about shortening.

    An example of more than `cutoff` tokens (one more is kept free for the end-of-sequence token)
    loses the end of its context, never its question, options or answer: one that is too long
    without any context stays longer than `cutoff` (PIQA has such rows).

    Raises:
        UserError: an answer cannot be told apart from the prompt.
    """
    prompts = _ids(tokenizer, [prompt.text for _, prompt, _ in asked])
    fulls = iter(
        _ids(tokenizer, [f"{prompt.text} {a}" for _, prompt, answers in asked for a in answers])
        if asked
        else []
    )
    encoded = []
    for (name, prompt, answers), ids in zip(asked, prompts, strict=True):
        ends = [_split(next(fulls), ids, name, answer) for answer in answers]
        room = cutoff - 1 - max(len(end) for end in ends)
        shortened = len(ids) > room and bool(prompt.context)
        while len(ids) > room and prompt.context:
            prompt = _shorten(tokenizer, prompt, len(ids) - room)
            (ids,) = _ids(tokenizer, [prompt.text])
        encoded.append(Encoded(ids, ends, shortened))
    return encoded


def encode_questions(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], form: AnswerForm, data: DataConfig
) -> list[Encoded]:
    """Encode items for scoring, each with all its possible answers."""
    asked = [(item.id, *ask(item, form, boolq_passage=data.boolq_passage)) for item in items]
    return encode(tokenizer, asked, data.cutoff_length)


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], data: DataConfig
) -> list[Example]:
    """Encode items for training: one example per item and form, its answer ended by EOS."""
    if tokenizer.eos_token_id is None:
        raise UserError("model: its tokenizer has no end-of-sequence token to end answers with")
    examples = []
    for form in data.forms:
        asked = []
        for item in items:
            prompt, answers = ask(item, form, boolq_passage=data.boolq_passage)
            asked.append((item.id, prompt, [answers[item.answer]]))
        for item, encoded in zip(items, encode(tokenizer, asked, data.cutoff_length), strict=True):
            answer = [*encoded.answers[0], tokenizer.eos_token_id]
            examples.append(
                Example(encoded.prompt + answer, len(answer), item.task, encoded.shortened)
            )
    return examples
