"""`evaluate.py`: the command line of `train.py` for an adapter that exists, or for none.

`run=DIR` takes everything from the record of a finished run and scores the adapter that it left;
`adapter=DIR` takes one of PEFT's or ours. `protocol=a,b` is short for `evaluation.protocols=[a,b]`.
Everything else is as in `train.py`, and goes before what the record says.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mixlora_exp.cli.train import execute
from mixlora_exp.config import compose
from mixlora_exp.config.recorded import literal, recorded
from mixlora_exp.config.switches import SWITCHES
from mixlora_exp.errors import UserError
from mixlora_exp.records.files import RECORD
from mixlora_exp.records.record import read_run
from mixlora_exp.runs.base_choice import base_words
from mixlora_exp.system.guarded import guarded

__all__ = ["dispatch", "main", "translate"]

USAGE = """\
Score an adapter, or the base model alone, without training.

  python evaluate.py run=outputs/NAME protocol=lm_eval      the adapter of a finished run
  python evaluate.py adapter=DIR model=smollm2_135m task=multi protocol=answer_text
  python evaluate.py model=smollm2_135m task=arc_e          the base model alone
  python evaluate.py run=[DIR,DIR]                          several adapters of one base model in
                                                            the same passes; or adapter=[DIR,DIR]

protocol=label_logits,answer_text,lm_eval,generate: one or several; else as in the run's record.
Other fields as for train.py, for example evaluation.limit=100 or data=local data.path=DIR.
"""

GROUPS = ("preset", "model", "task", "data", "kernel", "trainer", "evaluation")


def _check_adapter(adapter: str | None) -> None:
    """Before data is looked for, on the hub for instance."""
    if adapter is not None and not Path(adapter.strip("'\"")).expanduser().is_dir():
        raise UserError(f"adapter={adapter} is no folder: give one that PEFT or train.py wrote")


def _base_model(given: Mapping[str, str]) -> list[str]:
    """The words that choose the base model of the adapter that is named."""
    if "adapter" not in given:
        return []
    return base_words(Path(given["adapter"].strip("'\"")).expanduser(), given)


def translate(argv: Sequence[str]) -> list[str]:
    """The command line of `train.py` that does what this one of `evaluate.py` asks for.

    Raises:
        UserError: `run=DIR` holds no finished run or no adapter, or two sources are given.
    """
    given = dict(word.split("=", 1) for word in argv if "=" in word and not word.startswith("-"))
    for name in given:
        close = difflib.get_close_matches(name, ("run", "protocol"), cutoff=0.6)
        if close and name not in ("run", "protocol"):
            raise UserError(f"{name}={given[name]} is not an option; did you mean {close[0]}=?")
    _check_adapter(given.get("adapter"))
    rest = [w for w in argv if w.partition("=")[0] not in ("run", "protocol")]
    if "method" in given and given["method"] != "none":
        raise UserError(
            f"method={given['method']}: evaluate.py trains nothing; leave it out, or use train.py"
        )
    if "method" not in given:
        rest = ["method=none", *rest]
    if "protocol" in given:
        names = given["protocol"].strip("[]")
        rest.append(f"evaluation.protocols=[{names}]")
    if "run" not in given:
        return [*_base_model(given), *rest]
    if "adapter" in given:
        raise UserError(
            f"run={given['run']} and adapter={given['adapter']} were both given: name one of them"
        )
    folder = Path(given["run"]).expanduser()
    if not (folder / RECORD).is_file():
        left = folder / "last_good"
        hint = f"; what is left of this one is adapter={left}" if left.is_dir() else ""
        raise UserError(
            f"run={given['run']} holds no {RECORD}: give the folder of a finished run{hint}"
        )
    settings = read_run(folder / RECORD)["config"]
    base = _beside(folder, settings)
    if settings.get("method", {}).get("name") != "none":
        if not (folder / "adapter" / "adapter_config.json").is_file():
            raise UserError(
                f"run={given['run']} holds no adapter/ (a copied record has none): give the "
                "folder that the run wrote, or adapter=DIR"
            )
        base.append(f"adapter={literal(str(folder / 'adapter'))}")
    elif settings.get("adapter") is not None:
        base.append(f"adapter={literal(settings['adapter'])}")
    anew = {name for name in GROUPS if name in given}
    if "preset" in given:
        # Its values are asked for, so those of the record must not go before them.
        anew |= set(SWITCHES.values())
    return [*base, *recorded(settings, anew), *rest]


def _beside(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """The scores of a run are written beside it, where it still lies in the folder that it was
    written to: a record alone does not say where to write."""
    written = Path(settings.get("output_dir", "")).expanduser()
    if folder.is_symlink() or written.resolve() != folder.resolve().parent:
        return []
    return [f"output_dir={literal(str(folder.parent))}"]


def each(argv: Sequence[str]) -> list[list[str]]:
    """One command line for each folder of `run=[A,B]` or `adapter=[A,B]`."""
    for number, word in enumerate(argv):
        name, _, value = word.partition("=")
        if name in ("run", "adapter") and value.startswith("[") and value.endswith("]"):
            folders = [folder.strip(" '\"") for folder in value[1:-1].split(",")]
            if not all(folders):
                raise UserError(f"{word}: a folder is missing; write {name}=[DIR,DIR]")
            rest = [*argv[:number], *argv[number + 1 :]]
            return [[f"{name}={folder}", *rest] for folder in folders]
    return [list(argv)]


def _score_together(lines: Sequence[Sequence[str]]) -> None:
    """Score each line's adapter, in the same passes where their base models allow it."""
    flags = [word for word in lines[0] if word.startswith("-")]
    if flags:
        raise UserError(f"{flags[0]} does not go with several adapters: score them one by one")
    configs = [compose(translate(line)) for line in lines]
    # Imported late, so that a mistake on the command line is told before torch is loaded.
    from mixlora_exp.runs.together import run_together

    run_together(configs)


def dispatch(argv: Sequence[str]) -> int:
    """Carry out one command line; returns the exit code."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        sys.stdout.write(USAGE)
        return 0
    lines = each(argv)
    if len(lines) == 1:
        return execute(translate(lines[0]))
    _score_together(lines)
    return 0


def main() -> NoReturn:
    """Run the command line that the process was started with, and exit."""
    sys.exit(guarded(dispatch, sys.argv[1:]))
