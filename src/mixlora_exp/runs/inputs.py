"""Everything that a run reads, located and checked before anything is computed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mixlora_exp.config.choices import MixtureName
from mixlora_exp.config.resolve import to_dict
from mixlora_exp.config.schema import (
    Base,
    Config,
    DataSource,
    Head,
    Tracker,
    TrainedMethodConfig,
)
from mixlora_exp.data.sources import LoadedSplit, load_split
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation import encode_tests
from mixlora_exp.kernels import KERNELS, resolve_kernel
from mixlora_exp.models import (
    check_model,
    contradict,
    has_local_tokenizer,
    identify,
    known_identity,
    load_tokenizer,
    of_record,
    read_base,
    with_own_shape,
)
from mixlora_exp.models.budget import with_matched_rank
from mixlora_exp.models.precision import resolve_dtype
from mixlora_exp.records.code_hash import code_sha256
from mixlora_exp.records.files import RECORD
from mixlora_exp.records.record import read_run
from mixlora_exp.records.required_fields import odd_fields
from mixlora_exp.runs.method_checks import check_kernel, check_method, check_shuffle
from mixlora_exp.runs.optimizer_checks import check_optimizer
from mixlora_exp.runs.parallel import check_processes
from mixlora_exp.runs.quantized_base import check_quantized_base
from mixlora_exp.system.device import resolve_device
from mixlora_exp.system.hashing import file_sha256
from mixlora_exp.system.hub import adapter_folder, pin_revision

SIGN = "fingerprint"


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that a run reads. `identity` goes into the record, and distinguishes finished runs
    with the same settings but other inputs."""

    splits: dict[tuple[str, str], LoadedSplit]
    identity: dict[str, Any]


def resolve_config(config: Config) -> Config:
    """Return the configuration, completed with the architecture of the model in `model.path`, the
    commit of an adapter on the hub, and the rank that `method.match_params` asks for.

    Raises:
        UserError: no rank does it, or as `pin_revision`.
    """
    adapter = None if config.adapter is None else pin_revision(config.adapter)
    model = with_own_shape(config.model)
    return with_matched_rank(dataclasses.replace(config, model=model, adapter=adapter))


def _wanted(config: Config) -> list[tuple[str, str]]:
    """Return (task, split) pairs that a run reads."""
    scored = "train" if config.evaluation.held_out else "test"
    wanted = [(task, scored) for task in config.task.evaluate]
    if isinstance(config.method, TrainedMethodConfig):
        wanted = [(task, "train") for task in config.task.train] + wanted
    return wanted


def _splits(config: Config) -> dict[tuple[str, str], LoadedSplit]:
    custom, wanted = config.task.custom, _wanted(config)
    splits = {(task, split): load_split(config.data, task, split, custom) for task, split in wanted}
    # Only protocols need rows; those of large training splits would waste memory.
    return {
        key: dataclasses.replace(loaded, rows=[]) if key[1] == "train" else loaded
        for key, loaded in splits.items()
    }


def adapter_entry(config: Config) -> dict[str, Any] | None:
    """Path, hash, type and origin of the adapter to score; None if `config` has none."""
    if config.adapter is None:
        return None
    folder = adapter_folder(config.adapter)
    # Imported late: PEFT takes a second to load, and most command lines do not need it.
    from mixlora_exp.adapters.saved import saved_settings

    settings = saved_settings(folder)
    peft_type = settings["peft_type"]
    sha256 = file_sha256(folder / "adapter_model.safetensors")
    return {
        "path": config.adapter,
        "peft_type": peft_type,
        "method": _method(settings),
        "sha256": sha256,
        "trained_by": _trained_by(folder.parent / RECORD, sha256),
    }


def _method(settings: dict[str, Any]) -> str:
    """Return the method name of a saved adapter; types without one go by PEFT's name."""
    kind = settings["peft_type"].lower()
    if kind == "lora_mixture" and settings.get("mixture") in MixtureName.__members__:
        return settings["mixture"]
    return kind.replace("lora", "dora") if settings.get("use_dora") else kind


