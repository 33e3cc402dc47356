"""Logits, losses and gradients of the implementation that the authors published.

The fixtures' README says how they were made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_kernels import CPU_KERNELS, ONE_OF_EACH_FORM
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mixlora_exp.adapters import MixLoraConfig, set_kernel
from mixlora_exp.config.choices import Head, LossOn
from mixlora_exp.data.collator import Collator
from mixlora_exp.data.encoding import Example
from mixlora_exp.training.head import loss_from_hidden

COEFFICIENT = 0.01
EXPERTS = 8
BATCHES = ("single", "right", "left")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Oracle:
    name: str
    model: PeftModel
    expected: dict[str, Tensor]
    scalars: dict[str, float]
    gradients: dict[str, Tensor]

    def run(self, batch: str) -> Any:
        keys = ("input_ids", "attention_mask", "labels")
        return self.model(**{key: self.expected[f"{batch}.{key}"] for key in keys})

    def real(self, batch: str) -> Tensor:
        return self.expected[f"{batch}.attention_mask"].bool()


def to_our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Theirs, one tensor per expert, to ours, stacked; LoRA and DoRA have PEFT's names already."""
    ours: dict[str, Tensor] = {}
    prefix = "base_model.model.model."
    for name, tensor in tensors.items():
        layer = name.removeprefix("mixlora.")
        if ".experts." in name:
            # ...mlp.gate_proj.experts.0.lora_A.weight
            block, rest = layer.split(".mlp.")
            projection, _, expert, part, _ = rest.split(".")
            key = f"{prefix}{block}.mlp.{part}_{projection.removesuffix('_proj')}"
            ours.setdefault(key, torch.empty(EXPERTS, *tensor.shape))[int(expert)] = tensor
        elif "moe_gate" in name:
            ours[prefix + layer.replace("moe_gate.weight", "lora_router")] = tensor
        else:
            ours[name if name.startswith("base_model.") else prefix + layer] = tensor
    return ours


def read(folder: Path, name: str) -> Oracle:
    common = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    config = {
        "llama-lora": lambda: LoraConfig(**common),
        "llama-dora": lambda: LoraConfig(**common, use_dora=True),
        "llama-mixlora": lambda: MixLoraConfig(
            **common,
            num_experts=EXPERTS,
            top_k=2,
            router_loss="topk",
            router_loss_pooling="all",
            router_loss_coef=COEFFICIENT,
        ),
    }[name]()
    base = AutoModelForCausalLM.from_pretrained(folder / "tiny-llama", dtype=torch.float32)
    model = get_peft_model(base, config)
    weights = to_our_names(load_file(folder / name / "adapter_model.safetensors"))
    assert weights.keys() == get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    assert not set_peft_model_state_dict(model, weights).unexpected_keys
    return Oracle(
        name,
        model.eval(),
        load_file(folder / name / "expected.safetensors"),
        json.loads((folder / name / "expected.json").read_text())["scalars"],
        to_our_names(load_file(folder / name / "expected_grads.safetensors")),
    )


@pytest.fixture(
    params=[
        *((name, kernel) for name in ("llama-lora", "llama-dora") for kernel in ONE_OF_EACH_FORM),
        *(("llama-mixlora", kernel) for kernel in CPU_KERNELS),
    ],
    ids="-".join,
    scope="module",
)
def oracle(request: pytest.FixtureRequest, shared_oracle: Path) -> Oracle:
    name, kernel = request.param
    oracle = read(shared_oracle, name)
    set_kernel(oracle.model, kernel)
    return oracle


@pytest.fixture(params=CPU_KERNELS, scope="module")
def mixlora(request: pytest.FixtureRequest, shared_oracle: Path) -> Oracle:
    oracle = read(shared_oracle, "llama-mixlora")
    set_kernel(oracle.model, request.param)
    return oracle


@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_logits_and_loss(oracle: Oracle, batch: str) -> None:
    oracle.model.eval()
    output = oracle.run(batch)
    difference = (output.logits - oracle.expected[f"{batch}.logits"])[oracle.real(batch)]
    assert difference.abs().max() < 2e-5
    # In evaluation the router loss is not part of the loss.
    assert output.loss.item() == pytest.approx(oracle.scalars[f"{batch}.loss"], abs=2e-5)


