"""Items per second of the scoring protocols beside lm-eval's own loop: same model, same items.

`python scripts/bench_eval.py limit=60 path=DIR` scores that many items of each of the eight tasks
(generated ones without `path`; tasks that DIR has no test split of are left out) with lm-eval's
`HFLM` at its default batch size of 1 and at each of `batch_sizes`, with the subclass that shares
prefixes, and with `label_logits`. Writes `results/bench/eval-<model>-<dtype>.json`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from mixlora_exp.adapters import attach_adapter
from mixlora_exp.config import compose, options
from mixlora_exp.config.schema import TASK_NAMES, Config, LoraMethodConfig
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.data.sources import load_split
from mixlora_exp.errors import UserError, guarded
from mixlora_exp.evaluation import Scorer, TaskScore
from mixlora_exp.evaluation.harness import evaluate_tasks, score_lm_eval, task_scores
from mixlora_exp.evaluation.label_logits import score_label_logits
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.results.record import finish_record, provenance, write_json
from mixlora_exp.runtime import autocast, hardware_names, resolve_device

ROOT = Path(__file__).resolve().parents[1]
OWN = "lm_eval, its own loop, batch size {}"


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
    model: Any = load_model(config.model, dtype, 0).to(device)
    if device.type == "cpu":
        model.set_attn_implementation("eager")
    if isinstance(config.method, LoraMethodConfig):
        model = attach_adapter(model, config.method, config.kernel, 0)
    scorer = Scorer(model, tokenizer, autocast(device, dtype), settings.batch_tokens)

    def own_loop(size: int) -> Callable[[], list[TaskScore]]:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=size)
        return lambda: task_scores(evaluate_tasks(lm, tests), tests)

    ways: dict[str, Callable[[], list[TaskScore]]] = {
        **{OWN.format(size): own_loop(size) for size in settings.batch_sizes},
        "lm_eval, prefix shared": lambda: score_lm_eval(scorer, tests),
        "label_logits": lambda: score_label_logits(scorer, tests, config.data, config.evaluation),
    }
    config.evaluation.batch_check = 0
    items = sum(len(test.items) for test in tests.values())
    rows: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in ways}
    for number in range(settings.rounds):
        names = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for name in names:
            start = time.perf_counter()
            scores = ways[name]()
            rows[name]["seconds"].append(round(time.perf_counter() - start, 3))
            rows[name]["accuracy"] = {s.task: s.accuracy for s in scores}
            rows[name]["accuracy_normalized"] = {s.task: s.accuracy_normalized for s in scores}
            print(f"round {number + 1}: {name}: {rows[name]['seconds'][-1]:.1f} s", file=sys.stderr)
    best = min(statistics.median(rows[OWN.format(s)]["seconds"]) for s in settings.batch_sizes)
    for name, row in rows.items():
        seconds = statistics.median(row["seconds"])
        row["items_per_second"] = round(items / seconds, 3)
        row["times_the_best_own_loop"] = round(best / seconds, 3)
        print(f"{name}: {items / seconds:.1f} items/s, {best / seconds:.2f} times lm-eval's best")
    record = {
        "config": asdict(settings),
        "items": {task: len(test.items) for task, test in tests.items()},
        "protocols": rows,
        "threads": torch.get_num_threads(),
        "provenance": provenance(ROOT, hardware_names()),
    }
    # The record tells where results were found, not where someone keeps data.
    record["config"]["path"] = None if settings.path is None else Path(settings.path).name
    name = f"eval-{settings.model}-{settings.method}-{settings.dtype}.json"
    write_json(Path(settings.output) / name, finish_record(record))
    print(f"Written: {Path(settings.output) / name}")


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
