"""A model on the meta device, without weights, to find its projections and to check its support."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import fx, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers import initialization as transformers_initialization

from mixlora_exp.config.schema import ATTENTION_TARGETS, FEED_FORWARD_TARGETS
from mixlora_exp.config.schema_method import FEED_FORWARD_BLOCK as BLOCK
from mixlora_exp.config.schema_model import ModelConfig
from mixlora_exp.errors import UserError, shown
from mixlora_exp.models.architecture import architecture_of
from mixlora_exp.models.text_cache import cached_by_text

FORMULA = "down_proj(mul(act_fn(gate_proj(x)), up_proj(x)))"
"""The feed-forward block that experts extend; a block with another formula is not supported."""
FUSED = ("qkv_proj", "gate_up_proj", "query_key_value", "c_attn", "Wqkv", "dense_h_to_4h")
"""Names of linear layers that compute several projections with one matrix, as in Phi-3."""


def skeleton_of(model: ModelConfig) -> nn.Module:
    """Return the model on the meta device, to be read only; its `config` is the transformers
    configuration.

    Raises:
        UserError: the model's configuration is not valid, or its architecture is not supported.
    """
    if model.path is not None and not model.draws_weights:
        # The folder decides, which may change.
        return skeleton(architecture_of(model), f"model.path={model.path}")
    return _named(model)


@cached_by_text(repr)
def _named(model: ModelConfig) -> nn.Module:
    return skeleton(architecture_of(model), f"model={model.name}")


@cached_by_text(lambda found, origin: f"{origin} {found.to_json_string(use_diff=False)}")
def skeleton(found: PreTrainedConfig, origin: str) -> nn.Module:
    """Return the model of a configuration on the meta device, with tied weights.

    Raises:
        UserError: the architecture is not supported; `origin` begins the message.
    """
    found = copy.deepcopy(found)
    found.pad_token_id = None  # It may be outside the embedding, which would fail here.
    written = type(found) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not written or found.get_text_config() is not found:
        raise UserError(
            f"{origin}: model_type={found.model_type} is not a text-only causal language model: "
            "choose another model"
        )
    try:
        with torch.device("meta"), transformers_initialization.no_init_weights():
            model = AutoModelForCausalLM.from_config(found, trust_remote_code=False)
            model.tie_weights()
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{origin}: no model can be built from its configuration ({reason}): correct it"
        ) from error
    if objection := _objection(model, found):
        raise UserError(
            f"{origin}: model_type={found.model_type} is not supported: {objection}. "
            "Adapters need attention with q_proj, k_proj, v_proj, o_proj and a feed-forward "
            f"{BLOCK}(x) = {FORMULA} in each layer, as in Llama, Qwen, Mistral, Gemma and OLMo"
        )
    return model


def placed_projections(model: nn.Module) -> Iterator[tuple[str, str, nn.Linear]]:
    """Yield the projections that can have an adapter, layer by layer: name in the model, its last
    component, module."""
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name in (*ATTENTION_TARGETS, *FEED_FORWARD_TARGETS) and type(module) is nn.Linear:
            yield path, name, module


def projections(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Return `placed_projections` without the first component."""
    return ((name, module) for _, name, module in placed_projections(model))


def _objection(model: nn.Module, found: PreTrainedConfig) -> str | None:
    """Return why a model's architecture is not supported; None if it is."""
    if any("Experts" in type(module).__name__ for module in model.modules()):
        return "it is already a mixture of experts"
    last = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    if fused := [name for name in FUSED if name in last]:
        return f"it has {' and '.join(fused)}, several projections in one matrix"
    layers, names = found.num_hidden_layers, [name for name, _ in projections(model)]
    for targets in (ATTENTION_TARGETS, FEED_FORWARD_TARGETS):
        if any(names.count(name) != layers for name in targets):
            numbers = ", ".join(f"{names.count(name)} {name}" for name in targets)
            return f"{layers} layers have {numbers} as nn.Linear{_instead(model)}"
    heads, shared = found.num_attention_heads, found.num_key_value_heads
    if heads % shared:
        return f"num_key_value_heads={shared} does not divide num_attention_heads={heads}"
    blocks = [m for path, m in model.named_modules() if path.rpartition(".")[2] == BLOCK]
    if len(blocks) != layers:
        return f"{layers} layers have {len(blocks)} feed-forward blocks named {BLOCK}"
    others = {_formula(block) for block in blocks} - {FORMULA}
    return f"its {BLOCK}(x) is {shown(min(others), 160)}" if others else None


def _instead(model: nn.Module) -> str:
    """Return the unknown linear layers of a decoder layer, for a message."""
    known = {*ATTENTION_TARGETS, *FEED_FORWARD_TARGETS}
    others = {
        path.rpartition(".")[2]: type(module).__name__
        for path, module in model.named_modules()
        if path.rpartition(".")[2] not in known
        and (isinstance(module, nn.Linear) or "Conv1D" in type(module).__name__)
        and path.count(".") > 2
    }
    shown_ones = ", ".join(f"{name} ({kind})" for name, kind in sorted(others.items())[:4])
    return f", and also {shown_ones}" if others else ""


class _Leaves(fx.Tracer):
    """Traces one module, with its submodules as single nodes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _formula(block: nn.Module) -> str:
    """Return the formula of a block's output for its input `x`, in terms of its submodules."""

    def text(node: object) -> str:
        if not isinstance(node, fx.Node):
            return str(node)
        if node.op == "placeholder":
            return "x"
        parts = ", ".join(map(text, [*node.args, *node.kwargs.values()]))
        name = node.target if isinstance(node.target, str) else node.target.__name__
        return parts if node.op == "output" else f"{name}({parts})"

    try:
        graph = _Leaves().trace(block)
    except Exception as error:  # A foreign forward pass may raise anything when traced.
        return f"not known ({type(error).__name__})"
    return text(next(node for node in graph.nodes if node.op == "output"))
