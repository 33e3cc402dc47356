"""Several runs on one base model: trained in the same passes, recorded each as if it were alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mixlora_exp.adapters import attach_together, save_adapter
from mixlora_exp.config import Config, run_name
from mixlora_exp.config.together import check_together
from mixlora_exp.errors import UserError
from mixlora_exp.experiment import (
    RECORD,
    Run,
    finish,
    finished,
    run,
    start,
    start_folder,
    training_examples,
    write_record,
)
from mixlora_exp.inputs import check_inputs, gather_inputs, resolve_config
from mixlora_exp.planning import print_plan, print_plan_together
from mixlora_exp.results.show import say
from mixlora_exp.training import TrainSummary, fit_jointly, make_job

__all__ = ["run_together"]


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
    paths, missing = [], []
    for config in configs:
        folder = Path(config.output_dir).expanduser() / run_name(config)
        inputs = gather_inputs(config)
        if (folder / RECORD).exists() and not config.force:
            paths.append(finished(folder / RECORD, inputs))
        else:
            missing.append((config, folder, inputs))
    if len(missing) == 1:
        made = run(missing[0][0])
        return [*paths, made] if made else paths
    if missing:
        paths += _carry_out([start(*parts) for parts in missing])
    return paths


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
    paths = []
    for number, summary in done:
        this = runs[number]
        record = finish(this, base, summary, before[number], str(this.folder / "adapter"))
        paths.append(write_record(this.folder, record))
    if failures:
        raise UserError(
            f"{len(failures)} of {len(runs)} adapters were taken out, the others are recorded: "
            + "; ".join(failures)
        )
    return paths
