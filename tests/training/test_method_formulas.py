"""PEFT's own types, LoRA-FA and LoRA-GA against formulas of a few lines, in float64."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import compose
from peft import PeftModel
from small_methods import SMALL, first_losses, train
from torch import Tensor

from mixlora_exp.adapters import attach_adapter
from mixlora_exp.adapters.mixed_adapters import parameters_of
from mixlora_exp.config.schema import Config
from mixlora_exp.models import load_model

CASES = {
    "vera": ("peft.r=5", "vera_lambda_b vera_lambda_d"),
    "adalora": ("peft.init_r=5 peft.target_r=2 peft.lora_alpha=7 peft.lora_dropout=0",
                "lora_A lora_B lora_E"),
    # PEFT makes a float32 number of alpha / r, which is exact where r is a power of 2.
    "fedpara": ("peft.r=4 peft.alpha=6", "hada_w1_a hada_w1_b hada_w2_a hada_w2_b"),
    "hira": ("peft.r=3", "hira_A hira_B"),
    "lora_fa": ("rank=3 alpha=7 dropout=0", "lora_B"),
    "lora_ga": ("rank=3 alpha=7", "lora_A lora_B"),
}  # fmt: skip
"""By method the changes to its settings, and the names of its trained weights."""


def config_of(method: str, *words: str) -> Config:
    own = [f"method.{word}" for word in CASES[method][0].split()]
    return compose([*SMALL, f"method={method}", *own, *words])


def base_of(config: Config) -> Any:
    base = load_model(config.model, torch.float64, config.seed)
    base.set_attn_implementation("sdpa")  # The softmax of `eager` is in float32.
    return base


def drawn(config: Config) -> PeftModel:
    """A model whose adapter has random values everywhere; AdaLoRA's count of ranks is not drawn."""
    model = attach_adapter(base_of(config), config.method, config.kernel, config.seed)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "default" in name and "ranknum" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def check_equal(found: Tensor, expected: Tensor, name: str) -> None:
    """To 1e-10 of the largest number."""
    largest = expected.abs().max()
    assert largest > 0, name
    torch.testing.assert_close(found / largest, expected / largest, rtol=0, atol=1e-10, msg=name)


