"""The first losses of ten small runs: what tells that a change of the code changed the numbers.

`results/reference.json` has them; `make reference REASON="..."` makes them anew.
"""

from __future__ import annotations

import os
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from composed import compose
from encoded import examples_of

from mixlora_exp.adapters import attach_adapter
from mixlora_exp.config.paths import ROOT
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.models.precision import resolve_dtype
from mixlora_exp.records.code_hash import code_sha256
from mixlora_exp.records.record import finish_record, provenance, read_record, write_json
from mixlora_exp.training.fit import fit_jointly
from mixlora_exp.training.job import make_job

FILE = ROOT / "results" / "reference.json"
CHANGELOG = ROOT / "CHANGELOG.md"
# Two micro-batches a step; 36 examples are nine steps, so that the last steps are of a third epoch.
SMALL = (
    "experiment=smoke", "data.train_limit=36", "trainer.batch_size=4", "trainer.micro_batch_size=2",
    "trainer.max_steps=20", "trainer.learning_rate=1e-3", "method.rank=4", "method.alpha=8",
    "method.dropout=0.1",
)  # fmt: skip
FLOAT32, BFLOAT16 = "trainer.precision=float32", "trainer.precision=bfloat16"
RUNS: dict[str, tuple[str, ...]] = {
    "lora": ("method=lora", "kernel=exact", FLOAT32),
    "lora by PEFT": ("method=lora", "kernel=peft", FLOAT32),
    "dora": ("method=dora", "kernel=exact", FLOAT32),
    "mixlora": ("method=mixlora", "kernel=exact", FLOAT32),
    "mixlora by definition": ("method=mixlora", "kernel=reference", FLOAT32),
    "mixlora by Algorithm 1": ("method=mixlora", "kernel=shared", FLOAT32),
    "mixlora in bf16": ("method=mixlora", "kernel=exact", BFLOAT16),
    "mixdora": ("method=mixdora", "kernel=exact", FLOAT32),
    "mixdora in bf16": ("method=mixdora", "kernel=exact", BFLOAT16),
    "mola": ("method=mola", "kernel=exact", FLOAT32),
}
EXACT = {"losses": 0.0, "gradient_norms": 0.0}
ELSEWHERE = {
    FLOAT32: {"losses": 1e-5, "gradient_norms": 1e-4},
    BFLOAT16: {"losses": 2e-2, "gradient_norms": 1e-1},
}
"""Relative tolerances on another kind of CPU, whose sums have another order.

A token near a tie of the router may then go to another expert there, which a gradient norm shows
more than a loss. With `ATEN_CPU_CAPABILITY=avx2` and `=default`, and with a start that differs by
1e-7, the largest differences were 1.6e-7 of a loss and 1.3e-5 of a norm in float32, 1.2e-3 and
2.6e-2 in bf16.
"""

Losses = Mapping[str, Sequence[float]]


def kind_of_machine() -> dict[str, Any]:
    """What decides how results are rounded: where all of it is equal, they are equal to the bit."""
    cpu: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().split("\n\n")[0].splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        cpu[name.strip()] = value.strip()
    vectors = [f for f in cpu.get("flags", "").split() if f.startswith(("avx", "amx", "fma"))]
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{name: cpu.get(name) for name in ("vendor_id", "cpu family", "model")},
        "vector_flags": sorted(vectors),
    }


@cache
def losses_of(*words: str) -> dict[str, list[float]]:
    """Loss and gradient norm of every step of a run of `SMALL` with changes, on one thread."""
    torch.set_num_threads(1)
    config = compose([*SMALL, *words])
    dtype = resolve_dtype(config.trainer.precision, torch.device("cpu"))
    base = load_model(config.model, dtype, config.seed)
    base.set_attn_implementation("eager")
    model = attach_adapter(base, config.method, config.kernel, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(
            name=model.active_adapter, config=config, examples=examples_of(config),
            folder=Path(folder), tokenizer=load_tokenizer(config.model),
        )  # fmt: skip
        found = fit_jointly(model=model, jobs=[job], dtype=dtype)[job.name]
    if isinstance(found, UserError):
        raise found
    return {"losses": job.track.watch.losses, "gradient_norms": job.track.watch.norms}


def drift(found: Losses, expected: Losses, tolerances: Mapping[str, float]) -> str:
    """Where the first number differs by more than its kind's tolerance, relative, or at all if that
    is 0; empty if none does."""
    for name, values in expected.items():
        for step, (value, wanted) in enumerate(zip(found[name], values, strict=True), 1):
            if not abs(value - wanted) <= tolerances[name] * abs(wanted):
                return f"{name} of step {step}: {value!r}, was {wanted!r}"
    return ""


def for_machine(record: Mapping[str, Any], machine: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of the record that a kind of machine made; None without one."""
    made = (record, *record.get("others", ()))
    return next((one for one in made if one["machine"] == machine), None)


def numbers(run: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run in the record its losses and gradient norms."""
    return {kind: run[kind] for kind in EXACT if kind in run}


def _agrees(known: Mapping[str, Any], runs: Mapping[str, Any]) -> bool:
    """Whether another machine's runs are those of the record, up to its tolerances."""
    same = {n: r["words"] for n, r in known["runs"].items()} == {
        n: r["words"] for n, r in runs.items()
    }
    return same and not any(
        drift(run, numbers(known["runs"][name]), ELSEWHERE[RUNS[name][-1]])
        for name, run in runs.items()
    )


def remake(reason: str, file: Path = FILE, changelog: Path = CHANGELOG) -> int:
    """Write the losses of this code and machine, and the reason to the changelog; the exit code.

    Of a kind of machine that the record does not have, losses that agree with it are added; else
    the record is made anew, and what other machines made of the code before goes.
    """
    runs = {name: {"words": [*SMALL, *words], **losses_of(*words)} for name, words in RUNS.items()}
    machine = kind_of_machine()
    known = read_record(file) if file.exists() else {"runs": {}, "machine": None}
    own = for_machine(known, machine)
    before = (own or known)["runs"]
    changed = [name for name in runs if runs[name] != before.get(name)]
    if own is not None and not changed and before.keys() == runs.keys():
        sys.stdout.write("the losses are as they were: nothing was written\n")
        return 0
    packages = provenance(ROOT)["packages"]
    record = {
        "reason": reason, "code_sha256": code_sha256(), "machine": machine, "packages": packages,
        "runs": runs,
    }  # fmt: skip
    if own is None and _agrees(known, runs):
        kept = {k: v for k, v in known.items() if k not in ("schema_version", "content_sha256")}
        record, changed = {**kept, "others": [*known.get("others", ()), record]}, []
    text = with_reason(changelog.read_text(encoding="utf-8"), reason, changed)
    write_json(file, finish_record(record))
    changelog.write_text(text, encoding="utf-8")
    sys.stdout.write(f"written: {os.path.relpath(file, ROOT)}, {len(changed)} runs changed\n")
    return 0


def with_reason(text: str, reason: str, changed: Sequence[str]) -> str:
    """The changelog with a new first entry under the first `### Changed`."""
    runs = "all runs" if len(changed) == len(RUNS) else ", ".join(changed) or "another machine"
    entry = textwrap.fill(
        f"- Reference losses made anew ({runs}): {reason.rstrip('.')}.",
        width=108, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    before, heading, after = text.partition("### Changed\n\n")
    if not heading:
        raise UserError("CHANGELOG.md has no heading `### Changed`: add it")
    return f"{before}{heading}{entry}\n{after}"
