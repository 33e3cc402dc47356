"""Try the project end to end at the size of LLaMA-2 7B, in at most three minutes.

On random weights and generated data, without a network: MixLoRA is trained, killed, started again,
loaded back, scored on 16 items and asked for an answer; then LoRA, DoRA and MixDoRA train a few
steps on the same base, and MixLoRA on an NF4 one where bitsandbytes is installed. Writes `--record`
(`results/gpu-check.json`): the speed and peak memory of each beside the plan, hardware and
versions. Any `group.field=value` changes the runs: `model.quantization=nf4` does it all on that
base, for cards of 24 GB and less, and `model=tiny` does the same on a CPU. Exit code 1: a step did
not do what it should, or it took too long.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixlora_exp.adapters import attach_adapter
from mixlora_exp.cli.parser import Parser
from mixlora_exp.config.choices import PAPER_METHODS, Quantization
from mixlora_exp.config.command import compose
from mixlora_exp.config.paths import ROOT
from mixlora_exp.config.schema import Config
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model
from mixlora_exp.models.parameters import count_parameters
from mixlora_exp.models.precision import resolve_dtype
from mixlora_exp.models.quantization import is_installed
from mixlora_exp.plans.memory import memory_of
from mixlora_exp.records.record import finish_record, provenance, read_record, write_json
from mixlora_exp.runs.inputs import gather_inputs
from mixlora_exp.runs.run import run as run_once
from mixlora_exp.runs.run import start, training_examples
from mixlora_exp.serving.open import Opened, open_adapter
from mixlora_exp.serving.text_generation import continuations
from mixlora_exp.system.device import free_memory, hardware_names, resolve_device
from mixlora_exp.training import fit

STEPS, SAVED, FEW, ITEMS, NEW_TOKENS = 20, 10, 5, 16, 16
NF4 = Quantization.nf4
OTHERS = tuple(name for name in PAPER_METHODS if name != "mixlora")
WORDS = (
    "model=llama2_7b", "model.weights=random", "data=embedded", "task=arc_e",
    "data.train_limit=320", f"trainer.save_steps={SAVED}", "trainer.logging_steps=1",
    f"evaluation.limit={ITEMS}",
)  # fmt: skip
PROMPT = "Question: Which of these is the best answer to the question?\nAnswer:"
ON_A_CPU = 1e9
"""Parameters above which a CPU would take hours."""


@dataclass
class Steps:
    """Notes each optimizer step that is logged, and when."""

    numbers: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def __call__(self, step: int, loss: float) -> None:
        """Record a logged step and the time of its entry."""
        self.numbers.append(step)
        self.times.append(time.perf_counter())

    def seconds(self) -> float:
        """Return the median of a step; the first one, in which kernels are compiled, has no
        beginning."""
        spans = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        return statistics.median(spans)


def _config(words: Sequence[str], method: str, steps: int, folder: Path) -> Config:
    own = [f"method={method}", f"trainer.max_steps={steps}", f"output_dir={folder}"]
    return compose([*WORDS, *words, *own])


def _run_until_killed(config: Config) -> None:
    def kill(step: int, loss: float) -> None:
        if step > SAVED:
            os.kill(os.getpid(), signal.SIGKILL)

    run_once(config, kill)


def _kill_a_run(config: Config, seconds: float) -> None:
    """Train in another process, which is killed in the step after its checkpoint."""
    process = multiprocessing.get_context("spawn").Process(target=_run_until_killed, args=(config,))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise UserError(f"no {SAVED} steps of training in {seconds:.0f} s: --seconds=N allows more")
    if process.exitcode != -signal.SIGKILL:
        raise UserError(f"training ended with exit code {process.exitcode} before it was killed")


def _examples(config: Config, folder: Path) -> list[Any]:
    """Return the encoded examples that a run in `folder` trains on."""
    return training_examples(start(config, folder, gather_inputs(config)))


def _measured(
    config: Config, train: dict[str, Any], steps: Steps, examples: Sequence[Any]
) -> dict[str, Any]:
    """Return the speed and memory of a training, beside the plan for examples of their true
    length."""
    longest = max(16, *(len(example.input_ids) for example in examples))
    data = dataclasses.replace(config.data, cutoff_length=longest)
    planned = memory_of(dataclasses.replace(config, data=data))
    seconds, total = steps.seconds(), sum(planned.values())
    return {
        "method": config.method.name,
        "quantization": config.model.quantization.value,
        "steps": train["steps"],
        "seconds_per_step": round(seconds, 4),
        "tokens_per_second": round(train["tokens"] / train["steps"] / seconds, 1),
        "longest_example": longest,
        "peak_memory_bytes": train["peak_memory_bytes"],
        "planned_memory_bytes": total,
        "peak_to_planned": round(train["peak_memory_bytes"] / total, 3),
        "final_loss": train["final_loss"],
    }


def _train_another(
    config: Config,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> dict[str, Any]:
    folder.mkdir(parents=True)
    examples, steps = _examples(config, folder), Steps()
    model = attach_adapter(base, config.method, config.kernel, config.seed)
    summary = fit(
        config=config, model=model, tokenizer=tokenizer, examples=examples, folder=folder,
        dtype=base.dtype, watch=steps,
    )  # fmt: skip
    model.unload()
    free_memory()
    return _measured(config, dataclasses.asdict(summary), steps, examples)


def _answer(opened: Opened) -> str:
    (answer,) = continuations(opened, [PROMPT], max_new_tokens=NEW_TOKENS)
    return answer


def _train_on_nf4(
    config: Config, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> dict[str, Any]:
    free_memory()
    device = resolve_device()
    dtype = resolve_dtype(config.trainer.precision, device)
    base = load_model(config.model, dtype, config.seed, device)
    return _train_another(config, base, tokenizer, folder)


def check(settings: argparse.Namespace, words: Sequence[str], place: Path) -> dict[str, Any]:
    """Carry everything out in the folder `place`; returns what is to be recorded.

    Raises:
        UserError: the model needs a CUDA GPU and there is none.
    """
    begun, seconds = time.monotonic(), {}

    def timed(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        start = time.monotonic()
        found = work(*arguments)
        seconds[name] = round(time.monotonic() - start, 1)
        print(f"{name}: {seconds[name]} s", flush=True)
        return found

    config = _config(words, "mixlora", STEPS, place / "runs")
    size = count_parameters(config.model, config.method).base
    if size > ON_A_CPU and resolve_device().type == "cpu":
        raise UserError(
            f"model={config.model.name} needs a CUDA GPU and this machine has none: model=tiny "
            "tries the same on a CPU"
        )
    timed("until_killed", _kill_a_run, config, settings.seconds)
    steps = Steps()
    record = read_record(timed("resumed_and_scored", run_once, config, steps))
    free_memory()
    opened = timed("loaded", open_adapter, str(place / "runs" / record["name"] / "adapter"))
    answer = timed("answered", _answer, opened)
    tokenizer, base = opened.tokenizer, opened.model.unload()
    examples = _examples(config, place)
    trainings, skipped = [_measured(config, record["train"], steps, examples)], []
    for method in OTHERS:
        if time.monotonic() - begun > settings.seconds:
            skipped.append(method)
            continue
        other = _config(words, method, FEW, place)
        trainings.append(timed(method, _train_another, other, base, tokenizer, place / method))
    del opened, base
    nf4 = _config([*words, f"model.quantization={NF4.value}"], "mixlora", FEW, place)
    if config.model.quantization is Quantization.none and is_installed(NF4):
        if time.monotonic() - begun > settings.seconds:
            skipped.append(NF4.value)
        else:
            trainings.append(timed(NF4.value, _train_on_nf4, nf4, tokenizer, place / NF4.value))
    items = sum(score["n"] for score in record["scores"])
    total = time.monotonic() - begun
    return {
        "words": [*WORDS, *words],
        "dtype": record["dtype"],
        "kernel": record["kernel"],
        "parameters": record["parameters"],
        "steps_after_the_kill": steps.numbers,
        "scored_items": items,
        "answer": answer,
        "trainings": trainings,
        "not_measured": skipped,
        "seconds": {**seconds, "total": round(total, 1), "limit": settings.seconds},
        "passed": {
            "resumed": steps.numbers == list(range(SAVED + 1, STEPS + 1)),
            "scored": items == ITEMS,
            "all_methods": not skipped,
            "in_time": total <= settings.seconds,
        },
    }


def run(argv: Sequence[str]) -> int:
    """Carry out the check and write its record; returns 1 where something failed.

    Raises:
        UserError: the command line is not valid, or the machine has no GPU and the model is large.
    """
    parser = Parser(__doc__)
    parser.add_argument("--seconds", type=float, default=180.0, help="the time it may take")
    parser.add_argument(
        "--record",
        metavar="FILE",
        help="default: results/gpu-check.json, outputs/gpu-check.json with changed runs",
    )
    parser.add_argument("overrides", metavar="NAME=VALUE", nargs="*", help="change the runs")
    settings = parser.parse(argv)
    words = settings.overrides
    origin = provenance(ROOT, hardware_names())
    with tempfile.TemporaryDirectory() as place:
        found = check(settings, words, Path(place))
    # A record of other runs does not replace that of these.
    path = ROOT / (settings.record or f"{'outputs' if words else 'results'}/gpu-check.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, finish_record({**found, "provenance": origin}))
    for training in found["trainings"]:
        peak, planned = (training[f"{name}_memory_bytes"] / 2**30 for name in ("peak", "planned"))
        speed, held = training["tokens_per_second"], training["quantization"]
        name = training["method"] + ("" if held == Quantization.none.value else f", {held}")
        print(f"{name:<12} {speed:>10,.0f} tokens/s, peak {peak:.1f} GiB, planned {planned:.1f}")
    failed = [name for name, passed in found["passed"].items() if not passed]
    print(f"{'failed: ' + ', '.join(failed) if failed else 'passed'}; written: {path}")
    return 1 if failed else 0
