"""Sets which special tokens a tokenizer adds to a text, once, when it is loaded.

The tokenizer itself is changed, so that all its users (training, every protocol, lm-eval,
generation, planning) get the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from mixlora_exp.errors import UserError

_FLAGS = ("add_bos_token", "add_eos_token")


def settle_special_tokens(
    tokenizer: PreTrainedTokenizerBase, stated: Mapping[str, Any], whose: str
) -> None:
    """Make `tokenizer` add its configured special tokens before a text, and none after it.

    `stated` is the content of `tokenizer_config.json`. Its `add_bos_token` decides whether a text
    begins with BOS (transformers reads the flag only without a `tokenizer.json`); without the flag,
    the template in `tokenizer.json` decides. Nothing follows a text, regardless of template and
    `add_eos_token`: texts are prompts, with or without an answer to score, and training adds EOS to
    answers itself. A tokenizer that already behaves in this way is unchanged. `whose` begins the
    error messages.

    Raises:
        UserError: a flag is not a boolean, or BOS is required but undefined.
    """
    flags = {name: stated[name] for name in _FLAGS if stated.get(name) is not None}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise UserError(
                f"{whose} has {name}={value!r} in tokenizer_config.json: write true or false there"
            )
    before, after = _added(tokenizer)
    wanted = list(before)
    if "add_bos_token" in flags:
        bos = tokenizer.bos_token_id
        wanted = [token for token in before if token != bos]
        if flags["add_bos_token"]:
            if bos is None:
                raise UserError(
                    f"{whose} has add_bos_token=true but no bos_token: name one in "
                    "tokenizer_config.json, or write false there"
                )
            wanted.insert(0, bos)
    if wanted != before or after:
        backend = tokenizer.backend_tokenizer
        names = tokenizer.convert_ids_to_tokens(wanted)
        backend.post_processor = processors.Sequence(
            [
                *_byte_levels(backend.post_processor),
                processors.TemplateProcessing(
                    single=[*names, "$A"],
                    pair=[*names, "$A", *(f"{name}:1" for name in names), "$B:1"],
                    special_tokens=list(zip(names, wanted, strict=True)),
                ),
            ]
        )


def special_tokens_entry(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the special tokens in a run's examples, for its record: `before_text`, `after_prompt`
    (none after `settle_special_tokens`) and `after_answer`."""
    before, after = _added(tokenizer)
    return {
        "before_text": tokenizer.convert_ids_to_tokens(before),
        "after_prompt": tokenizer.convert_ids_to_tokens(after),
        "after_answer": tokenizer.eos_token,
    }


def special_tokens_line(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the special tokens in a run's examples, as a line of its output."""
    entry = special_tokens_entry(tokenizer)
    before = " ".join(entry["before_text"]) or "none"
    return f"Special tokens: {before} before a text, {entry['after_answer']} after an answer"


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before and after a text."""
    vocabulary, special = tokenizer.get_vocab(), set(tokenizer.all_special_tokens)
    # A text from the vocabulary: for unknown texts some tokenizers return nothing or fail.
    for text in sorted(vocabulary.keys() - special, key=vocabulary.__getitem__):
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        if bare:
            break
    else:
        return [], []
    full = tokenizer(text)["input_ids"]
    start = next(i for i in range(len(full) + 1) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


def _byte_levels(processor: Any) -> list[processors.ByteLevel]:
    """Return the parts of a post-processor that adjust token offsets and add no tokens."""
    if processor is None:
        return []
    state = json.loads(processor.__getstate__())
    parts = state["processors"] if state["type"] == "Sequence" else [state]
    return [
        processors.ByteLevel(
            add_prefix_space=part["add_prefix_space"], trim_offsets=part["trim_offsets"]
        )
        for part in parts
        if "trim_offsets" in part
    ]
