"""Verifies that a merged checkpoint, read back, computes the same as base model and adapter.

Three complementary checks: outputs of each adapted layer on a few random tokens in float64,
relative to the adapter's effect; all other tensors, bitwise; and the outputs of the whole model in
its own precision.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixlora_exp.adapters import set_kernel
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation.head import full_precision_head
from mixlora_exp.models.precision import autocast

_LOG = logging.getLogger(__name__)

SHAPE = (2, 16)
"""(rows, tokens) on which the written checkpoint is compared with the adapter."""
EFFECT = {torch.float32: 1e-3, torch.bfloat16: 1 / 3}
"""Tolerated error of an adapted layer's output, relative to the adapter's effect on it. In bf16
PEFT rounds LoRA's product before the addition, which changes the rounding of the sum near ties
(measured over 210 layers: 0.08 for effects of at least 0.002 of the output, 0.2 for effects near
0.001, 0.3 near 0.0001, of which bf16 keeps little). DoRA's weight is rounded once."""
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-14}
"""Tolerated additional error, relative to the output's norm: rounding in float32 (measured: 3e-7),
and in bf16 the smallest effects above (measured: 5e-5)."""
LAYER = {torch.float32: 1e-4, torch.bfloat16: 2**-5}
"""Tolerated error of a layer's output in the model's own precision, including kernels, on the same
input, relative to the output's norm. In float32 only the order of sums differs (measured: 1e-6). In
bf16 weight and output are rounded once more, each by up to 2^-9 relative, and by more where terms
cancel (measured: 0.004 for most layers, at most 0.01). Since an adapter's effect may be smaller,
adapted layers are also checked in float64."""
LOGITS = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Tolerated relative error of the centred logits, in which the errors of all layers accumulate
(measured: 5e-6 and 0.05 over 30 layers). Detects what no single layer shows, such as a missing
configuration field."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """Expected output of a merged layer in float64, with weights rounded once to the written
    precision, and norms for the error bound. `size`: norm of the exact output."""

    rounded: Tensor
    size: float
    effect: float
    """Norm of the adapter's effect on the output."""
    lost: float
    """Norm of the rounding error."""

    def bound(self, dtype: torch.dtype) -> float:
        """Maximum norm of an error that rounding explains."""
        return EFFECT[dtype] * self.effect + ROUNDING[dtype] * self.size


@dataclass(frozen=True, slots=True)
class Expected:
    """Reference values for a merged checkpoint.

    `modules`: input and output of each module with weights in a forward pass over `ids`, by name
    (an adapted layer counts as one module). `inside`: name prefixes of tensors in adapted layers.
    `unchanged`: hashes of all other tensors.
    """

    dtype: torch.dtype
    ids: Tensor
    logits: Tensor
    modules: dict[str, tuple[Tensor, Tensor]]
    adapted: dict[str, _Layer]
    inside: tuple[str, ...]
    unchanged: dict[str, str]


@contextmanager
def merged_by_peft(model: PeftModel) -> Iterator[None]:
    """Convert PEFT's exceptions when merging an adapter of `model` into a `UserError`."""
    try:
        with warnings.catch_warnings():
            # PEFT warns about untied weights.
            warnings.simplefilter("ignore", UserWarning)
            yield
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        kind = model.peft_config[model.active_adapter].peft_type
        raise UserError(
            f"this {kind} adapter cannot be merged ({' '.join(str(error).split())[:200]}): load it "
            "with PeftModel.from_pretrained instead"
        ) from error


