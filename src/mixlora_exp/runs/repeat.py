"""Runs a record's configuration again and reports whether the result is the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mixlora_exp.config.architecture import current_model
from mixlora_exp.config.command import parse_overrides
from mixlora_exp.config.command_line import CommandLine
from mixlora_exp.config.given_paths import check_given
from mixlora_exp.config.recorded import rebuilt
from mixlora_exp.config.resolve import determining
from mixlora_exp.config.schema import Config
from mixlora_exp.errors import UserError
from mixlora_exp.plans.cards import FIELDS
from mixlora_exp.records.files import find_record
from mixlora_exp.records.record import read_run
from mixlora_exp.records.required_fields import odd_fields
from mixlora_exp.runs.run import run
from mixlora_exp.system.console import echo

AGAIN = "outputs/again"
FREE = (
    *("output_dir", "data.path", "data.mirror", "model.path", "adapter", "base", "force"),
    *("dry_run", "plan.probe"),
)
"""Settings that may differ from the record's: where files are, and what is accepted of them, whose
content is compared; and a plan instead of the run."""


def repeat(given: str, words: Sequence[str]) -> bool | None:
    """Run the configuration of a record again, into `outputs/again`, and print what differs.

    `given`: a name in results/runs/, a packed run, a record or a run's folder. `words`: overrides
    of the fields in `FREE`. Returns whether the results are equal; None if nothing ran.

    Raises:
        UserError: the record is not valid, or the run cannot be repeated on this machine.
    """
    path = find_record(given)
    record = read_run(path)
    config = configuration(record, words)
    check_given(config)
    # What would change the run cannot be given.
    found = run(config, line=CommandLine(words=("--from", given, *words), fixed=frozenset(FIELDS)))
    if found is None:
        return None
    if found.resolve() == path.resolve():
        raise UserError(
            f"output_dir={config.output_dir} holds the record itself: choose another folder"
        )
    now = read_run(found)
    with odd_fields(path):
        results, context = list(_results(record, now)), list(_context(record, now))
    if results:
        echo(f"Differs from {given}: {'; '.join(results)}")
    else:
        echo(f"Equal to {given}: {', '.join(compared(record))}")
    if context:
        echo(f"Other circumstances: {'; '.join(context)}")
    return not results


def configuration(record: Mapping[str, Any], words: Sequence[str]) -> Config:
    """Return the configuration that repeats a record. Whether other base weights are accepted is
    not for the record to say.

    Raises:
        UserError: an override is not of a field in `FREE`, or a value is out of its range.
    """
    settings = dict(record["config"])
    # Adapters that were trained together have the same results alone.
    settings |= {"output_dir": AGAIN, "dry_run": False, "plan": {}, "force": False,
                 "adapters": [], "base": "check", "tracker": {}}  # fmt: skip
    for override in parse_overrides(words):
        name, value = override.key_or_group, override.value()
        if name not in FREE or not isinstance(value, str | bool | None):
            raise UserError(
                f"{override.input_line} would not repeat the record: only {', '.join(FREE)} can "
                "be given"
            )
        group, _, field = name.partition(".")
        settings[group] = {**settings[group], field: value} if field else value
    return rebuilt(settings)


def _results(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Return a line for each difference in the results."""
    yield from _changed("adapter", _sha256(then), _sha256(now))
    losses = [(record["train"] or {}).get("final_loss") for record in (then, now)]
    yield from _changed("last loss", *losses)
    scores = [{(s["task"], s["protocol"]): s for s in record["scores"]} for record in (then, now)]
    for key in sorted(scores[0].keys() | scores[1].keys()):
        accuracies = [side[key]["accuracy"] if key in side else None for side in scores]
        yield from _changed(f"accuracy of {'/'.join(key)}", *accuracies)
    hashes = [record.get("predictions_sha256") or {} for record in (then, now)]
    odd = [
        key
        for key in sorted(hashes[0].keys() & hashes[1].keys())
        if hashes[0][key] != hashes[1][key]
    ]
    if odd:
        yield f"predictions of {', '.join(odd)}"


def compared(record: Mapping[str, Any]) -> Iterator[str]:
    """Return the names of the results that the record holds."""
    held = {
        "adapter": _sha256(record),
        "last loss": (record["train"] or {}).get("final_loss"),
        "scores": record["scores"],
        "predictions": record.get("predictions_sha256"),
    }
    return (name for name, value in held.items() if value)


def _context(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Return a line for each difference in settings, inputs, code and machine."""
    before, after = _settings(then), _settings(now)
    for name in sorted(before.keys() & after.keys()):  # Versions have different fields.
        yield from _changed(name, before[name], after[name])
    scored = [(record["adapter"] or {}).get("sha256") for record in (then, now)]
    yield from _changed("scored adapter", *scored)
    for name in ("code", "kernel", "dtype", "attention"):
        yield from _changed(name, then.get(name), now.get(name))
    for split in sorted(then["data"].keys() | now["data"].keys()):
        sides = (
            [file["sha256"] for file in record["data"].get(split, [])] for record in (then, now)
        )
        yield from _changed(f"data of {split}", *(" ".join(side) or None for side in sides))
    for name in ("id", "commit", "file_sha256", "fingerprint"):
        if then["model"].get("source") != "path" or name != "id":
            yield from _changed(f"model's {name}", then["model"].get(name), now["model"].get(name))
    packages = [record["provenance"]["packages"] for record in (then, now)]
    for name in sorted(packages[0].keys() & packages[1].keys() - {"mixlora-exp"}):
        yield from _changed(name, packages[0][name], packages[1][name])
    machines = [record["provenance"]["hardware"] for record in (then, now)]
    yield from _changed("cpu", machines[0].get("cpu"), machines[1].get("cpu"))
    yield from _changed("gpus", *(", ".join(side["gpus"]) or None for side in machines))


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that determine the result, by dotted name."""
    config = record["config"]
    groups = determining({**config, "model": current_model(config["model"])})
    return {
        f"{group}.{name}": value
        for group, held in groups.items()
        for name, value in (held.items() if isinstance(held, dict) else [("", held)])
        if (group, name) != ("model", "config")
    }


def _sha256(record: Mapping[str, Any]) -> str | None:
    return (record.get("saved_adapter") or {}).get("sha256")


def _changed(name: str, then: Any, now: Any) -> Iterator[str]:
    """Yield a clause if two values differ. One that an older version did not record is not
    compared."""
    if then is not None and then != now:
        yield f"{name} {_short(now)} (was {_short(then)})"


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) >= 40:
        return value[:10]
    return f"{value:.6g}" if isinstance(value, float) else str(value)
