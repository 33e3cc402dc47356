"""Runs on quantised base models, and what is refused before any weight is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixlora_exp.cli import generate as generation
from mixlora_exp.cli.merge import run as merge
from mixlora_exp.config.schema import Quantization
from mixlora_exp.errors import UserError
from mixlora_exp.runs import run as experiment
from mixlora_exp.runs import state
from mixlora_exp.runs.quantized_base import WORKING_TYPES, check_quantized_base
from mixlora_exp.serving import open as opening
from mixlora_exp.serving.open import open_adapter, open_adapters
from mixlora_exp.system.exit_codes import guarded

QUANTIZED = "model.quantization="


@pytest.mark.parametrize(
    ("kind", "method"), [("nf4", "mixlora"), ("int8", "dora"), ("int8_torchao", "mixdora")]
)
def test_a_run_trains_scores_and_says_how_its_base_was_held(
    kind: str, method: str, configure: Callable[..., Any], tmp_path: Path
) -> None:
    path = experiment.run(configure(f"method={method}", f"{QUANTIZED}{kind}"))
    record = experiment.read_run(path)
    assert record["config"]["model"]["quantization"] == kind
    assert record["provenance"]["packages"][{"int8_torchao": "torchao"}.get(kind, "bitsandbytes")]
    assert record["train"]["steps"] == 2
    # The record's base, without being named.
    opened = open_adapter(str(path.parent))
    assert opened.config.model.quantization.value == kind
    output = tmp_path / "merged"
    told = f"{QUANTIZED}{kind}: an adapter cannot be merged into a quantised base"
    with pytest.raises(UserError, match=told):
        merge([str(path.parent), str(output)])
    if method == "dora":
        assert merge([str(path.parent), str(output), f"{QUANTIZED}none"]) == 0


@pytest.mark.parametrize("dry_run", ["false", "true"])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("nf4 kernel=peft", "nf4: kernel=peft would dequantise the base once for each expert"),
        ("int8 kernel=reference", "int8: kernel=reference would dequantise"),
        ("nf4 trainer.compile=layer", "nf4: compiled layers would keep the dequantised weights"),
        ("nf4 method=lora_ga", "nf4: method=lora_ga starts from the gradient"),
        (
            "int8_torchao method=hira",
            "int8_torchao: PEFT's HIRA fails or was not tried with it",
        ),
        ("nf4 method=fedpara", "nf4: PEFT's LOHA fails or was not tried with it: choose from LORA"),
    ],
)
def test_what_cannot_is_refused_before_loading(
    words: str, told: str, dry_run: str, configure: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(state, "load_model", None)
    config = configure("method=mixlora", *(QUANTIZED + words).split(), f"dry_run={dry_run}")
    with pytest.raises(UserError, match=told) as raised:
        experiment.run(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dry_run", ["false", "true"])
def test_a_missing_package_is_reported_before_loading(
    dry_run: str, configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "load_model", None)
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else there(name, *a)
    )
    config = configure(f"{QUANTIZED}int8_torchao", f"dry_run={dry_run}")
    with pytest.raises(UserError, match="needs the package torchao, which is not installed"):
        experiment.run(config)
    # A run that executes elsewhere is not held up.
    check_quantized_base(config, None, here=False)


def test_an_adapter_of_experts_is_not_scored_with_a_kernel_that_cannot(
    configure: Callable[..., Any],
) -> None:
    config = configure("method=none", f"{QUANTIZED}nf4", "kernel=peft")
    check_quantized_base(config, {"peft_type": "LORA"})
    with pytest.raises(UserError, match="kernel=peft would dequantise"):
        check_quantized_base(config, {"peft_type": "MIXLORA"})


def test_an_adapter_of_a_type_that_cannot_is_refused_by_name(
    configure: Callable[..., Any],
) -> None:
    config = configure("method=none", f"{QUANTIZED}nf4")
    check_quantized_base(config, {"peft_type": "VERA"})
    check_quantized_base(config, {"peft_type": "LORA_MIXTURE"})
    for kind in ("IA3", "LOHA"):
        with pytest.raises(UserError, match=f"nf4: PEFT's {kind} fails or was not tried"):
            check_quantized_base(config, {"peft_type": kind})


@pytest.mark.parametrize(
    ("method", "words", "told"),
    [
        (
            ["method=peft", "method.peft_type=LOHA", "method.peft={r: 2}"],
            [],
            "PEFT's LOHA fails or was not tried",
        ),
        (
            ["method=mixlora"],
            ["kernel=peft"],
            "kernel=peft would dequantise the base once for each expert",
        ),
    ],
    ids=["LOHA", "kernel=peft"],
)
def test_neither_is_asked(
    method: list[str], words: list[str], told: str, finished, monkeypatch, capsys
) -> None:
    adapter = finished(*method).path.parent
    monkeypatch.setattr(opening, "load_model", None)
    assert (
        guarded(generation.run, [f"adapter={adapter}", *words, f"{QUANTIZED}nf4", "prompt=a"]) == 2
    )
    assert told in capsys.readouterr().err
    both = [str(finished("method=lora").path.parent), str(adapter)]
    with pytest.raises(UserError, match=told):
        open_adapters(both, [*words, f"{QUANTIZED}nf4"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORKING_TYPES)
def test_peft_s_other_types_train_and_score(
    kind: Quantization, configure: Callable[..., Any]
) -> None:
    for peft_type in WORKING_TYPES[kind]:
        # The schedule of AdaLoRA needs more steps.
        own = ["method=adalora", "trainer.max_steps=40", "trainer.epochs=40"]
        if peft_type != "ADALORA":
            own = ["method=peft", f"method.peft_type={peft_type}", "method.peft={r: 4}"]
        path = experiment.run(configure(*own, f"{QUANTIZED}{kind.value}"))
        assert experiment.read_run(path)["scores"], peft_type
