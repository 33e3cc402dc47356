"""Adapter weights in the precision of the products, made once per optimizer step.

Parameters are trained in float32 and multiplied in bf16. Cast where they are used, they cost a
launch for each tensor in each pass; here those of a whole model are cast together, into memory that
keeps its address. DoRA's norms, and its scale `m / ||W + s B A||`, are made at the same time.

The parameters stay PEFT's own. As views of one buffer a single copy would cast them, but PEFT, `to`
and `load_state_dict(assign=True)` put others in their place, and each one saved by itself would
bring the whole buffer along.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mixlora_exp.adapters.cache_source import Source
from mixlora_exp.adapters.dora_norms import norms_of, norms_of_one_shape
from mixlora_exp.kernels import Low, squared_row_norms

__all__ = [
    "CachedWeights",
    "CachesWeights",
    "WeightCache",
    "cached_storages",
    "cached_weights",
    "prepare_compiled",
    "share_cache",
]

ALIGNED = 64
"""Elements to which a tensor's start is aligned in a buffer: 128 bytes in 16 bits."""

Key = tuple[str, str, torch.dtype]
"""(which projection of the layer, adapter, dtype of the products)"""


class CachedWeights(NamedTuple):
    """Copies made from a source. `low`: None where products take the parameters as they are;
    `norm`: with DoRA the row norms of `W + s B A` in float32 or better. No gradient reaches them.
    """

    low: Low | None
    norm: Tensor | None


class _Entry:
    """The copies of one source in memory that keeps its address, and the source's state when they
    were made.

    `memory` has `a`, `b` and `scale` in the dtype of the products and `norm`, as far as there are
    any.
    """

    def __init__(self, memory: dict[str, Tensor]) -> None:
        self.memory = memory
        self.copies = CachedWeights(None, None)
        self._state: tuple = ()
        self._refs: tuple[weakref.ref, ...] = ()

    def holds(self, source: Source, changes: int) -> bool:
        """Return whether the source is unchanged since the copies were made."""
        # The same tensors too: others may have been given the memory of deleted ones.
        return self._state == source.state(changes) and all(
            ref() is tensor for ref, tensor in zip(self._refs, source.tensors, strict=True)
        )

    def fits(self, source: Source, dtype: torch.dtype) -> bool:
        """Return whether the memory has the shapes, dtypes and device that the source needs."""
        return _needs(source, dtype) == {
            name: (t.shape, t.dtype, t.device) for name, t in self.memory.items()
        }

    def filled(self, source: Source, changes: int) -> None:
        """Record the state of the source after its copies were updated."""
        memory = self.memory
        low = None
        if memory.keys() - {"norm"}:
            # Parameters that have the dtype already are shared, not copied.
            a, b = memory.get("a", source.a.detach()), memory.get("b", source.b.detach())
            low = Low(a, b, memory.get("scale"))
        self.copies = CachedWeights(low, memory.get("norm"))
        self._state = source.state(changes)
        self._refs = tuple(map(weakref.ref, source.tensors))


@dataclass(slots=True)
class _Layer:
    """One layer's cached copies, and ||W||^2 by projection with the state of W at that time."""

    entries: dict[Key, _Entry] = field(default_factory=dict)
    squares: dict[str, tuple[tuple, weakref.ref, Tensor]] = field(default_factory=dict)

    def squared(self, part: str, source: Source) -> Tensor:
        weight = source.weight
        state = weight.data_ptr(), weight._version, weight.dtype
        found = self.squares.get(part)
        if found is None or found[0] != state or found[1]() is not weight:
            squares = squared_row_norms(source.matrix())
            found = self.squares[part] = (state, weakref.ref(weight), squares)
        return found[2]


