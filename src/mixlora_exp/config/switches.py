"""The switches between this project's behaviour and the official packages'."""

from __future__ import annotations

__all__ = ["SWITCHES"]

SWITCHES = {
    "loss_on": "trainer.loss_on",
    "padding_in_loss": "trainer.padding_in_loss",
    "order": "trainer.order",
    "train_magnitude": "method.train_magnitude",
    "router_loss": "method.router_loss",
    "router_loss_pooling": "method.router_loss_pooling",
    "router_loss_coef": "method.router_loss_coef",
    "boolq_passage": "data.boolq_passage",
    "arc_labels": "evaluation.arc_labels",
    "dropout_at_evaluation": "evaluation.dropout",
}
"""Field of the group `preset` -> the field that takes its value."""
