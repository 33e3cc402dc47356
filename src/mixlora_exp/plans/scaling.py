"""The paper's models on cards: the text of docs/scaling.md."""

from __future__ import annotations

from mixlora_exp.config.choices import PAPER_METHODS, PAPER_MODELS, LossOn, Quantization
from mixlora_exp.config.command import compose
from mixlora_exp.plans.cards import CARDS, Fit, fits
from mixlora_exp.plans.measured import measured_peaks
from mixlora_exp.plans.memory import usable_bytes

TEXT = """\
# What fits which card

The first settings that fit, by the plan: no gradient checkpointing before checkpointing, bf16
before 4 bits (`nf4`), micro-batches of 8 before smaller ones. Beside them the GiB that they take,
with examples of 512 tokens, the method's settings of Table 3 and one GPU, of whose memory a run can
use 94 %; a dash: nothing fits. `python train.py dry_run=true model=... method=...` tells the same
of any run, each card's settings as a command to paste. Made by
`python tests/checks/scaling_page.py > docs/scaling.md`, which a test repeats. `trainer.compile` is
printed with each card but never searched, by decision: what it gains was not measured on a GPU, so
that it stays as it was given, and only a change to 4 bits, which refuses it, switches it off.

{table}

`4 nf4 recomputed` is `trainer.micro_batch_size=4 model.quantization=nf4
trainer.gradient_checkpointing=true`. What a layer keeps is counted from what the code saves, and
held against autograd's own count on a CPU, within 2 % for each kernel at SmolLM2's shape (11 % for
`reference` with dropout), and for `kernel=exact` with the other routers (`uniform` 3 %) and at the
shapes of Gemma 3 and Qwen 3. Where a router may leave rows without an expert, the plan has the most
it can leave (up to 15 % above what a freshly drawn `switch` left), and an answer's text may be the
whole example. The sums against peaks that were measured on an H100 and an H200, within 10 % for
PEFT's own LoRA and DoRA, the paper's form (`kernel=peft`), and whole runs of a 7B model. Neither a
quantised base nor checkpointing was measured on a GPU: the matrix of the one, what the other keeps
of each layer, scoring (planned up to half above) and several adapters in one pass are held against
bytes counted on a CPU.

## Plans beside measured peaks

A training step in bf16 without an optimizer, dropout 0.05, of the rows whose code has not changed
since they were measured: PEFT's own LoRA and DoRA, and the paper's form (`mixlora` with
`kernel=peft`). Planned and measured peak in GiB, and how far the plan is off. With the loss on all
tokens there was no autocast.

{peaks}
"""


def _cell(fit: Fit | None) -> str:
    if fit is None:
        return "-"
    words = [str(fit.micro_batch)]
    words += [] if fit.quantization is Quantization.none else [fit.quantization.value]
    words += ["recomputed"] if fit.checkpointing else []
    return f"{' '.join(words)}: {fit.needed / 2**30:.1f}"


def _row(model: str, method: str) -> str:
    config = compose([f"model={model}", f"method={method}"])
    found = list(fits([config], lambda config: True))
    cells = [
        _cell(next((fit for fit in found if fit.needed <= usable_bytes(size)), None))
        for size in CARDS
    ]
    return f"| {model} | {method} | {' | '.join(cells)} |"


def _measured_table() -> list[str]:
    """Return the lines of the table of plans beside measured peaks, one per GPU, model, method and
    record, of the kernel whose code has not changed."""
    lines: dict[tuple[str, tuple[str, ...]], str] = {}
    for peak in measured_peaks():
        # A record has some rows twice.
        if "kernel=peft" not in peak.words or (peak.file, peak.words) in lines:
            continue
        config, file = peak.config, peak.file
        step = f"{config.trainer.micro_batch_size} x {config.data.cutoff_length}"
        step += f", loss on {'answers' if config.trainer.loss_on is LossOn.answer else 'all'}"
        off = f"{100 * (peak.planned / peak.measured - 1):+.1f} %"
        cells = [
            *(peak.gpu, config.model.name, config.method.name, step),
            *(f"{size / 2**30:.2f}" for size in (peak.planned, peak.measured)),
            *(off, f"[{file.removesuffix('.json')}](../results/bench/{file})"),
        ]
        lines[file, peak.words] = f"| {' | '.join(cells)} |"
    titles = ["GPU", "model", "method", "step", "planned", "measured", "off", "record"]
    return [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|", *lines.values()]


def page() -> str:
    """Return the text of docs/scaling.md."""
    titles = " | ".join(f"{size} GB" for size in CARDS)
    rows = [_row(model, method) for model in PAPER_MODELS for method in PAPER_METHODS]
    table = [f"| model | method | {titles} |", "| --- " * (2 + len(CARDS)) + "|", *rows]
    return TEXT.format(table="\n".join(table), peaks="\n".join(_measured_table()))
