"""Tables 3 and 4: hyperparameters and data sets, in the paper and here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixlora_exp.results.paper import TASK_TITLES, read_paper
from mixlora_exp.results.tables.parts import Block, Entry, Row, dash
from mixlora_exp.results.tables.registry import PAPER, Made, Sources, table
from mixlora_exp.tasks import TASKS


def _text(value: Any) -> Entry:
    return dash if value in (None, "") else Entry("text", text=str(value))


def _resolved(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the hyperparameters of Table 3 in a composed configuration."""
    method, trainer = config["method"], config["trainer"]
    experts = "num_experts" in method
    return {
        "cutoff_length": str(config["data"]["cutoff_length"]),
        "learning_rate": f"{trainer['learning_rate']:g}",
        "optimizer": "AdamW",
        "batch_size": str(trainer["batch_size"]),
        "accumulation_steps": str(trainer["batch_size"] // trainer["micro_batch_size"]),
        "dropout": f"{method['dropout']:g}",
        "epochs": f"{trainer['epochs']:g}",
        "targets": ",".join(target.removesuffix("_proj") for target in method["targets"]),
        "lora_rank": str(method["rank"]),
        "lora_alpha": f"{method['alpha']:g}",
        "num_experts": str(method["num_experts"]) if experts else "",
        "top_k": str(method["top_k"]) if experts else "",
    }


def _same(printed: str, own: str) -> bool:
    try:
        return float(printed) == float(own)
    except ValueError:
        return sorted(printed.split(",")) == sorted(own.split(","))


@table(3, "Hyperparameters")
def hyperparameters(sources: Sources) -> Made:
    """Return Table 3: the paper's settings beside those of `conf/`, and the differences."""
    configs, rows, differing = sources.composed(), [], []
    lora, mixlora = _resolved(configs["lora"]), _resolved(configs["mixlora"])
    for line in read_paper(PAPER, 3).lines:
        name = line["hyperparameter"]
        cells = []
        for column, own in (("lora_dora", lora), ("mixlora_mixdora", mixlora)):
            cells += [_text(line[column]), _text(own[name])]
            if not _same(line[column], own[name]):
                differing.append(f"{name}: {line[column]} in the paper, {own[name]} here")
        rows.append(Row((name,), tuple(cells)))
    for first, second in (("lora", "dora"), ("mixlora", "mixdora")):
        if _resolved(configs[first]) != _resolved(configs[second]):
            differing.append(f"{second} does not run with {first}'s values")
    columns = ("LoRA, DoRA: paper", "here", "MixLoRA, MixDoRA: paper", "here")
    notes = [f"Differs: {entry}." for entry in dict.fromkeys(differing)]
    notes.append(
        "The paper's batch of 16 with 8 accumulation steps: its official template takes 16 "
        "examples per optimizer step in micro-batches of 8, which are 2 accumulation steps."
    )
    block = Block("Hyperparameters", ("hyperparameter",), columns, tuple(rows))
    return [block], notes


@table(4, "Data sets")
def data_sets(sources: Sources) -> Made:
    """Return Table 4: sizes in the paper, of the published splits, and of the files that runs
    read."""
    read: dict[tuple[str, str, str], set[int]] = {}
    for run in sources.runs:
        for split, files in run.record["data"].items():
            task, _, part = split.partition("/")
            source = run.scored["data"]["name"]
            read.setdefault((task, part, source), set()).add(sum(f["rows"] for f in files))
    origins = sorted({source for _, _, source in read})
    rows = []
    for line in read_paper(PAPER, 4).lines:
        task = TASKS[line["task"]]
        cells = [_text(line[name]) for name in ("domain", "type")]
        cells.append(_text(task.kind))
        for part in ("train", "test"):
            cells += [_text(f"{int(line[part]):,}"), _text(f"{task.sizes[part]:,}")]
            for source in origins:
                counts = sorted(read.get((task.name, part, source), ()))
                cells.append(_text(" or ".join(f"{count:,}" for count in counts)))
        rows.append(Row((TASK_TITLES[task.name],), tuple(cells)))
    columns = ["domain", "type: paper", "here"]
    for part in ("train", "test"):
        columns += [f"{part}: paper", "published"]
        columns += [f"read, data={source}" for source in origins]
    notes = [
        "The paper rounds the sizes of ARC and PIQA. Its WinoGrande training set is the debiased "
        "one. BoolQ, PIQA, SIQA, HellaSwag and WinoGrande are scored on the validation split, "
        "whose labels are public.",
        "Rows of the files that the runs read; a limit on rows or items stands over the results. "
        "data=embedded are generated tasks, not the benchmarks.",
    ]
    block = Block("Data sets", ("task",), tuple(columns), tuple(rows), run=bool(read))
    return [block], notes
