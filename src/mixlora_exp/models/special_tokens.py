"""Which special tokens a tokenizer puts around a text: decided once, when it is loaded.

The decision goes into the tokenizer itself, so that whoever calls it (training, every protocol,
lm-eval, generation, planning) gets the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from mixlora_exp.errors import UserError

__all__ = ["settle_special_tokens", "special_tokens_entry", "special_tokens_line"]

_FLAGS = ("add_bos_token", "add_eos_token")


def settle_special_tokens(
    tokenizer: PreTrainedTokenizerBase, stated: Mapping[str, Any], whose: str
) -> None:
    """Let `tokenizer` put before a text what its configuration says, and nothing after it.

    `stated` is the content of `tokenizer_config.json`. Where it has `add_bos_token`, that decides
    whether a text begins with BOS (transformers reads it only where there is no `tokenizer.json`);
    else the template of `tokenizer.json` does. Nothing follows a text, whatever template and
    `add_eos_token` say, for each text here is a prompt, or one with an answer whose tokens count:
    what ends an answer is added where answers are trained on, once. A tokenizer that does so
    already is left as it is. `whose` begins an error's line.

    Raises:
        UserError: a flag is no boolean, or BOS is called for and there is none.
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
    """The special tokens in a run's examples, for its record: those `before_text`, those
    `after_prompt` (none, where the tokenizer was settled) and the one `after_answer`."""
    before, after = _added(tokenizer)
    return {
        "before_text": tokenizer.convert_ids_to_tokens(before),
        "after_prompt": tokenizer.convert_ids_to_tokens(after),
        "after_answer": tokenizer.eos_token,
    }


def special_tokens_line(tokenizer: PreTrainedTokenizerBase) -> str:
    """The same for a run's log."""
    entry = special_tokens_entry(tokenizer)
    before = " ".join(entry["before_text"]) or "none"
    return f"Special tokens: {before} before a text, {entry['after_answer']} after an answer"


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    vocabulary, special = tokenizer.get_vocab(), set(tokenizer.all_special_tokens)
    # A text that it knows: of others some tokenizers make nothing, and some an error.
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
    """What of a post-processor concerns the places of tokens in the text, and adds none."""
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
