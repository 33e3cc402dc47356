"""Several runs on one base model: trained in the same passes, recorded each as if it were alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from mixlora_exp.adapters import attach_together, load_adapters, save_adapter, set_kernel
from mixlora_exp.config import Config, run_name
from mixlora_exp.config.schema import Protocol
from mixlora_exp.config.together import check_together
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation import Scorer, in_lockstep
from mixlora_exp.experiment import (
    RECORD,
    Run,
    Scores,
    failure_noted,
    finish,
    finished,
    held,
    score_alone,
    score_with,
    start,
    start_folder,
    tracked,
    training_examples,
    write_record,
)
from mixlora_exp.inputs import check_inputs, gather_inputs, resolve_config
from mixlora_exp.planning import print_plan, print_plan_together
from mixlora_exp.results.show import say
from mixlora_exp.runtime import autocast
from mixlora_exp.training import TrainSummary, fit_jointly, make_job

__all__ = ["run_together", "score_together"]


def run_together(configs: Sequence[Config]) -> list[Path]:
    """Carry out runs that share a base; returns the paths of their records, none for a dry run.

    Finished runs are left out. One that fails is told of when the others are done and recorded.

    Raises:
        UserError: the runs cannot share a base, or something that the user can mend failed.
    """
    configs = [resolve_config(config) for config in configs]
    check_together(configs, [run_name(config) for config in configs])
    if configs[0].dry_run:
        check_inputs(list(configs))
        for config in configs:
            print_plan(config)
        print_plan_together(configs)
        return []
    paths, runs = [], []
    with contextlib.ExitStack() as locks:
        for config in configs:
            folder = Path(config.output_dir).expanduser() / run_name(config)
            inputs = gather_inputs(config)
            lock = None
            if config.force or not (folder / RECORD).exists():
                lock = locks.enter_context(held(folder))
                if lock is None:
                    continue
            if (folder / RECORD).exists() and not config.force:
                paths.append(finished(folder / RECORD, inputs))
            else:
                runs.append(start(config, folder, inputs, lock))
                locks.enter_context(failure_noted(folder))
                locks.enter_context(tracked(runs[-1]))
        if runs:
            paths += _carry_out(runs)
    return paths


def score_together(runs: Sequence[Run], base: PreTrainedModel) -> list[Scores]:
    """Score the adapters of several runs, loaded back from disk, in the same passes.

    lm-eval, which is not made for several threads, and dropout, which is drawn per pass, take
    each adapter by itself.
    """
    say(f"Scoring {len(runs)} adapters loaded back from disk")
    names = {f"adapter{number}": this for number, this in enumerate(runs)}
    alone = [
        this
        for this in runs
        if this.config.evaluation.dropout or Protocol.lm_eval in this.config.evaluation.protocols
    ]
    found: dict[int, Scores] = {id(this): score_alone(this, base) for this in alone}
    names = {name: this for name, this in names.items() if this not in alone}
    if names:
        folders = {name: this.folder / "adapter" for name, this in names.items()}
        model = load_adapters(base, folders)
        set_kernel(model, runs[0].config.kernel.name.value)
        device = next(model.parameters()).device
        together = in_lockstep(
            model,
            runs[0].tokenizer,
            autocast(device, runs[0].dtype),
            {name: partial(_score_with, this) for name, this in names.items()},
            max(this.config.evaluation.batch_tokens for this in names.values()),
        )
        model.unload()
        found |= {id(names[name]): scores for name, scores in together.items()}
    return [found[id(this)] for this in runs]


def _score_with(this: Run, scorer: Scorer) -> Scores:
    return score_with(this, lambda: scorer)


def _carry_out(runs: Sequence[Run]) -> list[Path]:
    first = runs[0]
    base = first.load_base()
    before = [
        this.score_base(base) if this.config.evaluation.before_training else None for this in runs
    ]
    jobs = []
    for number, this in enumerate(runs):
        start_folder(this.folder)
        jobs.append(
            make_job(
                f"adapter{number}",
                this.config,
                training_examples(this),
                this.folder,
                this.tokenizer,
                this.checkpoints(),
                this.tracking,
            )
        )
    methods = {job.name: (job.config.method, job.config.seed) for job in jobs}
    model = attach_together(base, methods, first.config.kernel)
    say(f"Training {len(jobs)} adapters together: {', '.join(r.folder.name for r in runs)}")
    results = fit_jointly(model, jobs, first.dtype)
    done: list[tuple[int, TrainSummary]] = []
    failures = []
    for number, (job, result) in enumerate(zip(jobs, results.values(), strict=True)):
        if isinstance(result, str):
            failures.append(f"{job.folder.name}: {result}")
            continue
        save_adapter(model, job.folder / "adapter", job.name)
        others = [other.folder.name for other in runs if other is not runs[number]]
        done.append((number, dataclasses.replace(result, together=others)))
    model.unload()
    scores = score_together([runs[number] for number, _ in done], base) if done else []
    paths = []
    for (number, summary), found in zip(done, scores, strict=True):
        this = runs[number]
        record = finish(this, base, summary, before[number], found)
        paths.append(write_record(this.folder, record, this.lock))
    if failures:
        raise UserError(
            f"{len(failures)} of {len(runs)} adapters were taken out, the others are recorded: "
            + "; ".join(failures)
        )
    return paths
