"""Adapter weights in the products' precision: as the parameters are, after any change of them."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from cached_layers import layers_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from mixlora_exp.adapters import MixLoraConfig, set_kernel
from mixlora_exp.adapters.cache_source import adapters_changed
from mixlora_exp.adapters.weight_cache import CachesWeights, cached_weights

BF16 = torch.bfloat16
LAYERS = 10
"""With adapters, in the tiny model: four projections and a feed-forward block in each of two."""


@pytest.fixture
def model(model_of, dora: bool) -> PeftModel:
    made = model_of(dtype=BF16, use_dora=dora)
    set_kernel(made, "exact")
    return made


@pytest.fixture
def plain(base_of, draw) -> PeftModel:
    """DoRA of PEFT's own, without this project's tuner."""
    made = get_peft_model(base_of(dtype=BF16), LoraConfig(r=4, use_dora=True, **COMMON))
    draw(made)
    set_kernel(made, "exact")
    return made


COMMON = {"target_modules": ["q_proj", "k_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def tensors_of(model: nn.Module, adapter: str = "default") -> Iterator[tuple[str, Tensor]]:
    """All cached copies by name."""
    for layer in layers_of(model):
        for part in layer.cache_sources(adapter):
            low, norm = cached_weights(layer, adapter, BF16, part)[1]
            named = {"a": low.a, "b": low.b, "scale": low.scale, "norm": norm}
            yield from ((name, tensor) for name, tensor in named.items() if tensor is not None)


def check_layer(layer: CachesWeights, adapter: str = "default") -> int:
    sources = layer.cache_sources(adapter)
    for part, source in sources.items():
        same, (low, norm) = cached_weights(layer, adapter, BF16, part)
        assert all(x is y for x, y in zip(same.tensors, source.tensors, strict=True))
        assert torch.equal(low.a, source.a.to(BF16))
        assert torch.equal(low.b, source.b.to(BF16))
        assert (norm is None) == (low.scale is None) == (source.magnitude is None)
        if norm is not None:
            change = source.scaling * source.b.double() @ source.a.double()
            truth = (source.weight.double() + change).norm(dim=-1)
            torch.testing.assert_close(norm.double(), truth, rtol=2e-6, atol=0)
            assert torch.equal(low.scale, (source.magnitude / norm).to(BF16))
    return len(sources)


def check(model: nn.Module, adapter: str = "default") -> None:
    assert sum(check_layer(layer, adapter) for layer in layers_of(model)) > 0


# Ways in which a parameter changes.


@torch.no_grad()
def in_place(parameter: nn.Parameter, model: nn.Module, name: str) -> None:
    parameter.mul_(1.5)


@torch.inference_mode()
def in_inference_mode(parameter: nn.Parameter, model: nn.Module, name: str) -> None:
    parameter.mul_(1.5)


def by_load_state_dict(parameter: nn.Parameter, model: nn.Module, name: str) -> None:
    model.load_state_dict({name: parameter.detach() * 1.5}, strict=False)


def by_assignment(parameter: nn.Parameter, model: nn.Module, name: str) -> None:
    model.load_state_dict({name: parameter.detach() * 1.5}, strict=False, assign=True)


def other_data(parameter: nn.Parameter, model: nn.Module, name: str) -> None:
    parameter.data = parameter.data * 1.5


def other_parameter(parameter: nn.Parameter, model: nn.Module, name: str) -> None:
    place, _, last = name.rpartition(".")
    owner = model.get_submodule(place)
    made = nn.Parameter(parameter.detach() * 1.5)
    if isinstance(owner, nn.ParameterDict):
        owner[last] = made
    else:
        setattr(owner, last, made)


def data_and_a_word(parameter: nn.Parameter, model: nn.Module, name: str) -> None:
    parameter.data.mul_(1.5)
    adapters_changed()


def data_and_another_mode(parameter: nn.Parameter, model: nn.Module, name: str) -> None:
    parameter.data.mul_(1.5)
    model.train(not model.training)


def step_of(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[..., None]:
    def change(parameter: nn.Parameter, model: nn.Module, name: str) -> None:
        parameter.grad = torch.ones_like(parameter)
        make([parameter]).step()
        parameter.grad = None

    return change


WAYS = [
    pytest.param(in_place, id="in place"),
    pytest.param(in_inference_mode, id="in place, in inference mode"),
    pytest.param(by_load_state_dict, id="load_state_dict"),
    pytest.param(by_assignment, id="load_state_dict, other tensors"),
    pytest.param(other_data, id="other data"),
    pytest.param(other_parameter, id="another parameter"),
    pytest.param(data_and_a_word, id="through data, and adapters_changed"),
    pytest.param(data_and_another_mode, id="through data, and eval or train"),
    pytest.param(step_of(lambda w: torch.optim.AdamW(w, 0.1, fused=True)), id="fused AdamW"),
    pytest.param(step_of(lambda w: torch.optim.AdamW(w, 0.1, foreach=True)), id="foreach AdamW"),
    pytest.param(step_of(lambda w: torch.optim.SGD(w, 0.1)), id="SGD"),
]


@pytest.mark.parametrize("change", WAYS)
def test_each_weight_by_each_way(model, batch, change) -> None:
    """Of one layer each time, which is looked at before any other."""
    model(**batch)
    named = {id(p): name for name, p in model.named_parameters()}
    seen = 0
    for layer in layers_of(model):
        for part in layer.cache_sources("default"):
            count = 0
            for which in ("a", "b", "magnitude"):
                parameter = getattr(layer.cache_sources("default")[part], which)
                if parameter is None:
                    continue
                before = parameter.detach().clone()
                change(parameter, model, named[id(parameter)])
                now = getattr(layer.cache_sources("default")[part], which)
                assert not torch.equal(now, before)
                check_layer(layer)
                count += 1
            seen += 1
            assert count in (2, 3)
    assert seen == LAYERS + 4
    check(model)


def test_weights_of_peft_alone(plain, batch) -> None:
    plain(**batch)
    check(plain)
    step_of(lambda w: torch.optim.AdamW(w, 0.1, fused=True))(
        layers_of(plain)[0].lora_B["default"].weight, plain, ""
    )
    check(plain)


def test_frozen_weights_of_which_norms_are_taken(plain, batch) -> None:
    """Merged and taken out again they are rounded, by writes through `data`."""
    plain(**batch)
    for layer in layers_of(plain):
        layer.base_layer.weight.data.mul_(3)
        layer.merge()
        layer.unmerge()
        check_layer(layer)
        with torch.no_grad():
            layer.base_layer.weight.mul_(2)
        check_layer(layer)


def test_scaling_of_an_adapter(plain, batch) -> None:
    plain(**batch)
    for layer in layers_of(plain):
        layer.set_scale("default", 3.0)
        check_layer(layer)


@pytest.mark.filterwarnings("ignore")  # PEFT's own, about a second adapter
def test_adapters_that_come_and_go(model, config_of, draw, batch, dora) -> None:
    model(**batch)
    model.add_adapter("other", config_of(use_dora=dora, r=2))
    draw(model)
    for name in ("other", "default"):
        model.set_adapter(name)
        model(**batch)
        check(model, "default")
        check(model, "other")
    model.set_adapter("default")
    for rank in (2, 3):
        model.delete_adapter("other")
        model.add_adapter("other", config_of(use_dora=dora, r=rank))
        draw(model)
        check(model, "other")


def test_deleted_adapters_memory_is_given_back(model, config_of, batch, dora) -> None:
    model.add_adapter("other", config_of(use_dora=dora))
    model.set_adapter("other")
    model(**batch)
    memory = [weakref.ref(tensor) for _, tensor in tensors_of(model, "other")]
    model.set_adapter("default")
    model.delete_adapter("other")
    gc.collect()
    assert memory
    assert all(ref() is None for ref in memory)


@pytest.mark.parametrize(
    "copied",
    [deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_has_its_own(model, batch, copied) -> None:
    model(**batch)
    copy = copied(model)
    copy(**batch)
    for parameter in copy.parameters():
        if parameter.requires_grad:
            in_place(parameter, copy, "")
    check(copy)
    check(model)
    pointers = [{t.data_ptr() for _, t in tensors_of(one)} for one in (model, copy)]
    assert not pointers[0] & pointers[1]
    # Made together in the copy too.
    assert len({id(layer.weight_cache) for layer in layers_of(copy)}) == 1


def test_nothing_of_it_is_saved(model, batch) -> None:
    names = set(model.state_dict())
    model(**batch)
    assert set(model.state_dict()) == names
    assert len(pickle.dumps(layers_of(model)[0].weight_cache)) < 200


def test_memory_keeps_its_place(model, batch) -> None:
    """Through steps, and through parameters of the same shape in the place of others."""
    model(**batch)
    places = [tensor.data_ptr() for _, tensor in tensors_of(model)]
    for change in (in_place, other_parameter, other_data):
        for name, parameter in list(model.named_parameters()):
            if "lora_" in name and "router" not in name:
                change(parameter, model, name)
    check(model)
    assert [tensor.data_ptr() for _, tensor in tensors_of(model)] == places


def test_projections_with_one_input_have_a_side_by_side(model) -> None:
    """So that a kernel can take them as one matrix."""
    by_layer = {}
    for name, layer in model.named_modules():
        if isinstance(layer, CachesWeights):
            for part in layer.cache_sources("default"):
                by_layer[name.split("layers.")[1], part] = cached_weights(
                    layer, "default", BF16, part
                )
    for first, second in (
        (("0.self_attn.q_proj", "W"), ("0.self_attn.k_proj", "W")),
        (("0.self_attn.k_proj", "W"), ("0.self_attn.v_proj", "W")),
        (("1.mlp", "gate"), ("1.mlp", "up")),
    ):
        a, b = (by_layer[key][1].low.a for key in (first, second))
        assert b.data_ptr() == a.data_ptr() + a.numel() * a.element_size()


def test_dtype_of_the_parameters_needs_no_copy(model_of, batch, dora) -> None:
    model = model_of(use_dora=dora)
    set_kernel(model, "exact")
    model(**batch)
    for layer in layers_of(model):
        for part in layer.cache_sources("default"):
            source, (low, _) = cached_weights(layer, "default", torch.float32, part)
            assert (low is None) == (not dora)
            if dora:
                assert low.a.data_ptr() == source.a.data_ptr()
                assert low.b.data_ptr() == source.b.data_ptr()
                assert not low.a.requires_grad


def test_another_dtype_and_back(model, batch) -> None:
    model(**batch)
    for dtype in (torch.float16, torch.float32):
        model.to(dtype)
        check(model)
    model.bfloat16()
    for layer in layers_of(model):
        for part in layer.cache_sources("default"):
            source, (low, _) = cached_weights(layer, "default", BF16, part)
            assert low is None or torch.equal(low.a, source.a)


def test_gradients_reach_the_parameters(model, batch) -> None:
    """In float32; and a pass in evaluation between forward and backward pass does no harm."""
    loss = model.train()(**batch).loss
    with torch.no_grad():
        model.eval()(**batch)
    loss.backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in trained)
    assert not any(tensor.requires_grad for _, tensor in tensors_of(model))


def test_weights_changed_before_the_backward_pass_are_reported(model, batch) -> None:
    loss = model.train()(**batch).loss
    for parameter in model.parameters():
        if parameter.requires_grad:
            in_place(parameter, model, "")
    check(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_first_made_in_inference_mode(model, batch) -> None:
    with torch.inference_mode():
        model.eval()(**batch)
    model.train()(**batch).loss.backward()
    check(model)


def test_weights_without_versions_have_none(model_of, batch, dora) -> None:
    with torch.inference_mode():
        model = model_of(dtype=BF16, use_dora=dora)
        set_kernel(model, "exact")
        model.eval()(**batch)
        for layer in layers_of(model):
            for part in layer.cache_sources("default"):
                assert cached_weights(layer, "default", BF16, part)[1].low is None


def test_weights_that_other_processes_hold_have_none(model, batch) -> None:
    """As a partitioned parameter has no elements here between passes."""
    model(**batch)
    first, *others = layers_of(model)
    partitioned = next(iter(others[0].cache_sources("default").values())).a
    whole = partitioned.data
    partitioned.data = torch.empty(0)
    check_layer(first)
    partitioned.data = whole
    check(model)


def test_replicas_have_none(plain, batch) -> None:
    """As DataParallel makes them, whose threads would share one."""
    plain(**batch)
    layer, *_ = layers_of(plain)
    replica = layer._replicate_for_data_parallel()
    assert cached_weights(replica, "default", BF16)[1].low is None


def test_mixed_adapters_are_cast_under_autocast(base_of, batch) -> None:
    """The dtype is that of the pass: none of its own in float32, bf16 under autocast."""
    model = get_peft_model(base_of(), MixLoraConfig(r=2, num_experts=2, **COMMON))
    set_kernel(model, "exact")
    with torch.autocast("cpu", BF16):
        model(**batch)
    made = {
        key[2] for held in layers_of(model)[0].weight_cache._layers.values() for key in held.entries
    }
    assert made == {BF16}
    check(model)
