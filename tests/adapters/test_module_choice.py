"""Ranks and scales of single modules, some layers alone, starts of A and B: what is built, counted,
computed and saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from composed import compose
from peft.tuners.lora import LoraLayer
from small_methods import base_of, new_model, run
from torch import Tensor, nn

from mixlora_exp.adapters import (
    MixLoraFeedForward,
    attach_adapter,
    attach_together,
    load_adapter,
    save_adapter,
)
from mixlora_exp.adapters.mixed_adapters import parameters_of
from mixlora_exp.adapters.mixtures.layer import MixtureLinear
from mixlora_exp.config.schema import Config
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model
from mixlora_exp.models.flops import count_flops
from mixlora_exp.models.parameters import count_parameters, routers_of
from mixlora_exp.runs.method_checks import check_method

SMALL = ["model=tiny", "trainer.precision=float32", "+model.config.num_hidden_layers=4"]
LAYERS = "method.layers_to_transform=1-2"
CASES = {
    "lora": ["method.rank=4", "method.rank_pattern={q_proj:8,layers.0.mlp.down_proj:2}",
             "method.alpha_pattern={k_proj:3,2.mlp.up_proj:64}"],
    "dora": ["method.rank=4", "method.rank_pattern={gate_proj:3}", LAYERS],
    "lora_fa": ["method.rank=4", "method.rank_pattern={q_proj:8}", LAYERS],
    "mixlora": ["method.rank=4", "method.expert_rank=2", "method.expert_alpha=5", LAYERS],
    "mixdora": ["method.rank=4", "method.layers_to_transform=[3]"],
    "mola": ["method.rank=4", "method.num_experts=2/4", LAYERS],
}  # fmt: skip
"""Method -> its settings."""


def config_of(method: str, *words: str) -> Config:
    return compose([*SMALL, f"method={method}", *CASES[method], *words])


def drawn(config: Config) -> nn.Module:
    """A model with an adapter whose B is not zero."""
    model, generator = new_model(config), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def layers_with_adapters(model: nn.Module) -> set[int]:
    kinds = (LoraLayer, MixLoraFeedForward, MixtureLinear)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names}


@pytest.mark.parametrize("method", CASES)
def test_the_plan_counts_what_is_built(method: str) -> None:
    config = config_of(method)
    model = new_model(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted = count_parameters(config.model, config.method)
    assert counted.trainable == trained
    wanted = config.method.layers_to_transform
    assert sorted(layers_with_adapters(model)) == ([0, 1, 2, 3] if wanted is None else wanted)
    if method in ("mixlora", "mixdora", "mola"):
        assert len(routers_of(config.model, config.method)) == len(wanted)
    whole = compose([*SMALL, f"method={method}", "method.rank=4"])
    if wanted is not None and method != "mola":
        before = count_flops(whole.model, whole.method).adapter
        assert count_flops(config.model, config.method).adapter < before


def test_ranks_and_scales_by_module() -> None:
    model = new_model(config_of("lora"))
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    for name, module in found.items():
        first = ".layers.0." in name
        rank = 8 if name.endswith("q_proj") else 2 if first and name.endswith("down_proj") else 4
        alpha = 3 if name.endswith("k_proj") else 160
        alpha = 64 if ".layers.2." in name and name.endswith("up_proj") else alpha
        assert module.lora_A["default"].weight.shape[0] == rank, name
        assert module.scaling["default"] == alpha / rank, name


def test_experts_have_their_own_rank_and_scale() -> None:
    model = new_model(config_of("mixlora"))
    blocks = [m for m in model.modules() if isinstance(m, MixLoraFeedForward)]
    assert [(block.r["default"], block.scaling["default"]) for block in blocks] == [(2, 2.5)] * 2
    attention = [m for n, m in model.named_modules() if n.endswith("q_proj") and hasattr(m, "r")]
    assert [(m.r["default"], m.scaling["default"]) for m in attention] == [(4, 8.0)] * 2


@pytest.mark.parametrize("method", ["lora", "dora", "mixlora"])
def test_fused_layers_compute_what_stock_ones_do(method: str) -> None:
    """Outputs and gradients, in float64, with ranks that differ among projections of one input."""
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for kernel in ("exact", "peft"):
        config = config_of(method, f"kernel={kernel}", "method.dropout=0")
        base = load_model(config.model, torch.float32, config.seed).double()
        model = attach_adapter(base, config.method, config.kernel, config.seed)
        generator = torch.Generator().manual_seed(5)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = parameter.data.double() + 0.1 * noise
        ids = torch.randint(3, 1000, (2, 12), generator=torch.Generator().manual_seed(3))
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append((run(model), gradients))
    (one, own), (other, stock) = found
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert own.keys() == stock.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, stock[name], rtol=0, atol=1e-8, msg=name)


@pytest.mark.parametrize("method", CASES)
def test_saved_and_loaded_again(tmp_path: Path, method: str) -> None:
    config = config_of(method)
    model = drawn(config)
    expected = run(model)
    save_adapter(model, tmp_path / "saved")
    loaded = load_adapter(base_of(config), tmp_path / "saved", config.kernel)
    assert torch.equal(run(loaded), expected)
    assert layers_with_adapters(loaded) == layers_with_adapters(model)


def test_several_on_one_base_are_each_as_alone() -> None:
    configs = {f"a_{m}": config_of(m) for m in ("lora", "dora", "mixlora", "mola")}
    base = base_of(configs["a_lora"])
    methods = {name: (config.method, config.seed) for name, config in configs.items()}
    together = attach_together(base, methods, configs["a_lora"].kernel)
    for name, config in configs.items():
        alone = {n.replace("default", name): p for n, p in
                 parameters_of(new_model(config), "default").items()}  # fmt: skip
        found = parameters_of(together, name)
        assert sorted(p.shape for p in found.values()) == sorted(p.shape for p in alone.values())
    ids = torch.randint(3, 1000, (4, 12), generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in configs:
            for parameter in parameters_of(together, name).values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    names = list(configs)
    mixed = together.eval()(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        together.set_adapter(name)
        own = together(input_ids=ids).logits[row]
        torch.testing.assert_close(mixed[row], own, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", ["lora", "mixlora"])
def test_gaussian(method: str) -> None:
    words = [*SMALL, f"method={method}", "method.rank=16", "method.init_lora_weights=gaussian"]
    model = new_model(compose(words))
    drawn_a = [p.detach().flatten() for n, p in model.named_parameters() if "lora_A" in n]
    assert torch.cat(drawn_a).std().item() == pytest.approx(1 / 16, rel=0.02)
    # Uniform numbers of this deviation have no such tail.
    assert torch.cat(drawn_a).abs().max() > 3.5 / 16
    assert not any(p.any() for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonal_changes_no_output(dtype: torch.dtype) -> None:
    """PEFT's own on a bf16 base does, whose A and B are rounded."""
    config = compose(
        [*SMALL, "method=dora", "method.rank=8", "method.init_lora_weights=orthogonal"]
    )
    base = load_model(config.model, dtype, config.seed)
    model = attach_adapter(base, config.method, config.kernel, config.seed)
    for module in (m for m in model.modules() if isinstance(m, LoraLayer)):
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        assert a.dtype == b.dtype == torch.float32
        assert (b @ a).abs().max() < 1e-6 * b.norm() * a.norm()
        assert a.std() > 0.05
        assert b.std() > 0.05
    again = attach_adapter(
        load_model(config.model, dtype, config.seed), config.method, config.kernel, config.seed
    )
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("method=lora method.layers_to_transform=[1,4]", "the model has no layer 4, its layers are "
         "0 to 3"),
        ("method=mola method.layers_to_transform=2-9", "the model has no layer 4"),
        ("method=lora method.rank_pattern={layers.9.self_attn.q_proj:2}",
         "method.rank_pattern.layers.9.self_attn.q_proj=2 names no projection with an adapter"),
        ("method=lora method.layers_to_transform=[0] method.alpha_pattern={1.mlp.up_proj:2}",
         "method.alpha_pattern.1.mlp.up_proj=2.0 names no projection with an adapter"),
    ],
)  # fmt: skip
def test_what_the_model_does_not_have_is_told_before_it_is_loaded(words: str, told: str) -> None:
    config = compose([*SMALL, *words.split()])
    with pytest.raises(UserError, match=told.replace(".", r"\.")):
        check_method(config)
    with pytest.raises(UserError, match=told.replace(".", r"\.")):
        count_parameters(config.model, config.method)
