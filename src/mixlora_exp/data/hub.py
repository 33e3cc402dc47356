"""`data=hub`: pinned repositories on the Hugging Face hub, or a local mirror of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixlora_exp.data.loaded import DataFile, LoadedSplit, hash_rows, undecodable
from mixlora_exp.data.local import json_rows
from mixlora_exp.errors import UserError
from mixlora_exp.tasks import TASKS, Task, check_characters


def load_hub(mirror: str | None, task: str, split: str) -> LoadedSplit:
    """Load one split with `datasets`, at the pinned revision or from `mirror`.

    Raises:
        UserError: the split cannot be loaded, is empty, or has a row that is not valid.
    """
    spec = TASKS[task]
    rows = _from_hub(spec, split) if mirror is None else _from_mirror(spec, split, mirror)
    name = _name(spec, split, spec.revision if mirror is None else "mirror")
    items = []
    for index, row in enumerate(rows):
        try:
            items.append(spec.read(row, index))
        except ValueError as error:
            raise UserError(
                f"{name} row {index + 1}: this is not a row of {task}: {error}"
            ) from None
    if not items:
        raise UserError(f"{name} has no rows: {_way_out(spec)}")
    return LoadedSplit(items, [DataFile(name, len(items), hash_rows(rows))], rows)


def _name(spec: Task, split: str, revision: str) -> str:
    config = spec.hub_config or "default"
    return f"hub:{spec.hub_id}/{config}/{spec.splits[split]}@{revision}"


def _way_out(spec: Task) -> str:
    return (
        "read your own files with `data=local data.path=DIR`, or a downloaded copy of the "
        f"repository at DIR/{spec.hub_id} with `data.mirror=DIR`"
    )


def _from_hub(spec: Task, split: str) -> list[dict[str, Any]]:
    try:
        return _load(spec.hub_id, spec.hub_config, spec.splits[split], spec.revision)
    except _load_errors() as error:
        raise UserError(
            f"{spec.hub_id} (split {spec.splits[split]}, revision {spec.revision}) could not be "
            f"loaded from the hub ({_first_line(error)}): check the network and, for a gated "
            f"repository, that `hf auth login` was run and access is granted; or "
            f"{_way_out(spec)}"
        ) from error


def _from_mirror(spec: Task, split: str, mirror: str) -> list[dict[str, Any]]:
    root = Path(mirror).expanduser()
    folder = root / spec.hub_id
    if not folder.is_dir():
        there = sorted(f"{f.parent.name}/{f.name}" for f in root.glob("*/*") if f.is_dir())
        raise UserError(
            f"data.mirror={mirror} has no folder {spec.hub_id} "
            f"(there: {', '.join(there) or 'nothing'}): download {spec.hub_id} from the hub to "
            f"{folder}, or use `data=local data.path=DIR`"
        )
    try:
        return _load(str(folder), spec.hub_config, spec.splits[split], None)
    except _load_errors() as error:
        _check_lines(folder)
        raise UserError(
            f"data.mirror={mirror}: {spec.hub_id} (config {spec.hub_config or 'default'}, split "
            f"{spec.splits[split]}) could not be read from {folder} ({_first_line(error)}): "
            "download the repository there again, README.md and data files, or use "
            "`data=local data.path=DIR`"
        ) from error


def _check_lines(folder: Path) -> None:
    """Report the line with an unpaired surrogate, which Arrow refuses without naming the line."""
    for file in sorted(folder.rglob("*.jsonl*")):
        for where, row in json_rows(file):
            try:
                check_characters(row)
            except ValueError as error:
                raise UserError(f"{where}: {error}") from None


def _load(path: str, config: str | None, split: str, revision: str | None) -> list[dict[str, Any]]:
    import datasets

    with _no_progress_bars():
        loaded = datasets.load_dataset(path, config, split=split, revision=revision)
        try:
            return loaded.to_list()
        except UnicodeDecodeError as error:
            row, name = undecodable(loaded.data.table)
            raise UserError(
                f"{path} (split {split}) row {row + 1}: field '{name}' is not UTF-8 text "
                f"({error.reason}): encode it as UTF-8"
            ) from None


def _load_errors() -> tuple[type[Exception], ...]:
    """Return exceptions of `load_dataset` for missing, refused, unreachable or damaged data."""
    import datasets.exceptions
    import pyarrow

    # The hub client's own errors are `OSError`s.
    return (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError)


def _first_line(error: BaseException) -> str:
    import datasets.exceptions

    # DatasetGenerationError is generic; its cause has the reason and the row.
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
        error = error.__cause__
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
