"""Merging an adapter into its base model: a plain checkpoint that computes what the adapter does.

Memory: one copy of the model at a time, in the precision that is written, and a layer more. The
vocabulary matrix is copied where an adapter on it ends the tie between embedding and output
projection.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixlora_exp.durable import publishing
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation.head import full_precision_head
from mixlora_exp.models.reading import read_model
from mixlora_exp.runtime import autocast, resolve_dtype
from mixlora_exp.serving import Opened

__all__ = ["merge", "write_merged"]

SHAPE = (2, 16)
"""Rows and tokens on which the written checkpoint is compared with the adapter."""
LAYER = {torch.float32: 1e-4, torch.bfloat16: 2**-5}
"""Error of a layer's output on the same input, relative to the output's norm. In float32 only the
order of sums differs (measured: 1e-6). In bf16 weight and output are rounded once more, each by up
to 2^-9 of itself, and of more where terms cancel (measured: 0.004 for most layers, 0.01 for the
worst). What an adapter changes less than this is lost in bf16 anyway."""
LOGITS = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""The same of the logits, less their mean, to which the errors of all layers grow (measured: 5e-6
and 0.05 over 30 layers). It tells of what no single layer shows, such as a lost configuration."""


def _untie(base: PreTrainedModel) -> bool:
    """Give the output projection a weight of its own where it shares the embedding's and an
    adapter stands on one of the two, whose change would else be the other's as well."""
    ends = base.get_output_embeddings(), base.get_input_embeddings()
    if not any(isinstance(end, BaseTunerLayer) for end in ends):
        return False
    if any(isinstance(end, AuxiliaryTrainingWrapper) for end in ends):
        return False  # A copy already, which PEFT puts in the place of what was shared.
    head, embedding = (e.get_base_layer() if isinstance(e, BaseTunerLayer) else e for e in ends)
    if head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    return True


def merge(opened: Opened) -> PreTrainedModel:
    """The base model with the adapter in its weights. Embedding and output projection are tied
    afterwards only if they are equal. `opened` cannot be used any more.

    Raises:
        UserError: the adapter is a mixture, which no single weight can stand for, or PEFT cannot
            merge it.
    """
    model = opened.model
    if not isinstance(model, PeftModel):
        raise UserError("adapter=null: there is nothing to merge; name an adapter's folder")
    kind = model.peft_config[model.active_adapter].peft_type
    if kind == "MIXLORA":
        raise UserError(
            "a MixLoRA or MixDoRA adapter cannot be merged: its router chooses experts for each "
            "token, and one weight cannot stand for all of them. Load it with "
            "PeftModel.from_pretrained instead"
        )
    untied = _untie(model.get_base_model())
    try:
        with warnings.catch_warnings():
            # PEFT tells of a tie that has ended.
            warnings.simplefilter("ignore", UserWarning)
            merged = model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(
            f"this {kind} adapter cannot be merged ({' '.join(str(error).split())[:200]}): load it "
            "with PeftModel.from_pretrained instead"
        ) from error
    if untied:
        head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
        tied = torch.equal(head.weight, embedding.weight)
        if tied:
            head.weight = embedding.weight
        merged.config.tie_word_embeddings = tied
    return merged


@dataclass(frozen=True, slots=True)
class _Pass:
    """What a model computed: the logits of `ids`, and by its name what each module with weights
    took and gave, an adapter's layer as one."""

    ids: Tensor
    logits: Tensor
    modules: dict[str, tuple[Tensor, Tensor]]


@contextmanager
def _computing(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> Iterator[None]:
    with torch.inference_mode(), autocast(model.device, dtype), full_precision_head(model):
        yield


def _with_weights(base: nn.Module) -> dict[str, nn.Module]:
    """The modules that have weights of their own, an adapter's layer with all in it as one."""
    found: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        adapter = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        weights = adapter or any(True for _ in module.parameters(recurse=False))
        if weights and not any(name.startswith(f"{above}.") for above in found):
            found[name] = module
    return found


def _record(opened: Opened, dtype: torch.dtype) -> _Pass:
    """A pass of the adapter's model over random tokens, the same ones each time."""
    model, base = opened.model, opened.model.get_base_model()
    vocabulary = base.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, SHAPE, generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    modules: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for name, module in _with_weights(base).items():

        def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            modules[name] = args[0], output

        hooks.append(module.register_forward_hook(note))
    try:
        with _computing(model, dtype):
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return _Pass(ids, logits, modules)


def _off(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to the expected norm."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def _check(written: PreTrainedModel, expected: _Pass, dtype: torch.dtype) -> None:
    """Compare a checkpoint that was read back with the adapter's pass: each layer on the input
    that it had there, so that rounding does not add up, and then the whole.

    Raises:
        UserError: it computes something else than rounding explains.
    """
    with _computing(written, dtype):
        logits = written(input_ids=expected.ids, use_cache=False).logits
        off = {
            name: (_off(written.get_submodule(name)(taken), given), LAYER[dtype])
            for name, (taken, given) in expected.modules.items()
        }
    centred = (x - x.mean(dim=-1, keepdim=True) for x in (logits.float(), expected.logits.float()))
    off["the logits"] = _off(*centred), LOGITS[dtype]
    for name, (error, bound) in off.items():
        if not error <= bound:  # NaN is no number below it.
            raise UserError(
                f"the merged checkpoint does not compute what the adapter computes ({name}: off by "
                f"{error:.2g} of its size, rounding explains {bound:.2g}), so nothing was written: "
                "load the adapter with PeftModel.from_pretrained instead"
            )


def write_merged(opened: Opened, folder: Path) -> None:
    """Write the merged model with its tokenizer, in the transformers format. The folder appears
    only after it was read back and found to compute what the adapter does. `opened` cannot be used
    any more.

    Raises:
        UserError: the folder exists or cannot be written, the adapter cannot be merged, or the
            checkpoint is wrong.
    """
    if os.path.lexists(folder):
        raise _exists(folder)
    config, device = opened.config, opened.model.device
    dtype = resolve_dtype(config.trainer.precision, device)
    expected = _record(opened, dtype) if isinstance(opened.model, PeftModel) else None
    merged = merge(opened)
    try:
        with publishing(folder) as new:
            merged.save_pretrained(new)
            opened.tokenizer.save_pretrained(new)
            merged.to("meta")  # Two copies of a large model might not fit.
            written = read_model(str(new), dtype, config.model, f"output={folder}")
            _check(written.to(device), expected, dtype)
    except FileExistsError as error:
        raise _exists(folder) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"output={folder} cannot be written ({error}): free space there or name another folder"
        ) from error


def _exists(folder: Path) -> UserError:
    return UserError(f"output={folder} exists already: name another folder, or remove it")
