"""Text generation after prompts: greedy or sampled, in batches, with the KV cache."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer

from mixlora_exp.data.chat import dated_template
from mixlora_exp.data.collator import pad_left
from mixlora_exp.errors import UserError, shown
from mixlora_exp.evaluation.head import full_precision_head
from mixlora_exp.models.precision import autocast, resolve_dtype
from mixlora_exp.serving.open import Opened

Prompt = str | Sequence[Mapping[str, str]]
"""A text to continue, or the turns of a chat (`role` and `content`)."""


class _Numbers(LogitsProcessor):
    """Raises `UserError` if the logits are not finite; decoding would still choose a token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.isfinite().all():
            raise UserError(
                "the model's logits are not finite, because the training of the adapter diverged: "
                "use an earlier checkpoint"
            )
        return scores


KEPT = "\n\t\u200c\u200d"
"""Characters that are not escaped: newline, tab, zero-width joiner and non-joiner."""


def harmless(text: str) -> str:
    """Return `text` for standard output: on a terminal, control characters are escaped."""
    return shown(text, None, keep=KEPT) if sys.stdout.isatty() else text


class _Streamer(TextStreamer):
    """Prints an answer as it is generated."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(harmless(text), stream_end)


def check_chat(opened: Opened) -> None:
    """Refuse a chat if the tokenizer has no chat template."""
    if opened.tokenizer.chat_template is None:
        raise UserError(
            f"chat=true: the tokenizer of model={opened.config.model.name} has no chat template; "
            "leave it out"
        )


def _check_length(opened: Opened, prompt: Prompt, tokens: int, new: int) -> None:
    """Refuse a prompt that, with the new tokens, exceeds the model's positions."""
    limit = opened.tokenizer.model_max_length
    if tokens + new <= limit:
        return
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    room = limit - tokens
    hint = f"set max_new_tokens={room} or less" if room > 0 else "shorten it"
    raise UserError(
        f"max_new_tokens={new}: the prompt {text[:40]!r} has {tokens:,} tokens, but the model has "
        f"{limit:,} positions: {hint}"
    )


def _prompt_ids(opened: Opened, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return opened.tokenizer(prompt, verbose=False)["input_ids"]
    check_chat(opened)
    return opened.tokenizer.apply_chat_template(
        list(prompt),
        add_generation_prompt=True,
        return_dict=True,
        # As in training.
        chat_template=dated_template(opened.tokenizer),
    )["input_ids"]


@torch.inference_mode()
def continuations(
    opened: Opened,
    prompts: Iterable[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 1,
    stream: bool = False,
    adapters: Sequence[str] | None = None,
) -> Iterator[str]:
    """Generate a continuation of each prompt, in order, `batch_size` prompts at a time.

    Greedy at `temperature` 0, otherwise sampled; with the KV cache. `stream` prints text as it is
    generated (one prompt at a time). `adapters` has a label of `Opened.adapters` for each prompt;
    prompts for different adapters share batches.

    Raises:
        UserError: a prompt is too long for the model (checked before generation), there is no chat
            template, or the logits are not finite.
    """
    tokenizer, model = opened.tokenizer, opened.model
    sampling = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    dtype = resolve_dtype(opened.config.trainer.precision, model.device)
    pending = []
    for prompt in prompts:
        pending.append(_prompt_ids(opened, prompt))
        _check_length(opened, prompt, len(pending[-1]), max_new_tokens)
    for start in range(0, len(pending), batch_size):
        rows = pending[start : start + batch_size]
        batch = {k: v.to(model.device) for k, v in pad_left(rows, tokenizer.pad_token_id).items()}
        del batch["position_ids"]  # `generate` computes them from the mask.
        if adapters is not None:
            chosen = adapters[start : start + batch_size]
            batch["adapter_names"] = [opened.adapters[label] for label in chosen]
        streamer = _Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        # As in scoring: with a bf16 output projection the arg-max token sometimes differs.
        with autocast(model.device, dtype), full_precision_head(model):
            output = model.generate(
                **batch, **sampling, max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id, streamer=streamer if stream else None,
                logits_processor=LogitsProcessorList([_Numbers()]),
            )  # fmt: skip
        new = output[:, batch["input_ids"].shape[1] :]
        yield from tokenizer.batch_decode(new, skip_special_tokens=True)
