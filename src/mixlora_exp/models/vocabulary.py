"""A tokenizer beside a model's embedding: every id that it gives has a row there."""

from __future__ import annotations

import json

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mixlora_exp.errors import UserError

__all__ = ["fit_vocabulary", "pad_with_a_known_token"]


def fit_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    whose: str,
    way_out: str = "take the tokenizer that belongs to the weights",
) -> None:
    """Check that the ids of `tokenizer` are below `rows`, those of the embedding.

    A padding token beyond them (one that was added, and the embedding not resized) is taken out of
    the tokenizer, so that no text gives its id either, and a token that the model has pads in its
    place. `whose` begins an error's line, `way_out` ends it.

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
            f"{whose} has {len(tokenizer)} tokens, and the model's embedding {rows} rows: "
            f"{len(beyond)} have none, the first {first!r} (id {beyond[first]}); {way_out}"
        )


def pad_with_a_known_token(tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    """Where a tokenizer has no padding token, take one that it has.

    No token is added: the embedding keeps its size. The unknown token comes first, so that a real
    end of sequence never looks like padding.

    Raises:
        UserError: there is no token to take.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"{whose} has no padding, unknown or end-of-sequence token")


def _largest(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values(), default=-1)


def _take_out(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Remove an added token; a text that spells it is then a text like any other."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [added for added in state["added_tokens"] if added["content"] != token]
    state["padding"] = None  # Batches are padded here, by the collator.
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
