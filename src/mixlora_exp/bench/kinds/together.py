"""`kind=together`: several adapters trained and scored together, against one run after another.

Runs `experiment=multi_adapter/four_methods` (or the one given), then each of its entries as a
command of its own, each in a process of its own: losses, scores, the time of the whole process and
its peak memory. Words that are no setting of a benchmark are overrides as `train.py` takes them
(`data.path=DIR`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixlora_exp.bench.options import BenchOptions
from mixlora_exp.bench.runner import Kind, echo
from mixlora_exp.config.command import compose, compose_settings
from mixlora_exp.config.paths import ROOT
from mixlora_exp.config.together import entry_overrides
from mixlora_exp.errors import UserError
from mixlora_exp.records.outcome import outcomes


@dataclass(slots=True, kw_only=True)
class TogetherOptions(BenchOptions):
    """Settings of `kind=together`. experiment: an experiment with `adapters`; overrides: further
    words of the command line."""

    experiment: str = "multi_adapter/four_methods"
    overrides: list[str] = field(default_factory=list)


def _run(words: list[str], log: Path) -> dict[str, float]:
    """Return seconds and peak memory of one command line of `train.py`, start and loading
    included."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "train.py"), *words]
    echo(" ".join(words))
    begun = time.perf_counter()
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    if os.waitstatus_to_exitcode(status):
        raise UserError(f"{' '.join(words)} failed: {log.read_text()[-1000:]}")
    # Linux counts in KiB.
    return {"seconds": round(seconds, 1), "peak_memory_gib": round(usage.ru_maxrss / 2**20, 3)}


def _pair(together: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """Return one adapter's results, trained together and alone, and their differences."""
    records = together["record"], alone["record"]
    curves = [[entry["loss"] for entry in record["train"]["curve"]] for record in records]
    scores = [
        {
            f"{s['task']}/{s['protocol']}": {k: s[k] for k in ("accuracy", "gold_log_likelihood")}
            for s in record["scores"]
        }
        for record in records
    ]
    return {
        "method": records[0]["config"]["method"]["name"],
        "rank": records[0]["config"]["method"]["rank"],
        "final_loss": [record["train"]["final_loss"] for record in records],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*curves, strict=True)),
        "scores": scores,
        "chance": {s["task"]: s["chance"] for s in records[0]["scores"]},
        "majority_class": {s["task"]: s["majority_class"] for s in records[0]["scores"]},
        "items": {s["task"]: s["n"] for s in records[0]["scores"]},
        "fingerprint": records[0]["fingerprint"],
    }


def _markdown(record: Mapping[str, Any]) -> str:
    lines = [
        "| adapter | task | loss at the end, together | alone | largest difference of a logged "
        "loss | accuracy together | alone | chance | majority |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in record["adapters"].values():
        for key, score in one["scores"][0].items():
            task = key.partition("/")[0]
            accuracies = (score["accuracy"], one["scores"][1][key]["accuracy"])
            shown = [f"{100 * value:.1f}" for value in (
                *accuracies, one["chance"][task], one["majority_class"][task])]  # fmt: skip
            lines.append(
                f"| {one['method']} r={one['rank']} | {task} | {one['final_loss'][0]:.4f} "
                f"| {one['final_loss'][1]:.4f} | {one['largest_loss_difference']:.1e} "
                f"| {' | '.join(shown)} |"
            )
    whole, single = record["together"], record["alone"]
    seconds = sum(one["seconds"] for one in single.values())
    most = max(one["peak_memory_gib"] for one in single.values())
    every = sum(one["peak_memory_gib"] for one in single.values())
    lines += [
        "",
        f"Together: {whole['seconds']:.0f} s, peak memory {whole['peak_memory_gib']:.2f} GiB. One "
        f"after another: {seconds:.0f} s in all, peak memory {most:.2f} GiB; side by side they "
        f"would take {every:.2f} GiB.",
    ]
    return "\n".join(lines) + "\n"


def _parse(words: Sequence[str]) -> TogetherOptions:
    names = TogetherOptions.__dataclass_fields__.keys() - {"overrides"}
    own = [word for word in words if word.partition("=")[0] in names]
    options = compose_settings(TogetherOptions, own)
    options.overrides = [word for word in words if word not in own]
    return options


def measure(options: TogetherOptions) -> Iterator[dict[str, Any]]:
    """Yield the record of the seconds and memory of adapters trained together, beside runs of their
    own.

    Raises:
        UserError: the experiment has no adapters, or a run fails.
    """
    experiment, words = f"experiment={options.experiment}", options.overrides
    config = compose([experiment, *words])
    if not config.adapters:
        raise UserError(f"{experiment} has no adapters: name one of conf/experiment/multi_adapter/")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        joint, alone = [f"output_dir={folder / name}" for name in ("together", "alone")]
        whole = _run([experiment, *words, joint], folder / "log")
        single = {}
        for number, entry in enumerate(config.adapters, start=1):
            own = entry_overrides(entry, number)
            single[" ".join(own)] = _run(
                [experiment, *words, "adapters=[]", *own, alone], folder / "log"
            )
        found, expected = outcomes(folder / "together"), outcomes(folder / "alone")
    yield {
        "model": config.model.name,
        "experiment": experiment,
        "overrides": [w for w in words if not w.startswith("data.path=")],
        "adapters": {name: _pair(found[name], expected[name]) for name in expected},
        "together": whole,
        "alone": single,
    }


KIND = Kind(
    options=TogetherOptions, measure=measure, markdown=_markdown, parse=_parse,
    name=lambda record: f"together-{record['model']}",
)  # fmt: skip
