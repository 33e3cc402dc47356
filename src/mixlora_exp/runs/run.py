"""One run, end to end: data, base model, adapter, training, saving, reloading, scores, record.

Scores come from the adapter loaded back from disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from mixlora_exp.adapters import attach_adapter, load_adapter, save_adapter
from mixlora_exp.adapters.shuffled import shuffle_experts
from mixlora_exp.config.command_line import CommandLine
from mixlora_exp.config.resolve import fingerprint, to_dict
from mixlora_exp.config.run_names import run_name
from mixlora_exp.config.schema import Base, Config, TrainedMethodConfig
from mixlora_exp.data.encoding import Example
from mixlora_exp.evaluation import Scorer, Share, TaskScore
from mixlora_exp.models import identify
from mixlora_exp.models.precision import autocast
from mixlora_exp.models.special_tokens import special_tokens_entry
from mixlora_exp.plans.plan import cost_entry, parameters_entry
from mixlora_exp.records.card import model_card
from mixlora_exp.records.record import (
    finish_record,
    read_run,
    write_json,
    write_text,
)
from mixlora_exp.records.show import print_record
from mixlora_exp.runs.announce import announce
from mixlora_exp.runs.finished import finished
from mixlora_exp.runs.inputs import (
    RECORD,
    gather_inputs,
    resolve_config,
)
from mixlora_exp.runs.ownership import failure_noted, held
from mixlora_exp.runs.planned import print_plans
from mixlora_exp.runs.predictions import score_entry, write_predictions
from mixlora_exp.runs.scoring import Scores, score_with
from mixlora_exp.runs.state import Run, Watch, start, training_examples
from mixlora_exp.system.console import be_quiet, echo
from mixlora_exp.system.device import (
    free_memory,
    gathered,
    processes,
)
from mixlora_exp.system.durable import sync
from mixlora_exp.system.hashing import file_sha256
from mixlora_exp.training import TrainSummary, fit, fit_halving
from mixlora_exp.training.sharding import shard_frozen, sharded
from mixlora_exp.training.tracking import start_tracker

Earlier = list[Path] | None


def run(
    config: Config,
    watch: Watch | None = None,
    earlier: Earlier = None,
    line: CommandLine | None = None,
) -> Path | None:
    """Execute the run that `config` describes and return the path of its record; None for a dry
    run, or if another process is executing it. If the record exists already, its results are shown
    or, if `earlier` is given, its path is added there. line: the command line, for a plan.

    `watch` is called with step and loss (without router loss) during training, and may raise
    `GivenUp` to end the run. A finished run of the same fingerprint on the same inputs is not
    repeated unless `force` is set. The record is written last, so a folder without one holds no
    result. Under torchrun or accelerate, all processes train and score, and the first one writes.

    Raises:
        UserError: the user can fix the cause; nothing is recorded.
    """
    first = processes().is_main_process
    be_quiet(not first)
    config = resolve_config(config)
    if config.dry_run:
        print_plans([config], line)
        return None
    # Inputs first: most mistakes are there, and are found fastest.
    inputs = gather_inputs(config)
    folder = Path(config.output_dir).expanduser() / run_name(config, inputs.identity["adapter"])
    record_path = folder / RECORD
    if record_path.is_file() and not config.force:
        return finished(record_path, inputs, config, earlier)
    # Before there is a folder: what cannot run leaves nothing.
    this = start(config, folder, inputs)
    this.watch = watch
    with held(folder) as lock:
        if lock is None:
            return None
        if record_path.is_file() and not config.force:
            # Another process finished it between the check above and the lock.
            return finished(record_path, inputs, config, earlier)
        this.lock = lock
        announce(this)
        with failure_noted(folder, lock), tracked(this):
            record = _carry_out(this)
            return write_record(this, record) if first else None


@contextlib.contextmanager
def tracked(this: Run) -> Iterator[None]:
    """Run the tracker within the context; at the end it receives the run's scores."""
    if processes().is_main_process:
        this.tracker = start_tracker(this.config, this.folder, fingerprint(this.config))
    try:
        yield
    finally:
        if this.tracker is not None:
            path = this.folder / RECORD
            this.tracker.close(read_run(path) if path.exists() else None)


def write_record(this: Run, record: dict[str, Any]) -> Path:
    """Write and print the record of a finished run, and remove its checkpoints."""
    this.check_owner()
    path, record = this.folder / RECORD, finish_record(record)
    if record["train"] is not None:
        write_text(this.folder / "adapter" / "README.md", model_card(record))
    # The log, and the names of all files: after a power loss none is missing beside a record.
    for written in (this.folder / "train_log.jsonl", this.folder):
        if written.exists():
            sync(written)
    write_json(path, record)
    # Only now: checkpoints are needed until the record is on disk.
    this.checkpoints().clear()
    print_record(record)
    echo(f"Record: {path}")
    return path


