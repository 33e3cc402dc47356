"""Ensures that every token id of a tokenizer has a row in the model's embedding."""

from __future__ import annotations

import json

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mixlora_exp.errors import UserError


def fit_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    whose: str,
    way_out: str = "take the tokenizer that belongs to the weights",
) -> None:
    """Check that all ids of `tokenizer` are below `rows`, the number of rows of the embedding.

    A padding token beyond them (added without resizing the embedding) is removed from the
    tokenizer, so that no text is encoded with its id, and replaced by an existing token. `whose`
    begins the error message, `way_out` ends it.

    Raises:
        UserError: another token has no row.
    """
    if _largest(tokenizer) < rows:
        return
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        _take_out(tokenizer, str(tokenizer.pad_token))
        tokenizer.pad_token = None
        pad_with_a_known_token(tokenizer, whose)
    if _largest(tokenizer) >= rows:
        beyond = {token: id_ for token, id_ in tokenizer.get_vocab().items() if id_ >= rows}
        first = min(beyond, key=beyond.__getitem__)
        raise UserError(
            f"{whose} has {len(tokenizer)} tokens, but the model's embedding has {rows} rows: "
            f"{len(beyond)} have none, the first {first!r} (id {beyond[first]}); {way_out}"
        )


def pad_with_a_known_token(tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    """Give a tokenizer without padding token one of its existing tokens.

    No token is added, so the embedding keeps its size. The unknown token is preferred, so that a
    real EOS never looks like padding.

    Raises:
        UserError: the tokenizer has neither an unknown token nor EOS.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"{whose} has no padding, unknown or end-of-sequence token: define one in "
            "tokenizer_config.json"
        )


def _largest(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values(), default=-1)


def _take_out(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Remove an added token; text that spells it is then tokenized as ordinary text."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [added for added in state["added_tokens"] if added["content"] != token]
    state["padding"] = None  # Batches are padded here, by the collator.
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
