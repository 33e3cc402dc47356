"""Tables 6 and 7: time and memory of a training step, from the paper and from benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import yaml

from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.errors import UserError
from mixlora_exp.records.record import read_record
from mixlora_exp.records.required_fields import check_benchmark
from mixlora_exp.results.headings import told_apart
from mixlora_exp.results.paper import METHOD_TITLES, MODEL_TITLES, read_paper
from mixlora_exp.results.runs import LeftOut
from mixlora_exp.results.tables.parts import Block, Entry, Row, dash, number, paper
from mixlora_exp.results.tables.registry import PAPER, Made, Sources, table

PAPER_COLUMNS = (
    "train_forward_us", "train_forward_pct", "train_backward_us", "train_backward_pct",
    "train_memory_gb", "train_memory_pct", "infer_forward_us", "infer_forward_pct",
    "infer_memory_gb", "infer_memory_pct",
)  # fmt: skip
COLUMNS = (
    "training forward, us/token", "% of LoRA", "backward, us/token", "% of LoRA",
    "memory, GB", "% of LoRA", "inference forward, us/token", "% of LoRA",
    "inference memory, GB", "% of LoRA",
    "forward + backward, % of LoRA", "feed-forward bytes saved/token",
)  # fmt: skip
MODELS = {6: "llama2_7b", 7: "gemma_2b"}
BEFORE_AUTOCAST = (
    "Without autocast: PEFT's float32 adapters multiply in float32. Loss on all tokens."
)
ROW_TITLES = {
    "lora_peft": "LoRA (PEFT)",
    "lora_peft_again": "LoRA (PEFT), a second copy",
    "lora_peft_all_logits": "LoRA (PEFT), logits of all positions",
    "lora_peft_no_autocast": "LoRA (PEFT), no autocast",
    "lora_peft_bf16": "LoRA (PEFT), bf16 adapters",
    "lora_peft_compiled": "LoRA (PEFT), layers compiled",
    "lora_axolotl": "LoRA (axolotl's functions)",
    "dora_peft": "DoRA (PEFT)",
    "dora_peft_no_autocast": "DoRA (PEFT), no autocast",
    "dora_peft_bf16": "DoRA (PEFT), bf16 adapters",
    "base": "base model, forward only",
    "floor": "base model, forward and input gradient",
}


def load_benchmarks(folder: Path) -> tuple[list[Mapping[str, Any]], list[LeftOut]]:
    """Benchmark records in `results/bench/`, and those left out because they are not usable or were
    measured with uncommitted changes."""
    found, left_out = [], []
    faults = _faults(folder)
    for path in sorted(folder.glob("*.json")):
        try:
            record = read_record(path)
            git = record["provenance"]["git"]
            if git is None or git["dirty"]:
                raise UserError("it was measured with uncommitted changes")
            for one in record.get("benchmarks", [record]):
                # Bytes that were counted (`kind=bytes`) have no times for these tables.
                if "rows" in one and not any("kept_bytes" in r for r in one["rows"].values()):
                    entry = {**one, "provenance": record["provenance"], "name": path.stem}
                    entry = _without_faults(entry, faults)
                    _check(entry)
                    found.append(entry)
        except (
            UserError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            ArithmeticError,
        ) as error:
            left_out.append(LeftOut(f"bench/{path.stem}", str(error)))
    return found, left_out


def _check(record: Mapping[str, Any]) -> None:
    """Make all that the tables show of one benchmark, so that an odd value raises here and not in a
    table."""
    check_benchmark(record)
    for block in (_block(record), _summary([record])):
        for row in block.rows:
            for cell in row.cells:
                cell.show()


def _faults(folder: Path) -> list[Mapping[str, Any]]:
    """Return descriptions of figures that are known to be wrong, from `faults.yaml`."""
    path = folder / "faults.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else []


def _without_faults(
    record: Mapping[str, Any], faults: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Return the record without figures that are known to be wrong; the reasons are in `faults`."""
    commit, rows, reasons = record["provenance"]["git"]["commit"], dict(record["rows"]), []
    for fault in faults:
        if not commit.startswith(fault["commit"]):
            continue
        for name, row in rows.items():
            if row.get("method") in fault["methods"] and row.get("kernel") in fault["kernels"]:
                rows[name] = {k: v for k, v in row.items() if not k.startswith(fault["figures"])}
                reasons.append(fault["why"])
    return {**record, "rows": rows, "faults": list(dict.fromkeys(reasons))}