def change_of(method: str, p: dict[str, Tensor], w: Tensor, config: Any) -> Tensor:
    """(out, in), which the adapter adds to the weight w."""
    if method == "vera":
        # One A and B for all layers: uniform with He's bound, from a seed of their own, in float32.
        generator = torch.Generator().manual_seed(0)
        largest = max(config.hidden_size, config.intermediate_size)
        a, b = torch.empty(5, largest), torch.empty(largest, 5)
        for matrix in (a, b):
            bound = sqrt(6 / matrix.shape[1])
            matrix.uniform_(-bound, bound, generator=generator)
        a, b = a[:, : w.shape[1]].double(), b[: w.shape[0]].double()
        return p["vera_lambda_b"].diag() @ b @ p["vera_lambda_d"].diag() @ a
    if method == "adalora":
        # PEFT adds 1e-5 to the rank.
        return 7 / (5 + 1e-5) * p["lora_B"] @ p["lora_E"].flatten().diag() @ p["lora_A"]
    if method == "fedpara":
        return 6 / 4 * (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
    if method == "hira":
        return w * (p["hira_B"] @ p["hira_A"])
    if method == "lora_fa":
        return 7 / 3 * p["lora_B"] @ p["lora_A"]
    b, a, b0, a0 = (p[f"lora_{name}"][0] for name in ("B", "A", "B0", "A0"))
    return 7 / 3 * (b @ a - b0 @ a0)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj"])
@pytest.mark.parametrize("method", CASES)
def test_forward_and_all_gradients(method: str, name: str) -> None:
    model = drawn(config_of(method)).train()
    ((_, layer),) = ((n, m) for n, m in model.named_modules() if n.endswith(f"layers.1.{name}"))
    base = layer.get_base_layer()
    torch.manual_seed(0)
    base.bias = torch.nn.Parameter(torch.randn(base.out_features).double(), requires_grad=False)
    held = {key.split(".")[0]: p for key, p in layer.named_parameters() if "default" in key}
    # AdaLoRA's count of ranks is no weight, but has a gradient where the base is not in float32.
    trained = {k: p for k, p in held.items() if p.requires_grad and k in layer.adapter_layer_names}
    assert trained.keys() == set(CASES[method][1].split())

    def by_formula(x: Tensor) -> Tensor:
        changed = base.weight + change_of(method, held, base.weight, model.config)
        return x @ changed.T + base.bias

    inputs, out = (torch.randn(10, n).double() for n in (base.in_features, base.out_features))
    found, expected = [], []
    for results, run in ((found, layer), (expected, by_formula)):
        x = inputs.clone().requires_grad_()
        y = run(x)
        results += [y, *torch.autograd.grad((y * out).sum(), [x, *trained.values()])]
    for key, one, other in zip(["y", "x", *trained], found, expected, strict=True):
        check_equal(one, other, key)


def trained_of(model: PeftModel) -> dict[str, Tensor]:
    return {name: p for name, p in parameters_of(model, "default").items() if p.requires_grad}


def first_step(config: Config, model: PeftModel, folder: Path, patch: Any) -> tuple[Any, ...]:
    """Train, and return all weights and the trained ones' gradients as AdamW finds them in its
    first step, and the step's loss."""
    seen, real = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        if not seen:
            seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
            seen.append({n: p.grad.clone() for n, p in trained_of(model).items()})
        return real(self, *args, **kwargs)

    patch.setattr(torch.optim.AdamW, "step", step)
    _, summary = train(config, folder / "run", model, torch.float64)
    return *seen, summary.stability.step_losses[0]


def test_adaloras_loss_and_its_gradient(tmp_path: Path, monkeypatch) -> None:
    """The task's loss and 0.5 times the mean of |P^T P - 1| and |Q Q^T - 1| over all layers, once a
    step, of two micro-batches here."""
    config = config_of("adalora", "trainer.max_steps=2")
    model = drawn(config)
    own = trained_of(model)
    grams = [p @ p.T if "lora_A" in name else p.T @ p
             for name, p in own.items() if "lora_E" not in name]  # fmt: skip
    norms = [(gram - torch.eye(5).double()).square().sum().sqrt() for gram in grams]
    assert len(norms) == 28
    loss = sum(first_losses(model.base_model.model, config, tmp_path)) + 0.5 * sum(norms) / 28
    expected = dict(zip(own, torch.autograd.grad(loss, own.values()), strict=True))
    _, found, told = first_step(config, model, tmp_path, monkeypatch)
    # The summary rounds to seven digits.
    assert told == pytest.approx(loss.item(), rel=1e-6)
    for name, gradient in expected.items():
        check_equal(found[name], gradient, name)


def test_lora_fas_step(tmp_path: Path, monkeypatch) -> None:
    """AdamW's first step, for G (A A^T)^-1 / s^2 with G the gradient by B; PEFT adds 1e-8 to the
    diagonal of A A^T. A stays as it was."""
    config = config_of("lora_fa", "trainer.max_steps=1")
    model = drawn(config)
    own = trained_of(model)
    loss = sum(first_losses(model.base_model.model, config, tmp_path))
    gradients = dict(zip(own, torch.autograd.grad(loss, own.values()), strict=True))
    before, found, _ = first_step(config, model, tmp_path, monkeypatch)
    after, rate = dict(model.named_parameters()), config.trainer.learning_rate
    assert len(gradients) == 14
    for name, gradient in gradients.items():
        key = name.replace("lora_B", "lora_A")
        a = before[key]
        assert torch.equal(after[key], a)
        corrected = gradient @ (a @ a.T + 1e-8 * torch.eye(3).double()).inverse() / (7 / 3) ** 2
        check_equal(found[name], corrected, name)
        moved = (1 - 0.01 * rate) * before[name] - rate * corrected / (corrected.abs() + 1e-8)
        check_equal(after[name], moved, name)


def test_lora_gas_start(tmp_path: Path, monkeypatch) -> None:
    """With G = U S V^T the gradient by the base's weight and R = 3: A spans V_1..R, and
    B B^T = sqrt(out) / gamma U S^2 U^T over R+1..2R. There s B A - s B0 A0 is 0, so that the
    gradients of A and B are s B^T G and s G A^T."""
    config = config_of("lora_ga", "trainer.max_steps=1")
    base = base_of(config)
    model = attach_adapter(base_of(config), config.method, config.kernel, config.seed)
    held, found, _ = first_step(config, model, tmp_path, monkeypatch)
    layers = {n: m.weight for n, m in base.named_modules() if n.endswith("_proj")}
    assert len(layers) == 14
    for weight in layers.values():
        weight.requires_grad_()
    loss = sum(first_losses(base, config, tmp_path))
    for name, g in zip(layers, torch.autograd.grad(loss, layers.values()), strict=True):
        a, b, a0, b0 = (
            held[f"base_model.model.{name}.lora_{part}.default"][0]
            for part in ("A", "B", "A0", "B0")
        )
        assert torch.equal(a, a0)
        assert torch.equal(b, b0)
        right = torch.linalg.eigh(g.T @ g).eigenvectors.flip(1)[:, :3]
        check_equal(a.T @ a, right @ right.T, name)
        values, left = (part.flip(-1)[..., 3:6] for part in torch.linalg.eigh(g @ g.T))
        spread = left * values @ left.T * sqrt(len(g)) / 16
        check_equal(b @ b.T, spread, name)
        for part, expected in (("A", b.T @ g), ("B", g @ a.T)):
            own = found[f"base_model.model.{name}.lora_{part}.default"][0]
            check_equal(own, 7 / 3 * expected, name)
