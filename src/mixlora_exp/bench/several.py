"""What several adapters on one base cost: time per token, and memory item by item.

Run as `python -m mixlora_exp.bench.several`, with the settings as JSON on standard input, it prints
the resident memory of one training step and one forward pass in this process.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from mixlora_exp.adapters import MixLoraConfig, set_kernel
from mixlora_exp.adapters.hosting import add_guest, parameters_of
from mixlora_exp.adapters.norms import adapters_changed
from mixlora_exp.bench.measure import Clock, inference_step, saved_bytes, training_step
from mixlora_exp.bench.model import adapted, base_model, model_config, sharing
from mixlora_exp.bench.settings import Row
from mixlora_exp.config.choices import Head
from mixlora_exp.config.schema import ATTENTION_TARGETS, FEED_FORWARD_TARGETS
from mixlora_exp.errors import UserError
from mixlora_exp.runtime import peak_memory_bytes, reset_peak_memory
from mixlora_exp.training.joint import joint_losses, total_of
from mixlora_exp.training.packed import packed_attention

__all__ = ["SeveralConfig", "account", "benchmark_several"]

KINDS = ("lora", "dora", "mixlora", "mixdora")


@dataclass(slots=True, kw_only=True)
class SeveralConfig:
    """One benchmark of several adapters. `kind`: a method, or `mixed` for all four in turn.
    `sequences` of `length` tokens go through the model in a step, shared out over the adapters
    (`small`: each adapter has this many sequences of its own instead, against runs one after
    another). `layers` cuts the depth of what is timed."""

    model: str = "smollm2_135m"
    kind: str = "mixlora"
    layers: int | None = None
    counts: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    sequences: int = 8
    length: int = 128
    small: int = 1
    dtype: str = "bfloat16"
    dropout: float = 0.05
    rounds: int = 8
    resident: bool = True
    seed: int = 0
    threads: int | None = None
    output: str = "results/bench"
    name: str | None = None


def check(config: SeveralConfig) -> None:
    """Raises:
    UserError: a value is out of range.
    """
    if config.kind not in (*KINDS, "mixed"):
        raise UserError(f"kind={config.kind} is unknown: choose from {', '.join(KINDS)}, mixed")
    for name in ("sequences", "length", "small", "rounds"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be >= 1")
    for count in config.counts:
        if count < 1 or config.sequences % count:
            raise UserError(
                f"counts={count} must divide sequences={config.sequences}, so that all adapters "
                "get the same"
            )
    if not config.counts or config.counts[0] != 1:
        raise UserError(f"counts={config.counts} must begin with 1, which the others stand beside")


def _peft_config(kind: str, dropout: float) -> LoraConfig:
    row = Row(method=kind)
    common = {
        "r": row.rank,
        "lora_alpha": 2 * row.rank,
        "lora_dropout": dropout,
        "use_dora": kind.endswith("dora"),
        "target_modules": [*ATTENTION_TARGETS, *FEED_FORWARD_TARGETS],
        "task_type": "CAUSAL_LM",
    }
    return MixLoraConfig(**common) if kind.startswith("mix") else LoraConfig(**common)


def kind_of(config: SeveralConfig, number: int) -> str:
    """The method of the adapter with this number."""
    return KINDS[number % len(KINDS)] if config.kind == "mixed" else config.kind


def together(config: SeveralConfig, base: torch.nn.Module, count: int) -> PeftModel:
    """`count` trainable adapters on the weights of `base`, B not left at zero."""
    model: Any = sharing(base)
    for number in range(count):
        torch.manual_seed(config.seed + number)
        kind = kind_of(config, number)
        model = add_guest(model, f"adapter{number}", _peft_config(kind, config.dropout))
    set_kernel(model, "auto")
    with torch.no_grad():
        for number in range(count):
            for name, parameter in parameters_of(model, f"adapter{number}").items():
                parameter.requires_grad_(True)
                if "lora_B" in name:
                    parameter.normal_(0, 0.02)
    return model


def batches_of(config: SeveralConfig, count: int, sequences: int, vocabulary: int) -> dict:
    """Random sequences for each adapter, every token of which counts."""
    made = {}
    for number in range(count):
        generator = torch.Generator().manual_seed(config.seed + number)
        ids = torch.randint(vocabulary, (sequences, config.length), generator=generator)
        made[f"adapter{number}"] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(config.length).expand(sequences, -1),
            "labels": ids,
        }
    return made


class Joint:
    """Steps of several adapters, on batches of their own."""

    def __init__(self, config: SeveralConfig, base: torch.nn.Module, count: int, sequences: int):
        self.model = together(config, base, count)
        device = next(self.model.parameters()).device
        vocabulary = base.config.vocab_size
        self.batches = {
            name: {key: value.to(device) for key, value in batch.items()}
            for name, batch in batches_of(config, count, sequences, vocabulary).items()
        }
        self.items = {name: batch["labels"].numel() for name, batch in self.batches.items()}
        self.device, self.dtype = device, getattr(torch, config.dtype)

    def loss(self, attention: str) -> Tensor:
        # As `bench.measure` has it: no autocast, the base's precision decides.
        losses = joint_losses(self.model, self.batches, self.items, Head.full, attention)
        return total_of(losses)

    def train(self) -> tuple[float, float]:
        """Seconds of forward and backward pass."""
        self.model.train()
        adapters_changed()
        clock = Clock(self.device)
        with packed_attention(self.model.base_model.model) as attention:
            clock.mark()
            loss = self.loss(attention)
            clock.mark()
            loss.backward()
            clock.mark()
        self.model.base_model.row_map.use()
        self.model.zero_grad(set_to_none=True)
        return tuple(clock.spans())

    @torch.no_grad()
    def infer(self) -> float:
        """Seconds of a forward pass for the last position's logits, rows told apart by name."""
        self.model.eval()
        ids = torch.cat([batch["input_ids"] for batch in self.batches.values()])
        names = [name for name, batch in self.batches.items() for _ in batch["input_ids"]]
        each = list(self.batches)
        self.model(input_ids=ids[: len(each), :1], adapter_names=each, logits_to_keep=1)
        clock = Clock(self.device)
        clock.mark()
        self.model(input_ids=ids, adapter_names=names, logits_to_keep=1)
        clock.mark()
        return clock.spans()[0]

    def saved(self) -> int:
        """Bytes kept for the backward pass, beside parameters."""
        self.model.train()
        owned = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        with packed_attention(self.model.base_model.model) as attention:
            found = saved_bytes(lambda: self.loss(attention), owned)
        self.model.base_model.row_map.use()
        return found


