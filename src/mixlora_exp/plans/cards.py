"""The settings with which runs fit the memory of a card, and the command that sets them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from mixlora_exp.config.choices import Compile, Quantization
from mixlora_exp.config.command_line import CommandLine, name_of
from mixlora_exp.config.schema import Config, TrainedMethodConfig
from mixlora_exp.models.quantization import PACKAGES, is_installed
from mixlora_exp.plans.memory import (
    adapter_bytes,
    loading_bytes,
    memory_of,
    memory_together,
    number_bytes,
    peak_bytes,
    scoring_bytes,
    usable_bytes,
)

CARDS = (16, 24, 48, 80)
"""Memory of the cards that a plan is made for, in GiB."""
FREE = ("dry_run", "plan.probe")
MICRO_BATCH, CHECKPOINTING, QUANTIZATION, COMPILE = FIELDS = (
    "trainer.micro_batch_size", "trainer.gradient_checkpointing", "model.quantization",
    "trainer.compile",
)  # fmt: skip
"""Fields of the settings that are chosen for a card."""
Accepts = Callable[[Config], bool]
"""A function that returns whether method and kernel work with a configuration's settings."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Settings of runs on one base model, and the bytes that a device needs for them."""

    micro_batches: tuple[int, ...]
    """That of each run."""
    checkpointing: bool
    quantization: Quantization
    compile: Compile
    needed: int
    trains: bool = True
    wide: bool = False
    """True if frozen weights that are not quantised are float32."""

    @property
    def micro_batch(self) -> int:
        """The micro-batch of the first run."""
        return self.micro_batches[0]

    @property
    def described(self) -> str:
        """The settings in words: weights, and of training micro-batch, checkpointing and
        compilation."""
        plain = "float32" if self.wide else "bf16"
        held = plain if self.quantization is Quantization.none else self.quantization.value
        if not self.trains:
            return held
        sizes = " and ".join(map(str, sorted(set(self.micro_batches), reverse=True)))
        recomputed = "" if self.checkpointing else "no "
        return (
            f"micro-batch {sizes}, {recomputed}checkpointing, {held}, compile {self.compile.value}"
        )

    def words(self, config: Config) -> list[str]:
        """Return the overrides by which runs get these settings; config: that of the first."""
        trainer = config.trainer
        found = []
        if self.micro_batch != trainer.micro_batch_size:
            found.append(f"{MICRO_BATCH}={self.micro_batch}")
        if self.checkpointing != trainer.gradient_checkpointing:
            found.append(f"{CHECKPOINTING}=true")
        if self.quantization is not config.model.quantization:
            found.append(f"{QUANTIZATION}={self.quantization.value}")
        if self.compile is not trainer.compile:
            found.append(f"{COMPILE}={self.compile.value}")
        return found


def total_bytes(configs: Sequence[Config], processes: int = 1) -> int:
    """Peak memory of one run, or of several that train together on one base model."""
    if len(configs) == 1:
        return peak_bytes(configs[0], processes=processes)
    memories = memory_together(configs)
    shared = max(m["weights"] + m.get("dequantized", 0) for m in memories)
    own = sum(sum(m.values()) - m["weights"] - m.get("dequantized", 0) for m in memories)
    # Those that are scored together share the base model and a batch's tensors.
    scored = max(scoring_bytes(config) - adapter_bytes(config) for config in configs)
    scored += sum(adapter_bytes(config) for config in configs)
    return max(shared + own, scored, *map(loading_bytes, configs))


def many_that_fit(config: Config, gib: float) -> int:
    """Return the number of adapters like this that can train and be scored together on one base
    model in `gib` GiB."""
    usable, memory = usable_bytes(gib), memory_of(config, packed=True)
    if loading_bytes(config) > usable:
        return 0
    shared = memory["weights"] + memory.get("dequantized", 0)
    trained = (usable - shared) // (sum(memory.values()) - shared)
    own = adapter_bytes(config)
    scored = (usable - scoring_bytes(config) + own) // own
    return max(0, int(min(trained, scored)))


def _trains(configs: Sequence[Config]) -> bool:
    return any(isinstance(config.method, TrainedMethodConfig) for config in configs)