class WeightCache:
    """Cached weights of a model's layers. The first layer that finds its own out of date has those
    of all layers made anew: a few launches for all weights, and a product for each of DoRA's norms.

    At each use a layer looks whether its parameters were written to, moved or replaced, or any
    optimizer stepped (fused ones write past the tensors' versions). What is written through
    `weight.data`, outside of any optimizer, leaves no trace: call `adapters_changed()` then, or
    `eval()` on the model. Parameters without versions (inference tensors) are not cached, and no
    copy is used while a graph is compiled or recorded, which would see the values of that moment
    for ever. Copies of a model, through pickle too, start with an empty cache.
    """

    def __init__(self) -> None:
        self._layers: weakref.WeakKeyDictionary[CachesWeights, _Layer] = weakref.WeakKeyDictionary()
        self._changes = 0

    def __reduce__(self) -> tuple[type, tuple]:
        return WeightCache, ()

    def join(self, layer: CachesWeights) -> None:
        """Let a layer's copies be made together with those of the others."""
        before = layer.__dict__.get("_weight_cache")
        held = None if before is None else before._layers.pop(layer, None)
        self._layers[layer] = held or _Layer()
        layer.__dict__["_weight_cache"] = self

    def changed(self, *, frozen: bool = False) -> None:
        """Let all be made anew before their next use; `frozen`: ||W||^2 too."""
        self._changes += 1
        if frozen:
            for held in self._layers.values():
                held.squares.clear()

    def held_by(self, layer: CachesWeights) -> list[_Entry]:
        """Return the entries that are cached for a layer."""
        return list(self._layers[layer].entries.values())

    def forget(self, layer: CachesWeights, adapter: str) -> None:
        """Give back the memory of a deleted adapter."""
        held = self._layers[layer]
        held.entries = {key: found for key, found in held.entries.items() if key[1] != adapter}

    def of(
        self, layer: CachesWeights, part: str, adapter: str, source: Source, dtype: torch.dtype
    ) -> CachedWeights:
        """Return the up-to-date copies of a layer's source."""
        if torch.compiler.is_compiling() or _recorded(source):
            found = layer.prepared.get(f"{part}/{adapter}")
            return _made_now(source) if found is None else found
        # A replica of DataParallel has the cache of its model without having joined.
        if not _lasts(source) or layer not in self._layers:
            return _made_now(source)
        key, held = (part, adapter, dtype), self._layers[layer]
        found = held.entries.get(key)
        if found is None or not found.holds(source, self._changes):
            # Made in inference mode, a value could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                self._make(adapter, dtype)
            found = held.entries[key]
        return found.copies

    def _make(self, adapter: str, dtype: torch.dtype) -> None:
        """Bring all copies of an adapter up to date."""
        stale = list(self._stale(adapter, dtype))
        new = [(held, key, source) for held, key, source in stale if key not in held.entries]
        for (held, key, _), memory in zip(new, _allocated(new), strict=True):
            held.entries[key] = _Entry(memory)
        made = [(source, held.entries[key]) for held, key, source in stale]
        for name in ("a", "b"):
            pairs = [(s.memory[name], getattr(own, name)) for own, s in made if name in s.memory]
            _copy(pairs)
        dora = [(held, key, source) for held, key, source in stale if source.magnitude is not None]
        if dora:
            squares = [held.squared(key[0], source) for held, key, source in dora]
            norms = norms_of([source for _, _, source in dora], squares)
            scales = torch._foreach_div([source.magnitude for _, _, source in dora], norms)
            own = [held.entries[key].memory for held, key, _ in dora]
            _copy([(memory["norm"], norm) for memory, norm in zip(own, norms, strict=True)])
            _copy([(memory["scale"], scale) for memory, scale in zip(own, scales, strict=True)])
        for source, entry in made:
            entry.filled(source, self._changes)

    def _stale(self, adapter: str, dtype: torch.dtype) -> Iterator[tuple[_Layer, Key, Source]]:
        for layer, held in self._layers.items():
            # `use_linear_kernel` may have given a layer back to PEFT.
            if not isinstance(layer, CachesWeights):
                continue
            for part, source in layer.cache_sources(adapter).items():
                key: Key = (part, adapter, dtype)
                found = held.entries.get(key)
                if not _lasts(source) or (found and found.holds(source, self._changes)):
                    continue
                if found and not found.fits(source, dtype):
                    del held.entries[key]
                yield held, key, source


