"""Names and fingerprints of runs: what decides a result is in them."""

from __future__ import annotations

import dataclasses
import re

import pytest

from mixlora_exp.config.command import compose
from mixlora_exp.config.resolve import (
    EXCLUDED,
    fingerprint,
)
from mixlora_exp.config.run_names import LONGEST, run_name
from mixlora_exp.config.schema import Config


def test_fingerprint_is_stable(base: Config) -> None:
    assert fingerprint(base) == fingerprint(compose())
    assert re.fullmatch(r"[0-9a-f]{64}", fingerprint(base))
    name = run_name(base)
    assert name == f"smollm2_135m-mixlora-multi-hub-s42-{fingerprint(base)[:10]}"


def test_names_carry_the_settings_that_are_not_the_defaults() -> None:
    words = ["method=lora", "task=arc_e", "data=embedded"]
    varied = [*words, "method.rank=8", "trainer.learning_rate=6e-4", "data.train_limit=64"]
    assert run_name(compose(varied)).startswith(
        "smollm2_135m-lora-arc_e-embedded-rank8-lr0.0006-rows64-s42-"
    )
    plain = run_name(compose([*words, "method.rank=80", "evaluation.limit=5"]))
    assert plain.startswith("smollm2_135m-lora-arc_e-embedded-s42-")
    # A run that scores has no training settings, whatever the defaults say.
    assert "lr" not in run_name(compose(["method=none", "trainer.learning_rate=1"]))
    many = [f"trainer.{name}=7" for name in ("epochs", "warmup_steps", "max_steps", "weight_decay")]
    long = run_name(compose([*varied, *many, "method.dropout=0.2", "method.alpha=3"]))
    assert len(long) < len(plain) + LONGEST + 2
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", long)


@pytest.mark.parametrize(
    ("method", "words", "told"),
    [
        ("lora", ["rank_pattern={q_proj:16,layers.0.mlp.up_proj:4}"],
         "rank_layers.0.mlp.up4-rank_q16"),
        ("lora", ["rank_pattern={layers.0.mlp.up_proj:4,q_proj:16}"],
         "rank_layers.0.mlp.up4-rank_q16"),
        ("lora", ["alpha_pattern={q_proj:8.5}"], "alpha_q8.5"),
        ("lora", ["targets=[q_proj,v_proj]"], "targets_q_v"),
        ("lora", ["layers_to_transform=[0,2-5,9]"], "layers0_2to5_9"),
        ("mola", ["num_experts=[4,4,4,2]", "top_k=[2,2,1,1]"], "num_experts4x3_2-top_k2_2_1_1"),
        ("mixlora_top_p", ["router_options.limit=3"], "limit3"),
        ("vera", ["peft.r=8"], "r8"),
    ],
)  # fmt: skip
def test_names_carry_lists_and_entries(method: str, words: list[str], told: str) -> None:
    """Of entries by name those that differ from the method's own."""
    given = [f"method={method}", "task=arc_e", "data=embedded", *(f"method.{w}" for w in words)]
    assert f"-embedded-{told}-s42-" in run_name(compose(given))


def other_value(value: object) -> object:
    """A different value of the same kind; checks do not run on assignment."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, list):
        return [*value, *value]
    return f"{getattr(value, 'value', value)}-other"


def leaves(node: object, path: str = "") -> list[str]:
    names: list[str] = []
    for item in dataclasses.fields(node):
        value = getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            names += leaves(value, f"{path}{item.name}.")
        else:
            names.append(f"{path}{item.name}")
    return names


def test_fingerprint_covers_every_field_but_the_excluded(base: Config) -> None:
    reference = fingerprint(base)
    names = leaves(base)
    assert len(names) > 60
    for name in names:
        config = compose_copy(base)
        *parents, last = name.split(".")
        node = config
        for parent in parents:
            node = getattr(node, parent)
        setattr(node, last, other_value(getattr(node, last)))
        excluded = any(name == entry or name.startswith(f"{entry}.") for entry in EXCLUDED)
        assert (fingerprint(config) == reference) is excluded, name
    for entry in EXCLUDED:
        assert any(name == entry or name.startswith(f"{entry}.") for name in names), entry


def compose_copy(config: Config) -> Config:
    parts = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    for name, value in parts.items():
        if dataclasses.is_dataclass(value):
            parts[name] = dataclasses.replace(value)
    return Config(**parts)
