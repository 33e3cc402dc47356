"""Row norms of DoRA, kept for as long as the adapter cannot have changed: one optimizer step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mixlora_exp.kernels import dora_norms, squared_row_norms

__all__ = ["KeepsNorms", "NormCache", "adapter_norms", "adapters_changed"]


class _Steps:
    """Counts the steps of all optimizers in this process.

    Tensor versions alone do not tell of every change: fused AdamW writes past them.
    """

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimizer, args, kwargs) -> None:
        self.count += 1


STEPS = _Steps()


@dataclass(frozen=True, slots=True)
class _Entry:
    state: tuple
    sources: tuple[weakref.ref, ...]
    value: Tensor


class NormCache:
    """Values by key, computed again when a source was written to, moved, or an optimizer stepped.

    `weight.data` written by hand, outside of any optimizer, goes unnoticed: call `clear` then, or
    `eval()` on the model. Nothing is kept while a CUDA graph is recorded, whose replays would see
    the norm of that moment for ever, and nothing is copied or stored with the model.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], _Entry] = {}

    def get(
        self,
        key: tuple[str, str],
        sources: tuple[Tensor, ...],
        compute: Callable[[], Tensor],
        *,
        scaling: float = 1.0,
        frozen: bool = False,
    ) -> Tensor:
        """The value of `compute`, which depends on the sources and on `scaling` alone. `frozen`:
        no optimizer holds the sources."""
        # Made in inference mode, a value could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            # Inference tensors have no version to tell a change by.
            if (
                torch.compiler.is_compiling()
                or any(t.is_inference() for t in sources)
                or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
            ):
                return compute()
            state = (
                scaling,
                0 if frozen else STEPS.count,
                tuple((t.data_ptr(), t._version, t.dtype, t.device) for t in sources),
            )
            entry = self._entries.get(key)
            # The same tensors too: others may have been given the memory of deleted ones.
            if (
                entry is None
                or entry.state != state
                or any(ref() is not t for ref, t in zip(entry.sources, sources, strict=True))
            ):
                entry = _Entry(state, tuple(map(weakref.ref, sources)), compute())
                self._entries[key] = entry
            return entry.value

    def __getstate__(self) -> dict[str, dict]:
        return {"_entries": {}}

    def __setstate__(self, state: dict[str, dict]) -> None:
        self._entries = state["_entries"]

    def clear(self, *, frozen: bool = False) -> None:
        """Forget what depends on adapters; keys with an empty second part stay unless `frozen`."""
        kept = {} if frozen else {k: entry for k, entry in self._entries.items() if not k[1]}
        self._entries = kept


def adapter_norms(
    cache: NormCache, key: tuple[str, str], weight: Tensor, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """||W + s B A|| by rows, from the cache as long as it holds.

    key: (which weight of the module, adapter); weight: (out, in); a: (R, in), b: (out, R), then
    (out,) is returned; or those of E experts, a: (E, R, in), b: (E, out, R), then (E, out).
    """
    squared = cache.get((key[0], ""), (weight,), lambda: squared_row_norms(weight), frozen=True)

    def compute() -> Tensor:
        if a.dim() == 3:
            return dora_norms(weight, squared, a, b, scaling)
        return dora_norms(weight, squared, a[None], b[None], scaling)[0]

    return cache.get(key, (weight, a, b), compute, scaling=scaling)


class KeepsNorms(nn.Module):
    """A layer that keeps norms of its adapters."""

    @property
    def norms(self) -> NormCache:
        if "_norms" not in self.__dict__:
            self.__dict__["_norms"] = NormCache()
        return self.__dict__["_norms"]

    def train(self, mode: bool = True) -> KeepsNorms:
        # A trainer calls `train()` before every micro-batch: that alone changes nothing.
        if not (mode and self.training):
            self.norms.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> KeepsNorms:
        # `to`, `float` and the like may round the weights and give them their old memory back.
        self.norms.clear(frozen=True)
        return super()._apply(*args, **kwargs)


def adapters_changed() -> None:
    """Let every cached norm be computed anew, as after an optimizer step."""
    STEPS.count += 1
