"""Several runs on one base model: trained and scored in the same forward passes, each recorded as
if it had run alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from mixlora_exp.adapters import attach_together, load_adapters, save_adapter, set_kernel
from mixlora_exp.adapters.mixed_adapters import check_shareable
from mixlora_exp.adapters.shuffled import shuffle_experts
from mixlora_exp.config.command_line import CommandLine
from mixlora_exp.config.run_names import run_name
from mixlora_exp.config.schema import Base, Config, LoraMethodConfig, Protocol
from mixlora_exp.config.together import check_together
from mixlora_exp.errors import PackError, UserError
from mixlora_exp.evaluation import Scorer, in_lockstep
from mixlora_exp.models.precision import autocast
from mixlora_exp.runs.announce import announce
from mixlora_exp.runs.finished import finished
from mixlora_exp.runs.inputs import (
    Inputs,
    gather_inputs,
    resolve_config,
)
from mixlora_exp.runs.ownership import forget_failure, held, note_failure
from mixlora_exp.runs.planned import print_plans
from mixlora_exp.runs.run import (
    RECORD,
    Run,
    finish,
    run,
    score_alone,
    score_base,
    start,
    tracked,
    training_examples,
    write_record,
)
from mixlora_exp.runs.scoring import Scores, are_kept, keep_scores, score_with
from mixlora_exp.system.console import echo
from mixlora_exp.system.device import convert_out_of_memory, free_memory, processes
from mixlora_exp.system.disk_faults import convert_disk_faults
from mixlora_exp.system.hub import adapter_folder
from mixlora_exp.training import Job, TrainSummary, fit_jointly, make_job


class _Pack:
    """The active runs of one pack, the records of finished ones, and the failures."""

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.runs: list[Run] = []
        self.failures: dict[str, str] = {}

    def fail(self, folder: Path, error: BaseException | str) -> None:
        """Note the failure of one run and remove it; the others continue."""
        self.failures[folder.name] = str(error)
        for this in self.runs:
            if this.folder == folder:
                note_failure(folder, error, this.lock)
        self.runs = [this for this in self.runs if this.folder != folder]

    def end(self) -> list[Path]:
        """Return the paths of the records.

        Raises:
            PackError: a run failed.
        """
        reasons = list(dict.fromkeys(self.failures.values()))
        done, failed = len(self.paths), len(self.failures)
        if self.failures and not self.paths and len(reasons) == 1:
            raise PackError(reasons[0], done=done, failed=failed)
        if self.failures:
            raise PackError(
                f"{failed} of {failed + done} adapters failed"
                f"{', the others are recorded' if self.paths else ''}: "
                + "; ".join(f"{name}: {why}" for name, why in self.failures.items()),
                done=done,
                failed=failed,
            )
        return self.paths


def run_together(
    configs: Sequence[Config],
    *,
    earlier: list[Path] | None = None,
    line: CommandLine | None = None,
) -> list[Path]:
    """Execute runs that share a base model; returns the paths of their records, none for a dry run.

    Skips finished runs (see `run` for `earlier` and `line`) and those that another process is
    executing. A run that fails, in its data, training or scoring, is reported after the others are
    recorded.

    Raises:
        UserError: the runs cannot share a base model, or a run failed for a reason that the user
            can fix (`PackError`).
    """
    if len(configs) == 1:
        path = run(configs[0], earlier=earlier, line=line)
        return [] if path is None else [path]
    configs = [resolve_config(config) for config in configs]
    check_together(configs, [run_name(config) for config in configs])
    for config in configs:
        if config.adapter is not None:
            # Even if it is scored alone, it would leave the base model changed.
            check_shareable(adapter_folder(config.adapter))
    if processes().num_processes > 1:
        raise UserError(
            "adapters: several adapters train together only in one process: start train.py without "
            "torchrun, or train them one by one"
        )
    if configs[0].dry_run:
        print_plans(configs, line)
        return []
    pack = _Pack()
    with contextlib.ExitStack() as stack:
        for config in configs:
            folder = Path(config.output_dir).expanduser() / run_name(config)
            try:
                with convert_disk_faults(f"output_dir={config.output_dir}"):
                    inputs = gather_inputs(config)
                    folder = folder.with_name(run_name(config, inputs.identity["adapter"]))
                    _enter(pack, stack, config, folder, inputs, earlier)
            except UserError as error:
                pack.fail(folder, error)
        try:
            with (
                convert_disk_faults(f"output_dir={configs[0].output_dir}"),
                convert_out_of_memory(),
            ):
                _carry_out(pack)
        except Exception as error:
            for this in pack.runs:
                if not (this.folder / RECORD).exists():
                    note_failure(this.folder, error, this.lock)
            raise
    return pack.end()


def _enter(
    pack: _Pack,
    stack: contextlib.ExitStack,
    config: Config,
    folder: Path,
    inputs: Inputs,
    earlier: list[Path] | None,
) -> None:
    """Add a run to the pack, unless it is finished or another process is executing it."""
    if (folder / RECORD).is_file() and not config.force:
        pack.paths.append(finished(folder / RECORD, inputs, config, earlier))
        return
    this = start(config, folder, inputs)
    lock = stack.enter_context(held(folder))
    if lock is None:
        return
    if (folder / RECORD).is_file() and not config.force:
        # Another process finished it between the look above and the lock.
        pack.paths.append(finished(folder / RECORD, inputs, config, earlier))
        return
    this.lock = lock
    announce(this)
    forget_failure(folder)
    stack.enter_context(tracked(this))
    pack.runs.append(this)


def _carry_out(pack: _Pack) -> None:
    if not pack.runs:
        return
    base = pack.runs[0].load_base()
    before = {
        this.folder.name: score_base(this, base)
        for this in pack.runs
        if this.config.evaluation.before_training
    }
    summaries = _train(pack, base)
    scores = score_together(pack.runs, base) if pack.runs else {}
    for this in list(pack.runs):
        name = this.folder.name
        found = scores[name]
        if isinstance(found, BaseException):
            pack.fail(this.folder, f"scoring failed: {found}")
            continue
        try:
            record = finish(this, base, summaries.get(name), before.get(name), found)
            pack.paths.append(write_record(this, record))
        except UserError as error:
            pack.fail(this.folder, error)


def _jobs(pack: _Pack) -> list[Job]:
    jobs = []
    for this in list(pack.runs):
        if not isinstance(this.config.method, LoraMethodConfig):
            continue  # An existing adapter is only scored.
        try:
            this.begin()
            job = make_job(
                name=f"adapter{len(jobs)}",
                config=this.config,
                examples=training_examples(this),
                folder=this.folder,
                tokenizer=this.tokenizer,
                checkpoints=this.checkpoints(),
                tracker=this.tracker,
            )
        except UserError as error:
            pack.fail(this.folder, error)
            continue
        jobs.append(job)
    return jobs


def _train(pack: _Pack, base: PreTrainedModel) -> dict[str, TrainSummary]:
    """Train and save the pack's adapters, then remove them from `base` and from memory."""
    jobs = _jobs(pack)
    if not jobs:
        return {}
    first = pack.runs[0]
    methods = {job.name: (job.config.method, job.config.seed) for job in jobs}
    model = attach_together(base, methods, first.config.kernel)
    echo(f"Training {len(jobs)} adapters together: {', '.join(job.folder.name for job in jobs)}")
    results = fit_jointly(model=model, jobs=jobs, dtype=first.dtype)
    summaries, own = {}, {this.folder.name: this for this in pack.runs}
    for job in jobs:
        result, name = results[job.name], job.folder.name
        if isinstance(result, UserError):
            pack.fail(job.folder, result)
            continue
        try:
            own[name].check_owner()
            save_adapter(model, job.folder / "adapter", job.name)
        except UserError as error:
            pack.fail(job.folder, error)
            continue
        others = [other.folder.name for other in jobs if other is not job]
        summaries[name] = dataclasses.replace(result, together=others)
    model.unload()
    del model, jobs, results
    free_memory()
    return summaries


