"""The settings with which runs fit the memory of a card, and the command that sets them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from mixlora_exp.config.choices import Compile, Quantization
from mixlora_exp.config.schema import Config, TrainedMethodConfig
from mixlora_exp.plans.memory import memory_together, peak_bytes, scoring_bytes, usable_bytes

__all__ = ["CARDS", "Fit", "card_lines", "fits", "total_bytes"]

CARDS = (16, 24, 48, 80)
"""Memory of the cards that a plan is made for, in GiB."""
FREE = ("dry_run", "plan.probe")
Accepts = Callable[[Config], bool]
"""A function that returns whether method and kernel work with a configuration's settings."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Settings of runs on one base model, and the bytes that a device needs for them."""

    micro_batch: int
    checkpointing: bool
    quantization: Quantization
    compile: Compile
    needed: int

    @property
    def described(self) -> str:
        """The settings in words: micro-batch, checkpointing, weights, compilation."""
        return (
            f"micro-batch {self.micro_batch}, "
            f"{'' if self.checkpointing else 'no '}checkpointing, "
            f"{'bf16' if self.quantization is Quantization.none else self.quantization.value}, "
            f"compile {self.compile.value}"
        )

    def words(self, config: Config) -> list[str]:
        """Return the overrides by which a configuration gets these settings."""
        trainer = config.trainer
        found = []
        if self.micro_batch != trainer.micro_batch_size:
            found.append(f"trainer.micro_batch_size={self.micro_batch}")
        if self.checkpointing != trainer.gradient_checkpointing:
            found.append("trainer.gradient_checkpointing=true")
        if self.quantization is not config.model.quantization:
            found.append(f"model.quantization={self.quantization.value}")
        if self.compile is not trainer.compile:
            found.append(f"trainer.compile={self.compile.value}")
        return found


def total_bytes(configs: Sequence[Config], processes: int = 1) -> int:
    """Peak memory of one run, or of several that train together on one base model."""
    if len(configs) == 1:
        return peak_bytes(configs[0], processes=processes)
    memories = memory_together(configs)
    shared = max(m["weights"] + m.get("dequantized", 0) for m in memories)
    own = sum(sum(m.values()) - m["weights"] - m.get("dequantized", 0) for m in memories)
    return max(shared + own, *(scoring_bytes(config) for config in configs))


def _settings(config: Config, processes: int) -> Iterator[tuple[bool, Quantization, int]]:
    """Yield (checkpointing, quantisation, micro-batch) in the order of preference. What is switched
    on stays on, and micro-batches do not become larger than asked for."""
    trainer, chosen = config.trainer, config.model.quantization
    if not isinstance(config.method, TrainedMethodConfig):
        sizes, checkpointing = [trainer.micro_batch_size], [trainer.gradient_checkpointing]
    else:
        sizes = [
            n
            for n in range(trainer.micro_batch_size, 0, -1)
            if trainer.batch_size % (n * processes) == 0
        ]
        checkpointing = [True] if trainer.gradient_checkpointing else [False, True]
    quantized = [chosen, Quantization.nf4] if chosen is Quantization.none else [chosen]
    for recomputed in checkpointing:
        for kind in quantized:
            for size in sizes:
                yield recomputed, kind, size


def _with(config: Config, checkpointing: bool, kind: Quantization, size: int) -> Config:
    # Compiled layers would keep dequantised weights.
    how = config.trainer.compile if kind is Quantization.none else Compile.off
    trainer = replace(
        config.trainer,
        micro_batch_size=size,
        gradient_checkpointing=checkpointing,
        compile=how,
    )
    return replace(config, model=replace(config.model, quantization=kind), trainer=trainer)


def fits(configs: Sequence[Config], accepts: Accepts, processes: int = 1) -> Iterator[Fit]:
    """Yield the settings that the runs can have, in the order of preference: no checkpointing
    before checkpointing, then bf16 before 4 bits, then larger micro-batches before smaller. The
    runs have the same trainer settings; accepts: says which are refused for another reason."""
    first = configs[0]
    for checkpointing, kind, size in _settings(first, processes):
        changed = [
            _with(config, checkpointing, kind, min(size, config.trainer.micro_batch_size))
            for config in configs
        ]
        if all(accepts(config) for config in changed):
            needed = total_bytes(changed, processes)
            yield Fit(size, checkpointing, kind, changed[0].trainer.compile, needed)


def card_lines(
    configs: Sequence[Config],
    words: Sequence[str],
    accepts: Accepts = lambda config: True,
    processes: int = 1,
) -> list[tuple[str, str]]:
    """Return a (title, value) line per card: what fits it first, as a command. words: the overrides
    that the user gave."""
    found = list(fits(configs, accepts, processes))
    needed = total_bytes(configs, processes)
    lines = []
    for size in CARDS:
        usable = usable_bytes(size)
        fit = next((fit for fit in found if fit.needed <= usable), None)
        if fit is None:
            least = min(found, key=lambda fit: fit.needed)
            text = (
                f"does not fit: the least is {_gib(least.needed)} GiB ({least.described}), of "
                f"which such a card has {_gib(usable)}; {_larger(least)} would"
            )
        else:
            command = _command(words, fit.words(configs[0]), processes)
            what = "fits" if needed <= usable else "does not fit; this would"
            text = f"{what}, in {_gib(fit.needed)} GiB ({fit.described}): {command}"
        lines.append((f"{size} GB", text))
    return lines


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def _larger(least: Fit) -> str:
    """Return what would be large enough for the smallest settings."""
    card = next((size for size in CARDS if least.needed <= usable_bytes(size)), None)
    return "a smaller model, or shorter examples," if card is None else f"a card of {card} GB"


def _command(words: Sequence[str], changed: Sequence[str], processes: int) -> str:
    names = {word.partition("=")[0] for word in changed}
    kept = [w for w in words if w.partition("=")[0].lstrip("+") not in {*names, *FREE}]
    start = "python" if processes == 1 else f"torchrun --nproc-per-node={processes}"
    return " ".join([start, "train.py", *map(shlex.quote, [*kept, *changed])])