class CachesWeights(nn.Module):
    """A layer whose adapters' weights are cached."""

    cached_parts: tuple[str, ...] = ("W",)
    """Names of the layer's projections."""
    prepared: Mapping[str, CachedWeights] = {}
    """Copies that compiled or recorded code reads, by `PART/ADAPTER`, set by `prepare_compiled`."""

    def source_of(self, part: str, adapter: str) -> Source | None:
        """Return an adapter's weights for a projection, None if it has none."""
        raise NotImplementedError

    def cache_sources(self, adapter: str) -> dict[str, Source]:
        """Return an adapter's weights in this layer by projection."""
        found = {part: self.source_of(part, adapter) for part in self.cached_parts}
        return {part: source for part, source in found.items() if source is not None}

    @property
    def weight_cache(self) -> WeightCache:
        """The model's cache, or until `share_cache` the layer's own."""
        if "_weight_cache" not in self.__dict__:
            WeightCache().join(self)
        return self.__dict__["_weight_cache"]

    def train(self, mode: bool = True) -> CachesWeights:
        """Set the mode; a change of mode makes the cached weights stale."""
        # A trainer calls `train()` before every micro-batch: that alone changes nothing.
        if not (mode and self.training):
            self.weight_cache.changed()
        return super().train(mode)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge as PEFT does, which makes the cached weights and ||W||^2 stale."""
        # PEFT writes the frozen weight through `data`.
        super().merge(*args, **kwargs)
        self.weight_cache.changed(frozen=True)

    def unmerge(self) -> None:
        """Undo the merge, which makes the cached weights and ||W||^2 stale."""
        super().unmerge()
        self.weight_cache.changed(frozen=True)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the adapter and the cached copies of its weights."""
        super().delete_adapter(adapter_name)
        self.weight_cache.forget(self, adapter_name)

    def _apply(self, *args: Any, **kwargs: Any) -> CachesWeights:
        # `to`, `float` and the like may round the weights and give them their old memory back.
        self.weight_cache.changed(frozen=True)
        return super()._apply(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy; its cache is the one that the copies of the model's other layers have.
        super().__setstate__(state)
        self.weight_cache.join(self)


def cached_storages(model: nn.Module) -> set[int]:
    """Return the data pointers of the memory that cached weights of a model's layers are in."""
    layers = [module for module in model.modules() if isinstance(module, CachesWeights)]
    entries = [e for layer in layers for e in layer.weight_cache.held_by(layer)]
    return {t.untyped_storage().data_ptr() for entry in entries for t in entry.memory.values()}


def share_cache(model: nn.Module) -> None:
    """Let the layers of a model have their weights cached together."""
    layers = [module for module in model.modules() if isinstance(module, CachesWeights)]
    for layer in layers:
        layers[0].weight_cache.join(layer)


def prepare_compiled(model: nn.Module, dtype: torch.dtype | None) -> list[int]:
    """Bring up to date what compiled or recorded layers read in the coming pass, for products in
    `dtype`; None: they make it themselves, in every pass. Returns the copies' addresses."""
    places = []
    for layer in (module for module in model.modules() if isinstance(module, CachesWeights)):
        layer.prepared = {}
        for adapter in layer.active_adapters if dtype is not None else ():
            for part, source in layer.cache_sources(adapter).items():
                made = layer.weight_cache.of(layer, part, adapter, source, dtype)
                layer.prepared[f"{part}/{adapter}"] = made
                low = () if made.low is None else (made.low.a, made.low.b, made.low.scale)
                held = (tensor for tensor in (*low, made.norm) if tensor is not None)
                places += [tensor.data_ptr() for tensor in held]
    return places


def cached_weights(
    layer: CachesWeights, adapter: str, dtype: torch.dtype, part: str = "W"
) -> tuple[Source, CachedWeights]:
    """Return the weights of an adapter at a layer's projection, which must have it, and their
    copies for products in `dtype`."""
    source = layer.source_of(part, adapter)
    assert source is not None
    return source, layer.weight_cache.of(layer, part, adapter, source, dtype)


def _recorded(source: Source) -> bool:
    """Return whether a CUDA graph records what is computed with the source."""
    return source.a.is_cuda and torch.cuda.is_current_stream_capturing()


def _lasts(source: Source) -> bool:
    """Return whether copies of the source can be kept: a change will be seen, and the weights are
    whole (not partitioned over processes)."""
    if source.magnitude is not None and isinstance(source.weight, DTensor):
        return False  # Sharded: only within its layer's own pass is it whole, and then a tensor.
    shape = source.b.shape[-2], source.a.shape[-1]
    whole = source.dequantized is not None or source.weight.shape == shape
    return whole and not _recorded(source) and not any(one.is_inference() for one in source.tensors)


def _made_now(source: Source) -> CachedWeights:
    """Return uncached norms for one call; the kernels cast the parameters themselves."""
    if source.magnitude is None:
        return CachedWeights(None, None)
    with torch.no_grad():
        norms = norms_of_one_shape([source], [squared_row_norms(source.matrix())])
        return CachedWeights(None, norms[0])


def _needs(source: Source, dtype: torch.dtype) -> dict[str, tuple]:
    """Return (shape, dtype, device) of the copies that a source needs, by name."""
    needed = {
        name: (tensor.shape, dtype, tensor.device)
        for name, tensor in (("a", source.a), ("b", source.b), ("scale", source.magnitude))
        if tensor is not None and (name == "scale" or tensor.dtype != dtype)
    }
    if source.magnitude is not None:
        precise = torch.promote_types(source.weight.dtype, torch.float32)
        needed["norm"] = (source.magnitude.shape, precise, source.magnitude.device)
    return needed


def _allocated(new: Sequence[tuple[_Layer, Key, Source]]) -> list[dict[str, Tensor]]:
    """Return memory for copies. In one buffer for each dtype and device lie all A, then all B, in
    the order of the layers: A of projections with one input are neighbours. What DoRA has is small,
    and a graph that keeps one layer's is not to keep that of all."""
    memories: list[dict[str, Tensor]] = [{} for _ in new]
    buffers: dict[tuple, list[tuple[int, str, torch.Size]]] = {}
    needed = [_needs(source, key[2]) for _, key, source in new]
    for name in ("a", "b", "scale", "norm"):
        for i, wanted in enumerate(needed):
            if name not in wanted:
                continue
            shape, dtype, device = wanted[name]
            if name in ("a", "b"):
                buffers.setdefault((dtype, device), []).append((i, name, shape))
            else:
                memories[i][name] = torch.empty(shape, dtype=dtype, device=device)
    for (dtype, device), places in buffers.items():
        sizes = [-(-shape.numel() // ALIGNED) * ALIGNED for _, _, shape in places]
        parts = torch.empty(sum(sizes), dtype=dtype, device=device).split(sizes)
        for (i, name, shape), part in zip(places, parts, strict=True):
            memories[i][name] = part[: shape.numel()].view(shape)
    return memories


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write the second of each pair into the first, all in few launches.

    Through `data`, which leaves the version as it is: the graph of a pass holds the memory, and may
    be run backward after an evaluation that made the same values again.
    """
    pairs = list(pairs)
    if pairs:
        torch._foreach_copy_([own.data for own, _ in pairs], [value for _, value in pairs])
