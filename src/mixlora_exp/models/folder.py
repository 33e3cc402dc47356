"""What a folder with a model may name: nothing but its own files.

transformers follows what it finds in a folder: an adapter's configuration to another base model on
the hub, an index to weights elsewhere, a configuration to kernels that it downloads and runs.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from mixlora_exp.errors import UserError, shown
from mixlora_exp.system.untrusted import open_regular, read_json

__all__ = ["ATTENTION", "check_folder", "check_settings"]

INDEX, ADAPTER, TOKENIZER = "*.index.json", "adapter_config.json", "tokenizer.json"
NOT_OBEYED = ("quantization_config", "transformers_weights", "kernel_config", "distributed_config")
"""Settings of a `config.json` with which transformers would load other code or other files."""
ATTENTION, OWN = "_attn_implementation", (None, "eager", "sdpa")
IMPLEMENTATIONS = (ATTENTION, "attn_implementation", "experts_implementation",
                   "_experts_implementation")  # fmt: skip
"""Settings that name how a part is computed. Any but PyTorch's own can be a program on the hub,
which transformers would fetch and run."""


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
                f"{origin}: {name}={value} in config.json is not obeyed: it would load other code "
                "or files. Take it out, or give the model in plain weights"
            )


def check_folder(folder: Path, origin: str) -> None:
    """Check the JSON files of a model's folder, weights' index and tokenizer included, before
    transformers reads them.

    Raises:
        UserError: one is no regular file, damaged, too large, or names files outside of the folder.
    """
    if (folder / ADAPTER).exists():
        raise UserError(
            f"{origin}: there is an {ADAPTER}, which names another base model: give a folder with "
            "a model alone, and the adapter as adapter=DIR"
        )
    for path in sorted(folder.glob("*.json")):
        try:
            if path.name == TOKENIZER:
                # Read by a parser of its own, which has limits; it can be large.
                with open_regular(path):
                    continue
            found = read_json(path, finite=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{origin}: {path.name} cannot be used: {error}") from error
        if path.match(INDEX):
            _check_index(found, f"{origin}: {path.name}")
        elif path.name == "config.json":
            if not isinstance(found, dict):
                raise UserError(f"{origin}: config.json holds no JSON object")
            check_settings(found, origin)
        elif path.name == "tokenizer_config.json" and isinstance(found, dict):
            for name in found.get("fast_tokenizer_files") or ():
                _check_name(name, f"{origin}: {path.name}")


def _check_index(index: Any, where: str) -> None:
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise UserError(f"{where} has no weight_map: take another copy")
    for name in set(map(str, names.values())):
        _check_name(name, where)


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name:
        raise UserError(
            f"{where} names the file {shown(str(name), 80)}, which is not one of the folder's own"
        )
