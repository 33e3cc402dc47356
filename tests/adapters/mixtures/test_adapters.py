"""Mixtures in linear layers as PEFT adapters: files, several on one base, and merging."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import PeftType
from safetensors.torch import load_file, save_file
from small_mixtures import METHODS, ROUTED, make_settings

from mixlora_exp.adapters import MixtureConfig, load_adapter, load_adapters, save_adapter
from mixlora_exp.adapters.mixed_adapters import add_guest, parameters_of
from mixlora_exp.adapters.mixtures.layer import MixtureLinear
from mixlora_exp.config.by_layer import by_layer
from mixlora_exp.config.schema import KernelConfig, KernelName
from mixlora_exp.errors import UserError

KERNEL = KernelConfig(name=KernelName.exact)


@torch.no_grad()
def run(model, batch, **kwargs) -> torch.Tensor:
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return model.eval()(**inputs, **kwargs).logits


@pytest.fixture
def folders(mixed_of, kit, tmp_path: Path) -> dict[str, Path]:
    """An adapter of each method, of LoRA and of MixLoRA, saved by itself."""
    for method in METHODS:
        save_adapter(mixed_of(method), tmp_path / method)
    kit.adapter(tmp_path / "plain", "lora")
    kit.adapter(tmp_path / "mixlora", "mixlora")
    return {name: tmp_path / name for name in (*METHODS, "plain", "mixlora")}


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_again(mixed_of, base_of, batch, tmp_path, method: str) -> None:
    model = mixed_of(method)
    expected = run(model, batch)
    save_adapter(model, tmp_path / "one")
    written = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (written["peft_type"], written["mixture"]) == ("LORA_MIXTURE", method)
    stock = PeftModel.from_pretrained(base_of(), str(tmp_path / "one"))
    assert isinstance(stock.peft_config["default"], MixtureConfig)
    loaded = load_adapter(base_of(), tmp_path / "one", KERNEL)
    for again in (stock, loaded):
        assert torch.equal(run(again, batch), expected)
    save_adapter(loaded, tmp_path / "two")
    for name in ("adapter_model.safetensors",):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with loaded.disable_adapter():
        base = run(base_of(), batch)
        assert torch.equal(run(loaded, batch), base)
    assert not torch.equal(expected, base)


def test_loading_needs_no_singular_values(mixed_of, base_of, tmp_path, monkeypatch) -> None:
    save_adapter(mixed_of("goat"), tmp_path / "goat")
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("computed again"))
    load_adapter(base_of(), tmp_path / "goat", KERNEL)


@pytest.mark.parametrize(
    ("options", "usual", "rho"),
    [({"rho": 2.0}, 0, 2), ({"rho": 2.0, "usual_scale": 1}, 1, 2), ({}, 0, 10)],
)
def test_goat_starts_as_defined(base_of, options: dict, usual: int, rho: float) -> None:
    """s B_e A_e is the first R singular triplets of run e over rho, 10 by default; the mean over
    all experts is what the constant term takes away."""
    model = get_peft_model(base_of(), make_settings("goat", mixture_options=options))
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.k_proj")
    u, values, v = torch.linalg.svd(layer.get_base_layer().weight)
    a, b, s = (getattr(layer, n)["default"] for n in ("lora_A", "lora_B", "scaling"))
    assert s == (6 / 3 if usual else (3 * 64 / 3) ** 0.5)
    for e in range(4):
        own = slice(8 * e, 8 * e + 3)
        expected = u[:, own] @ torch.diag(values[own]) @ v[own] / rho
        torch.testing.assert_close(s * b[e] @ a[e], expected, rtol=1e-4, atol=1e-6)
    x = torch.randn(5, 64)
    for part in ("A", "B"):
        start = getattr(layer, f"lora_{part}0")["default"]
        assert torch.equal(start, getattr(layer, f"lora_{part}")["default"])
        assert not start.requires_grad
    layer.lora_router["default"].data.zero_()
    layer.router["default"] = model.peft_config["default"].make_router(4, 4, 64)
    torch.testing.assert_close(layer(x), layer.get_base_layer()(x), rtol=1e-4, atol=1e-5)


def test_routers_start_as_defined(base_of) -> None:
    """Normal, with the variance of the originals' uniform +-1/sqrt(in); the threshold's bias 0."""
    torch.manual_seed(1)
    model = get_peft_model(base_of(), make_settings("adamole", num_experts=32))
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    drawn = layer.lora_router["default"].detach()
    assert drawn.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)
    assert drawn.abs().max() > 64**-0.5
    assert layer.lora_router_threshold_bias["default"].tolist() == [0]


@pytest.mark.parametrize("method", ["mola", "loramoe", "hydralora", "adamole", "moslora"])
def test_others_start_as_the_base(base_of, batch, method: str) -> None:
    torch.manual_seed(1)
    model = get_peft_model(base_of(), make_settings(method))
    assert torch.equal(run(model, batch), run(base_of(), batch))


def test_rows_are_those_of_the_adapter_alone(base_of, folders, batch_of) -> None:
    """All methods in one pass, in any order, beside plain LoRA, MixLoRA and rows of the base."""
    names = ["mola", "plain", "goat", "__base__", "loramoe", "mixlora", "moslora", "hydralora"]
    names += ["adamole", "plain", "mola"]
    batch = batch_of(rows=len(names), length=24)
    for order in (list(folders), list(folders)[::-1]):
        model = load_adapters(base_of(), {name: folders[name] for name in order})
        found = run(model, batch, adapter_names=names)
        for name in dict.fromkeys(names):
            rows = [i for i, other in enumerate(names) if other == name]
            alone = base_of()
            if name != "__base__":
                alone = PeftModel.from_pretrained(alone, str(folders[name]))
            part = {key: value[rows] for key, value in batch.items()}
            torch.testing.assert_close(found[rows], run(alone, part), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(run(model, batch), run(base_of(), batch))
    for name in folders:
        model.set_adapter(name)
        alone = PeftModel.from_pretrained(base_of(), str(folders[name]))
        torch.testing.assert_close(run(model, batch), run(alone, batch), rtol=1e-4, atol=1e-5)


def test_unloading_gives_the_base_model_back(base_of, folders, batch) -> None:
    base = base_of().eval()
    modules = [type(module) for module in base.modules()]
    again = load_adapters(base, folders).unload()
    assert [type(module) for module in again.modules()] == modules
    assert torch.equal(run(again, batch), run(base_of(), batch))


def test_an_adapter_can_be_deleted(base_of, folders, batch) -> None:
    model = load_adapters(base_of(), {name: folders[name] for name in ("goat", "mola")})
    model.delete_adapter("goat")
    assert not any("goat" in key.split(".") for key in model.state_dict())
    model.set_adapter("mola")
    alone = PeftModel.from_pretrained(base_of(), str(folders["mola"]))
    assert torch.equal(run(model, batch), run(alone, batch))


@pytest.mark.parametrize("method", ["moslora", "pissa"])
def test_what_is_one_matrix_merges(mixed_of, base_of, batch, method: str) -> None:
    model = mixed_of(method)
    expected = run(model, batch)
    model.merge_adapter()
    torch.testing.assert_close(run(model, batch), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(run(model, batch), expected, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, MixtureLinear) for module in merged.modules())
    torch.testing.assert_close(run(merged, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ROUTED)
def test_what_depends_on_the_input_is_not_merged(mixed_of, method: str) -> None:
    model = mixed_of(method)
    with pytest.raises(ValueError, match=f"{method} cannot be merged"):
        model.merge_and_unload()


@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained(mixed_of, method: str) -> None:
    """All but what the method keeps fixed, in float32 on a base of 16 bits."""
    model = mixed_of(method, torch.bfloat16)
    named = dict(model.named_parameters())
    lora = {key for key in named if "lora_" in key}
    trained = {key for key, parameter in named.items() if parameter.requires_grad}
    assert lora - trained == {key for key in lora if "lora_A0" in key or "lora_B0" in key}
    assert {named[key].dtype for key in lora} == {torch.float32}
    assert set(parameters_of(model.base_model.model, "default").values()) == {
        named[key] for key in trained
    }


@pytest.mark.parametrize("method", METHODS)
def test_mask_serves_all_experts_and_not_the_router(mixed_of, method: str) -> None:
    """The branch of a row does not exist where all its elements are dropped."""
    model = mixed_of(method, torch.float64, lora_dropout=0.999999)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").train()
    x = torch.randn(3, 64, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.get_base_layer()(x))
    if method in ROUTED:
        logits = x.float() @ layer.lora_router["default"].float().T
        torch.testing.assert_close(layer.routing.logits.float(), logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": "nola"}, "mixture='nola' is not 'adamole'"),
        ({"num_experts": 0}, "num_experts=0 must be a whole number"),
        ({"num_experts": "2/x"}, "num_experts=2/x must be"),
        ({"num_experts": [2, 2.5]}, r"num_experts=\[2, 2.5\] must be"),
        ({"top_k": 9}, r"top_k=9 must be in \[1, num_experts=8\]"),
        (
            {"top_k": [2, 3], "num_experts": [2, 2]},
            r"top_k=.* must be in \[1, num_experts=\[2,2\]\]",
        ),
        ({"router": "none"}, "router='none' is not"),
        ({"router_options": {"p": 1.0}, "num_experts": 2}, "router_options.p is not an option"),
        ({"mixture_options": {"d": 1.0}}, "mixture_options.d is not an option of mola"),
        ({"mixture": "loramoe", "mixture_options": {"d": 1.0}}, "d=1.0 must be in"),
        ({"mixture": "goat", "mixture_options": {"eta": 0.0}}, "eta=0.0 must be > 0"),
        ({"mixture": "goat", "r": 20}, "rank=20: each of 8 experts"),
        ({"mixture": "pissa", "r": 40, "num_experts": 1, "top_k": 1}, "rank=40: a weight of 32 x"),
        ({"mixture": "lora_ga", "r": 20, "num_experts": 1, "top_k": 1}, "twice as many singular"),
        ({"mixture": "goat", "mixture_options": {"usual_scale": 2}}, "usual_scale=2 must be 0 or"),
        (
            {"mixture": "goat", "mixture_options": {"usual_scale": 1, "eta": 2}},
            "eta=2: usual_scale",
        ),
        (
            {"mixture": "goat", "mixture_options": {"usual_scale": 1, "eta": 0.5}},
            "eta=0.5: usual_scale",
        ),
        ({"mixture": "lora_ga", "mixture_options": {"gamma": 0.0}}, "gamma=0.0 must be > 0"),
        ({"mixture": "moslora"}, "num_experts=8: mixture=moslora has 1 expert"),
        ({"mixture": "moslora", "router": "top_k"}, "mixture=moslora has no router"),
        ({"use_dora": True}, "does not support use_dora"),
        (
            {"router_loss_pooling": "all", "num_experts": [2, 4]},
            "router_loss_pooling=all must be layer, or num_experts and top_k a number each",
        ),
        ({"num_experts": [2, 2, 2]}, "num_experts has 3 entries, and the model has 2 layers"),
        ({"top_k": "1/4", "num_experts": "4/2"}, "top_k=1/4 must be"),
    ],
)
def test_bad_settings_are_reported(base_of, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(base_of(), MixtureConfig(**{"task_type": "CAUSAL_LM", "r": 2, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 10**6}, "num_experts=1000000"),
        ({"num_experts": [3, 10**6]}, "num_experts=1000000"),
        ({"num_experts": [3, "4"]}, "must be an integer above 0, or a list"),
        ({"num_experts": "9/9"}, "must be an integer above 0, or a list"),
        ({"top_k": []}, "top_k"),
        ({"r": 10**6}, "is larger than in any tensor"),
        ({"num_experts": [3, 3]}, "rank or experts"),
        ({"num_experts": [3, 4, 3]}, "num_experts has 3 entries"),
        ({"mixture": "os.system"}, "mixture='os.system'"),
        ({"mixture_options": {"x": 1}}, "mixture_options.x"),
        ({"mixture_options": 3}, "cannot be loaded"),
    ],
)
def test_files_of_others(mixed_of, base_of, tmp_path, changes, message) -> None:
    save_adapter(mixed_of("mola"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        load_adapter(base_of(), tmp_path, KERNEL)


def test_a_lacking_tensor_is_named(mixed_of, base_of, tmp_path) -> None:
    save_adapter(mixed_of("goat"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = next(key for key in tensors if key.endswith("lora_A0"))
    save_file({key: value for key, value in tensors.items() if key != gone}, path)
    with pytest.raises(UserError, match="lora_A0"):
        load_adapter(base_of(), tmp_path, KERNEL)


def test_guests_of_both_orders_are_saved_as_they_were(base_of, folders, tmp_path) -> None:
    model = load_adapters(base_of(), {name: folders[name] for name in ("mola", "plain")})
    for name in ("mola", "plain"):
        save_adapter(model, tmp_path / "again" / name, name)
        old, new = (load_file(p / "adapter_model.safetensors") for p in
                    (folders[name], tmp_path / "again" / name))  # fmt: skip
        assert old.keys() == new.keys()
        assert all(torch.equal(new[key], value) for key, value in old.items())


def test_a_copy_is_whole(mixed_of, batch) -> None:
    model = mixed_of("adamole")
    assert torch.equal(run(copy.deepcopy(model), batch), run(model, batch))


def test_type_of_the_adapter(base_of) -> None:
    assert PeftType("LORA_MIXTURE") == "LORA_MIXTURE"
    model = add_guest(base_of(), "plain", LoraConfig(r=2, target_modules=["q_proj"]))
    add_guest(model, "mixed", make_settings("mola", target_modules=["q_proj"]))
    kinds = [m for m in model.modules() if isinstance(m, MixtureLinear)]
    assert len(kinds) == 2


@pytest.mark.parametrize("method", METHODS)
def test_products_are_in_the_working_precision(mixed_of, method: str) -> None:
    """Of a base in bf16, and under autocast; gradients of the weights are float32."""
    name = "base_model.model.model.layers.1.mlp.up_proj"
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float32):
        layer = mixed_of(method, dtype).get_submodule(name)
        truth = copy.deepcopy(layer).double()(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
            y = layer(x.to(dtype))
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert {p.grad.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
        assert float((y.double() - truth).norm() / truth.norm()) < 0.05


def test_ties_go_to_the_lower_index(mixed_of) -> None:
    layer = mixed_of("mola").get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    layer.lora_router["default"].data.zero_()
    layer(torch.randn(6, 64))
    assert layer.routing.experts.tolist() == [[0, 1]] * 6


def test_uneven_groups_of_layers() -> None:
    assert by_layer("num_experts", "2/4/6/8", 32) == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8
    assert by_layer("num_experts", "2/4", 5) == [2, 2, 2, 4, 4]
    assert by_layer("num_experts", "2/4/6/8", 2) == [2, 6]
    assert by_layer("num_experts", [1, 2], 2) == [1, 2]
    assert by_layer("num_experts", 3, 2) == [3, 3]
