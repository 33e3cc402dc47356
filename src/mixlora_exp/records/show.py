"""Prints the record of a run on the terminal, as tables and a summary line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import mean, pstdev
from typing import Any

from mixlora_exp.config.switches import SWITCHES
from mixlora_exp.errors import shown
from mixlora_exp.records.layout import Column, Sheet, fitted
from mixlora_exp.records.score_warnings import score_warnings
from mixlora_exp.records.wilson import percent
from mixlora_exp.system.console import console, echo


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean, or None if a value is missing: a mean over fewer tasks is not comparable."""
    found = list(values)
    return None if None in found else mean(found)


def _switched(config: Mapping[str, Any]) -> str:
    """Return the preset and all deviations from it; empty for `correct` without deviations."""
    preset = config.get("preset")
    if preset is None:
        return ""
    odd = []
    for switch, dotted in SWITCHES.items():
        group, _, field = dotted.partition(".")
        value = config[group].get(field, preset[switch])
        if value != preset[switch]:
            odd.append(f"{dotted}={str(value).lower() if isinstance(value, bool) else value}")
    if preset["name"] == "correct" and not odd:
        return ""
    return ", ".join([f"preset={preset['name']}", *odd])


def scores_table(record: Mapping[str, Any], protocol: str) -> Sheet:
    """Accuracy in percent per task, before and after training, with majority class and chance."""
    data = record["config"]["data"]["name"]
    title = f"{protocol}, accuracy in %, data: {data}"
    if data == "embedded":
        title += " (generated tasks, not the benchmarks)"
    switched = _switched(record["config"])
    if switched:
        title += f"\n{switched}"
    before = {(s["task"], s["protocol"]): s for s in record["scores_before"] or []}
    scores = [s for s in record["scores"] if s["protocol"] == protocol]
    # One row per task, and one for their average.
    rows = [[s] for s in scores] + ([scores] if len(scores) > 1 else [])
    labels = [s["task"] for s in scores] + ["average"] * (len(scores) > 1)

    def over(key: str, shown: Callable[[float | None], str]) -> list[str]:
        return [shown(_mean(s[key] for s in row)) for row in rows]

    def counted(key: str) -> list[str]:
        return [str(sum(s[key] for s in row)) for row in rows]

    def gained(kind: str) -> list[str]:
        after = over(kind, percent)
        if not before:
            return after
        past = [percent(_mean(before[s["task"], protocol][kind] for s in row)) for row in rows]
        return [f"{old} {arrow} {new}" for old, new in zip(past, after, strict=True)]

    arrow = "->" if console.options.ascii_only else "→"
    times = f"\nbefore {arrow} after" if before else ""
    figures = [Column(f"accuracy{times}", gained("accuracy"))]
    if any(s["accuracy_normalized"] is not None for s in scores):
        figures.append(Column(f"per char.{times}", gained("accuracy_normalized")))
    errors = [percent(s["stderr"]) for s in scores]
    figures += [
        Column("std.\nerr.", errors + [""] * (len(rows) - len(errors))),
        Column("major.\nclass", over("majority_class", percent)),
        Column("chance", over("chance", percent)),
        Column("gold\nlog-lik.", over("gold_log_likelihood", _nats)),
        Column("n", counted("n")),
    ]
    if any(s.get("unparsed") is not None for s in scores):
        figures.append(Column("un-\nparsed", counted("unparsed")))
    return Sheet(title, Column("task", labels), figures, summed=len(scores) > 1)


def load_table(record: Mapping[str, Any]) -> Sheet | None:
    """Return the share of each expert per scored task, in percent of the (token, slot) pairs,
    averaged over layers; None without experts."""
    first = record["scores"][0]["protocol"]
    loads = {s["task"]: s["expert_load"] for s in record["scores"] if s["protocol"] == first}
    if record["train"] is not None:
        loads["training"] = record["train"]["expert_load"]
    if any(load is None for load in loads.values()):
        return None
    shares = [
        [mean(layer[e] for layer in load) for e in range(len(load[0]))] for load in loads.values()
    ]
    figures = [
        Column(str(expert), [f"{100 * share:.0f}" for share in column])
        for expert, column in enumerate(zip(*shares, strict=True))
    ]
    spread = [mean(pstdev(layer) for layer in load) for load in loads.values()]
    figures.append(Column("std. of\nshares", [f"{value:.4f}" for value in spread]))
    return Sheet("expert load, % of slots", Column("task", list(loads)), figures)


def _show(sheet: Sheet) -> None:
    """Print a table that fits the terminal's width; in a pipe, 80 columns or COLUMNS."""
    echo(sheet.title)
    for table in fitted(sheet, console.width):
        console.print(table)


def _plain(value: Any) -> Any:
    """Return a record whose texts are safe to print on a terminal (see `errors.shown`)."""
    if isinstance(value, Mapping):
        return {name: _plain(held) for name, held in value.items()}
    if isinstance(value, list):
        return [_plain(held) for held in value]
    return shown(value, 200) if isinstance(value, str) else value


def print_record(record: Mapping[str, Any]) -> None:
    """Print the name of a record's run, its tables, one per protocol, the expert load, and the cost
    of training."""
    record = _plain(record)
    # In one piece, because several processes of a sweep print at the same time.
    with console.capture() as held:
        _print(record)
    console.file.write(held.get())
    console.file.flush()


def _print(record: Mapping[str, Any]) -> None:
    console.print()
    echo(f"Results of {record['name']}")
    for protocol in dict.fromkeys(s["protocol"] for s in record["scores"]):
        _show(scores_table(record, protocol))
    loads = load_table(record)
    if loads is not None:
        _show(loads)
    for warning in score_warnings(record):
        echo(warning)
    train = record["train"]
    if train is None:
        return
    steps = "1 step" if train["steps"] == 1 else f"{train['steps']} steps"
    first = train.get("first_step_seconds")
    after, begun = "", ""
    if first is not None and train["steps"] > 1:
        after, begun = " after it", f", {first:.1f} s of them for the first step"
    count = train.get("processes", 1)
    several = "" if count == 1 else f" by {count} processes"
    echo(
        f"Trained {steps}, {train['tokens']} tokens in {train['seconds']:.0f} s{several}{begun} "
        f"({train['tokens_per_second']:.0f} tokens/s{after}), loss {train['final_loss']:.3f}, "
        f"peak memory {train['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