def _settings(
    configs: Sequence[Config], processes: int, fixed: Collection[str]
) -> Iterator[tuple[bool, Quantization, int | None]]:
    """Yield (checkpointing, quantisation, micro-batch) in the order of preference; None: each run
    its own. What is switched on stays on, and micro-batches do not become larger than asked for.
    Compilation is switched off where it must be, and never on (docs/scaling.md)."""
    trainer, chosen = configs[0].trainer, configs[0].model.quantization
    trains, largest = _trains(configs), trainer.micro_batch_size
    sizes, checkpointing, quantized = [None], [trainer.gradient_checkpointing], [chosen]
    alike = {config.trainer.micro_batch_size for config in configs} == {largest}
    if trains and alike and MICRO_BATCH not in fixed:
        batches = {config.trainer.batch_size for config in configs}
        sizes = [
            n
            for n in range(largest, 0, -1)
            if all(batch % (n * processes) == 0 for batch in batches)
        ]
    if trains and not trainer.gradient_checkpointing and CHECKPOINTING not in fixed:
        checkpointing = [False, True]
    compiled = trains and trainer.compile is not Compile.off
    given = {QUANTIZATION, COMPILE} if compiled else {QUANTIZATION}
    if chosen is Quantization.none and not given & set(fixed):
        quantized = [chosen, Quantization.nf4]
    for recomputed in checkpointing:
        for kind in quantized:
            for size in sizes:
                yield recomputed, kind, size


def _with(config: Config, checkpointing: bool, kind: Quantization, size: int | None) -> Config:
    # Compiled layers would keep dequantised weights.
    trains = isinstance(config.method, TrainedMethodConfig)
    how = config.trainer.compile if kind is Quantization.none or not trains else Compile.off
    trainer = replace(
        config.trainer,
        micro_batch_size=size or config.trainer.micro_batch_size,
        gradient_checkpointing=checkpointing,
        compile=how,
    )
    return replace(config, model=replace(config.model, quantization=kind), trainer=trainer)


def fits(
    configs: Sequence[Config],
    accepts: Accepts,
    processes: int = 1,
    fixed: Collection[str] = (),
) -> Iterator[Fit]:
    """Yield the settings that the runs can have, in the order of preference: no checkpointing
    before checkpointing, then bf16 before 4 bits, then larger micro-batches before smaller.
    accepts: says which are refused for another reason. fixed: those of `FIELDS` that stay."""
    for checkpointing, kind, size in _settings(configs, processes, fixed):
        changed = [_with(config, checkpointing, kind, size) for config in configs]
        if all(accepts(config) for config in changed):
            yield Fit(
                tuple(config.trainer.micro_batch_size for config in changed),
                checkpointing,
                kind,
                changed[0].trainer.compile,
                total_bytes(changed, processes),
                _trains(configs),
                number_bytes(changed[0]) == 4,
            )


def card_lines(
    configs: Sequence[Config],
    line: CommandLine,
    accepts: Accepts = lambda config: True,
    processes: int = 1,
) -> list[tuple[str, str]]:
    """Return a (title, value) line per card: what fits it first, as a command. line: that of the
    runs."""
    found = list(fits(configs, accepts, processes, line.fixed))
    needed = total_bytes(configs, processes)
    lines = []
    for size in CARDS:
        usable = usable_bytes(size)
        fit = next((fit for fit in found if fit.needed <= usable), None)
        if fit is None:
            least = min(found, key=lambda fit: fit.needed)
            text = (
                f"does not fit: the least is {_gib(least.needed)} GiB ({least.described}), of "
                f"which such a card has {_gib(usable)}; {_larger(least, configs)} would"
            )
        else:
            command = _command(line, fit.words(configs[0]), processes)
            what = "fits" if needed <= usable else "does not fit; this would"
            described = f"{fit.described}{_lacks(fit.quantization)}"
            text = f"{what}, in {_gib(fit.needed)} GiB ({described}): {command}"
        lines.append((f"{size} GB", text))
    return lines


def _lacks(kind: Quantization) -> str:
    if kind is Quantization.none or is_installed(kind):
        return ""
    return f"; not on this machine without `pip install {PACKAGES[kind]}`"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def _larger(least: Fit, configs: Sequence[Config]) -> str:
    """Return what would be large enough for the smallest settings."""
    card = next((size for size in CARDS if least.needed <= usable_bytes(size)), None)
    if card is not None:
        return f"a card of {card} GB"
    for config, size in zip(configs, least.micro_batches, strict=True):
        changed = _with(config, least.checkpointing, least.quantization, size)
        if scoring_bytes(changed) == least.needed:
            return "a smaller evaluation.batch_tokens"
    return "a smaller model, or shorter examples,"


def _command(line: CommandLine, changed: Sequence[str], processes: int) -> str:
    names = {name_of(word) for word in changed}
    kept = [word for word in line.words if name_of(word) not in {*names, *FREE}]
    start = "python" if processes == 1 else f"torchrun --nproc-per-node={processes}"
    return " ".join([start, line.script, *map(shlex.quote, [*kept, *changed])])
