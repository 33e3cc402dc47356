"""Train, reload and score an adapter: `python train.py method=mixlora model=... task=multi`.

`--from RECORD` runs the configuration of a record again and says what differs.
"""

from __future__ import annotations

from collections.abc import Sequence

from mixlora_exp.cli.hydra_command import dispatch
from mixlora_exp.cli.parser import Parser
from mixlora_exp.config.recorded import Recorded
from mixlora_exp.config.typed import as_typed, literal
from mixlora_exp.system.exit_codes import guarded
from mixlora_exp.system.hub import adapter_folder, on_hub, pin_revision


def with_base(overrides: Sequence[str]) -> tuple[list[str], Recorded]:
    """Return the overrides of a command line. If it scores an adapter and chooses no base model,
    the adapter's own is chosen, by overrides that come first or by fields of its record."""
    given = dict(line.split("=", 1) for line in overrides if "=" in line)
    typed = given.get("adapter", "null").strip("'\"")
    # Several are cells of a sweep, each of which is resolved when it starts.
    if on_hub(typed) and "," in typed:
        return list(overrides), {}
    if on_hub(typed):
        place = pin_revision(typed)
        overrides = [
            f"adapter={literal(place)}" if line.startswith("adapter=") else line
            for line in overrides
        ]
        typed = place
    folder = adapter_folder(typed)
    # Anything else that is wrong with `adapter` is reported once the configuration is composed.
    if given.get("method") != "none" or "experiment" in given or not folder.is_dir():
        return list(overrides), {}
    from mixlora_exp.runs.base_choice import base_of

    words, recorded = base_of(folder, given)
    return [*words, *overrides], recorded


def run(argv: Sequence[str]) -> int:
    """Execute one command line and return the exit code; with `--from`, 1 if the results differ."""
    if any(word.partition("=")[0] == "--from" for word in argv):
        parser = Parser(__doc__)
        parser.add_argument("--from", dest="record", metavar="RECORD", required=True)
        parser.add_argument("overrides", metavar="NAME=VALUE", nargs="*")
        args = parser.parse(argv)
        # Imported late, so that a mistake on the command line is reported before torch loads.
        from mixlora_exp.runs.repeat import repeat

        return int(repeat(args.record, as_typed(args.overrides)) is False)
    return dispatch(argv, "config", with_base)


def execute(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code.

    0: done; 2: a user mistake, reported in one message; 130: interrupted; 1: runs of a sweep
    crashed. A crash outside a sweep is raised, so that Python prints it and exits with 1.
    """
    return guarded(run, argv)
