"""The training loss of one adapter, or of several adapters in one forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from mixlora_exp.adapters.row_map import Segment
from mixlora_exp.config.choices import Head
from mixlora_exp.training.head import loss_from_hidden
from mixlora_exp.training.packed import Batch, pack_batches


def label_count(batch: Batch) -> Tensor:
    """Return the number of label tokens in a batch, a scalar tensor; the first column has no
    prediction."""
    return (batch["labels"][..., 1:] != -100).sum()


def single_loss(
    model: nn.Module,
    base: nn.Module,
    batch: Batch,
    items: Tensor | int,
    head: Head,
    attention: str = "",
) -> Tensor:
    """Return the loss of a single adapter on a padded or packed batch, by the model's own forward
    pass.

    model: the PEFT model, possibly wrapped for several processes; base: its base model.
    items: label tokens of the optimizer step, by which the summed loss is divided. attention: as
    yielded by `packed_attention`, within which a packed batch and the backward pass run.
    """
    if "unpack" in batch:
        packed = pack_batches(base, {"": batch}, attention)
        batch = {**batch, "packed": packed}
        del batch["unpack"]
    with loss_from_hidden(base, head):
        return model(**batch, num_items_in_batch=items)["loss"]


def joint_losses(
    model: PeftModel,
    batches: Mapping[str, Batch],
    items: Mapping[str, Tensor | int],
    head: Head,
    attention: str,
) -> dict[str, Tensor]:
    """Return the loss of each adapter on its own batch, equal to that of a separate run.

    The batches pass through the frozen model together. They share only read-only state, so neither
    gradients nor NaN spread between adapters. items: label tokens of each adapter's optimizer step,
    by which its summed loss is divided. With experts, the loss includes the router loss of the
    adapter's rows, which `model.base_model.router_reports` has separately.

    Call this and the backward pass within `packed_attention`, which yields `attention`. The tuner's
    `row_map` stays set, for layers that gradient checkpointing recomputes.
    """
    tuner = model.base_model
    base = tuner.model
    packed = pack_batches(base, batches, attention)
    tuner.row_map.use(segments=[Segment(n, part.rows) for n, part in packed.parts.items()])
    masks = {name: batch["attention_mask"] for name, batch in batches.items()}
    types = {n: batch["task_types"] for n, batch in batches.items() if "task_types" in batch}
    tuner.row_map.begin_pass(masks, types)
    hidden = base.model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        packed=packed,
        use_cache=False,
    ).last_hidden_state[0]
    reports = tuner.collect_reports()
    losses = {}
    with loss_from_hidden(base, head):
        for name, batch in batches.items():
            part, labels = packed.parts[name], batch["labels"]
            states = hidden[part.rows].view(*part.shape, -1)
            kept: Any = batch.get("logits_to_keep")
            logits = base.get_output_embeddings()(states if kept is None else states[:, kept])
            loss = base.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=base.config.vocab_size,
                num_items_in_batch=items[name],
            )
            if name in reports:
                coefficient = model.peft_config[name].router_loss_coef
                term = coefficient * reports[name].loss
                # In the tuner's order: the quotient of the two counts would be float32.
                loss = loss + term * label_count(batch) / items[name]
            losses[name] = loss
    return losses


def total_of(losses: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of the losses; its gradient for each adapter is that of the adapter's own
    loss."""
    return torch.stack(list(losses.values())).sum()
