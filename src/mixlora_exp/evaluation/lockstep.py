"""Scores several adapters in shared forward passes.

A thread per adapter runs the protocols as if the adapter were alone. A requested forward pass waits
until every other thread has requested one or finished, and then runs for all of them, each row with
its adapter. The result does not depend on which thread runs the pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixlora_exp.evaluation.forward import Keeper, Scorer, chosen
from mixlora_exp.evaluation.packing import PackedQuestion

Result = TypeVar("Result")
GRACE = 60.0
"""Seconds that an interruption waits for the current pass."""


@dataclass(slots=True)
class _Request:
    """A requested forward pass: its kind (method, setting) and rows, later its result. `known`: an
    earlier start kept what comes of it."""

    kind: tuple[str, int]
    rows: Sequence[Any]
    known: bool = False
    result: Any = None
    routes: list[list[Tensor]] = field(default_factory=list)
    experts: int = 0
    error: BaseException | None = None


class PassFailed(Exception):
    """The requested forward pass failed; `__cause__` is the reason."""


class PassLeftOut(Exception):
    """The requested forward pass did not run: what comes of it is known for each adapter."""


class Lockstep:
    """Rendezvous of the threads of `adapters`. `scorer` runs the passes on a model with them."""

    def __init__(self, scorer: Scorer, adapters: Sequence[str]) -> None:
        self.scorer = scorer
        self._waiting: dict[str, _Request] = {}
        self._present = set(adapters)
        self._order = list(adapters)
        self._meeting = threading.Condition()
        self._error: BaseException | None = None

    def ask(self, adapter: str, request: _Request) -> _Request:
        """Wait for the other threads, and return the request with its result.

        A pass is left out only if it is known for each adapter in it: each pass that runs has the
        rows that it would have had without the interruption, and so the same rounding.

        Raises:
            PassLeftOut: the pass was left out.
            PassFailed: the pass failed, or `cancel` was called.
        """
        with self._meeting:
            if self._error is not None:
                raise PassFailed from self._error
            self._waiting[adapter] = request
            self._run_if_all_are_here()
            self._meeting.wait_for(lambda: adapter not in self._waiting or self._error is not None)
            failure = self._error or request.error
            if isinstance(failure, PassLeftOut):
                raise failure
            if failure is not None:
                raise PassFailed from failure
        return request

    def cancel(self, error: BaseException) -> None:
        """Make every thread end at its next pass."""
        with self._meeting:
            self._error = error
            self._waiting = {}
            self._meeting.notify_all()

    def leave(self, adapter: str) -> None:
        """Note that the adapter's thread requests no further passes."""
        with self._meeting:
            self._present.discard(adapter)
            self._run_if_all_are_here()

    def _run_if_all_are_here(self) -> None:
        if not self._waiting or set(self._waiting) != self._present:
            return
        kinds = dict.fromkeys(self._waiting[a].kind for a in self._order if a in self._waiting)
        for kind in kinds:
            joined = {
                name: self._waiting[name]
                for name in self._order
                if name in self._waiting and self._waiting[name].kind == kind
            }
            try:
                self._run(kind, joined)
            except Exception as error:  # noqa: BLE001 - raised in the waiting threads
                for request in joined.values():
                    request.error = error
        self._waiting = {}
        self._meeting.notify_all()

    def _run(self, kind: tuple[str, int], requests: Mapping[str, _Request]) -> None:
        if all(request.known for request in requests.values()):
            for request in requests.values():
                request.error = PassLeftOut()
            return
        method, setting = kind
        rows = [row for request in requests.values() for row in request.rows]
        names = [name for name, request in requests.items() for _ in request.rows]
        run = getattr(self.scorer, f"run_{method}")
        found = run(rows, *([setting] if setting else []), adapter_names=names)
        start = 0
        for name, request in requests.items():
            end = start + len(request.rows)
            request.result, start = found[start:end], end
            if method != "generate":
                request.routes, request.experts = self._routes(name, request.rows)

    def _routes(self, adapter: str, rows: Sequence[Any]) -> tuple[list[list[Tensor]], int]:
        routings = [
            module.routings[adapter]
            for module in self.scorer.model.modules()
            if adapter in getattr(module, "routings", ())
        ]
        if not routings:
            return [[] for _ in rows], 0
        lengths = [len(row.tokens if isinstance(row, PackedQuestion) else row) for row in rows]
        experts = max(routing.probabilities.shape[-1] for routing in routings)
        return chosen(routings, lengths), experts


