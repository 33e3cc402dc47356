"""Computes a causal model's cross-entropy from hidden states, without materialising all logits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from mixlora_exp.config.choices import Head
from mixlora_exp.kernels.loss import IGNORED, linear_cross_entropy

SumLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def resolve_head(head: Head, device: torch.device) -> Head:
    """Return the head that `auto` selects on `device`; any other `head` unchanged."""
    if head is not Head.auto:
        return head
    fused = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    return Head.liger if fused else Head.chunked


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum", ignore_index=IGNORED)(
        weight, hidden, labels
    )


def _can_replace(model: PreTrainedModel) -> bool:
    """Return whether the output projection is a frozen `nn.Linear` without bias or logit soft
    cap."""
    head = model.get_output_embeddings()
    return (
        type(head) is nn.Linear
        and head.bias is None
        and not head.weight.requires_grad
        and getattr(model.config, "final_logit_softcapping", None) is None
    )


def _next_token_labels(labels: Tensor) -> Tensor:
    """Return labels shifted left by one, so that each position's label is the next token."""
    return functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()


@contextmanager
def loss_from_hidden(model: PreTrainedModel, head: Head) -> Iterator[None]:
    """Within this context `model(labels=...)` computes its loss without materialising the logits.

    The output projection becomes the identity, and the model's loss function computes projection
    and cross-entropy together; `logits` in the output are then hidden states and must not be used.
    Nothing changes for `head=full`, or if the output projection is trained, adapted, has a bias or
    is followed by a soft cap. `model` is the base model, not the `PeftModel`.
    """
    resolved = resolve_head(head, model.device)
    if resolved is Head.full or not _can_replace(model):
        yield
        return
    projection = model.get_output_embeddings()
    sum_loss: SumLoss = _liger if resolved is Head.liger else linear_cross_entropy

    def loss_function(
        logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch=None, **kwargs
    ) -> Tensor:
        # As in transformers: `shift_labels` takes precedence.
        shifted = kwargs.get("shift_labels")
        labels = _next_token_labels(labels) if shifted is None else shifted
        hidden, labels = logits.flatten(0, -2), labels.flatten().to(logits.device)
        dtype = projection.weight.dtype
        with torch.autocast(logits.device.type, enabled=False):
            total = sum_loss(hidden.to(dtype), projection.weight, labels)
        items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return total / items

    stock, replaced = model.loss_function, vars(projection).get("forward")
    projection.forward = lambda hidden: hidden
    model.loss_function = loss_function
    try:
        yield
    finally:
        if replaced is None:
            del projection.forward
        else:
            projection.forward = replaced
        model.loss_function = stock