def _parameters(joint: Joint) -> int:
    names = joint.batches
    return sum(p.numel() for n in names for p in parameters_of(joint.model, n).values())


def account(config: SeveralConfig) -> dict[str, Any]:
    """Memory per model of M adapters, in bytes, each with `sequences / max(counts)` sequences.

    Parameters and what autograd keeps are counted at one and two layers and extended to the true
    depth, in which both are linear; nothing here depends on the machine. `expected` is
    (base / M + a) / (base + a) with a that of the one adapter alone (or, of `mixed`, of the mean).
    """
    depth = model_config(config.model, None).depth
    sequences = max(1, config.sequences // max(config.counts))
    found: dict[int, dict[int, dict[str, int]]] = {}
    for layers in (1, 2):
        shape = model_config(config.model, layers)
        base = base_model(shape, getattr(torch, config.dtype), "cpu", config.seed)
        base.set_attn_implementation("sdpa")
        frozen = sum(p.nbytes for p in base.parameters())
        for count in config.counts:
            joint = Joint(config, base, count, sequences)
            parameters = _parameters(joint)
            found.setdefault(count, {})[layers] = {
                "base": frozen,
                "adapter": 4 * parameters,
                "gradient": 4 * parameters,
                "adamw": 8 * parameters,
                "activations": joint.saved(),
            }
    rows = {}
    for count, by_depth in found.items():
        whole = {
            item: by_depth[1][item] + (by_depth[2][item] - by_depth[1][item]) * (depth - 1)
            for item in by_depth[1]
        }
        rows[count] = {"bytes": whole, **_per_model(whole, count)}
    for count, row in rows.items():
        for use in ("train", "infer", "infer_bf16"):
            one = rows[1][use]
            row[f"{use}_percent"] = round(100 * row[use] / one, 2)
            own = row[use] - row["bytes"]["base"] / count
            a = own if config.kind == "mixed" else one - rows[1]["bytes"]["base"]
            frozen = row["bytes"]["base"]
            row[f"{use}_expected_percent"] = round(
                100 * (frozen / count + a) / (one if config.kind == "mixed" else frozen + a), 2
            )
    named = {str(count): row for count, row in rows.items()}
    return {"depth": depth, "sequences": sequences, "length": config.length, "rows": named}


def _per_model(whole: dict[str, int], count: int) -> dict[str, float]:
    adapter = whole["adapter"]
    return {
        "train": sum(whole.values()) / count,
        "infer": (whole["base"] + adapter) / count,
        "infer_bf16": (whole["base"] + adapter / 2) / count,
        "train_adamw_8bit": (sum(whole.values()) - 0.75 * whole["adamw"]) / count,
    }


def resident_here(config: SeveralConfig, count: int) -> dict[str, int]:
    """Bytes beyond what this process held before, at `config.layers`: of a forward pass, and of a
    training step with AdamW."""
    device = torch.device("cpu")
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    reset_peak_memory(device)
    before = peak_memory_bytes(device)
    shape = model_config(config.model, config.layers)
    base = base_model(shape, getattr(torch, config.dtype), "cpu", config.seed)
    base.set_attn_implementation("sdpa")
    joint = Joint(config, base, count, max(1, config.sequences // max(config.counts)))
    joint.infer()
    inference = peak_memory_bytes(device) - before
    trained = [p for n in joint.batches for p in parameters_of(joint.model, n).values()]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    reset_peak_memory(device)
    for _ in range(2):
        with packed_attention(joint.model.base_model.model) as attention:
            joint.model.train()
            joint.loss(attention).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"infer": inference, "train": peak_memory_bytes(device) - before}


def resident(config: SeveralConfig, count: int) -> dict[str, Any]:
    """`resident_here` in a fresh process."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "mixlora_exp.bench.several"],
        input=json.dumps({"config": asdict(config), "count": count}),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"exit code {result.returncode}: {reason}"}
    return json.loads(result.stdout.splitlines()[-1])


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def benchmark_several(
    config: SeveralConfig, *, say: Callable[[str], None] = _say
) -> dict[str, Any]:
    """Measure M adapters for each M of `counts`.

    `times`: microseconds per token of a step with equal tokens in all, `alone` being the ordinary
    path of one adapter, and of `small` batches, all adapters together against one after another;
    medians and quartiles over rounds in which all rows are interleaved. `memory`: see `account`.
    """
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = model_config(config.model, config.layers)
    base = base_model(shape, getattr(torch, config.dtype), device, config.seed)
    base.set_attn_implementation("eager" if device == "cpu" else "sdpa")
    steps = _steps(config, base)
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    for number in range(config.rounds + 1):
        names = list(steps)
        random.Random(config.seed + number).shuffle(names)
        for name in names:
            taken = steps[name]()
            if number:  # The first round warms up.
                samples[name].append(taken)
        say(f"round {number}/{config.rounds}")
    tokens = config.sequences * config.length
    times = {name: _times(taken, samples, name, config) for name, taken in samples.items()}
    steps.clear()
    del base
    say("memory, by accounting")
    memory = account(config)
    held = {}
    if config.resident and device == "cpu":
        for count in config.counts:
            held[str(count)] = resident(config, count)
            say(f"resident memory of {count}")
    return {
        "config": asdict(config),
        "device": device,
        "threads": torch.get_num_threads(),
        "layers": shape.depth,
        "tokens": tokens,
        "times": times,
        "memory": memory,
        "resident": held,
    }


def _steps(config: SeveralConfig, base: torch.nn.Module) -> dict[str, Callable[[], tuple]]:
    """By name, a function that returns seconds of forward, backward and inference."""
    vocabulary, device = base.config.vocab_size, next(base.parameters()).device
    steps: dict[str, Callable[[], tuple]] = {}

    def alone(sequences: int, kind: str) -> Callable[[], tuple]:
        row = Row(method=kind, kernel="auto")
        model = adapted(base, row, config.dropout, config.seed)
        ids = torch.randint(vocabulary, (sequences, config.length), device=device)
        return lambda: (*training_step(model, row, ids), inference_step(model, ids))

    def joined(count: int, sequences: int) -> Callable[[], tuple]:
        joint = Joint(config, base, count, sequences)
        return lambda: (*joint.train(), joint.infer())

    steps["alone"] = alone(config.sequences, kind_of(config, 0))
    for count in config.counts:
        steps[f"together_{count}"] = joined(count, config.sequences // count)
    for count in config.counts[1:]:
        steps[f"small_together_{count}"] = joined(count, config.small)
        singles = [alone(config.small, kind_of(config, i)) for i in range(min(count, len(KINDS)))]

        def one_after_another(singles=singles, count=count) -> tuple:
            taken = [singles[i % len(singles)]() for i in range(count)]
            return tuple(map(sum, zip(*taken, strict=True)))

        steps[f"small_alone_{count}"] = one_after_another
    return steps


def _times(
    taken: Sequence[tuple[float, ...]], samples: dict[str, list], name: str, config: SeveralConfig
) -> dict[str, Any]:
    """Medians, and ratios within rounds: to the first row of the same tokens, or of small batches
    to the runs one after another."""
    small = name.startswith("small")
    count = int(name.rpartition("_")[2]) if small else 0
    tokens = config.length * (config.small * count if small else config.sequences)
    found: dict[str, Any] = {}
    parts = {"train": slice(0, 2), "infer": slice(2, 3)}
    other = samples[f"small_alone_{count}" if small else "together_1"]
    for part, span in parts.items():
        own = [sum(sample[span]) for sample in taken]
        found[f"{part}_us_per_token"] = round(statistics.median(own) * 1e6 / tokens, 3)
        ratios = [a / sum(b[span]) for a, b in zip(own, other, strict=True)]
        low, middle, high = (
            statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        )
        found[f"{part}_ratio"] = round(middle, 4)
        found[f"{part}_ratio_quartiles"] = [round(low, 4), round(high, 4)]
    return found


def main() -> None:
    """Measure what standard input asks for and print it as JSON."""
    asked = json.loads(sys.stdin.read())
    config = SeveralConfig(**asked["config"])
    if config.threads:
        torch.set_num_threads(config.threads)
    sys.stdout.write(json.dumps(resident_here(config, asked["count"])) + "\n")


if __name__ == "__main__":
    main()
