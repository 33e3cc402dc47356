"""Assignment of the rows of a forward pass to several adapters on one base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixlora_exp.kernels import Router

__all__ = ["BASE", "RowMap", "Segment", "join", "take"]

BASE = "__base__"
"""PEFT's name for rows without an adapter."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Some rows of the flattened batch (rows, width): a slice, or their indices."""

    adapter: str
    rows: slice | Tensor


@dataclass(slots=True)
class RowMap:
    """Shared by all adapter layers of a model. Empty: the active adapter has every row.

    `segments` cover the rows of a packed batch one after another; `names` has an adapter for each
    sequence of an ordinary batch, in any order (PEFT's `adapter_names`). `masks`: by adapter, true
    for the real ones of its rows in the pass, (rows,), or of a batch (sequences, tokens), which may
    begin with tokens of earlier passes; an adapter without one has real rows alone. `sequences`: of
    the pass, where it is known. `types`: by adapter, the kind of the task of each of its sequences
    (0 or 1), where the batch tells. `reported`: whether the report of the pass is made.
    """

    segments: tuple[Segment, ...] = ()
    names: tuple[str, ...] = ()
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    sequences: int = 0
    types: Mapping[str, Tensor] = field(default_factory=dict)
    reported: bool = False
    _real: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _resolved: dict[torch.Size, tuple[Segment, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.segments or self.names)

    def use(self, *, segments: Sequence[Segment] = (), names: Sequence[str] = ()) -> None:
        """Set the assignment for the following passes; without arguments, clear it."""
        self.segments, self.names, self._resolved = tuple(segments), tuple(names), {}

    def begin_pass(
        self,
        masks: Mapping[str, Tensor],
        types: Mapping[str, Tensor] | None = None,
        sequences: int = 0,
    ) -> None:
        """Set which rows of the next pass are real (not padding), the kinds of its sequences'
        tasks, and the number of sequences."""
        self.masks, self.types, self._real = dict(masks), dict(types or {}), {}
        self.sequences, self.reported = sequences, False
        for adapter, mask in masks.items():
            # Before the pass, which may be compiled.
            self._real[adapter, mask.numel()] = mask.reshape(-1).bool()

    def masks_of(self, mask: object, active: Sequence[str]) -> dict[str, Tensor]:
        """Return the masks for `begin_pass`, made from a model's `attention_mask`: (sequences,
        tokens), or (sequences, 1, tokens, tokens) of packed questions; empty for other masks
        and for segments, whose masks the caller sets. active: the adapters of all rows where
        `names` has none."""
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-2] == mask.shape[-1]:
            seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
            # Padding attends to itself alone, and nothing else to it.
            mask = (seen.sum(dim=-1) > 1) | (seen.sum(dim=-2) > 1)
            # A question of one token, behind its padding.
            mask[:, -1] |= ~mask.any(dim=-1)
        if not isinstance(mask, Tensor) or mask.dim() != 2 or self.segments:
            return {}
        if not self.names:
            return dict.fromkeys(active, mask)
        # `of` refuses another number of sequences.
        copies = len(mask) // len(self.names)
        names = [name for name in self.names for _ in range(copies)]
        return {
            name: mask[[i for i, other in enumerate(names) if other == name]]
            for name in dict.fromkeys(names)
        }

    def real(self, adapter: str, rows: int, device: torch.device) -> Tensor | None:
        """Return (rows,) bool of an adapter's rows, None if all are; made once for all layers."""
        mask = self.masks.get(adapter)
        if mask is None:
            return None
        if (adapter, rows) not in self._real:
            width, rest = divmod(rows, mask.shape[0])
            if mask.dim() == 1 or rest or not 0 < width <= mask.shape[1]:
                return None  # of another pass
            self._real[adapter, rows] = mask[:, -width:].reshape(-1).bool()
        return self._real[adapter, rows].to(device)

    def seen_by(
        self, router: Router, adapter: str, rows: int, device: torch.device
    ) -> Tensor | None:
        """Return the mask of an adapter's rows for `Router.route_masked`.

        Raises:
            ValueError: it needs to know where each sequence ends, which is not known.
        """
        mask, given = self.real(adapter, rows, device), self.masks.get(adapter)
        if not router.by_sequence:
            return mask
        count = self.sequences
        if given is not None:
            count = len(given) if given.dim() > 1 else 0
        if not count or rows % count:
            raise ValueError(
                "router_options.capacity counts by sequence, and where one ends is not known in "
                "this pass: give the model an attention_mask (sequences, tokens)"
            )
        mask = torch.ones(rows, dtype=torch.bool, device=device) if mask is None else mask
        return mask.view(count, -1)

    def of(self, x: Tensor) -> tuple[Segment, ...]:
        """Return the segments of the rows of x (..., width), flattened.

        Raises:
            ValueError: the number of sequences does not match the number of names.
        """
        if self.segments:
            return self.segments
        shape = x.shape[:-1]
        if shape not in self._resolved:
            self._resolved[shape] = _by_name(self.names, shape, x.device)
        return self._resolved[shape]


def _by_name(
    names: tuple[str, ...], shape: torch.Size, device: torch.device
) -> tuple[Segment, ...]:
    # Beam search has several adjacent sequences per name.
    copies, rest = divmod(shape[0], len(names))
    if rest or not copies:
        raise ValueError(
            f"adapter_names has {len(names)} names, but there are {shape[0]} sequences"
        )
    length = shape[1:].numel()
    found: dict[str, list[int]] = {}
    for i, name in enumerate(name for name in names for _ in range(copies)):
        found.setdefault(name, []).append(i)
    columns = torch.arange(length, device=device)
    return tuple(
        Segment(name, (torch.tensor(rows, device=device)[:, None] * length + columns).flatten())
        for name, rows in found.items()
    )


def take(rows: Tensor, segment: Segment) -> Tensor:
    """Return the segment's rows: a view for a slice, otherwise a copy."""
    if isinstance(segment.rows, slice):
        return rows[segment.rows]
    return rows.index_select(0, segment.rows)


def join(parts: Sequence[Tensor], segments: Sequence[Segment]) -> Tensor:
    """Return the inverse of `take` for all segments together."""
    if len(parts) == 1 and isinstance(segments[0].rows, slice):
        return parts[0]
    rows = torch.cat(list(parts))
    if isinstance(segments[0].rows, slice):
        return rows
    order = torch.cat([segment.rows for segment in segments])
    return torch.empty_like(rows).index_copy(0, order, rows)