def _trained_by(path: Path, sha256: str) -> dict[str, Any] | None:
    """Return facts about the run that trained an adapter, from the record next to it if that record
    has the hash of these weights. Tables need them to find the cell that the scores belong to."""
    if not path.exists():
        return None
    record = read_run(path)
    if (record.get("saved_adapter") or {}).get("sha256") != sha256:
        return None
    kept = ("name", "fingerprint", "content_sha256", "config", "data", "model", "parameters",
            "kernel", "dtype")  # fmt: skip
    with odd_fields(path):
        origin, train = record["provenance"], record["train"] or {}
        return {
            **{name: record[name] for name in kept},
            "git": origin["git"],
            "train": {n: train.get(n) for n in ("micro_batch_size", "halved_micro_batch")},
            "provenance": {
                "packages": {"torch": origin["packages"]["torch"]},
                "hardware": {"gpus": origin["hardware"]["gpus"]},
            },
        }


def _check_base(config: Config, adapter: dict[str, Any] | None) -> None:
    if adapter is not None:
        check_known_base(config, adapter_folder(str(config.adapter)), adapter["trained_by"])


def check_known_base(
    config: Config, folder: Path, trained_by: dict[str, Any] | None = None
) -> None:
    """Refuse an adapter that is known to be trained on other base weights, before loading any.

    `trained_by`: the record of the run that trained it.

    Raises:
        UserError: its base model has other weights than `config.model`.
    """
    then = read_base(folder)
    if then is None and trained_by is not None:
        then = of_record(trained_by)
    if then is None:
        return
    now = known_identity(config.model, config.seed)
    from mixlora_exp.adapters.base_check import refusal, shapes_differ

    if shapes_differ(then, now) or (config.base is Base.check and contradict(then, now)):
        raise refusal(folder, then, now)


def _kernel(config: Config, adapter: dict[str, Any] | None) -> str | None:
    """Return the kernel that computes the adapter, or None without an adapter."""
    if adapter is None and not isinstance(config.method, TrainedMethodConfig):
        return None
    device = resolve_device().type
    name = resolve_kernel(config.kernel.name.value, device)
    chosen = KERNELS[name]
    if not chosen.runs_on(device):
        place = {"cuda": "a CUDA GPU"}.get(chosen.device or "", chosen.device)
        needs = " and ".join(filter(None, (place, chosen.needs)))
        raise UserError(f"kernel={name} needs {needs}, which this machine lacks: use kernel=auto")
    return name


def _check_head(config: Config) -> None:
    if config.trainer.head is not Head.liger or not isinstance(config.method, TrainedMethodConfig):
        return
    if resolve_device().type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "trainer.head=liger needs a CUDA GPU and the package liger-kernel, and at least one is "
            "missing: use trainer.head=auto"
        )


def _check_tracker(config: Config) -> None:
    name = config.tracker.name
    if name is not Tracker.none and importlib.util.find_spec(name.value) is None:
        raise UserError(
            f"tracker={name.value}: the package {name.value} is not installed: "
            f"run `pip install {name.value}`, or use tracker=none"
        )


def gather_inputs(config: Config) -> Inputs:
    """Read the data, and identify all inputs of the run by hashes.

    Raises:
        UserError: data, model folder, adapter or tracker is missing or damaged.
    """
    adapter = adapter_entry(config)
    _check_settings(config, adapter)
    check_processes(config)
    kernel = _kernel(config, adapter)
    check_quantized_base(config, adapter)
    check_model(config.model)
    check_method(config)
    splits = _splits(config)
    identity = {
        "data": {
            f"{task}/{split}": [dataclasses.asdict(file) for file in loaded.files]
            for (task, split), loaded in splits.items()
        },
        "model": identify(config.model),
        "adapter": adapter,
        "code": code_sha256(),
        "kernel": kernel,
        "dtype": str(resolve_dtype(config.trainer.precision, resolve_device())).partition(".")[2],
    }
    return Inputs(splits, identity)


def _check_settings(config: Config, adapter: dict[str, Any] | None, *, here: bool = True) -> None:
    """Check all that needs neither data nor weights. `here`: the run executes on this machine."""
    _check_tracker(config)
    check_shuffle(config, adapter)
    check_kernel(config, adapter)
    check_optimizer(config, here=here)
    _check_base(config, adapter)
    if here:
        _check_head(config)