@contextmanager
def _computing(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> Iterator[None]:
    with torch.inference_mode(), autocast(model.device, dtype), full_precision_head(model):
        yield


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _with_weights(base: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that directly own weights, by name; an adapted layer counts as one
    module."""
    found: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        weights = _is_adapted(module) or any(True for _ in module.parameters(recurse=False))
        if weights and not any(name.startswith(f"{above}.") for above in found):
            found[name] = module
    return found


def expect(model: PeftModel, dtype: torch.dtype) -> Expected:
    """Reference values for a checkpoint of `model`, merged and written in `dtype`; `model` is not
    changed.

    Raises:
        UserError: PEFT cannot merge the adapter, or a merged layer computes something else.
    """
    base = model.get_base_model()
    vocabulary = base.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, SHAPE, generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    layers, modules = _with_weights(base), {}
    hooks = []
    for name, module in layers.items():

        def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            modules[name] = args[0], output

        hooks.append(module.register_forward_hook(note))
    try:
        with _computing(model, dtype):
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad(), merged_by_peft(model):
        adapted = {
            name: _expect_layer(name, layers[name], taken, dtype)
            for name, (taken, _) in modules.items()
            if _is_adapted(layers[name])
        }
    _tell_of_losses(adapted.values(), dtype)
    inside = tuple(f"{name}." for name, module in layers.items() if _is_adapted(module))
    return Expected(dtype, ids, logits, modules, adapted, inside, _hashes(base, dtype, inside))


def _copy(module: nn.Module) -> nn.Module:
    """Return a float64 copy of `module` that uses the `peft` kernel: the fused kernels do not
    support float64."""
    # PEFT's layers keep their constructor arguments, which may contain activations.
    memo = {id(m.kwargs): {} for m in module.modules() if hasattr(m, "kwargs")}
    copied = deepcopy(module, memo).double()
    set_kernel(copied, "peft")
    return copied


def _in_float64(module: nn.Module, taken: Tensor) -> Tensor:
    return module(taken.double() if taken.is_floating_point() else taken)


def _expect_layer(name: str, module: nn.Module, taken: Tensor, dtype: torch.dtype) -> _Layer:
    """Merge a copy of an adapted layer in float64, compare it with the unmerged layer, and return
    the reference values."""
    layer = _copy(module)
    given = _in_float64(layer, taken)
    layer.enable_adapters(False)
    effect = float((given - _in_float64(layer, taken)).norm())
    layer.enable_adapters(True)
    if hasattr(layer, "unload_and_optionally_merge_module"):
        layer = layer.unload_and_optionally_merge_module(True, safe_merge=True, adapter_names=None)
    else:
        layer.merge(safe_merge=True)
        layer = layer.get_base_layer()
    merged = _in_float64(layer, taken)
    rounded = _in_float64(layer.to(dtype).double(), taken)
    found = _Layer(rounded, float(given.norm()), effect, float((rounded - given).norm()))
    _compare(name, merged, given, found.bound(torch.float32))
    return found


def _tell_of_losses(layers: Collection[_Layer], dtype: torch.dtype) -> None:
    """Warn about adapters whose effect is lost in bf16 rounding. Effects below the rounding of
    float32 are ignored, such as those of DoRA's untrained magnitudes."""
    nothing = ROUNDING[torch.float32]
    lost = sum(
        layer.lost > layer.effect / 2 for layer in layers if layer.effect > nothing * layer.size
    )
    if lost and dtype is torch.bfloat16:
        _LOG.warning(
            "in %d of %d layers rounding to bf16 removes more than half of the adapter's effect: "
            "trainer.precision=float32 preserves it",
            lost,
            len(layers),
        )


def _hashes(model: nn.Module, dtype: torch.dtype, inside: tuple[str, ...]) -> dict[str, str]:
    """Return SHA-256 of each tensor of `model`, floating-point ones cast to `dtype` first, by its
    name; names that begin with one of `inside` are left out."""
    found = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(inside):
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            found[name] = f"{tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()}"
    return found


def _compare(name: str, found: Tensor, expected: Tensor, bound: float) -> None:
    """Refuse a difference whose norm exceeds `bound`."""
    error = float((found.double() - expected.double()).norm())
    if not error <= bound:  # Also refuses NaN.
        size = float(expected.double().norm()) or 1e-30
        raise _wrong(
            f"{name}: relative error {error / size:.2g}, rounding explains {bound / size:.2g}"
        )


def _wrong(why: str) -> UserError:
    return UserError(
        f"the merged checkpoint differs from the adapter ({why}), so nothing was written: load the "
        "adapter with PeftModel.from_pretrained instead"
    )


def check(written: PreTrainedModel, expected: Expected) -> None:
    """Compare a checkpoint that was read back with the reference: each layer on the input it had in
    the adapter's model, so that rounding errors do not accumulate, and the whole model.

    Raises:
        UserError: it differs by more than rounding explains.
    """
    dtype = expected.dtype
    hashes = _hashes(written, dtype, expected.inside)
    for name in expected.unchanged.keys() | hashes.keys():
        if expected.unchanged.get(name) != hashes.get(name):
            raise _wrong(f"{name} differs from the base model's, but has no adapter")
    with _computing(written, dtype):
        logits = written(input_ids=expected.ids, use_cache=False).logits
        for name, (taken, given) in expected.modules.items():
            bound = LAYER[dtype] * float(given.double().norm())
            _compare(name, written.get_submodule(name)(taken), given, bound)
    with torch.no_grad():
        for name, layer in expected.adapted.items():
            found = _in_float64(_copy(written.get_submodule(name)), expected.modules[name][0])
            _compare(name, found, layer.rounded, layer.bound(dtype))
    found, given = (
        x.double() - x.double().mean(dim=-1, keepdim=True) for x in (logits, expected.logits)
    )
    _compare("the logits", found, given, LOGITS[dtype] * float(given.norm()))
