"""Use after training: an adapter on its base model, generation, and merging.

The base model is the one that the record beside the adapter names, or the `model=` that is given,
with any field of the group (`model.path=DIR`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from mixlora_exp.adapters import load_adapter, load_adapters, set_kernel
from mixlora_exp.config import compose
from mixlora_exp.config.schema import Config
from mixlora_exp.data.collator import pad_left
from mixlora_exp.errors import UserError
from mixlora_exp.inputs import RECORD, resolve_config
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.rescoring import recorded
from mixlora_exp.results.record import read_record
from mixlora_exp.runtime import resolve_device, resolve_dtype

__all__ = [
    "Opened",
    "continuations",
    "merge",
    "open_adapter",
    "open_adapters",
    "split_words",
    "write_merged",
]

GROUPS = ("model", "kernel", "seed", "trainer.precision")


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that is ready for use, in evaluation mode, and its tokenizer.

    `adapters`: where the model carries several, their names in it by what users call them."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    config: Config
    adapters: Mapping[str, str] = field(default_factory=dict)


def split_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that choose the base model, and the others."""
    model = [
        word
        for word in argv
        if word.partition("=")[0] in GROUPS or word.startswith(("model.", "kernel."))
    ]
    return model, [word for word in argv if word not in model]


def _overrides(adapter: Path | None, words: Sequence[str]) -> list[str]:
    given = {word.partition("=")[0] for word in words}
    record = None if adapter is None else adapter.parent / RECORD
    if record is None or not record.is_file() or "model" in given:
        return ["method=none", *words]
    trained = read_record(record)["config"]
    return ["method=none", *recorded({"model": trained["model"]}, set()), *words]


def open_adapter(adapter: str | None, words: Sequence[str] = ()) -> Opened:
    """Load the base model and the adapter in `adapter`; None: the base model alone.

    Raises:
        UserError: there is no adapter, it does not fit the model, or the model cannot be loaded.
    """
    folder = None if adapter is None else _folder_of(adapter)
    model, tokenizer, config = _open_base(folder, words)
    if folder is not None:
        model = load_adapter(model, folder, config.kernel)
    return Opened(model.to(resolve_device()).eval(), tokenizer, config)


def open_adapters(adapters: Sequence[str], words: Sequence[str] = ()) -> Opened:
    """Load one base model, that of the first adapter's record, and several adapters of any method
    onto it. An adapter is called after its folder, or after the run whose `adapter/` it is.

    Raises:
        UserError: as `open_adapter`, or two adapters have the same name.
    """
    folders = {}
    for adapter in adapters:
        folder = _folder_of(adapter)
        label = (folder.parent if folder.name == "adapter" else folder).resolve().name
        if label in folders:
            raise UserError(
                f"adapters: {folders[label]} and {folder} are both called {label}: rename a folder"
            )
        folders[label] = folder
    base, tokenizer, config = _open_base(next(iter(folders.values())), words)
    names = {label: f"adapter{number}" for number, label in enumerate(folders)}
    model = load_adapters(base, {names[label]: folder for label, folder in folders.items()})
    set_kernel(model, config.kernel.name.value)
    return Opened(model.to(resolve_device()).eval(), tokenizer, config, names)


def _folder_of(adapter: str) -> Path:
    """Where the adapter's files are: in the folder, or in `adapter/` of a run's."""
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        raise UserError(f"adapter={adapter} is no folder: give one that PEFT or train.py wrote")
    return folder / "adapter" if (folder / "adapter").is_dir() else folder


def _open_base(
    folder: Path | None, words: Sequence[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Config]:
    config = resolve_config(compose(_overrides(folder, words)))
    dtype = resolve_dtype(config.trainer.precision, resolve_device())
    tokenizer = load_tokenizer(config.model)
    return load_model(config.model, dtype, config.seed), tokenizer, config


Prompt = str | Sequence[Mapping[str, str]]
"""A text to go on with, or the turns of a chat (`role` and `content`)."""


def _prompt_ids(opened: Opened, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return opened.tokenizer(prompt)["input_ids"]
    if opened.tokenizer.chat_template is None:
        raise UserError(
            f"chat=true: the tokenizer of model={opened.config.model.name} has no chat template; "
            "leave it out"
        )
    return opened.tokenizer.apply_chat_template(
        list(prompt), add_generation_prompt=True, return_dict=True
    )["input_ids"]


@torch.inference_mode()
def continuations(
    opened: Opened,
    prompts: Iterable[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 1,
    stream: bool = False,
    adapters: Sequence[str] | None = None,
) -> Iterator[str]:
    """What the model writes after each prompt, in their order, `batch_size` at a time.

    Greedy at `temperature` 0, else sampled; with the key/value cache. `stream` prints the words as
    they come (one prompt at a time). `adapters` has one for each prompt, by its key in
    `Opened.adapters`; prompts of different adapters share batches.
    """
    tokenizer, model = opened.tokenizer, opened.model
    sampling = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    pending = [_prompt_ids(opened, prompt) for prompt in prompts]
    for start in range(0, len(pending), batch_size):
        rows = pending[start : start + batch_size]
        batch = {k: v.to(model.device) for k, v in pad_left(rows, tokenizer.pad_token_id).items()}
        del batch["position_ids"]  # `generate` counts them from the mask.
        if adapters is not None:
            chosen = adapters[start : start + batch_size]
            batch["adapter_names"] = [opened.adapters[label] for label in chosen]
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = model.generate(
            **batch, **sampling, max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id, streamer=streamer if stream else None,
        )  # fmt: skip
        new = output[:, batch["input_ids"].shape[1] :]
        yield from tokenizer.batch_decode(new, skip_special_tokens=True)


def merge(opened: Opened) -> PreTrainedModel:
    """The base model with the adapter in its weights.

    Raises:
        UserError: the adapter is a mixture, which no single weight can stand for.
    """
    model = opened.model
    if not isinstance(model, PeftModel):
        raise UserError("adapter=null: there is nothing to merge; name an adapter's folder")
    kind = model.peft_config[model.active_adapter].peft_type
    if kind == "MIXLORA":
        raise UserError(
            "a MixLoRA or MixDoRA adapter cannot be merged: its router chooses experts for each "
            "token, and one weight cannot stand for all of them. Load it with "
            "PeftModel.from_pretrained instead"
        )
    return model.merge_and_unload(safe_merge=True)


def write_merged(opened: Opened, folder: Path) -> None:
    """Write the merged model with its tokenizer, in the transformers format.

    Raises:
        UserError: the folder exists or cannot be written, or the adapter cannot be merged.
    """
    if folder.exists():
        raise UserError(f"output={folder} exists already: name another folder, or remove it")
    merged = merge(opened)
    partial = folder.with_name(folder.name + ".partial")
    try:
        merged.save_pretrained(partial)
        opened.tokenizer.save_pretrained(partial)
        partial.rename(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"output={folder} cannot be written ({error}): free space there or name another folder"
        ) from error
