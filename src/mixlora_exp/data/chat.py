"""`data=chat`: free text in the model's own chat template, with the loss on the completion."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from mixlora_exp.data.encoded import Encoded, Example
from mixlora_exp.errors import UserError, shown
from mixlora_exp.tasks import Item

DAY = datetime.date(2024, 7, 26)
"""What templates that write today's date are told, so that a run has the same tokens on each day:
the date that Llama 3's template itself takes where it is told none."""
CODES = (
    *("-d", "-m", "-y", "-j", "-H", "-I", "-M", "-S"),
    *"aAbBcCdDeFgGhHIjmMnprRStTuUVwWxXyYzZ%",
)
"""Of `strftime`'s format, which are all replaced, those without a sign last."""


def dated_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the tokenizer's chat template with `DAY` in the place of today; None if it asks for no
    date, or there is none. (A function would not reach it: transformers may pass on texts alone.)
    """
    template = tokenizer.chat_template or ""
    text = template.get("default", "") if isinstance(template, dict) else template
    if "strftime_now" not in text:
        return None
    filled = "".join(f"|replace('%{code}', '{DAY.strftime('%' + code)}')" for code in CODES)
    macro = f"{{%- macro strftime_now(format) -%}}{{{{ format{filled} }}}}{{%- endmacro %}}"
    # Else a line break that the template begins with would count as that of the macro's end.
    return f"{macro}{{{{ '' }}}}{text}"


def encode_chats(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[Encoded]:
    """Encode the messages of items as prompts, and the completions, which end with EOS. A template
    that writes the date writes that of `DAY`.

    Raises:
        UserError: the tokenizer has no chat template, or its template does not put the completion
            after the messages.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "data=chat: the model's tokenizer has no chat template; use data=local, or another "
            "model"
        )
    found, template = [], dated_template(tokenizer)
    for item in items:
        turns = [{"role": role, "content": content} for role, content in item.turns]
        whole = [*turns, {"role": "assistant", "content": item.options[0]}]
        try:
            before = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False, chat_template=template
            )
            text = tokenizer.apply_chat_template(whole, tokenize=False, chat_template=template)
        except Exception as error:  # noqa: BLE001 - a template raises what its author chose
            raise UserError(
                f"data=chat: the model's chat template refuses item {item.id} of {item.task} "
                f"({type(error).__name__}: {shown(str(error), 200)})"
            ) from error
        # The template writes the special tokens itself.
        ids = [
            tokenizer(t, add_special_tokens=False, verbose=False).input_ids for t in (before, text)
        ]
        prompt, full = ids
        if not text.startswith(before) or full[: len(prompt)] != prompt:
            raise UserError(
                f"data=chat: the model's chat template changes the messages of item {item.id} of "
                f"{item.task} when the answer follows; use data=local, or another model"
            )
        found.append(Encoded(prompt, [_ended(full[len(prompt) :], tokenizer.eos_token_id)], False))
    return found


def _ended(answer: list[int], eos: int) -> list[int]:
    """Return the answer up to its EOS, which some templates write themselves, with more after
    it."""
    return answer[: answer.index(eos) + 1] if eos in answer else [*answer, eos]


def chat_examples(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[Example]:
    """Training examples of items, with the loss on the completion and its EOS.

    Raises:
        UserError: as `encode_chats`, or an item is too long for the model.
    """
    examples = []
    for item, encoded in zip(items, encode_chats(tokenizer, items), strict=True):
        answer = encoded.answers[0]
        check_positions(tokenizer, item, len(encoded.prompt) + len(answer))
        examples.append(Example(encoded.prompt + answer, len(answer), item.task))
    return examples


def check_positions(tokenizer: PreTrainedTokenizerBase, item: Item, needed: int) -> None:
    """Refuse free text that needs more positions than the model has; it is never truncated."""
    if needed > tokenizer.model_max_length:
        raise UserError(
            f"item {item.id} of {item.task} needs {needed:,} tokens, and the model has "
            f"{tokenizer.model_max_length:,} positions: remove it, or choose a model with more"
        )
