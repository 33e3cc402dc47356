"""What a run says on the terminal: short lines while it works, one table at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import mean, pstdev
from typing import Any

from rich.console import Console
from rich.table import Table

from mixlora_exp.config.switches import SWITCHES

__all__ = ["be_quiet", "print_record", "say", "scores_table"]

console = Console(soft_wrap=True, highlight=False)


def be_quiet(quiet: bool) -> None:
    """Say nothing from now on, or speak again: of several processes one speaks."""
    console.quiet = quiet


def say(message: str) -> None:
    """One line of progress."""
    console.print(message, markup=False)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean, or None where a value is missing: a mean of fewer tasks is another figure."""
    found = list(values)
    return None if None in found else mean(found)


def _switched(config: Mapping[str, Any]) -> str:
    """The preset and what is set otherwise than in it, or nothing for `correct` as it is."""
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


def scores_table(record: Mapping[str, Any], protocol: str) -> Table:
    """Accuracy in percent per task, before and after training, beside majority class and chance."""
    data = record["config"]["data"]["name"]
    title = f"{protocol}, accuracy in %, data: {data}"
    if data == "embedded":
        title += " (generated tasks, not the benchmarks)"
    switched = _switched(record["config"])
    if switched:
        title += f"\n{switched}"
    table = Table(title=title, title_justify="left")
    before = {(s["task"], s["protocol"]): s for s in record["scores_before"] or []}
    scores = [s for s in record["scores"] if s["protocol"] == protocol]
    normalized = any(s["accuracy_normalized"] is not None for s in scores)
    unparsed = any(s.get("unparsed") is not None for s in scores)
    table.add_column("task", no_wrap=True)
    kinds = ["accuracy", *(["accuracy_normalized"] if normalized else [])]
    for kind in kinds:
        label = "per char." if kind == "accuracy_normalized" else "accuracy"
        head = f"{label}\nbefore → after" if before else label
        table.add_column(head, justify="right", no_wrap=True)
    columns = ["std.\nerr.", "major.\nclass", "chance", "gold\nlog-lik.", "n"]
    for name in [*columns, *(["un-\nparsed"] if unparsed else [])]:
        table.add_column(name, justify="right")

    def add(label: str, rows: list[Mapping[str, Any]], tail: list[str]) -> None:
        cells = [label]
        for kind in kinds:
            values = [_mean(s[kind] for s in rows)]
            if before:
                values.insert(0, _mean(before[s["task"], protocol][kind] for s in rows))
            cells.append(" → ".join(map(_percent, values)))
        table.add_row(*cells, *tail)

    for s in scores:
        tail = [_percent(s[k]) for k in ("stderr", "majority_class", "chance")]
        tail += [_nats(s["gold_log_likelihood"]), str(s["n"])]
        add(s["task"], [s], [*tail, *([str(s["unparsed"])] if unparsed else [])])
    if len(scores) > 1:
        table.add_section()
        tail = ["", *(_percent(mean(s[k] for s in scores)) for k in ("majority_class", "chance"))]
        tail += [_nats(_mean(s["gold_log_likelihood"] for s in scores))]
        tail += [str(sum(s["n"] for s in scores))]
        tail += [str(sum(s["unparsed"] for s in scores))] if unparsed else []
        add("average", scores, tail)
    return table


def load_table(record: Mapping[str, Any]) -> Table | None:
    """Share of each expert per scored task, in percent of (token, slot) pairs, mean over layers;
    None without experts."""
    first = record["scores"][0]["protocol"]
    loads = {s["task"]: s["expert_load"] for s in record["scores"] if s["protocol"] == first}
    if record["train"] is not None:
        loads["training"] = record["train"]["expert_load"]
    if any(load is None for load in loads.values()):
        return None
    table = Table(title="expert load, % of slots", title_justify="left")
    table.add_column("task", no_wrap=True)
    for expert in range(len(loads["training" if "training" in loads else next(iter(loads))][0])):
        table.add_column(str(expert), justify="right")
    table.add_column("std. of\nshares", justify="right")
    for task, load in loads.items():
        shares = [mean(layer[e] for layer in load) for e in range(len(load[0]))]
        spread = mean(pstdev(layer) for layer in load)
        table.add_row(task, *(f"{100 * share:.0f}" for share in shares), f"{spread:.4f}")
    return table


def print_record(record: Mapping[str, Any]) -> None:
    """The tables of a record, one per protocol, the expert load, and what training took."""
    for protocol in dict.fromkeys(s["protocol"] for s in record["scores"]):
        console.print(scores_table(record, protocol))
    loads = load_table(record)
    if loads is not None:
        console.print(loads)
    train = record["train"]
    if train is None:
        return
    say(
        f"Trained {train['steps']} steps, {train['tokens']} tokens in {train['seconds']:.0f} s "
        f"({train['tokens_per_second']:.0f} tokens/s), loss {train['final_loss']:.3f}, "
        f"peak memory {train['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
