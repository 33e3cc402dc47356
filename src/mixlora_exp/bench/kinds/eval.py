"""`kind=eval`: items per second of scoring beside lm-eval's own loop: same model, same items.

`limit=60 path=DIR` scores that many items of each of the eight tasks (generated ones without
`path`; tasks that DIR has no test split of are left out).

lm-eval's tasks: its own loop at each of `batch_sizes` (1 is its default) beside the subclass that
shares prefixes, to be 1.5 times as fast. The prompts of `label_logits`: lm-eval's loop on a task of
the same prompts with the labels as choices, beside `label_logits`, to be 4 times as fast. Each pair
must give the same accuracies.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval.models.huggingface import HFLM

from mixlora_exp.adapters import attach_adapter
from mixlora_exp.bench.interleaved import interleaved
from mixlora_exp.bench.options import BenchOptions, require_dtype
from mixlora_exp.bench.runner import Kind, echo
from mixlora_exp.config.command import compose
from mixlora_exp.config.schema import TASK_NAMES, AnswerForm, Config, LoraMethodConfig, Protocol
from mixlora_exp.data.encoding import prompt_with_answers
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.data.sources import load_split
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation import Scorer, TaskScore, score_tests
from mixlora_exp.evaluation.harness import (
    evaluate_files,
    evaluate_tasks,
    score_lm_eval,
    task_scores,
)
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.models.precision import autocast
from mixlora_exp.system.device import resolve_device

TARGETS = {"lm_eval": 1.5, "label_logits": 4.0}


@dataclass(slots=True, kw_only=True)
class EvalOptions(BenchOptions):
    """Settings of `kind=eval`. limit: items per task; batch_sizes: of lm-eval's own scoring;
    batch_tokens: of ours, padded tokens per batch; path: a folder with data, None for the generated
    tasks."""

    model: str = "smollm2_135m"
    method: str = "none"
    dtype: str = "float32"
    limit: int = 60
    path: str | None = None
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16])
    batch_tokens: int = 4096
    rounds: int = 3


def _tests(config: Config, limit: int) -> dict[str, LoadedSplit]:
    found = {}
    for task in TASK_NAMES:
        if config.data.path and not (Path(config.data.path).expanduser() / task).is_dir():
            continue
        try:
            split = load_split(config.data, task, "test")
        except UserError as error:
            echo(f"left out: {error}")
            continue
        found[task] = split.limited(limit, 0)
    return found


def _write_label_tasks(folder: Path, tests: dict[str, LoadedSplit], config: Config) -> list[str]:
    """Return tasks of lm-eval with the prompts of `label_logits` and the labels as choices."""
    names = []
    for task, test in tests.items():
        data = folder / f"label_{task}.jsonl"
        rows = []
        for item in test.items:
            form = AnswerForm.label
            passage = config.data.boolq_passage
            prompt, answers = prompt_with_answers(item, form, boolq_passage=passage)
            rows.append({"prompt": prompt.text, "choices": answers, "gold": item.answer})
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        spec = {
            "task": f"label_{task}",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(data)},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / f"label_{task}.yaml").write_text(yaml.safe_dump(spec))
        names.append(f"label_{task}")
    return names


def _label_accuracies(lm: HFLM, tests: dict[str, LoadedSplit], config: Config) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        names = _write_label_tasks(Path(folder), tests, config)
        results = evaluate_files(lm, names, folder)["results"]
    return {task: results[f"label_{task}"]["acc,none"] for task in tests}


Way = Callable[[], dict[str, float]]
"""A way of scoring all items; returns accuracies by task."""


def _ways(
    config: Config, options: EvalOptions, tests: dict[str, LoadedSplit]
) -> dict[tuple[str, str], Way]:
    """Return the ways to score that are measured, by protocol and name."""
    dtype, device = getattr(torch, options.dtype), resolve_device()
    tokenizer = load_tokenizer(config.model)
    model: Any = load_model(config.model, dtype, 0, device)
    if device.type == "cpu":
        model.set_attn_implementation("eager")
    if isinstance(config.method, LoraMethodConfig):
        model = attach_adapter(model, config.method, config.kernel, 0)
    scorer = Scorer(model, tokenizer, autocast(device, dtype), options.batch_tokens)
    config.evaluation.batch_check = 0

    def accuracies(scores: list[TaskScore]) -> dict[str, float]:
        return {score.task: score.accuracy for score in scores}

    ways: dict[tuple[str, str], Way] = {}
    for size in options.batch_sizes:
        name = f"lm-eval's loop, batch size {size}"
        lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=size)
        ways["lm_eval", name] = lambda lm=lm: accuracies(
            task_scores(evaluate_tasks(lm, tests), tests)
        )
        ways["label_logits", name] = lambda lm=lm: _label_accuracies(lm, tests, config)
    ways["lm_eval", "ours"] = lambda: accuracies(score_lm_eval(scorer, tests))
    ways["label_logits", "ours"] = lambda: accuracies(
        score_tests(Protocol.label_logits, scorer, tests, config.data, config.evaluation)
    )
    return ways


def _summary(rows: dict[str, dict[str, Any]], items: int, target: float) -> dict[str, Any]:
    speed = {name: items / statistics.median(row["seconds"]) for name, row in rows.items()}
    others = {name: value for name, value in speed.items() if name != "ours"}
    return {
        "items_per_second": {name: round(value, 3) for name, value in speed.items()},
        "times_as_fast": {n: round(speed["ours"] / value, 3) for n, value in others.items()},
        "target": target,
        "same_accuracies": all(r["accuracy"] == rows["ours"]["accuracy"] for r in rows.values()),
    }


def measure(options: EvalOptions) -> Iterator[dict[str, Any]]:
    """Yield the record of the items per second of each protocol, ours beside lm-eval's own.

    Raises:
        UserError: `dtype` is not float32 or bfloat16.
    """
    require_dtype(options.dtype, ("float32", "bfloat16"))
    source = ["data=local", f"data.path={options.path}"] if options.path else ["data=embedded"]
    config = compose([f"model={options.model}", f"method={options.method}", "task=all", *source])
    tests = _tests(config, options.limit)
    ways = _ways(config, options, tests)
    rows: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in TARGETS}

    def timed(protocol: str, name: str) -> dict[str, float]:
        start = time.perf_counter()
        found = ways[protocol, name]()
        seconds = round(time.perf_counter() - start, 3)
        row = rows[protocol].setdefault(name, {"seconds": [], "accuracy": found})
        row["seconds"].append(seconds)
        echo(f"{protocol}, {name}: {seconds:.1f} s")
        return {}

    steps = {" ".join(key): lambda number, key=key: timed(*key) for key in ways}
    interleaved(steps, options.rounds, 0, echo=echo)
    items = sum(len(test.items) for test in tests.values())
    kept = asdict(options)
    # The record tells where results were found, not where someone keeps data.
    kept["path"] = None if options.path is None else Path(options.path).name
    yield {
        "config": kept,
        "items": {task: len(test.items) for task, test in tests.items()},
        "summary": {p: _summary(rows[p], items, target) for p, target in TARGETS.items()},
        "protocols": rows,
        "threads": torch.get_num_threads(),
    }


def _name(record: Mapping[str, Any]) -> str:
    config = record["config"]
    source = "embedded" if config["path"] is None else "local"
    return f"eval-{config['model']}-{config['method']}-{config['dtype']}-{source}"


def _markdown(record: Mapping[str, Any]) -> str:
    lines = ["| protocol | way | items/s | ours, times as fast | target |", "|" + " --- |" * 5]
    for protocol, found in record["summary"].items():
        for way, speed in found["items_per_second"].items():
            factor = found["times_as_fast"].get(way)
            cells = ["-", "-"] if factor is None else [f"{factor:.2f}", f"{found['target']:g}"]
            lines.append(f"| {protocol} | {way} | {speed:.1f} | {' | '.join(cells)} |")
        if not found["same_accuracies"]:
            lines.append(f"| {protocol} | the accuracies are not the same | - | - | - |")
    return "\n".join(lines) + "\n"


KIND = Kind(options=EvalOptions, measure=measure, name=_name, markdown=_markdown)