def check_inputs(configs: list[Config], *, elsewhere: bool = False) -> None:
    """Check the inputs and requirements of runs, without accessing the hub; shared data are checked
    once.

    `elsewhere`: the runs execute on other machines, so GPU and packages are not checked (nor are
    they for a dry run).

    Raises:
        UserError: an input is missing or damaged, or this machine lacks a requirement.
    """
    checked: set[str] = set()
    for config in map(resolve_config, configs):
        here = not (elsewhere or config.dry_run)
        adapter = adapter_entry(config)
        _check_settings(config, adapter, here=here)
        if not elsewhere:
            check_processes(config)
        if here:
            _kernel(config, adapter)
        check_quantized_base(config, adapter, here=not elsewhere)
        if (model := json.dumps(to_dict(config.model))) not in checked:
            check_model(config.model, here=here)
            if has_local_tokenizer(config.model):
                load_tokenizer(config.model)
            checked.add(model)
        check_method(config)
        if config.data.name is DataSource.hub and config.data.mirror is None:
            continue
        # Cells that differ only in the method read the same data.
        parts = (config.model, config.task, config.data, config.evaluation, _wanted(config))
        key = json.dumps([to_dict(part) for part in parts])
        if key not in checked:
            _check_items(config)
            checked.add(key)


def _check_items(config: Config) -> None:
    """Read the items and, if the tokenizer is available locally, check that they can be scored."""
    tests = scored_tests(config, Inputs(_splits(config), {}))
    if has_local_tokenizer(config.model):
        encoded_tests(config, load_tokenizer(config.model), tests)


def scored_tests(config: Config, inputs: Inputs) -> dict[str, LoadedSplit]:
    """Return the items to score, by task; raises as `scored_split`."""
    return {task: scored_split(config, inputs, task) for task in config.task.evaluate}


def encoded_tests(
    config: Config, tokenizer: PreTrainedTokenizerBase, tests: dict[str, LoadedSplit]
) -> dict[str, dict[str, Any]]:
    """Return the items to score as each protocol encodes them, by the protocol's name.

    Raises:
        UserError: a protocol does not support the tokenizer or a row, or a package is missing.
    """
    data, evaluation = config.data, config.evaluation
    return {
        p.value: encode_tests(p, tokenizer, tests, data, evaluation) for p in evaluation.protocols
    }


def comparable(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an identity that must match for a run to resume; file locations are
    excluded."""
    data = {split: [file["sha256"] for file in files] for split, files in identity["data"].items()}
    model = {k: v for k, v in identity["model"].items() if k not in ("commit", "path")}
    return {**{k: v for k, v in identity.items() if k != "adapter"}, "data": data, "model": model}


def differences(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """Return names of the inputs that differ from those of a finished run; data splits are compared
    by hash.

    A hub model's commit is known only after loading, so it is not compared; nor is a fingerprint of
    the weights that is not known yet.
    """
    found = []
    for split, files in now["data"].items():
        hashes = [file["sha256"] for file in files]
        if [file["sha256"] for file in then["data"].get(split, [])] != hashes:
            found.append(split)
    # Older records do not contain the code's hash.
    names = ("model", "adapter", "kernel", "dtype", *(["code"] if "code" in then else []))
    for name in names:
        old, new = then.get(name), now[name]
        if isinstance(old, dict) and isinstance(new, dict):
            unknown = {SIGN} if None in (old.get(SIGN), new.get(SIGN)) else set()
            left_out = {"commit", "path", *unknown}
            old, new = ({k: v for k, v in x.items() if k not in left_out} for x in (old, new))
        if old != new:
            found.append(name)
    return found


def scored_split(config: Config, inputs: Inputs, task: str) -> LoadedSplit:
    """Return the items of a task to score.

    Raises:
        UserError: with `evaluation.held_out`, training uses all rows.
    """
    limit, seed = config.evaluation.limit, config.data.seed
    if not config.evaluation.held_out:
        return inputs.splits[task, "test"].limited(limit, seed)
    trained = config.data.train_limit_of(task)
    found = inputs.splits[task, "train"].held_out(trained or 0, limit, seed)
    if not found.items:
        field = f"train_limits.{task}" if task in config.data.train_limits else "train_limit"
        raise UserError(
            f"data.{field}={trained} leaves no row of {task} to score "
            "(evaluation.held_out=true): choose a smaller limit"
        )
    return found
