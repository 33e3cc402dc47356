"""Items per second of the scoring protocols beside lm-eval's own loop: same model, same items.

`python scripts/bench_eval.py limit=60 path=DIR` scores that many items of each of the eight tasks
(generated ones without `path`; tasks that DIR has no test split of are left out).

lm-eval's tasks: its own loop at each of `batch_sizes` (1 is its default) beside the subclass that
shares prefixes, to be 1.5 times as fast. The prompts of `label_logits`: lm-eval's loop on a task of
the same prompts with the labels as choices, beside `label_logits`, to be 4 times as fast. Each pair
must give the same accuracies. Writes `results/bench/eval-<model>-<method>-<dtype>.json`.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval.models.huggingface import HFLM

from mixlora_exp.adapters import attach_adapter
from mixlora_exp.config import compose, options
from mixlora_exp.config.schema import TASK_NAMES, AnswerForm, Config, LoraMethodConfig
from mixlora_exp.data.encoding import ask
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.data.sources import load_split
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation import Scorer, TaskScore
from mixlora_exp.evaluation.harness import (
    evaluate_files,
    evaluate_tasks,
    score_lm_eval,
    task_scores,
)
from mixlora_exp.evaluation.label_logits import score_label_logits
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.models.precision import autocast
from mixlora_exp.records.record import finish_record, provenance, write_json
from mixlora_exp.system.device import hardware_names, resolve_device
from mixlora_exp.system.guarded import guarded

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"lm_eval": 1.5, "label_logits": 4.0}


@dataclass(slots=True, kw_only=True)
class Settings:
    model: str = "smollm2_135m"
    method: str = "none"
    dtype: str = "float32"
    limit: int = 60
    path: str | None = None
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16])
    batch_tokens: int = 4096
    rounds: int = 3
    output: str = "results/bench"


def _tests(config: Config, limit: int) -> dict[str, LoadedSplit]:
    found = {}
    for task in TASK_NAMES:
        if config.data.path and not (Path(config.data.path).expanduser() / task).is_dir():
            continue
        try:
            split = load_split(config.data, task, "test")
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        found[task] = split.limited(limit, 0)
    return found


def _write_label_tasks(folder: Path, tests: dict[str, LoadedSplit], config: Config) -> list[str]:
    """Tasks of lm-eval with the prompts of `label_logits` and the labels as choices."""
    names = []
    for task, test in tests.items():
        data = folder / f"label_{task}.jsonl"
        rows = []
        for item in test.items:
            form = AnswerForm.label
            prompt, answers = ask(item, form, boolq_passage=config.data.boolq_passage)
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


def run(arguments: Sequence[str]) -> None:
    settings = options(Settings, arguments)
    source = ["data=local", f"data.path={settings.path}"] if settings.path else ["data=embedded"]
    overrides = [f"model={settings.model}", f"method={settings.method}", "task=all", *source]
    config = compose(overrides)
    if settings.dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype={settings.dtype} is not valid: choose float32 or bfloat16")
    dtype, device = getattr(torch, settings.dtype), resolve_device()
    tests = _tests(config, settings.limit)
    tokenizer = load_tokenizer(config.model)
    model: Any = load_model(config.model, dtype, 0, device)
    if device.type == "cpu":
        model.set_attn_implementation("eager")
    if isinstance(config.method, LoraMethodConfig):
        model = attach_adapter(model, config.method, config.kernel, 0)
    scorer = Scorer(model, tokenizer, autocast(device, dtype), settings.batch_tokens)

    config.evaluation.batch_check = 0

    def accuracies(scores: list[TaskScore]) -> dict[str, float]:
        return {score.task: score.accuracy for score in scores}

    def own(size: int) -> HFLM:
        return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=size)

    def labels() -> dict[str, float]:
        return accuracies(score_label_logits(scorer, tests, config.data, config.evaluation))

    ways: dict[tuple[str, str], Callable[[], dict[str, float]]] = {}
    for size in settings.batch_sizes:
        name, lm = f"lm-eval's loop, batch size {size}", own(size)
        ways["lm_eval", name] = lambda lm=lm: accuracies(
            task_scores(evaluate_tasks(lm, tests), tests)
        )
        ways["label_logits", name] = lambda lm=lm: _label_accuracies(lm, tests, config)
    ways["lm_eval", "ours"] = lambda: accuracies(score_lm_eval(scorer, tests))
    ways["label_logits", "ours"] = labels
    items = sum(len(test.items) for test in tests.values())
    rows: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in TARGETS}
    for number in range(settings.rounds):
        for protocol, name in random.Random(number).sample(list(ways), len(ways)):
            start = time.perf_counter()
            found = ways[protocol, name]()
            seconds = round(time.perf_counter() - start, 3)
            row = rows[protocol].setdefault(name, {"seconds": [], "accuracy": found})
            row["seconds"].append(seconds)
            print(f"round {number + 1}: {protocol}, {name}: {seconds:.1f} s", file=sys.stderr)
    summary = {}
    for protocol, target in TARGETS.items():
        ours, *others = rows[protocol].pop("ours"), *rows[protocol].values()
        speed = {
            name: items / statistics.median(r["seconds"]) for name, r in rows[protocol].items()
        }
        rows[protocol]["ours"] = ours
        own_speed = items / statistics.median(ours["seconds"])
        summary[protocol] = {
            "items_per_second": {n: round(v, 3) for n, v in {**speed, "ours": own_speed}.items()},
            "times_as_fast": {name: round(own_speed / v, 3) for name, v in speed.items()},
            "target": target,
            "same_accuracies": all(other["accuracy"] == ours["accuracy"] for other in others),
        }
        for name, factor in summary[protocol]["times_as_fast"].items():
            print(f"{protocol}: {factor:.2f} times as fast as {name} (target {target})")
        if not summary[protocol]["same_accuracies"]:
            print(f"{protocol}: the accuracies are not the same; the record has them")
    record = {
        "config": asdict(settings),
        "items": {task: len(test.items) for task, test in tests.items()},
        "summary": summary,
        "protocols": rows,
        "threads": torch.get_num_threads(),
        "provenance": provenance(ROOT, hardware_names()),
    }
    # The record tells where results were found, not where someone keeps data.
    record["config"]["path"] = None if settings.path is None else Path(settings.path).name
    source = "embedded" if settings.path is None else "local"
    name = f"eval-{settings.model}-{settings.method}-{settings.dtype}-{source}.json"
    write_json(Path(settings.output) / name, finish_record(record))
    print(f"Written: {Path(settings.output) / name}")


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