def _title(name: str, row: Mapping[str, Any]) -> str:
    if name in ROW_TITLES:
        return ROW_TITLES[name]
    title = f"{METHOD_TITLES.get(row['method'], row['method'])} ({row['kernel']} kernel)"
    extra = []
    if row["method"].startswith("mix") and (row["num_experts"], row["top_k"]) != (8, 2):
        extra.append(f"E={row['num_experts']}, K={row['top_k']}")
    if row.get("router", "top_k") != "top_k":
        extra.append(f"router {row['router']}")
    if row["adapter_dtype"] == "base":
        extra.append("bf16 adapters")
    # Rows with a field for autocast all have the loss as in training.
    if row["head"] != "full" and "autocast" not in row:
        extra.append("loss in chunks")
    return ", ".join([title, *extra])


def _scaled(value: float | None, scale: float = 1.0) -> float | None:
    return None if value is None else scale * value


def _ratio(row: Mapping[str, Any], base: Mapping[str, Any] | None, name: str) -> float | None:
    if base is None or row.get(name) is None or not base.get(name):
        return None
    return 100 * row[name] / base[name]


PARTS = {
    "train_forward": ("train_forward_s",),
    "train_backward": ("train_backward_s",),
    "infer_forward": ("infer_forward_s",),
    "train": ("train_forward_s", "train_backward_s"),
}
"""Name of a ratio -> the times of a round whose sums it compares."""


def _time_ratio(
    row: Mapping[str, Any], base: Mapping[str, Any] | None, name: str
) -> tuple[float, float, float] | None:
    """Lower quartile, median and upper quartile of the ratios to `base` within rounds, in percent.

    Recomputed for adapters in bf16, because records before 2026-11-27 compare their time and their
    memory with different rows; otherwise as recorded.
    """
    ratio = row.get(f"{name}_ratio")
    if ratio is None:
        return None
    if row["adapter_dtype"] != "base":
        low, high = row.get(f"{name}_ratio_quartiles") or (ratio, ratio)
        return 100 * low, 100 * ratio, 100 * high
    rounds = {sample["round"]: sample for sample in (base or {}).get("samples", ())}
    pairs = [(s, rounds[s["round"]]) for s in row.get("samples", ()) if s["round"] in rounds]
    keys = PARTS[name]
    both = [(a, b) for a, b in pairs if all(key in a and key in b for key in keys)]
    ratios = [100 * sum(a[k] for k in keys) / sum(b[k] for k in keys) for a, b in both]
    if not ratios:
        return None
    # A single round has no quartiles: all three are its ratio.
    low, middle, high = quantiles(ratios if ratios[1:] else 2 * ratios, n=4, method="inclusive")
    return low, middle, high


def _percent(found: tuple[float, float, float] | None) -> Entry:
    return dash if found is None else number(found[1])