@pytest.mark.parametrize("head", [Head.full, Head.chunked])
@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_loss_counting_padding(oracle: Oracle, batch: str, head: Head) -> None:
    """What the official packages minimise: padding is predicted, at positions of its own.

    The batch is the collator's, padded on the side that the fixture names. Padding in front sees
    no token, so its loss depends on the attention: the fixtures' is plain attention, as in runs.
    """
    oracle.model.eval()
    oracle.model.base_model.model.set_attn_implementation("eager")
    ids, real = oracle.expected[f"{batch}.input_ids"], oracle.real(batch)
    examples = [Example(row[kept].tolist(), 1, "t") for row, kept in zip(ids, real, strict=True)]
    side = "left" if batch == "left" else "right"
    made = Collator(0, LossOn.all, padding=True, padding_side=side)(examples)
    assert torch.equal(made["input_ids"], ids)
    with loss_from_hidden(oracle.model.base_model.model, head):
        loss = oracle.model(**made).loss.item()
    expected = oracle.scalars[f"{batch}.loss_counting_padding"]
    assert loss == pytest.approx(expected, abs=2e-5)
    if batch == "right":
        # It is not the loss with one position for all of a row's padding.
        clamped = (made["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        other = oracle.model(**{**made, "position_ids": clamped}).loss.item()
        assert abs(other - expected) > 1e-2


@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_router_logits_and_router_loss(mixlora: Oracle, batch: str) -> None:
    mixlora.model.eval()
    mixlora.run(batch)
    real = mixlora.real(batch)
    tuner = mixlora.model.base_model
    for layer, block in enumerate(tuner.feed_forwards()):
        expected = mixlora.expected[f"{batch}.router_logits.layer{layer}.mlp"]
        logits = block.routing.logits.view(expected.shape)
        assert (logits - expected)[real].abs().max() < 2e-5
    loss = COEFFICIENT * tuner.router_report.loss.item()
    assert loss == pytest.approx(mixlora.scalars[f"{batch}.aux_loss"], abs=1e-6)
    assert tuner.router_report.counts.sum(dim=1).tolist() == [2 * int(real.sum())] * 2


def test_gradients_of_loss_and_router_loss(oracle: Oracle) -> None:
    """In training mode, without dropout, the tuner adds the router loss by itself."""
    oracle.model.train()
    oracle.model.zero_grad()
    output = oracle.run("right")
    auxiliary = oracle.scalars.get("right.aux_loss", 0.0)
    assert (auxiliary > 0) == (oracle.name == "llama-mixlora")
    expected = oracle.scalars["right.loss"] + auxiliary
    assert output.loss.item() == pytest.approx(expected, abs=2e-5)
    if auxiliary:
        assert COEFFICIENT * output["aux_loss"].item() == pytest.approx(auxiliary, abs=1e-6)
    output.loss.backward()
    compared = 0
    for name, parameter in oracle.model.named_parameters():
        if not parameter.requires_grad:
            continue
        saved = name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")
        expected = oracle.gradients[saved]
        difference = (parameter.grad - expected).abs().max() / expected.abs().max()
        assert difference < 1e-4, name
        compared += 1
    assert compared == len(oracle.gradients)


def test_gradients_without_the_router_loss_are_others(mixlora: Oracle) -> None:
    """So the comparison above is one of both terms: 2 % of the router's gradient is the second."""
    config = mixlora.model.peft_config["default"]
    router = "base_model.model.model.layers.0.mlp.lora_router"
    mixlora.model.train()
    mixlora.model.zero_grad()
    config.router_loss_coef = 0.0
    try:
        mixlora.run("right").loss.backward()
    finally:
        config.router_loss_coef = COEFFICIENT
    gradient = mixlora.model.get_parameter(router + ".default").grad
    expected = mixlora.gradients[router]
    assert (gradient - expected).abs().max() / expected.abs().max() > 1e-3
