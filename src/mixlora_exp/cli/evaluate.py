"""Score an adapter that exists, or the base model alone: `python evaluate.py run=outputs/NAME`.

`run=DIR` takes everything from the record of a finished run and scores the adapter that it left;
`adapter=DIR` takes one of PEFT's or ours. What a record says is data, and goes before the options
of conf/ but after what is given on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixlora_exp.cli.hydra_command import dispatch, parse_flags
from mixlora_exp.config import compose, parse_overrides
from mixlora_exp.config.recorded import literal, recorded, typed_texts
from mixlora_exp.config.switches import SWITCHES
from mixlora_exp.errors import UserError
from mixlora_exp.records.files import RECORD
from mixlora_exp.records.record import read_run
from mixlora_exp.runs.base_choice import base_words

GROUPS = ("preset", "model", "task", "data", "kernel", "trainer", "evaluation")


class Words:
    """A command line by the fields that it gives. Of folders the text counts as it was typed."""

    def __init__(self, words: Sequence[str]) -> None:
        self.named = dict(w.split("=", 1) for w in words if w.startswith(("run=", "adapter=")))
        rest = [word for word in words if word.partition("=")[0] not in self.named]
        parsed = parse_overrides(rest)
        self.given = {**self.named, **{one.key_or_group: one for one in parsed}}
        self.lines = [one.input_line or "" for one in parsed]

    def folders(self, name: str) -> list[str]:
        """What `run=` or `adapter=` names: none, one, or several in brackets."""
        if name not in self.named:
            return []
        found = typed_texts(self.named[name])
        if not all(found):
            raise UserError(
                f"{name}={self.named[name]}: a folder is missing; write {name}=DIR or "
                f"{name}=[DIR,DIR]"
            )
        return found

    def others(self, *names: str) -> list[str]:
        """The words but for those that give one of these fields."""
        return [line for line in self.lines if line.partition("=")[0] not in names]


def each(words: Sequence[str]) -> list[list[str]]:
    """One command line for each folder of `run=[A,B]` or `adapter=[A,B]`.

    Raises:
        UserError: a folder is missing in the list, or both are given.
    """
    line = Words(words)
    if "run" in line.given and "adapter" in line.given:
        raise UserError("run and adapter were both given: name one of them")
    for name in ("run", "adapter"):
        folders = line.folders(name)
        if folders:
            return [[f"{name}={folder}", *line.lines] for folder in folders]
    return [line.lines]


def overrides_of(words: Sequence[str]) -> list[str]:
    """The overrides of `conf/evaluate.yaml` that a command line with one folder asks for.

    Raises:
        UserError: `run=DIR` holds no finished run or no adapter, or `adapter=DIR` is no folder.
    """
    line = Words(words)
    lines = line.others("protocol")
    if "method" not in line.given:
        # An experiment may choose another.
        lines = ["method=none", *lines]
    if "protocol" in line.given:
        if "evaluation.protocols" in line.given:
            raise UserError("protocol and evaluation.protocols were both given: name one of them")
        names = (line.given["protocol"].input_line or "").partition("=")[2].strip("[]")
        lines.append(f"protocol=[{names}]")
    for folder in line.folders("adapter"):
        if not Path(folder).expanduser().is_dir():
            raise UserError(f"adapter={folder} is no folder: give one that PEFT or train.py wrote")
        lines.append(f"adapter={literal(folder)}")
        return [*base_words(Path(folder).expanduser(), line.given), *lines]
    for folder in line.folders("run"):
        return [*_of_run(folder, line.given), *lines]
    return lines


def _of_run(named: str, given: Mapping[str, Any]) -> list[str]:
    """What the record of a finished run says, and the adapter that the run left."""
    folder = Path(named).expanduser()
    if not (folder / RECORD).is_file():
        left = folder / "last_good"
        hint = f"; what is left of this one is adapter={left}" if left.is_dir() else ""
        raise UserError(f"run={named} holds no {RECORD}: give the folder of a finished run{hint}")
    settings = read_run(folder / RECORD)["config"]
    lines = _beside(folder, settings)
    if settings.get("method", {}).get("name") != "none":
        if not (folder / "adapter" / "adapter_config.json").is_file():
            raise UserError(
                f"run={named} holds no adapter/ (a copied record has none): give the "
                "folder that the run wrote, or adapter=DIR"
            )
        lines.append(f"adapter={literal(str(folder / 'adapter'))}")
    elif settings.get("adapter") is not None:
        lines.append(f"adapter={literal(settings['adapter'])}")
    anew = {name for name in GROUPS if name in given}
    if "protocol" in given:
        anew.add("evaluation.protocols")
    if "preset" in given:
        # Its values are asked for, so those of the record must not go before them.
        anew |= set(SWITCHES.values())
    return [*lines, *recorded(settings, anew)]


def _beside(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """The scores of a run are written beside it, where it still lies in the folder that it was
    written to: a record alone does not say where to write."""
    written = Path(settings.get("output_dir", "")).expanduser()
    if folder.is_symlink() or written.resolve() != folder.resolve().parent:
        return []
    return [f"output_dir={literal(str(folder.parent))}"]


def run(argv: Sequence[str]) -> int:
    """Carry out one command line; returns the exit code.

    Raises:
        UserError: there is a mistake in it, or an adapter cannot be scored.
    """
    argv = argv or ["--help"]
    lines = each(parse_flags(argv).overrides)
    if len(lines) == 1:
        return dispatch(argv, "evaluate", lambda _: overrides_of(lines[0]))
    flags = [word for word in argv if word.startswith("-")]
    if flags:
        raise UserError(f"{flags[0]} does not go with several adapters: score them one by one")
    configs = [compose(overrides_of(line), "evaluate") for line in lines]
    # Imported late, so that a mistake on the command line is told before torch is loaded.
    from mixlora_exp.runs.together import run_together

    run_together(configs)
    return 0
