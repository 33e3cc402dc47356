"""Merges an adapter into its base model, and writes a plain checkpoint.

Memory: one copy of the model, in the written precision, and one adapted layer in float64. The
vocabulary matrix is copied if an adapter on it unties embedding and output projection.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from mixlora_exp.errors import UserError
from mixlora_exp.models.precision import resolve_dtype
from mixlora_exp.models.reading import read_model
from mixlora_exp.models.writing import write_tokenizer
from mixlora_exp.serving.merge_check import check, expect, merged_by_peft
from mixlora_exp.serving.open import Opened
from mixlora_exp.system.durable import publishing


def _untie(base: PreTrainedModel) -> bool:
    """Copy the output projection's weight if it is tied to the embedding and one of the two has an
    adapter, which would otherwise also change the other. Returns whether it was copied."""
    ends = base.get_output_embeddings(), base.get_input_embeddings()
    if not any(isinstance(end, BaseTunerLayer) for end in ends):
        return False
    if any(isinstance(end, AuxiliaryTrainingWrapper) for end in ends):
        return False  # PEFT has already replaced the tied weight with a copy.
    head, embedding = (e.get_base_layer() if isinstance(e, BaseTunerLayer) else e for e in ends)
    if head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    return True


def merge(opened: Opened) -> PreTrainedModel:
    """Return the base model with the adapter merged into its weights. Embedding and output
    projection are tied afterwards only if they are equal. `opened` must not be used afterwards.

    Raises:
        UserError: the adapter is a mixture of experts, which cannot be merged, or PEFT cannot merge
            it.
    """
    model = _mergeable(opened)
    untied = _untie(model.get_base_model())
    with merged_by_peft(model):
        merged = model.merge_and_unload(safe_merge=True)
    if untied:
        head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
        tied = torch.equal(head.weight, embedding.weight)
        if tied:
            head.weight = embedding.weight
        merged.config.tie_word_embeddings = tied
    return merged


def _mergeable(opened: Opened) -> PeftModel:
    """Return the adapter's model.

    Raises:
        UserError: there is no adapter, or its method cannot be merged.
    """
    model = opened.model
    if not isinstance(model, PeftModel):
        raise UserError("adapter=null: there is nothing to merge; give an adapter's folder")
    config = model.peft_config[model.active_adapter]
    if not getattr(config, "mergeable", config.peft_type != "MIXLORA"):
        kind = getattr(config, "mixture", "MixLoRA or MixDoRA")
        raise UserError(
            f"a {kind} adapter cannot be merged: its router chooses experts for each "
            "token, which no single weight can represent. Load it with "
            "PeftModel.from_pretrained instead"
        )
    return model


def write_merged(opened: Opened, folder: Path) -> None:
    """Write the merged model with its tokenizer, in the transformers format. The folder appears
    only after it was read back and its outputs match those of the adapter. `opened` must not be
    used afterwards.

    Raises:
        UserError: the folder exists or cannot be written, the adapter cannot be merged, or the
            checkpoint is wrong.

    Logs a warning if the written precision is too low for the adapter's effect.
    """
    if os.path.lexists(folder):
        raise _exists(folder)
    config, device = opened.config, opened.model.device
    dtype = resolve_dtype(config.trainer.precision, device)
    expected = expect(_mergeable(opened), dtype)
    merged = merge(opened)
    try:
        with publishing(folder) as new:
            merged.save_pretrained(new)
            write_tokenizer(opened.tokenizer, new)
            merged.to("meta")  # Two copies of a large model might not fit.
            written = read_model(str(new), dtype, config.model, str(folder))
            check(written.to(device), expected)
    except FileExistsError as error:
        raise _exists(folder) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{folder} cannot be written ({error}): free space there or name another folder"
        ) from error


def _exists(folder: Path) -> UserError:
    return UserError(f"{folder} already exists: name another folder, or remove it")
