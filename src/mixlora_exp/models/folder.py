"""Checks that the files in a model's folder refer to nothing outside it.

transformers follows references in a folder: from an adapter's configuration to a base model on the
hub, from an index to weights elsewhere, from a configuration to kernels that it downloads and runs.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from mixlora_exp.errors import UserError, shown
from mixlora_exp.models.file_cache import Stamp, content, stamp
from mixlora_exp.system.untrusted import open_regular, parse_json

INDEX, ADAPTER, TOKENIZER = "*.index.json", "adapter_config.json", "tokenizer.json"
NOT_OBEYED = ("quantization_config", "transformers_weights", "kernel_config", "distributed_config")
"""Settings of a `config.json` that make transformers load other code or files."""
ATTENTION, OWN = "_attn_implementation", (None, "eager", "sdpa")
IMPLEMENTATIONS = (ATTENTION, "attn_implementation", "experts_implementation",
                   "_experts_implementation")  # fmt: skip
"""Settings that choose an implementation. Any value except PyTorch's own may name code on the hub,
which transformers would download and run."""


def check_settings(settings: dict[str, Any], origin: str) -> None:
    """Check the `config.json` of a folder or of a repository on the hub.

    Raises:
        UserError: it has a setting that would load other code or files.
    """
    odd = [name for name in IMPLEMENTATIONS if settings.get(name) not in OWN]
    for name in (*NOT_OBEYED, *odd):
        if settings.get(name):
            value = shown(repr(settings[name]), 80)
            raise UserError(
                f"{origin}: {name}={value} in config.json is refused: it would load other code or "
                "files. Remove it, or give a model with plain weights"
            )


def check_folder(folder: Path, origin: str) -> None:
    """Check the JSON files of a model's folder, weights' index and tokenizer included, before
    transformers reads them.

    Files that were checked before and did not change are not opened again.

    Raises:
        UserError: a file is not regular, damaged, too large, or names files outside the folder.
    """
    paths = tuple(sorted(folder.glob("*.json")))
    _check(folder, origin, paths, tuple(map(stamp, paths)))


@lru_cache(maxsize=8)
def _check(folder: Path, origin: str, paths: tuple[Path, ...], _: tuple[Stamp, ...]) -> None:
    if (folder / ADAPTER).exists():
        raise UserError(
            f"{origin} contains {ADAPTER}, which names another base model: give a folder with "
            "only a model, and the adapter as adapter=DIR"
        )
    for path in paths:
        try:
            if path.name == TOKENIZER:
                # Its own parser limits it; the file can be large.
                with open_regular(path):
                    continue
            found = parse_json(content(path), finite=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{origin}: {path.name} cannot be used ({error}): copy the model again"
            ) from error
        if path.match(INDEX):
            _check_index(found, f"{origin}: {path.name}")
        elif path.name == "config.json":
            if not isinstance(found, dict):
                raise UserError(f"{origin}: config.json is not a JSON object: copy the model again")
            check_settings(found, origin)
        elif path.name == "tokenizer_config.json" and isinstance(found, dict):
            for name in found.get("fast_tokenizer_files") or ():
                _check_name(name, f"{origin}: {path.name}")


def _check_index(index: Any, where: str) -> None:
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise UserError(f"{where} has no weight_map: copy the model again")
    for name in set(map(str, names.values())):
        _check_name(name, where)


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name:
        raise UserError(
            f"{where} names the file {shown(str(name), 80)}, which is not in the folder: copy the "
            "model again"
        )