def score_together(
    runs: Sequence[Run], base: PreTrainedModel
) -> Mapping[str, Scores | BaseException]:
    """Score the adapters of several runs, loaded back from disk, in the same forward passes.

    Returns scores, or the error, by run name. Adapters are scored alone under lm-eval (not
    thread-safe), with dropout (drawn per pass), and after a shared pass failed.
    """
    echo(f"Scoring {len(runs)} adapters loaded back from disk")
    shared = {
        f"adapter{number}": this
        for number, this in enumerate(runs)
        if not this.config.evaluation.dropout
        and Protocol.lm_eval not in this.config.evaluation.protocols
    }
    found: dict[str, Scores | BaseException] = {}
    # Kept is either none of them or, before the first record is written, each.
    if len(shared) > 1 and not all(are_kept(r, r.adapter_folder) for r in shared.values()):
        model = load_adapters(
            base,
            {name: this.adapter_folder for name, this in shared.items()},
            accept=all(this.config.base is Base.accept for this in shared.values()),
        )
        set_kernel(model, runs[0].config.kernel.name.value)
        for name, this in shared.items():
            if this.config.evaluation.shuffle_experts is not None:
                shuffle_experts(model, name, this.config.evaluation.shuffle_experts)
        names = [this.folder.name for this in shared.values()]
        results = in_lockstep(
            model,
            runs[0].tokenizer,
            autocast(next(model.parameters()).device, runs[0].dtype),
            {name: partial(_score_with, this, names) for name, this in shared.items()},
            max(this.config.evaluation.batch_tokens for this in shared.values()),
        )
        model.unload()
        found = {shared[name].folder.name: result for name, result in results.items()}
        if all(isinstance(result, tuple) for result in found.values()):
            # Killed between two records, who is left would be scored without the others' rows.
            for this in shared.values():
                keep_scores(this, this.adapter_folder, found[this.folder.name])
    for this in runs:
        if isinstance(found.get(this.folder.name), tuple):
            continue
        try:
            found[this.folder.name] = score_alone(this, base)
        except Exception as error:  # noqa: BLE001 - the others' scores are recorded all the same
            found[this.folder.name] = error
    return found


def _score_with(this: Run, names: Sequence[str], scorer: Scorer) -> Scores:
    label = f"{this.folder.name} "
    return score_with(this, lambda: scorer, this.adapter_folder, label, names)
