"""Scores of a run, protocol by protocol. Those of a finished protocol, and the batches of one that
was begun, are kept until the record is written, so that an interrupted run does not compute them
again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from mixlora_exp.config.schema import Protocol
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation import ItemScore, Scorer, TaskScore, score_tests
from mixlora_exp.records.record import write_json
from mixlora_exp.runs.kept_batches import KeptBatches
from mixlora_exp.runs.scoring_progress import ScoringProgress
from mixlora_exp.runs.state import Run
from mixlora_exp.system.console import echo
from mixlora_exp.system.device import gathered, processes
from mixlora_exp.system.hashing import file_sha256
from mixlora_exp.system.untrusted import read_json

Scores = tuple[list[TaskScore], dict[str, dict[str, float]]]
"""Scores per task and protocol; and per protocol the number of items and the seconds."""
Kept = tuple[list[TaskScore], float]
"""Scores of a protocol by task, and the seconds that they took."""


def score_with(
    this: Run,
    scorer_of: Callable[[], Scorer],
    adapter: Path | None,
    label: str = "",
    together: Sequence[str] = (),
) -> Scores:
    """Score every task under every protocol, each protocol with a new scorer. `adapter`: its
    folder; None: the base model alone. `label` precedes the printed lines. `together`: names of the
    runs that are scored in the same passes. They must meet in the same passes again, so that also
    the batches of a finished protocol are asked for one by one."""
    config, scores, times = this.config, [], {}
    identity = _identity(this, adapter) | ({"together": list(together)} if together else {})
    for protocol in config.evaluation.protocols:
        place = _place(this, adapter, protocol)
        # All processes go by what the first one found.
        kept = None if together else gathered(_recall(place, identity))[0]
        if kept is None:
            start, scorer = time.perf_counter(), scorer_of()
            if processes().is_main_process:
                scorer.watch = ScoringProgress(f"{label}{protocol.value}")
            if not config.evaluation.dropout:
                scorer.kept = _begun(this, place, identity, f"{label}{protocol.value}")
            found = score_tests(
                protocol,
                scorer,
                this.tests,
                config.data,
                config.evaluation,
                this.encoded[protocol.value],
            )
            before = 0.0 if scorer.kept is None else scorer.kept.seconds
            kept = found, round(time.perf_counter() - start + before, 3)
            if processes().is_main_process:
                this.check_owner()
            if processes().is_main_process and not together:
                _keep(place, identity, kept)
                for path in place.parent.glob(f"{place.stem}-batches-*.jsonl"):
                    path.unlink(missing_ok=True)
        else:
            echo(f"  {label}{protocol.value}: kept from before the interruption")
        found, seconds = kept
        times[protocol.value] = {"items": sum(s.n for s in found), "seconds": seconds}
        for score in found:
            accuracy = f"{100 * score.accuracy:.1f} % of {score.n} items"
            if score.unparsed:
                accuracy += f", {100 * score.unparsed / score.n:.1f} % unparsed"
            echo(f"  {label}{protocol.value} {score.task}: {accuracy}")
        scores += found
    return scores, times


def keep_scores(this: Run, adapter: Path, scores: Scores) -> None:
    """Keep a run's finished scores, as `score_with` does of an adapter that is scored alone. A file
    that cannot be written is left out: the record, which is written later, reports that."""
    identity = _identity(this, adapter)
    for protocol in this.config.evaluation.protocols:
        own = [score for score in scores[0] if score.protocol == protocol.value]
        with contextlib.suppress(UserError, OSError):
            this.check_owner()
            place = _place(this, adapter, protocol)
            _keep(place, identity, (own, scores[1][protocol.value]["seconds"]))


def are_kept(this: Run, adapter: Path) -> bool:
    """Return whether an earlier start kept the scores of all protocols."""
    try:
        identity = _identity(this, adapter)
    except OSError:
        return False  # Loading the adapter reports what is wrong with it.
    protocols = this.config.evaluation.protocols
    return all(_recall(_place(this, adapter, p), identity) is not None for p in protocols)


def _place(this: Run, adapter: Path | None, protocol: Protocol) -> Path:
    what = "base" if adapter is None else "adapter"
    return this.checkpoints().folder / f"scores-{what}-{protocol.value}.json"


def _begun(this: Run, place: Path, identity: dict[str, Any], label: str) -> KeptBatches:
    """Return this process's batches of a protocol that an earlier start may have begun."""
    path = place.with_name(f"{place.stem}-batches-{processes().process_index}.jsonl")
    kept = KeptBatches(path, identity, this.check_owner)
    if len(kept) and processes().is_main_process:
        echo(f"  {label}: {len(kept)} batches kept from before the interruption")
    return kept


def _identity(this: Run, adapter: Path | None) -> dict[str, Any]:
    """Return the run's inputs and settings, and the weights that are scored."""
    weights = None if adapter is None else file_sha256(adapter / "adapter_model.safetensors")
    return {**this.checkpoints().identity, "weights": weights}


def _keep(place: Path, identity: dict[str, Any], kept: Kept) -> None:
    scores, seconds = [dataclasses.asdict(score) for score in kept[0]], kept[1]
    place.parent.mkdir(parents=True, exist_ok=True)
    entry = {"identity": identity, "scores": scores, "seconds": seconds}
    write_json(place, {**entry, "sha256": _hash(entry)})


def _recall(place: Path, identity: dict[str, Any]) -> Kept | None:
    """Return the scores of an earlier start; None if there are none or they do not fit."""
    try:
        entry = read_json(place)
        sha256 = entry.pop("sha256")
        if sha256 != _hash(entry) or entry["identity"] != identity:
            return None
        scores = [
            TaskScore(**{**score, "items": [ItemScore(**item) for item in score["items"]]})
            for score in entry["scores"]
        ]
        if not all(isfinite(s.accuracy) and len(s.items) == s.n for s in scores):
            return None
        return scores, float(entry["seconds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return None


def _hash(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
