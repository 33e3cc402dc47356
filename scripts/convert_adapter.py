"""Convert an adapter between the official format and PEFT's: `convert_adapter.py IN OUT`.

IN is a folder of the official packages, which becomes a PEFT folder, or one of PEFT's, which
becomes an official one; an imported adapter that was not changed becomes what it was. For
exporting, `magnitude=drop` leaves out DoRA's magnitudes, for which that format has no place;
`dropout=VALUE` writes this instead of the adapter's own; `act_fn=NAME` names the base model's
activation where the adapter does not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixlora_exp.adapters.files import is_official
from mixlora_exp.config import options
from mixlora_exp.errors import UserError
from mixlora_exp.official.export import export_official
from mixlora_exp.official.folders import read_official, read_peft, write_official, write_peft
from mixlora_exp.official.imports import import_official
from mixlora_exp.system.guarded import guarded


@dataclass(slots=True, kw_only=True)
class Settings:
    magnitude: str = "keep"
    dropout: float | None = None
    act_fn: str | None = None


def run(arguments: Sequence[str]) -> None:
    # A folder may have a "=" in its name, as those of sweeps do.
    folders = [
        Path(word)
        for word in arguments
        if not word.startswith("-") and ("=" not in word or "/" in word)
    ]
    settings = options(Settings, [word for word in arguments if Path(word) not in folders])
    if len(folders) != 2:
        raise UserError(f"two folders are needed, IN and OUT, not {len(folders)}")
    source, target = folders
    if settings.magnitude not in ("keep", "drop"):
        raise UserError(f"magnitude={settings.magnitude} is not valid: choose keep or drop")
    if settings.dropout is not None and not 0 < settings.dropout < 1:
        raise UserError(f"dropout={settings.dropout} must be above 0 and below 1")
    if not source.is_dir():
        raise UserError(f"{source} is no folder: give one with an adapter")
    if target.exists():
        raise UserError(f"{target} exists already: name another folder, or remove it")
    if is_official(source):
        given = [name for name in ("dropout", "act_fn") if getattr(settings, name) is not None]
        given += ["magnitude"] if settings.magnitude == "drop" else []
        if given:
            raise UserError(
                f"{given[0]}={getattr(settings, given[0])} is for exporting, and {source} is in "
                "the official format: leave it out"
            )
        converted = import_official(read_official(source))
        write_peft(target, converted.files)
        kind = "PEFT's format"
    else:
        converted = export_official(
            read_peft(source),
            drop_magnitude=settings.magnitude == "drop",
            dropout=settings.dropout,
            act_fn=settings.act_fn,
        )
        write_official(target, converted.files)
        kind = "the official format"
    for note in converted.notes:
        print(f"note: {note}")
    print(f"written in {kind}: {target}")


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:], resumes=False))