def _measured(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> tuple[Entry, ...]:
    if "error" in row:
        text = Entry("text", text=row["error"].removeprefix("not measured: "))
        return (text, *[dash] * (len(COLUMNS) - 1))
    cells = []
    for name in ("train_forward", "train_backward"):
        cells.append(number(row.get(f"{name}_us_per_token")))
        cells.append(_percent(_time_ratio(row, base, name)))
    cells.append(number(_scaled(row.get("train_peak_memory_bytes"), 1e-9), 2))
    cells.append(number(_ratio(row, base, "train_peak_memory_bytes")))
    cells.append(number(row.get("infer_forward_us_per_token")))
    cells.append(_percent(_time_ratio(row, base, "infer_forward")))
    cells.append(number(_scaled(row.get("infer_peak_memory_bytes"), 1e-9), 2))
    cells.append(number(_ratio(row, base, "infer_peak_memory_bytes")))
    step = _time_ratio(row, base, "train")
    cells.append(
        dash if step is None else Entry("ours", step[1], low=step[0], high=step[2], digits=0)
    )
    cells.append(number(row.get("feed_forward_saved_bytes_per_token"), 0))
    return tuple(cells)


def _paper_block(table: int) -> Block:
    rows = []
    for line in read_paper(PAPER, table).lines:
        label = METHOD_TITLES[line["method"]]
        if line["optimized"]:
            label += " (optimised)" if line["optimized"] == "yes" else " (not optimised)"
        models = "1 model" if line["models"] == "1" else f"{line['models']} models, each"
        cells = [paper(line[name]) for name in PAPER_COLUMNS]
        rows.append(Row((label, models), (*cells, dash, dash)))
    heading = f"{MODEL_TITLES[MODELS[table]]}: the paper"
    return Block(heading, ("method", "models"), COLUMNS, tuple(rows))


def _shape(record: Mapping[str, Any]) -> str:
    config = record["config"]
    return (
        f"{MODEL_TITLES.get(config['model'], config['model'])}: {record['layers']} layers, "
        f"{config['batch']} x {config['length']} tokens, {config['dtype']}"
    )


def _machine(record: Mapping[str, Any]) -> str:
    hardware = record["provenance"]["hardware"]
    return ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {record['threads']} threads"


def _step(record: Mapping[str, Any]) -> str:
    """Return whether PEFT's LoRA ran under autocast, and which tokens the loss is on."""
    config = record["config"]
    if "loss_on" not in config:
        how, loss = "no autocast", "all"
    else:
        how = "autocast" if config["dtype"] != "float32" else "no autocast"
        loss = f"the last {config['answer']}" if config["loss_on"] == "answer" else "all"
    return f"{how}, loss on {loss}"


def _block(record: Mapping[str, Any]) -> Block:
    """Return one benchmark; its heading is the shape, and the second label how it was measured."""
    base = record["rows"].get("lora_peft")
    source = (f"bench/{record['name']}.json",)
    measured = (
        f"{_machine(record)}, torch {record['provenance']['packages']['torch']}, "
        f"dropout {record['config']['dropout']:g}"
    )
    rows = []
    for name, row in record["rows"].items():
        cells = [
            cell if cell.value is None else dataclasses.replace(cell, records=source)
            for cell in _measured(row, base)
        ]
        rows.append(Row((_title(name, row), measured), tuple(cells)))
    faults = (f"Dashes stand for figures that are known to be wrong: {why}."
              for why in record.get("faults", ()))  # fmt: skip
    before = () if "loss_on" in record["config"] else (BEFORE_AUTOCAST,)
    note = " ".join([f"Record: results/{source[0]}", *before, *faults])
    return Block(_shape(record), ("method", "measured"), COLUMNS, tuple(rows), True, (note,))


def _of_one_shape(blocks: Sequence[Block], details: Sequence[Mapping[str, Any]]) -> Block:
    """Return the benchmarks of one shape under one another, distinguished by how they were
    measured."""
    names = told_apart([block.rows[0].label[1] if block.rows else "" for block in blocks], details)
    rows = [
        Row((row.label[0], name), row.cells)
        for block, name in zip(blocks, names, strict=True)
        for row in block.rows
    ]
    notes = tuple(
        f"{name}: {note}" for block, name in zip(blocks, names, strict=True) for note in block.notes
    )
    return dataclasses.replace(blocks[0], rows=tuple(rows), notes=notes)


SUMMARY = tuple(METHOD_TITLES[method] for method in PAPER_METHODS)


def _summary(records: Sequence[Mapping[str, Any]]) -> Block:
    """Return the time of a step and peak memory of each method with this project's kernels, per
    shape, machine and kind of step, of the benchmark with the most methods and rounds."""
    best: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for record in sorted(records, key=_completeness):
        if record["config"]["dropout"]:
            best[_shape(record), _machine(record), _step(record)] = record
    rows = []
    for label, record in sorted(best.items()):
        base, cells = record["rows"].get("lora_peft"), []
        source = (f"bench/{record['name']}.json",)
        found = [_fastest(record["rows"], method) for method in PAPER_METHODS]
        cells = [_percent(_time_ratio(row, base, "train")) for row in found]
        cells += [number(_ratio(row, base, "train_peak_memory_bytes")) for row in found]
        cells.append(number(_scaled((base or {}).get("train_peak_memory_bytes"), 1e-9), 2))
        cells = [dash if c.value is None else dataclasses.replace(c, records=source) for c in cells]
        rows.append(Row(label, tuple(cells)))
    heading = "Forward and backward of a step, and its peak memory, in percent of PEFT's LoRA"
    columns = (
        *(f"{title}, time" for title in SUMMARY),
        *(f"{title}, memory" for title in SUMMARY),
        "PEFT's LoRA, GB",
    )
    labels = ("shape, with its batch", "machine", "step")
    return Block(heading, labels, columns, tuple(rows), run=True)


def _fastest(rows: Mapping[str, Any], method: str) -> Mapping[str, Any]:
    """Return the row of a method: with the Triton kernels where they were measured."""
    triton = rows.get(f"{method}_triton", {})
    return triton if triton.get("train_ratio") is not None else rows.get(method, {})


def _completeness(record: Mapping[str, Any]) -> tuple[int, int, str]:
    methods = sum("train_ratio" in _fastest(record["rows"], method) for method in PAPER_METHODS)
    return methods, record["config"].get("rounds") or 0, record["name"]


TITLE = "Time and memory of a step, "


@table(6, TITLE + MODEL_TITLES["llama2_7b"])
def of_llama(sources: Sources) -> Made:
    """Return Table 6, with further models that are not in the paper."""
    own = [r for r in sources.benchmarks if r["config"]["model"] == "llama2_7b"]
    others = [r for r in sources.benchmarks if r["config"]["model"] not in MODELS.values()]
    return _made(6, own + others)


@table(7, TITLE + MODEL_TITLES["gemma_2b"])
def of_gemma(sources: Sources) -> Made:
    """Return Table 7: benchmarks of Gemma 2B."""
    return _made(7, [r for r in sources.benchmarks if r["config"]["model"] == "gemma_2b"])


def _made(number: int, mine: Sequence[Mapping[str, Any]]) -> Made:
    shapes: dict[str, list[Mapping[str, Any]]] = {}
    for record in mine:
        shapes.setdefault(_shape(record), []).append(record)
    blocks = [_paper_block(number)]
    for records in shapes.values():
        details = [
            {
                "rounds": record["config"].get("rounds"),
                "commit": record["provenance"]["git"]["commit"][:8],
                "record": record["name"],
            }
            for record in records
        ]
        blocks.append(_of_one_shape([_block(record) for record in records], details))
    notes = [
        "Measured on random weights of the true shape; medians of rounds in which all rows take "
        "turns. Forward + backward: median of the ratios within rounds, with their quartiles. "
        "All ratios, of time and of memory, are to PEFT's own LoRA, the first row of a benchmark, "
        "with adapters in float32. Memory depends on the batch, which stands in the heading. "
        "Different hardware: only the percentages can be compared "
        "with the paper's.",
        "The paper's text gives 30 % lower latency for the optimised form; its own Table 6 gives "
        "13.6 % in the forward pass (535.2 to 462.5 us).",
    ]
    return blocks, notes, lambda made: [_summary(mine), made[0]] if mine else []
