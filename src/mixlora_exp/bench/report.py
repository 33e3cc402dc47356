"""A benchmark's record as a table, compared with the paper's Tables 6 and 7."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from typing import Any

from mixlora_exp.config.paths import RESULTS
from mixlora_exp.records.wilson import percent

PAPER = RESULTS / "paper"
PAPER_TABLES = {"llama2_7b": "table6.csv", "gemma_2b": "table7.csv"}
# Row of the benchmark -> (method, optimised) of the paper's table, one model at a time.
PAPER_ROWS = {
    "lora_peft": ("lora", ""),
    "dora_peft": ("dora", ""),
    "mixlora_peft": ("mixlora", "no"),
    "mixlora_shared": ("mixlora", "yes"),
}
HEADER = (
    "row",
    "train fwd us/token",
    "% of LoRA",
    "train bwd us/token",
    "% of LoRA",
    "fwd + bwd, ratio to LoRA (quartiles)",
    "n",
    "infer fwd us/token",
    "% of LoRA",
    "peak train MB",
    "peak infer MB",
    "FFN saved bytes/token",
    "paper: fwd %, bwd %, infer %",
)

EXTRA = {
    "train_us_per_token": "recorded step us/token",
    "busy_us": "GPU busy us/token",
    "kernels": "kernels a step",
    "launches_per_layer": "launches a layer",
}
"""Columns of records that have such figures."""


def paper_rows(model: str) -> dict[str, Mapping[str, str]]:
    """Return the paper's figures by row of the benchmark, empty for a model that it does not
    have."""
    if model not in PAPER_TABLES:
        return {}
    with (PAPER / PAPER_TABLES[model]).open(newline="") as stream:
        table = list(csv.DictReader(stream))
    return {
        row: line
        for row, key in PAPER_ROWS.items()
        for line in table
        if (line["method"], line["optimized"]) == key and line["models"] == "1"
    }


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.0f}"


def _line(name: str, row: Mapping[str, Any], paper: Mapping[str, str] | None) -> list[str]:
    if "error" in row:
        return [name, row["error"], *["-"] * (len(HEADER) - 2)]
    if not row.get("rounds"):
        return [name, "no time left for a round", *["-"] * (len(HEADER) - 2)]
    ratio = "-"
    if row.get("train_ratio") is not None:
        low, high = row["train_ratio_quartiles"]
        ratio = f"{row['train_ratio']:.2f} ({low:.2f} to {high:.2f})"
    from_paper = "-"
    if paper is not None:
        columns = ("train_forward_pct", "train_backward_pct", "infer_forward_pct")
        from_paper = ", ".join(f"{float(paper[column]):.0f}" for column in columns)
    return [
        name,
        _number(row.get("train_forward_us_per_token")),
        percent(row.get("train_forward_ratio"), 0),
        _number(row.get("train_backward_us_per_token")),
        percent(row.get("train_backward_ratio"), 0),
        ratio,
        str(row["rounds"]),
        _number(row.get("infer_forward_us_per_token")),
        percent(row.get("infer_forward_ratio"), 0),
        _megabytes(row.get("train_peak_memory_bytes")),
        _megabytes(row.get("infer_peak_memory_bytes")),
        _number(row.get("feed_forward_saved_bytes_per_token"), 0),
        from_paper,
    ]


def _extra(row: Mapping[str, Any], key: str, tokens: int) -> str:
    value = row.get(key)
    if key == "busy_us":
        return _number(value and value / tokens)
    if key == "train_us_per_token":
        return _number(value)
    return _number(value, 0)


def markdown(record: Mapping[str, Any]) -> str:
    """Return the table of one record, with what it was measured on."""
    config, hardware = record["config"], record["provenance"]["hardware"]
    machine = ", ".join(hardware.get("gpus") or []) or (
        f"{hardware['cpu']}, {record['threads']} threads"
    )
    head = (
        f"# {config['model']}, {record['layers']} layers, {config['batch']} x {config['length']} "
        f"tokens, {config['dtype']}, dropout {config['dropout']}\n\n"
        f"{machine}; torch {record['provenance']['packages']['torch']}. Random weights. Medians of "
        "n rounds, rows interleaved in one process; ratios are taken within rounds. A dash is not "
        "measured.\n\n"
    )
    if "loss_on" in config:
        where = "all tokens"
        if config["loss_on"] == "answer":
            where = f"the last {config['answer']} tokens of each sequence"
        liger = ", with liger-kernel's patches of the base model" if config["liger"] else ""
        head += f"As a training run has it{liger}: under autocast, loss on {where}.\n\n"
    paper, rows = paper_rows(config["model"]), record["rows"]
    extra = [key for key in EXTRA if any(key in row for row in rows.values())]
    header = [*HEADER, *(EXTRA[key] for key in extra)]
    lines = [header, ["---"] * len(header)]
    for name, row in rows.items():
        line = _line(name, row, paper.get(name))
        lines.append([*line, *(_extra(row, key, record["tokens"]) for key in extra)])
    return head + "".join("| " + " | ".join(line) + " |\n" for line in lines)


def kernel_table(record: Mapping[str, Any], name: str) -> str:
    """Return the longest kernels of a row's step, or nothing."""
    row = record["rows"].get(name, {})
    if not row.get("by_kernel"):
        return ""
    lines = [("kernel", "launches", "us", "% of busy"), ("---",) * 4]
    for one in row["by_kernel"]:
        # Names of templates are long, and a bar would end the cell.
        short = one["name"][:100].replace("|", "/")
        share = 100 * one["us"] / row["busy_us"]
        lines.append((short, str(one["count"]), f"{one['us']:,.0f}", f"{share:.1f}"))
    head = (
        f"A step of {name}: {row['kernels']:,} kernels, {row['busy_us']:,.0f} us of the GPU; "
        f"the {len(row['by_kernel'])} longest:\n\n"
    )
    return head + "".join("| " + " | ".join(line) + " |\n" for line in lines)
