"""What a run says on the terminal: short lines while it works, one table at its end."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean, pstdev
from typing import Any

from rich.console import Console
from rich.table import Table

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


def _load_text(load: list[list[float]] | None) -> str:
    """Mean share of each expert over layers, in percent."""
    if load is None:
        return "-"
    return " ".join(f"{100 * mean(layer[e] for layer in load):.0f}" for e in range(len(load[0])))


def scores_table(record: Mapping[str, Any], protocol: str) -> Table:
    """Accuracy in percent per task, before and after training, beside majority class and chance."""
    data = record["config"]["data"]["name"]
    title = f"{protocol}, accuracy in %, data: {data}"
    if data == "embedded":
        title += " (generated tasks, not the benchmarks)"
    table = Table(title=title, title_justify="left")
    before = {(s["task"], s["protocol"]): s for s in record["scores_before"] or []}
    scores = [s for s in record["scores"] if s["protocol"] == protocol]
    normalized = scores[0]["accuracy_normalized"] is not None
    table.add_column("task")
    kinds = ["accuracy", *(["accuracy_normalized"] if normalized else [])]
    for kind in kinds:
        label = "per character" if kind == "accuracy_normalized" else "accuracy"
        if before:
            table.add_column(f"{label}\nbefore", justify="right")
        table.add_column(f"{label}\nafter" if before else label, justify="right")
    for name in ("std.\nerror", "majority\nclass", "chance", "n"):
        table.add_column(name, justify="right")
    has_experts = any(s["expert_load"] is not None for s in scores)
    if has_experts:
        table.add_column("expert load, % of slots")

    def add(label: str, rows: list[Mapping[str, Any]], tail: list[str]) -> None:
        cells = [label]
        for kind in kinds:
            if before:
                old = [before[s["task"], protocol][kind] for s in rows]
                cells.append(_percent(mean(old)))
            cells.append(_percent(mean(s[kind] for s in rows)))
        table.add_row(*cells, *tail)

    for s in scores:
        tail = [_percent(s[k]) for k in ("stderr", "majority_class", "chance")]
        tail.append(str(s["n"]))
        add(s["task"], [s], [*tail, _load_text(s["expert_load"])] if has_experts else tail)
    if len(scores) > 1:
        table.add_section()
        tail = ["", *(_percent(mean(s[k] for s in scores)) for k in ("majority_class", "chance"))]
        tail.append(str(sum(s["n"] for s in scores)))
        add("average", scores, tail)
    return table


def print_record(record: Mapping[str, Any]) -> None:
    """The tables of a record, one per protocol, and what training took."""
    for protocol in dict.fromkeys(s["protocol"] for s in record["scores"]):
        console.print(scores_table(record, protocol))
    train = record["train"]
    if train is None:
        return
    say(
        f"Trained {train['steps']} steps, {train['tokens']} tokens in {train['seconds']:.0f} s "
        f"({train['tokens_per_second']:.0f} tokens/s), loss {train['final_loss']:.3f}, "
        f"peak memory {train['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    if train["expert_load"] is not None:
        spread = mean(pstdev(layer) for layer in train["expert_load"])
        say(f"Expert load in training: {_load_text(train['expert_load'])} % of slots")
        say(f"(standard deviation across experts {spread:.4f}, mean over layers)")
