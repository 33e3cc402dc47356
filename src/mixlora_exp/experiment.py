"""One run, end to end: data, base model, adapter, training, disk, reload, scores, record.

The only module that knows every room. What is scored is what was loaded back from disk.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from mixlora_exp.adapters import attach_adapter, load_adapter, save_adapter
from mixlora_exp.config import Config, fingerprint, run_name, to_dict
from mixlora_exp.config.schema import LoraMethodConfig, MixLoraMethodConfig
from mixlora_exp.data.encoding import encode_examples
from mixlora_exp.data.sources import LoadedSplit, limit_items, load_split
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation import Scorer, TaskScore, score_task
from mixlora_exp.kernels import resolve_kernel
from mixlora_exp.models import identify, load_model, load_tokenizer
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
RECORD = "record.json"


def run(config: Config) -> Path | None:
    """Carry out `config`; returns the path of its record, None for a dry run.

    A finished run of the same fingerprint is not repeated unless `force` is set. The record is
    written last, so a folder without one holds no result. Started by torchrun or accelerate, all
    processes train and the first one does the rest.

    Raises:
        UserError: something that the user can mend; nothing is recorded.
    """
    first = processes().is_main_process
    be_quiet(not first)
    if config.dry_run:
        print_plan(config)
        return None
    folder = Path(config.output_dir) / run_name(config)
    record_path = folder / RECORD
    # Data first: its mistakes are the commonest and the quickest to find.
    splits = _load_data(config)
    if record_path.exists() and not config.force:
        return _finished(record_path, _data_entry(splits))
    _make_folder(folder)
    processes().wait_for_everyone()
    if first:
        record_path.unlink(missing_ok=True)
    say(f"Run {folder.name}")
    record = _carry_out(config, folder, splits)
    if not first:
        return None
    write_json(record_path, finish_record(record))
    print_record(record)
    say(f"Record: {record_path}")
    return record_path


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output_dir={folder.parent}: cannot be written ({error.strerror}); choose another"
        ) from error


Splits = dict[tuple[str, str], LoadedSplit]


def _data_entry(splits: Splits) -> dict[str, list[dict[str, Any]]]:
    """The files that were read, as they stand in a record."""
    return {
        f"{task}/{split}": [dataclasses.asdict(file) for file in loaded.files]
        for (task, split), loaded in splits.items()
    }


def _finished(path: Path, data: dict[str, list[dict[str, Any]]]) -> Path:
    """Show a finished run, if it read the same data as would be read now."""
    record = read_record(path)
    for split, files in data.items():
        hashes = [file["sha256"] for file in files]
        if [file["sha256"] for file in record["data"].get(split, [])] != hashes:
            raise UserError(
                f"{path} is a finished run of the same settings on other data ({split} differs): "
                "choose another output_dir, or force=true to replace it"
            )
    print_record(record)
    say(f"Already finished: {path}. force=true runs it again.")
    return path


def _carry_out(config: Config, folder: Path, splits: Splits) -> dict[str, Any]:
    started = time.time()
    # Now, not at the end: the code that runs is the code of this moment.
    origin = provenance(ROOT, hardware_names())
    device = resolve_device()
    dtype = resolve_dtype(config.trainer.precision, device)
    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    base = load_model(config.model, dtype, config.seed).to(device)
    if device.type == "cpu":
        # On short sequences a CPU runs plain attention 2 to 3 times faster than the fused one.
        base.set_attn_implementation("eager")
    identity = identify(config.model, base)
    tests = {
        task: limit_items(splits[task, "test"].items, config.evaluation.limit, config.data.seed)
        for task in config.task.evaluate
    }
    before, summary, adapter = None, None, None
    if config.evaluation.before_training:
        say("Scoring the base model")
        before = _score(config, base, tokenizer, tests, dtype)
    model: torch.nn.Module = base
    if isinstance(config.method, LoraMethodConfig):
        summary, adapter = _train(config, folder, base, tokenizer, splits, dtype)
        if not processes().is_main_process:
            return {}
        say(f"Scoring the adapter loaded back from {adapter}")
        model = load_adapter(base, adapter, config.kernel)
    after = _score(config, model, tokenizer, tests, dtype)
    predictions = _write_predictions(folder, after)
    return {
        "name": folder.name,
        "fingerprint": fingerprint(config),
        "status": "finished",
        "config": to_dict(config),
        "model": identity,
        "kernel": _kernel(config),
        "dtype": str(dtype).removeprefix("torch."),
        "attention": base.config._attn_implementation,
        "data": _data_entry(splits),
        "parameters": parameters_entry(config),
        "train": None if summary is None else dataclasses.asdict(summary),
        "scores": [_score_entry(score) for score in after],
        "scores_before": None if before is None else [_score_entry(score) for score in before],
        "predictions": predictions,
        "seconds": round(time.time() - started, 1),
        "provenance": origin,
    }


def _kernel(config: Config) -> str | None:
    if isinstance(config.method, MixLoraMethodConfig):
        return resolve_kernel(config.kernel.name.value)
    return "peft" if isinstance(config.method, LoraMethodConfig) else None


def _load_data(config: Config) -> Splits:
    wanted = [(task, "test") for task in config.task.evaluate]
    if isinstance(config.method, LoraMethodConfig):
        wanted = [(task, "train") for task in config.task.train] + wanted
    return {(task, split): load_split(config.data, task, split) for task, split in wanted}


def _train(
    config: Config,
    folder: Path,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    dtype: torch.dtype,
) -> tuple[TrainSummary, Path]:
    """Train an adapter on `base`, save it and take it off again."""
    items: list[Item] = []
    for task in config.task.train:
        loaded = splits[task, "train"].items
        items += limit_items(loaded, config.data.train_limit, config.data.seed)
    examples = encode_examples(tokenizer, items, config.data)
    model = attach_adapter(base, config.method, config.kernel, config.seed)
    say(f"Training {config.method.name} on {len(examples)} examples")
    summary = fit(config, model, tokenizer, examples, folder / "trainer", dtype)
    adapter = folder / "adapter"
    if processes().is_main_process:
        save_adapter(model, adapter)
    model.unload()
    return summary, adapter


def _score(
    config: Config,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tests: dict[str, list[Item]],
    dtype: torch.dtype,
) -> list[TaskScore]:
    scores = []
    for protocol in config.evaluation.protocols:
        for task, items in tests.items():
            device = next(model.parameters()).device
            scorer = Scorer(
                model, tokenizer, autocast(device, dtype), config.evaluation.batch_tokens
            )
            score = score_task(protocol, scorer, tokenizer, items, config.data, config.evaluation)
            say(f"  {protocol.value} {task}: {score.accuracy:.3f} of {score.n}")
            scores.append(score)
    return scores


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