class LockstepScorer(Scorer):
    """The scorer of one adapter, which shares its forward passes with the other adapters."""

    def __init__(self, meeting: Lockstep, adapter: str, batch_tokens: int) -> None:
        shared = meeting.scorer
        super().__init__(shared.model, shared.tokenizer, shared.autocast, batch_tokens)
        self._meeting, self._adapter = meeting, adapter
        self._last = _Request(("", 0), ())
        self._is_known = False

    def _recalled(
        self, kept: Keeper, name: str, size: int, work: Callable[[], Sequence[Result]]
    ) -> Sequence[Result]:
        self._is_known = kept.has(name, size)
        try:
            return self._new(kept, name, work)
        except PassLeftOut:
            return self._known(kept, name)
        finally:
            self._is_known = False

    def _ask(self, method: str, setting: int, rows: Sequence[Any]) -> Any:
        request = _Request((method, setting), rows, self._is_known)
        self._last = self._meeting.ask(self._adapter, request)
        return self._last.result

    def run_logits(self, rows: Sequence[Sequence[int]], keep: int, **kwargs: Any) -> Tensor:
        """Return `Scorer.run_logits`, from a pass shared with other adapters."""
        return self._ask("logits", keep, rows)

    def run_scores(
        self, questions: Sequence[PackedQuestion], **kwargs: Any
    ) -> list[list[tuple[float, bool]]]:
        """Return `Scorer.run_scores`, from a pass shared with other adapters."""
        return self._ask("scores", 0, questions)

    def run_generate(
        self, rows: Sequence[Sequence[int]], new_tokens: int, **kwargs: Any
    ) -> list[list[int]]:
        """Return `Scorer.run_generate`, from a pass shared with other adapters."""
        return self._ask("generate", new_tokens, rows)

    def routes(self, lengths: Sequence[int]) -> list[list[Tensor]]:
        """Return the experts that the adapter's routers chose in the last shared pass, by row and
        layer."""
        return self._last.routes

    def _experts(self) -> int:
        return self._last.experts


def in_lockstep(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    autocast: AbstractContextManager,
    work: Mapping[str, Callable[[Scorer], Result]],
    batch_tokens: int,
) -> dict[str, Result | BaseException]:
    """Call the `work` of each adapter of `model` with a scorer that shares its forward passes.

    `batch_tokens`: padded tokens of a shared pass. Returns the result or the error of each adapter.
    An error in one thread does not stop the others; a failed pass ends all threads that wait for
    it. On an interruption all threads end after the current pass.
    """
    meeting = Lockstep(Scorer(model, tokenizer, autocast, batch_tokens), list(work))
    share = max(1, batch_tokens // len(work))
    results: dict[str, Result | BaseException] = {}
    threads_of_torch = torch.get_num_threads()

    def carry_out(adapter: str) -> None:
        # torch's thread settings are per thread.
        torch.set_num_threads(threads_of_torch)
        try:
            results[adapter] = work[adapter](LockstepScorer(meeting, adapter, share))
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            results[adapter] = error.__cause__ if isinstance(error, PassFailed) else error
        finally:
            meeting.leave(adapter)

    threads = [
        threading.Thread(target=carry_out, args=(name,), name=name, daemon=True) for name in work
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:
        meeting.cancel(error)
        for thread in threads:
            if thread.ident is not None:  # It was started before the interruption.
                thread.join(GRACE)
        raise
    return {name: results[name] for name in work}
