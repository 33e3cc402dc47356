"""Reads weights and tokenizers with transformers: quietly, from safetensors only, without remote
code, and with every failure as one `UserError`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import extract_commit_hash

from mixlora_exp.config.schema import ModelConfig
from mixlora_exp.errors import UserError
from mixlora_exp.models.architecture import read_hf_config
from mixlora_exp.models.file_cache import content
from mixlora_exp.models.folder import ATTENTION, check_folder, check_settings
from mixlora_exp.models.special_tokens import settle_special_tokens
from mixlora_exp.models.vocabulary import pad_with_a_known_token
from mixlora_exp.system.untrusted import parse_json

CPU = torch.device("cpu")
# Exceptions for broken or unreachable files; any other exception is a bug.
_FAILURES = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError, HTTPError)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of weight loading, but not those of downloads, nor warnings."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    downloads_shown = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # Also disables those of downloads.
    if downloads_shown:
        enable_progress_bars()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _chain(error: BaseException | None) -> list[BaseException]:
    """Return the error and its causes, innermost last; the chain may contain a cycle."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _reason(error: BaseException, config: ModelConfig) -> str:
    """Return one clause on why reading failed; transformers wraps the hub's typed errors."""
    causes = _chain(error)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(GatedRepoError):  # A subclass of RepositoryNotFoundError, so checked first.
        return f"access is gated: {config.access or 'ask on its page, then run `hf auth login`'}"
    if caused_by(RevisionNotFoundError):
        return f"model.revision={config.revision} does not exist"
    if caused_by(RepositoryNotFoundError, HFValidationError):
        grant = f" ({config.access})" if config.access else ""
        return f"the repository does not exist, or this account may not read it{grant}"
    if caused_by(HfHubHTTPError):
        return f"the hub refused: {_first_line(error)}"
    # Any other HTTPError is a connection error.
    unreachable = (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, TimeoutError)
    if caused_by(*unreachable, HTTPError):
        grant = f"; access: {config.access}" if config.access else ""
        return f"the hub cannot be reached and the files are not in the local cache{grant}"
    if caused_by(SafetensorError):
        return f"a weight file is truncated or damaged: {_first_line(error)}"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


@contextlib.contextmanager
def one_error(what: str, origin: str, config: ModelConfig) -> Iterator[None]:
    """Convert exceptions from reading `what` from `origin` into one `UserError`."""
    try:
        yield
    except _FAILURES as error:
        raise UserError(
            f"model={config.name}: cannot load the {what} of {origin}: {_reason(error, config)}. "
            "A folder with the model in the transformers format can be given as model.path=DIR"
        ) from error


def resolve_commit(what: str, hub_id: str, config: ModelConfig) -> str:
    """Return the commit to which `config.revision` resolves, by downloading config.json.

    Raises:
        UserError: the hub cannot be reached; the message reports it as a failure to load `what`.
    """
    with one_error(what, hub_id, config):
        file = cached_file(hub_id, CONFIG_NAME, revision=config.revision)
    return extract_commit_hash(file, None) or config.revision


def read_config(hub_id: str, config: ModelConfig, revision: str) -> PreTrainedConfig:
    """Read the `config.json` of a hub repository.

    Raises:
        UserError: it cannot be read, or requests other code or files.
    """
    with one_error("configuration", hub_id, config):
        found = AutoConfig.from_pretrained(hub_id, revision=revision, trust_remote_code=False)
    check_settings({**found.to_dict(), ATTENTION: getattr(found, ATTENTION, None)}, hub_id)
    return found


def read_model(
    location: str,
    dtype: torch.dtype,
    config: ModelConfig,
    origin: str,
    device: torch.device = CPU,
    **options: Any,
) -> PreTrainedModel:
    """Read a causal language model from a folder or the hub, each weight directly to `device`.

    Raises:
        UserError: the files cannot be read, or lack a weight.
    """
    if device.type != "cpu":
        options["device_map"] = {"": device}
    with one_error("weights", origin, config), quiet():
        if "gguf_file" not in options:
            options["config"] = _with_usable_padding(location, options)
        model, report = AutoModelForCausalLM.from_pretrained(
            location,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    # transformers only warns about missing weights, and draws them at random.
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"model={config.name}: {origin} lacks {len(missing)} weights, the first {missing[0]}: "
            "give a complete model as model.path=DIR"
        )
    return model.eval()


def _with_usable_padding(location: str, options: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the model's configuration without a `pad_token_id` outside the embedding, with which
    transformers could not build the model; the tokenizer determines the padding token."""
    kept = {name: options[name] for name in ("revision",) if name in options}
    found = AutoConfig.from_pretrained(location, trust_remote_code=False, **kept)
    pad, rows = getattr(found, "pad_token_id", None), getattr(found, "vocab_size", None)
    if pad is not None and rows is not None and pad >= rows:
        found.pad_token_id = None
    return found


def read_tokenizer(
    location: str, config: ModelConfig, origin: str, gguf_file: str | None = None, **options: Any
) -> PreTrainedTokenizerBase:
    """Read a fast tokenizer from a folder or the hub, padding on the right.

    `gguf_file` names a file in `location` with weights and tokenizer; without it the tokenizer has
    separate files.

    Raises:
        UserError: the tokenizer is missing, damaged or not a fast one.
    """
    none = UserError(
        f"model={config.name}: {origin} has no tokenizer (no tokenizer.json): copy the model's "
        "tokenizer to a folder with the model and give it as model.path=DIR"
    )
    folder = Path(location)
    if folder.is_dir() and gguf_file is None:
        check_folder(folder, origin)
    has_files = any(folder.glob("*token*")) or any(folder.glob("vocab*"))
    if folder.is_dir() and gguf_file is None and not has_files:
        raise none
    known = {} if gguf_file is not None else _known_config(folder)
    with one_error("tokenizer", origin, config), quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            location, gguf_file=gguf_file, trust_remote_code=False, **options, **known
        )
        stated = _tokenizer_settings(location, options.get("revision"))
    if not tokenizer.is_fast:
        raise UserError(
            f"model={config.name}: {origin} has no fast tokenizer: add its tokenizer.json, or "
            "choose another model"
        )
    # For some families transformers creates a tokenizer of only special tokens if there is no
    # vocabulary.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise none
    return finish_tokenizer(tokenizer, config, origin, stated)


def _known_config(folder: Path) -> dict[str, PreTrainedConfig]:
    """Return the option that spares transformers reading the `config.json` of a folder again, from
    which it takes the tokenizer's class. Empty on the hub, and if transformers is to judge the
    file."""
    if not (folder / CONFIG_NAME).is_file():
        return {}
    try:
        found = read_hf_config(folder, str(folder))
    except UserError:
        return {}
    found.name_or_path = str(folder)
    return {"config": found}


def _tokenizer_settings(location: str, revision: str | None) -> Mapping[str, Any]:
    """Return the content of `tokenizer_config.json` in a folder or on the hub, empty if there is
    none."""
    path = Path(location) / TOKENIZER_CONFIG_FILE
    if not path.parent.is_dir():
        return get_tokenizer_config(location, revision=revision)
    return parse_json(content(path), finite=False) if path.is_file() else {}


def finish_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    origin: str,
    stated: Mapping[str, Any] = MappingProxyType({}),
) -> PreTrainedTokenizerBase:
    """Choose an existing padding token, and apply `settle_special_tokens` with `stated`, the
    content of `tokenizer_config.json`."""
    whose = f"model={config.name}: the tokenizer of {origin}"
    pad_with_a_known_token(tokenizer, whose)
    settle_special_tokens(tokenizer, stated, whose)
    return tokenizer
