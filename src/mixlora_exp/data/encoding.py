"""Encodes items as tokens of prompt and answers, and truncates long contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from mixlora_exp.config.schema import AnswerForm, DataConfig, DataSource
from mixlora_exp.data.chat import chat_examples
from mixlora_exp.data.encoded import Encoded, Example
from mixlora_exp.errors import UserError
from mixlora_exp.tasks import TASKS, Item, Prompt
from mixlora_exp.tasks.custom import label_prompt, text_prompt


def prompt_with_answers(
    item: Item, form: AnswerForm, *, boolq_passage: bool = True
) -> tuple[Prompt, list[str]]:
    """Return the prompt of an item in one form, and its possible answers, one per option."""
    if item.task == "boolq" and not boolq_passage:
        item = replace(item, context="")
    task = TASKS.get(item.task)
    if item.turns:
        return Prompt("", "", item.question), list(item.options)
    if form is AnswerForm.label:
        return (task.label_prompt if task else label_prompt)(item), list(item.labels)
    return (task.text_prompt if task else text_prompt)(item), list(item.options)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, including the tokenizer's leading special tokens."""
    # No warning about long texts: they are truncated or refused below.
    return tokenizer(texts, verbose=False)["input_ids"]


def _shorten(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, excess: int) -> Prompt:
    """Drop at least `excess` tokens from the end of the context."""
    found = tokenizer(prompt.text, return_offsets_mapping=True, verbose=False)
    offsets = found["offset_mapping"]
    start, end = len(prompt.before), len(prompt.before) + len(prompt.context)
    ends = [stop for _, stop in offsets if start < stop <= end]
    # All tokens of a multi-token character have the same end, so it is dropped as a whole.
    kept = [stop for stop in ends[:-excess] if stop < ends[-excess]]
    keep = kept[-1] - start if kept else 0
    return replace(prompt, context=prompt.context[:keep].rstrip())


def _split(full: list[int], prompt: list[int], name: str, answer: str) -> list[int]:
    if full[: len(prompt)] != prompt or len(full) == len(prompt):
        raise UserError(
            f"model: its tokenizer joins the prompt of item {name} and the answer {answer!r} "
            "into one token, so the answer cannot be scored; choose another model"
        )
    return full[len(prompt) :]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[str, Prompt, list[str]]],
    cutoff: int,
) -> list[Encoded]:
    """Encode (item id, prompt, answers) triples, truncating contexts for the longest answer.

    If prompt and longest answer have more than `cutoff` - 1 tokens (one is reserved for EOS), the
    end of the context is dropped, never the question, options or answer: an example that is too
    long without any context stays longer than `cutoff` (PIQA has such rows).

    Raises:
        UserError: the tokenizer joins the end of a prompt and the beginning of an answer.
    """
    prompts = _ids(tokenizer, [prompt.text for _, prompt, _ in questions])
    fulls = iter(
        _ids(tokenizer, [f"{prompt.text} {a}" for _, prompt, answers in questions for a in answers])
        if questions
        else []
    )
    encoded = []
    for (name, prompt, answers), ids in zip(questions, prompts, strict=True):
        ends = [_split(next(fulls), ids, name, answer) for answer in answers]
        room = cutoff - 1 - max(len(end) for end in ends)
        shortened = len(ids) > room and bool(prompt.context)
        while len(ids) > room and prompt.context:
            prompt = _shorten(tokenizer, prompt, len(ids) - room)
            (ids,) = _ids(tokenizer, [prompt.text])
        encoded.append(Encoded(ids, ends, shortened))
    return encoded


def check_labels(
    tokenizer: PreTrainedTokenizerBase, name: str, labels: Sequence[str], ids: Sequence[list[int]]
) -> None:
    """Refuse labels of item `name` that are unknown to the tokenizer or have the same tokens."""
    labelled: dict[tuple[int, ...], str] = {}
    for label, own in zip(labels, ids, strict=True):
        if tokenizer.unk_token_id in own:
            raise UserError(
                f"model: its tokenizer does not know the label {label!r} of {name} (it gives "
                f"{tokenizer.unk_token}); use evaluation.protocols=[answer_text] and "
                "data.forms=[text]"
            )
        other = labelled.setdefault(tuple(own), label)
        if other != label:
            raise UserError(
                f"model: its tokenizer gives {other!r} and {label!r}, labels of {name}, the same "
                "token; use evaluation.protocols=[answer_text] and data.forms=[text]"
            )


def _check_length(
    tokenizer: PreTrainedTokenizerBase,
    item: Item,
    prompt: Prompt,
    needed: int,
    data: DataConfig,
    new_tokens: int = 0,
) -> None:
    """Refuse an item that needs more positions than the model has (`model_max_length`)."""
    positions = tokenizer.model_max_length
    if needed <= positions:
        return
    fitting = positions - new_tokens
    if prompt.context and fitting < data.cutoff_length:
        way_out = f"set data.cutoff_length={fitting} or less"
    else:
        way_out = "it has no context to truncate; remove it, or choose a model with more positions"
    raise UserError(
        f"item {item.id} of {item.task} needs {needed:,} tokens, and the model has "
        f"{positions:,} positions: {way_out}"
    )


def encode_questions(
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    form: AnswerForm,
    data: DataConfig,
    new_tokens: int = 0,
) -> list[Encoded]:
    """Encode items for scoring, each with all its possible answers. In form `label` the model's
    input is the prompt alone, after which it may generate `new_tokens` tokens.

    Raises:
        UserError: two labels are the same token, a label is unknown, or an item is too long for the
            model.
    """
    passage = data.boolq_passage
    questions = [
        (item.id, *prompt_with_answers(item, form, boolq_passage=passage)) for item in items
    ]
    encoded = encode(tokenizer, questions, data.cutoff_length)
    for item, (name, prompt, answers), found in zip(items, questions, encoded, strict=True):
        if form is AnswerForm.label:
            check_labels(tokenizer, name, answers, found.answers)
            needed = len(found.prompt) + new_tokens
        else:
            # The last token of an answer is only a target, never an input.
            needed = len(found.prompt) + max(map(len, found.answers)) - 1
        _check_length(tokenizer, item, prompt, needed, data, new_tokens)
    return encoded


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], data: DataConfig
) -> list[Example]:
    """Encode items for training: one example per item and form, with EOS after the answer.

    Raises:
        UserError: the tokenizer has no EOS, two labels are the same token, a label is unknown, or
            an item is too long for the model.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "model: its tokenizer has no end-of-sequence token to end answers with; choose another "
            "model"
        )
    if data.name is DataSource.chat:
        return chat_examples(tokenizer, items)
    examples = []
    for form in data.forms:
        questions = []
        for item in items:
            prompt, answers = prompt_with_answers(item, form, boolq_passage=data.boolq_passage)
            questions.append((item.id, prompt, [answers[item.answer]]))
        if form is AnswerForm.label:
            # Examples have only the gold label; one item per set of labels checks all labels.
            kinds = {item.labels: item for item in reversed(items)}
            encode_questions(tokenizer, list(kinds.values()), form, data)
        all_encoded = encode(tokenizer, questions, data.cutoff_length)
        for item, (_, prompt, _), encoded in zip(items, questions, all_encoded, strict=True):
            answer = [*encoded.answers[0], tokenizer.eos_token_id]
            ids = encoded.prompt + answer
            _check_length(tokenizer, item, prompt, len(ids), data)
            examples.append(Example(ids, len(answer), item.task, encoded.shortened))
    return examples
