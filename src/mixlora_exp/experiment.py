"""One run, end to end: data, base model, adapter, training, disk, reload, scores, record.

The only module that knows every room. What is scored is what was loaded back from disk.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from mixlora_exp.adapters import attach_adapter, load_adapter, save_adapter
from mixlora_exp.config import Config, fingerprint, run_name, to_dict
from mixlora_exp.config.schema import LoraMethodConfig
from mixlora_exp.data.encoding import encode_examples
from mixlora_exp.data.sources import LoadedSplit
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation import Scorer, TaskScore, check_tests, score_tests
from mixlora_exp.inputs import (
    RECORD,
    Inputs,
    check_inputs,
    differences,
    gather_inputs,
    resolve_config,
)
from mixlora_exp.models import file_sha256, identify, load_model, load_tokenizer
from mixlora_exp.planning import parameters_entry, print_plan
from mixlora_exp.results.record import (
    finish_record,
    provenance,
    read_record,
    write_json,
    write_jsonl,
)
from mixlora_exp.results.show import be_quiet, print_record, say
from mixlora_exp.runtime import autocast, hardware_names, processes, resolve_device, resolve_dtype
from mixlora_exp.tasks.base import Item
from mixlora_exp.training import TrainSummary, fit

__all__ = ["RECORD", "run"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(slots=True)
class _Run:
    """What the steps of a run share."""

    config: Config
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    tests: dict[str, LoadedSplit]
    dtype: torch.dtype


def run(config: Config) -> Path | None:
    """Carry out `config`; returns the path of its record, None for a dry run.

    A finished run of the same fingerprint on the same inputs is not repeated unless `force` is
    set. The record is written last, so a folder without one holds no result. Started by torchrun or
    accelerate, all processes train and the first one does the rest.

    Raises:
        UserError: something that the user can mend; nothing is recorded.
    """
    first = processes().is_main_process
    be_quiet(not first)
    config = resolve_config(config)
    if config.dry_run:
        check_inputs([config])
        print_plan(config)
        return None
    folder = Path(config.output_dir).expanduser() / run_name(config)
    record_path = folder / RECORD
    # Inputs first: their mistakes are the commonest and the quickest to find.
    inputs = gather_inputs(config)
    if record_path.exists() and not config.force:
        return _finished(record_path, inputs)
    say(f"Run {folder.name}")
    record = _carry_out(config, folder, inputs)
    if not first:
        return None
    write_json(record_path, finish_record(record))
    print_record(record)
    say(f"Record: {record_path}")
    return record_path


def _finished(path: Path, inputs: Inputs) -> Path:
    """Show a finished run, if its inputs were those of now."""
    record = read_record(path)
    changed = differences(inputs.identity, record)
    if changed:
        raise UserError(
            f"{path} is a finished run of the same settings on other inputs "
            f"({', '.join(changed)} differ): choose another output_dir, or force=true to replace it"
        )
    print_record(record)
    say(f"Already finished: {path}. force=true runs it again.")
    return path


def _start_folder(folder: Path) -> None:
    """Make the run's folder; from here on it holds no finished run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"output_dir={folder.parent}: cannot be written ({error.strerror}); choose another"
        ) from error


