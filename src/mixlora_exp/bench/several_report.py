"""The record of several adapters on one base as tables, in the form of the paper's Table 6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Table 6: two models together, memory per model in percent of one alone.
PAPER = {2: (57.7, 52.5)}


def _table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows) + "\n"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f}"


def _memory(record: Mapping[str, Any]) -> str:
    memory, resident = record["memory"], record["resident"]
    lines = []
    for count, row in memory["rows"].items():
        whole = row["bytes"]
        held = resident.get(count, {})
        one = resident.get("1", {})
        seen = ["-", "-"]
        if "train" in held and "train" in one:
            seen = [f"{100 * held[u] / int(count) / one[u]:.1f}" for u in ("train", "infer")]
        paper = PAPER.get(int(count))
        lines.append(
            [
                str(count),
                *(_gigabytes(whole[item] / int(count)) for item in whole),
                f"{row['train_percent']:.1f} ({row['train_expected_percent']:.1f})",
                f"{row['infer_percent']:.1f} ({row['infer_expected_percent']:.1f})",
                f"{row['infer_bf16_percent']:.1f}",
                *seen,
                "-" if paper is None else f"{paper[0]}, {paper[1]}",
            ]
        )
    header = [
        "adapters", "base, GB per model", "adapter", "gradient", "AdamW", "activations",
        "training % of one (expected)", "inference % (expected)", "inference %, adapters in bf16",
        f"resident at {record['layers']} layers: training %", "inference %",
        "paper: training, inference %",
    ]  # fmt: skip
    return (
        f"## Memory per model, {memory['depth']} layers, {memory['sequences']} x "
        f"{memory['length']} tokens each\n\n"
        "Counted, not measured: parameters, and what autograd keeps, at one and two layers, "
        "extended to the true depth. Expected is (base / M + a) / (base + a). Resident memory was "
        "measured, each row in a process of its own.\n\n" + _table(header, lines)
    )


def _times(record: Mapping[str, Any]) -> str:
    def cell(row: Mapping[str, Any], part: str) -> list[str]:
        low, high = row[f"{part}_ratio_quartiles"]
        ratio = f"{row[f'{part}_ratio']:.2f} ({low:.2f} to {high:.2f})"
        return [f"{row[f'{part}_us_per_token']:,.1f}", ratio]

    equal = [
        [name.replace("_", " "), *cell(row, "train"), *cell(row, "infer")]
        for name, row in record["times"].items()
        if not name.startswith("small")
    ]
    small = [
        [name.rpartition("_")[2], *cell(row, "train"), *cell(row, "infer")]
        for name, row in record["times"].items()
        if name.startswith("small_together")
    ]
    config = record["config"]
    header = ["training us/token", "ratio (quartiles)", "inference us/token", "ratio (quartiles)"]
    return (
        f"## Time at equal tokens, {config['sequences']} x {config['length']} in all\n\n"
        "Ratios to one adapter in the packed pass; `alone` is the ordinary path.\n\n"
        + _table(["row", *header], equal)
        + f"## Time of {config['small']} x {config['length']} tokens for each adapter\n\n"
        "Ratios to the same adapters one after another, each alone.\n\n"
        + _table(["adapters", *header], small)
    )


def several_markdown(record: Mapping[str, Any]) -> str:
    """Return the tables of one record, with what it was measured on."""
    config, hardware = record["config"], record["provenance"]["hardware"]
    # Older records call it `kind`.
    method = config.get("method", config.get("kind"))
    machine = ", ".join(hardware.get("gpus") or []) or (
        f"{hardware['cpu']}, {record['threads']} threads"
    )
    return (
        f"# Several adapters ({method}) on one {config['model']}, {config['dtype']}, "
        f"dropout {config['dropout']}\n\n"
        f"{machine}; torch {record['provenance']['packages']['torch']}. Random weights; times at "
        f"{record['layers']} layers, medians of {config['rounds']} rounds, rows interleaved in one "
        "process.\n\n" + _memory(record) + _times(record)
    ).rstrip() + "\n"
