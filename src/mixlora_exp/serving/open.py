"""Loads adapters on their base model for use after training.

The base model is the one in the record next to the adapter, or `model=NAME`, with any field of the
group (`model.path=DIR`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixlora_exp.adapters import load_adapter, load_adapters, set_kernel
from mixlora_exp.adapters.saved import saved_settings
from mixlora_exp.config.command import compose
from mixlora_exp.config.given_paths import check_folders
from mixlora_exp.config.schema import Base, Config, Quantization
from mixlora_exp.errors import UserError
from mixlora_exp.models import (
    BaseIdentity,
    check_model,
    contradict,
    load_model,
    load_tokenizer,
    with_own_shape,
)
from mixlora_exp.models.precision import resolve_dtype
from mixlora_exp.runs.base_choice import base_of, noted_base
from mixlora_exp.runs.inputs import check_known_base, resolve_config
from mixlora_exp.runs.quantized_base import check_quantized_base
from mixlora_exp.system.device import resolve_device
from mixlora_exp.system.hub import adapter_folder, on_hub

GROUPS = ("model", "kernel", "seed", "trainer.precision", "base")


@dataclass(frozen=True, slots=True)
class Opened:
    """A model in evaluation mode, and its tokenizer.

    `adapters`: if the model has several, label (for users) -> name in the model."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    config: Config
    adapters: Mapping[str, str] = field(default_factory=dict)


def split_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into those that choose the base model, and the others."""
    model = [
        word
        for word in argv
        if word.partition("=")[0] in GROUPS or word.startswith(("model.", "kernel."))
    ]
    return model, [word for word in argv if word not in model]


def _composed(adapter: Path | None, words: Sequence[str]) -> Config:
    given = {word.partition("=")[0] for word in words}
    chosen, recorded = ([], {}) if adapter is None else base_of(adapter, given, precision=True)
    return compose(["method=none", *chosen, *words], recorded=recorded)


def open_adapter(
    adapter: str | None, words: Sequence[str] = (), *, to_merge: bool = False
) -> Opened:
    """Load the base model and put `adapter` on it, or return the base model alone if `adapter` is
    None. `adapter`: a folder, or `hub:OWNER/NAME@REVISION`. `words`: overrides such as
    `model=NAME`, which choose the base model. to_merge: refuse a quantised one.

    Raises:
        UserError: there is no adapter, it does not fit the model, or the model cannot be loaded.
    """
    folder = None if adapter is None else _folder_of(adapter)
    model, tokenizer, config = _open_base(folder, words, to_merge=to_merge)
    if folder is not None:
        model = load_adapter(model, folder, config.kernel, accept=config.base is Base.accept)
        _check_numbers(model, folder)
    return Opened(model.eval(), tokenizer, config)


def open_adapters(adapters: Sequence[str], words: Sequence[str] = ()) -> Opened:
    """Load one base model, that of the first adapter's record, with several adapters of any method.
    An adapter's label is the name of its folder, of the run whose `adapter/` it is, or on the hub.

    Raises:
        UserError: as `open_adapter`, or two adapters have the same label or different base models.
    """
    folders = labelled(adapters)
    if "base=accept" not in words:
        _check_one_base(list(folders.values()))
    first, *others = folders.values()
    base, tokenizer, config = _open_base(first, words, others=others)
    names = {label: f"adapter{number}" for number, label in enumerate(folders)}
    model = load_adapters(
        base,
        {names[label]: folder for label, folder in folders.items()},
        accept=config.base is Base.accept,
    )
    set_kernel(model, config.kernel.name.value)
    for label, folder in folders.items():
        _check_numbers(model, folder, names[label])
    return Opened(model.eval(), tokenizer, config, names)


def labelled(adapters: Sequence[str]) -> dict[str, Path]:
    """Return the folders of several adapters, by label.

    Raises:
        UserError: one is not a folder, or two have the same label.
    """
    folders: dict[str, Path] = {}
    for adapter in adapters:
        folder = _folder_of(adapter)
        label = (folder.parent if folder.name == "adapter" else folder).resolve().name
        if on_hub(adapter):
            label = adapter.partition("@")[0].rpartition("/")[2]
        if label in folders:
            raise UserError(
                f"adapters: {folders[label]} and {folder} are both called {label}: rename one of "
                "the folders"
            )
        folders[label] = folder
    return folders


def _check_one_base(folders: Sequence[Path]) -> None:
    """Refuse adapters with different base models, as far as the files next to them show."""
    seen: tuple[Path, BaseIdentity] | None = None
    for folder in folders:
        base = noted_base(folder)
        if base is None:
            continue
        if seen is not None and contradict(seen[1], base):
            raise UserError(
                f"adapters: {seen[0]} was trained on {seen[1]}, but {folder} on {base}: "
                "give adapters of one base model, or use them one by one"
            )
        seen = (folder, base)


def _check_numbers(model: PeftModel, folder: Path, adapter: str = "default") -> None:
    for name, weight in model.named_parameters():
        if "lora_" in name and adapter in name.split(".") and not weight.isfinite().all():
            raise UserError(
                f"adapter={folder}: {name} contains values that are not finite, because its "
                "training diverged: use an earlier checkpoint"
            )


def _folder_of(adapter: str) -> Path:
    """Return the folder with the adapter's files: `adapter` itself, or `adapter/` in a run's
    folder."""
    folder = adapter_folder(adapter)
    check_folders([("adapter", adapter)])
    inner = folder / "adapter"
    if (folder / "last_good").is_dir() and not inner.is_dir():
        raise UserError(
            f"adapter={adapter} is a run that failed: adapter={folder / 'last_good'} is its last "
            "good adapter"
        )
    return inner if inner.is_dir() else folder


def _open_base(
    folder: Path | None,
    words: Sequence[str],
    *,
    to_merge: bool = False,
    others: Sequence[Path] = (),
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Config]:
    config = resolve_config(_composed(folder, words))
    if to_merge and config.model.quantization is not Quantization.none:
        raise UserError(
            f"model.quantization={config.model.quantization.value}: an adapter cannot be merged "
            "into a quantised base: add model.quantization=none to merge it into the weights that "
            "it was quantised from"
        )
    config = dataclasses.replace(config, model=with_own_shape(config.model))
    for each in (folder, *others):
        kind = None if each is None else {"peft_type": saved_settings(each)["peft_type"]}
        check_quantized_base(config, kind)
    check_model(config.model)
    if folder is not None:
        check_known_base(config, folder)
    device = resolve_device()
    dtype = resolve_dtype(config.trainer.precision, device)
    tokenizer = load_tokenizer(config.model)
    return load_model(config.model, dtype, config.seed, device), tokenizer, config