def _carry_out(this: Run) -> dict[str, Any]:
    config, folder = this.config, this.folder
    base, before, summary, adapter = this.load_base(), None, None, config.adapter
    if config.evaluation.before_training:
        before = score_base(this, base)
    if isinstance(config.method, TrainedMethodConfig):
        if processes().is_main_process:
            this.begin()
        processes().wait_for_everyone()
        summary = _train(this, base)
        adapter = str(folder / "adapter")
        if sharded(config):
            # Else its part would lie beside the whole one.
            del base
            free_memory()
            base = this.load_base()
    model: torch.nn.Module = base
    if adapter is not None:
        echo(f"Scoring the adapter loaded back from {adapter}")
        model = _load(this, base)
    scores = _score(this, model, None if adapter is None else this.adapter_folder)
    if not processes().is_main_process:
        return {}
    return finish(this, base, summary, before, scores)


def finish(
    this: Run,
    base: PreTrainedModel,
    summary: TrainSummary | None,
    before: list[TaskScore] | None,
    found: Scores,
) -> dict[str, Any]:
    """Write the predictions of a run and return its record, not yet written."""
    config, folder = this.config, this.folder
    after, scoring = found
    saved = None
    if summary is not None:
        saved = {"sha256": file_sha256(folder / "adapter" / "adapter_model.safetensors")}
    this.check_owner()
    if summary is None:
        this.begin()
    predictions = write_predictions(folder, after)
    return {
        "name": folder.name,
        "fingerprint": fingerprint(config),
        "status": "finished",
        "config": to_dict(config),
        **this.inputs.identity,
        "model": identify(config.model, base),
        "special_tokens": special_tokens_entry(this.tokenizer),
        "attention": base.config._attn_implementation,
        "parameters": parameters_entry(config),
        "cost": cost_entry(config, this.dtype.itemsize),
        "train": None if summary is None else dataclasses.asdict(summary),
        "saved_adapter": saved,
        "scores": [score_entry(score) for score in after],
        "scores_before": None if before is None else [score_entry(score) for score in before],
        "scoring": scoring,
        "predictions": predictions,
        "predictions_sha256": {key: file_sha256(folder / n) for key, n in predictions.items()},
        "seconds": round(time.time() - this.started, 1),
        "provenance": this.origin,
    }


def _train(this: Run, base: PreTrainedModel) -> TrainSummary:
    """Train an adapter on `base`, save it to the run's folder, and remove it from `base` and from
    memory."""
    examples = training_examples(this)
    echo(f"Training {this.config.method.name} on {len(examples)} examples")
    summary = fit_halving(
        this.config, this.checkpoints(), partial(_fit, this, base, examples), echo
    )
    free_memory()
    return summary


def _fit(this: Run, base: PreTrainedModel, examples: list[Example], config: Config) -> TrainSummary:
    frozen = list(base.parameters())
    model = attach_adapter(base, config.method, config.kernel, config.seed)
    if sharded(config):
        shard_frozen(model, frozen)
    try:
        summary = fit(
            config=config,
            model=model,
            tokenizer=this.tokenizer,
            examples=examples,
            folder=this.folder,
            dtype=this.dtype,
            checkpoints=this.checkpoints(),
            tracker=this.tracker,
            watch=this.watch,
        )
        if processes().is_main_process:
            this.check_owner()
            save_adapter(model, this.folder / "adapter")
        # All of them read it.
        processes().wait_for_everyone()
    finally:
        model.unload()
    return summary


def _load(this: Run, base: PreTrainedModel) -> PeftModel:
    """Return the adapter of a run on its base model, as it is to be scored."""
    accept = this.config.base is Base.accept
    model = load_adapter(base, this.adapter_folder, this.config.kernel, accept=accept)
    if this.config.evaluation.shuffle_experts is not None:
        shuffle_experts(model, "default", this.config.evaluation.shuffle_experts)
    return model


def score_base(this: Run, base: PreTrainedModel) -> list[TaskScore]:
    """Score the base model before training."""
    echo("Scoring the base model")
    return _score(this, base, None)[0]


def score_alone(this: Run, base: PreTrainedModel) -> Scores:
    """Score the adapter of a run, loaded back from disk, and remove it from `base`."""
    model = _load(this, base)
    found = _score(this, model, this.adapter_folder)
    model.unload()
    return found


def _score(this: Run, model: torch.nn.Module, adapter: Path | None) -> Scores:
    context = autocast(next(model.parameters()).device, this.dtype)
    state, tokens = processes(), this.config.evaluation.batch_tokens
    seed, share = None, Share(state.process_index, state.num_processes, gathered)
    if this.config.evaluation.dropout:
        # Drawn in the order of the batches: each process computes all of them.
        seed, share = this.config.seed, None
    make = partial(Scorer, model, this.tokenizer, context, tokens, seed, share)
    return score_with(this, make, adapter)
