"""Score an existing adapter, or the base model alone: `python evaluate.py run=outputs/NAME`.

`run=DIR` takes all settings from the record of a finished run and scores the adapter of that run;
`adapter=DIR` scores an adapter that PEFT or train.py wrote, `adapter=hub:OWNER/NAME@REVISION` one
on the hub. A record's values are data: nothing in them is resolved. They replace the defaults in
conf/, and the command line overrides them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixlora_exp.cli.hydra_command import dispatch, parse_flags
from mixlora_exp.config.command import compose, parse_overrides
from mixlora_exp.config.command_line import CommandLine
from mixlora_exp.config.given_paths import check_folders
from mixlora_exp.config.recorded import Recorded
from mixlora_exp.config.switches import SWITCHES
from mixlora_exp.config.typed import as_typed, literal, typed_texts
from mixlora_exp.errors import UserError
from mixlora_exp.records.files import RECORD
from mixlora_exp.records.record import read_run
from mixlora_exp.runs.base_choice import base_of
from mixlora_exp.system.hub import adapter_folder, pin_revision

NOT_TAKEN = (
    "method", "adapter", "adapters", "base", "dry_run", "plan", "force", "tracker", "output_dir",
)  # fmt: skip
"""Fields of a record that do not apply: the adapter determines the method, nothing is trained, and
what is accepted, executed or written is not for a record to say."""


class Words:
    """A command line, indexed by the fields it sets. Folder names stay as typed."""

    def __init__(self, words: Sequence[str]) -> None:
        self.named = dict(w.split("=", 1) for w in words if w.startswith(("run=", "adapter=")))
        rest = as_typed([w for w in words if w.partition("=")[0] not in self.named])
        parsed = parse_overrides(rest)
        self.given = {**self.named, **{one.key_or_group: one for one in parsed}}
        self.lines = [one.input_line or "" for one in parsed]

    def folders(self, name: str) -> list[str]:
        """Return the folders that `run=` or `adapter=` names: none, one, or several in brackets.

        Raises:
            UserError: the option has no folder.
        """
        if name not in self.named:
            return []
        found = typed_texts(self.named[name])
        if not all(found):
            raise UserError(
                f"{name}={self.named[name]} lacks a folder: write {name}=DIR or {name}=[DIR,DIR]"
            )
        return found

    def others(self, *names: str) -> list[str]:
        """Return the overrides, without those of the fields `names`."""
        return [line for line in self.lines if line.partition("=")[0] not in names]


def each(words: Sequence[str]) -> list[list[str]]:
    """Return one command line for each folder of `run=[A,B]` or `adapter=[A,B]`.

    Raises:
        UserError: the list lacks a folder, or both `run` and `adapter` are given.
    """
    line = Words(words)
    if "run" in line.given and "adapter" in line.given:
        raise UserError("run and adapter were both given: name one of them")
    for name in ("run", "adapter"):
        folders = line.folders(name)
        if folders:
            return [[f"{name}={folder}", *line.lines] for folder in folders]
    return [line.lines]


def settled(words: Sequence[str]) -> tuple[list[str], Recorded]:
    """Return the overrides of `conf/evaluate.yaml` for a command line with at most one folder, and
    the settings that a record adds (see `resolve.to_config`).

    Raises:
        UserError: `run=DIR` holds no finished run or no adapter, or `adapter=DIR` is not a folder.
    """
    line = Words(words)
    lines = line.others("protocol")
    if "method" not in line.given:
        # First, so that an experiment can choose another method.
        lines = ["method=none", *lines]
    if "protocol" in line.given:
        if "evaluation.protocols" in line.given:
            raise UserError("protocol and evaluation.protocols were both given: name one of them")
        names = (line.given["protocol"].input_line or "").partition("=")[2].strip("[]")
        lines.append(f"protocol=[{names}]")
    for folder in line.folders("adapter"):
        place = pin_revision(folder)
        check_folders([("adapter", place)])
        lines.append(f"adapter={literal(place)}")
        chosen, recorded = base_of(adapter_folder(place), line.given)
        return [*chosen, *lines], recorded
    for folder in line.folders("run"):
        return lines, _of_run(folder, line.given)
    return lines, {}


def _of_run(named: str, given: Mapping[str, Any]) -> Recorded:
    """Return the settings in the record of a finished run, and the run's adapter."""
    folder = Path(named).expanduser()
    if not (folder / RECORD).is_file():
        left = folder / "last_good"
        hint = f"; the last good adapter of this one is adapter={left}" if left.is_dir() else ""
        raise UserError(f"run={named} holds no {RECORD}: give the folder of a finished run{hint}")
    settings = read_run(folder / RECORD)["config"]
    taken = {name: value for name, value in settings.items() if name not in NOT_TAKEN}
    if settings["method"]["name"] == "none":
        taken["adapter"] = settings.get("adapter")
    elif (folder / "adapter" / "adapter_config.json").is_file():
        taken["adapter"] = str(folder / "adapter")
    else:
        raise UserError(
            f"run={named} holds no adapter/ (a copied record has none): give the "
            "folder that the run wrote, or adapter=DIR"
        )
    # Next to the run, if it is still in the folder that its record names: a record alone must not
    # decide where files are written.
    written = Path(settings.get("output_dir", "")).expanduser()
    if not folder.is_symlink() and written.resolve() == folder.resolve().parent:
        taken["output_dir"] = str(folder.parent)
    anew = ["evaluation.protocols"] if "protocol" in given else []
    if "preset" in given:
        anew += SWITCHES.values()
    for group, _, field in (dotted.partition(".") for dotted in anew):
        taken[group] = {k: v for k, v in taken.get(group, {}).items() if k != field}
    return taken


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code.

    Raises:
        UserError: the command line is not valid, or an adapter cannot be scored.
    """
    argv = argv or ["--help"]
    typed = parse_flags(argv).overrides
    lines = each(typed)
    if len(lines) == 1:
        return dispatch(argv, "evaluate", lambda _: settled(lines[0]))
    flags = [word for word in argv if word.startswith("-")]
    if flags:
        raise UserError(f"{flags[0]} does not work with several adapters: score them one by one")
    each_settled = [settled(line) for line in lines]
    configs = [compose(words, "evaluate", recorded) for words, recorded in each_settled]
    # Imported late, so that a mistake on the command line is reported before torch loads.
    from mixlora_exp.runs.together import run_together

    run_together(configs, line=CommandLine(script="evaluate.py", words=typed))
    return 0
