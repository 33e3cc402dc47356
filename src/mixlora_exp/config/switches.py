"""The switches between this project's behaviour and the official packages'."""

from __future__ import annotations

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

ONLY = {
    "loss_on": {"loss_on": "all"},
    # Padding can count only if all tokens do.
    "padding_in_loss": {"loss_on": "all", "padding_in_loss": True},
    "order": {"order": "fixed"},
    "train_magnitude": {"train_magnitude": False},
    "router_loss": {"router_loss": "topk"},
    "router_loss_pooling": {"router_loss_pooling": "all"},
    # The official packages use 1e-3 (best row of Table 9), as `correct` does; Section 3.2 has 1e-2.
    "router_loss_coef": {"router_loss_coef": 1e-2},
    "boolq_passage": {"boolq_passage": False},
    "arc_labels": {"arc_labels": "nine"},
    "dropout_at_evaluation": {"dropout_at_evaluation": True},
}
"""Switch -> the fields that the preset `only_<switch>` changes relative to `correct`."""