def _carry_out(config: Config, folder: Path, inputs: Inputs) -> dict[str, Any]:
    started = time.time()
    # Now, not at the end: the code that runs is the code of this moment.
    origin = provenance(ROOT, hardware_names())
    device = resolve_device()
    dtype = resolve_dtype(config.trainer.precision, device)
    set_seed(config.seed)
    limit, seed = config.evaluation.limit, config.data.seed
    this = _Run(
        config,
        folder,
        load_tokenizer(config.model),
        {t: inputs.splits[t, "test"].limited(limit, seed) for t in config.task.evaluate},
        dtype,
    )
    for protocol in config.evaluation.protocols:
        check_tests(protocol, this.tokenizer, this.tests, config.data)
    base = load_model(config.model, dtype, config.seed).to(device)
    if device.type == "cpu":
        # On short sequences a CPU runs plain attention 2 to 3 times faster than the fused one.
        base.set_attn_implementation("eager")
    identity = {**inputs.identity, "model": identify(config.model, base)}
    before, summary, adapter, saved = None, None, config.adapter, None
    if config.evaluation.before_training and processes().is_main_process:
        say("Scoring the base model")
        before, _ = _score(this, base)
    if isinstance(config.method, LoraMethodConfig):
        if processes().is_main_process:
            _start_folder(folder)
        processes().wait_for_everyone()
        summary = _train(this, base, inputs)
        adapter = str(folder / "adapter")
        if not processes().is_main_process:
            return {}
        saved = {"sha256": file_sha256(folder / "adapter" / "adapter_model.safetensors")}
    model: torch.nn.Module = base
    if adapter is not None:
        say(f"Scoring the adapter loaded back from {adapter}")
        model = load_adapter(base, Path(adapter).expanduser(), config.kernel)
    after, scoring = _score(this, model)
    if summary is None:
        _start_folder(folder)
    predictions = _write_predictions(folder, after)
    return {
        "name": folder.name,
        "fingerprint": fingerprint(config),
        "status": "finished",
        "config": to_dict(config),
        **identity,
        "attention": base.config._attn_implementation,
        "parameters": parameters_entry(config),
        "train": None if summary is None else dataclasses.asdict(summary),
        "saved_adapter": saved,
        "scores": [_score_entry(score) for score in after],
        "scores_before": None if before is None else [_score_entry(score) for score in before],
        "scoring": scoring,
        "predictions": predictions,
        "predictions_sha256": {key: file_sha256(folder / n) for key, n in predictions.items()},
        "seconds": round(time.time() - started, 1),
        "provenance": origin,
    }


def _train(this: _Run, base: PreTrainedModel, inputs: Inputs) -> TrainSummary:
    """Train an adapter on `base`, save it to the run's folder and take it off again."""
    config = this.config
    items: list[Item] = []
    for task in config.task.train:
        loaded = inputs.splits[task, "train"]
        items += loaded.limited(config.data.train_limit, config.data.seed).items
    examples = encode_examples(this.tokenizer, items, config.data)
    model = attach_adapter(base, config.method, config.kernel, config.seed)
    say(f"Training {config.method.name} on {len(examples)} examples")
    summary = fit(config, model, this.tokenizer, examples, this.folder, this.dtype)
    if processes().is_main_process:
        save_adapter(model, this.folder / "adapter")
    model.unload()
    return summary


def _score(
    this: _Run, model: torch.nn.Module
) -> tuple[list[TaskScore], dict[str, dict[str, float]]]:
    """Scores of every task under every protocol, and how long each protocol took."""
    config, scores, times = this.config, [], {}
    context = autocast(next(model.parameters()).device, this.dtype)
    for protocol in config.evaluation.protocols:
        start = time.perf_counter()
        seed = config.seed if config.evaluation.dropout else None
        scorer = Scorer(model, this.tokenizer, context, config.evaluation.batch_tokens, seed)
        found = score_tests(protocol, scorer, this.tests, config.data, config.evaluation)
        seconds = time.perf_counter() - start
        times[protocol.value] = {"items": sum(s.n for s in found), "seconds": round(seconds, 3)}
        for score in found:
            say(f"  {protocol.value} {score.task}: {100 * score.accuracy:.1f} % of {score.n} items")
        scores += found
    return scores, times


def _score_entry(score: TaskScore) -> dict[str, Any]:
    entry = dataclasses.asdict(dataclasses.replace(score, items=[]))
    del entry["items"]
    return entry


def _write_predictions(folder: Path, scores: Sequence[TaskScore]) -> dict[str, str]:
    """One JSON line per item; returns file names by task and protocol."""
    names = {}
    for score in scores:
        name = f"predictions/{score.task}.{score.protocol}.jsonl"
        write_jsonl(folder / name, [dataclasses.asdict(item) for item in score.items])
        names[f"{score.task}/{score.protocol}"] = name
    return names
