"""What a plan says of one adapter and of several on one base model agrees with their sum."""

from __future__ import annotations

import pytest
from composed import compose

from mixlora_exp.plans.cards import many_that_fit, total_bytes
from mixlora_exp.plans.memory import (
    adapter_bytes,
    loading_bytes,
    memory_of,
    peak_bytes,
    scoring_bytes,
    usable_bytes,
)
from mixlora_exp.plans.plan_text import print_plan, print_plan_together


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        (["model=llama2_7b", "trainer.micro_batch_size=1"], "training"),
        (["model=llama2_7b", "trainer.micro_batch_size=1", "trainer.gradient_checkpointing=true",
          "evaluation.batch_tokens=65536"], "scoring"),
        (["model=llama2_7b", "model.weights=random", "model.quantization=nf4",
          "trainer.micro_batch_size=1"], "loading"),
    ],
)  # fmt: skip
def test_so_many_fit_as_their_sum_says(words: list[str], limit: str) -> None:
    """Of adapters like one, in training, scoring and loading, of which each may be the largest."""
    config = compose([*words, "method=mixlora"])
    for size in (16, 24, 48, 80):
        most, usable = many_that_fit(config, size), usable_bytes(size)
        assert most == 0 or total_bytes([config] * most) <= usable
        assert total_bytes([config] * (most + 1)) > usable
    one, several = (total_bytes([config] * count) for count in (1, 3))
    parts = {"training": sum(memory_of(config, packed=True).values()),
             "scoring": scoring_bytes(config), "loading": loading_bytes(config)}  # fmt: skip
    assert max(parts, key=parts.get) == limit
    if limit == "scoring":
        assert several == one + 2 * adapter_bytes(config)


@pytest.mark.parametrize(
    ("words", "told", "never"),
    [
        (["trainer.precision=float32"], "no checkpointing, float32, compile off", "bf16, compile"),
        (["method=vera"], "80 GB", "adapters like this on one base"),
        (["model=llama2_13b", "data.cutoff_length=3000", "evaluation.batch_tokens=300000"],
         "a smaller evaluation.batch_tokens would", "a smaller model"),
    ],
)  # fmt: skip
def test_what_a_plan_says(words: list[str], told: str, never: str, capsys) -> None:
    print_plan(compose(["model=llama2_7b", "data=embedded", *words]), None)
    printed = capsys.readouterr().out
    assert told in printed
    assert never not in printed


def test_alone_the_largest_needs_what_its_own_plan_says(capsys) -> None:
    words = ["model=llama2_7b", "data=embedded", "evaluation.batch_tokens=65536",
             "trainer.micro_batch_size=1", "trainer.gradient_checkpointing=true"]  # fmt: skip
    configs = [compose([*words, f"method={name}"]) for name in ("lora", "mixlora")]
    print_plan_together(configs)
    alone = max(map(peak_bytes, configs)) / 2**30
    assert f"alone the largest needs {alone:.1f}" in capsys.readouterr().out
