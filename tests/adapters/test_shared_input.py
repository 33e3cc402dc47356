"""Projections that share their input, computed when the first is called; Triton interpreted."""

from __future__ import annotations

import gc
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from triton_cases import load

from mixlora_exp.adapters import set_kernel, several_linear
from mixlora_exp.adapters.dropout import use_dropout_stream
from mixlora_exp.adapters.linear import FusedLinear
from mixlora_exp.adapters.shared_input import PENDING
from mixlora_exp.kernels import DropoutStream, Frozen, lora, plain_linear
from mixlora_exp.kernels.low_rank import LowRankPart

(linear_launch,) = load("linear_launch")
NAMES = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(autouse=True)
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the interpreted kernels run; grows by the number of projections of each call."""
    called: list[int] = []
    low = linear_launch.low

    def counted(x: Tensor, parts: Sequence[LowRankPart]) -> list[Tensor]:
        called.append(len(parts))
        return low(x, parts)

    monkeypatch.setattr(linear_launch, "low", counted)
    monkeypatch.setattr(lora, "steps_on", lambda device: linear_launch)
    return called


@pytest.fixture(autouse=True)
def nothing_waits() -> Iterator[None]:
    PENDING.waiting = None
    yield
    PENDING.waiting = None


class Attention(nn.Module):
    """Three projections of one input and one of their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 8)
        self.o_proj = nn.Linear(8, 12, bias=False)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """With another input for keys and values: cross attention."""
        other = x if other is None else other
        q, k = self.q_proj(x), self.k_proj(other)
        return self.o_proj(torch.tanh(q) * k + self.v_proj(other))


def make(targets: tuple[str, ...] = (*NAMES, "o_proj"), **changes: Any) -> nn.Module:
    """With random adapters of different ranks, and dropout from a stream."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": Attention()})
    options = {"r": 3, "rank_pattern": {"k_proj": 5}, "lora_dropout": 0.3, **changes}
    inject_adapter_in_model(LoraConfig(target_modules=list(targets), **options), model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    use_dropout_stream(model, "default", rows())
    set_kernel(model, "exact")
    return model["attention"].train()


def rows() -> DropoutStream:
    """For the ten rows of `draw`."""
    stream = DropoutStream(seed=1)
    stream.begin(0, torch.zeros(10, dtype=torch.int64), torch.arange(10))
    return stream


def draw(seed: int = 3) -> Tensor:
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(seed))


def alone(block: nn.Module) -> nn.Module:
    """The same block with each projection by itself."""
    copy = deepcopy(block)
    for module in copy.modules():
        if isinstance(module, FusedLinear):
            module.siblings = None
    return copy


def results(block: nn.Module, run: Callable[..., Tensor] | None = None, *more: Tensor) -> dict:
    """Output and gradients by name."""
    x = draw().requires_grad_()
    y = (block if run is None else run)(x, *more)
    y.square().sum().backward()
    found = {name: p.grad for name, p in block.named_parameters() if p.requires_grad}
    block.zero_grad()
    return {"y": y.detach(), "x": x.grad, **found}


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_group_is_its_projections(sizes, use_dora) -> None:
    """Outputs, gradients and masks are those of each by itself, in fewer launches."""
    block = make(use_dora=use_dora)
    expected = results(alone(block))
    assert sizes == [1, 1, 1, 1]
    sizes.clear()
    check(results(block), expected)
    assert sizes == [3, 1]


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("at_once", [False, True], ids=["each by itself", "at once"])
def test_the_base_s_weights_are_multiplied_with_as_they_are_held(
    monkeypatch, at_once, use_dora
) -> None:
    """Not read as matrices: a quantised base may hold them otherwise."""

    class Doubled(Frozen):
        """Holds half of the weight."""

        def __init__(self, half: Tensor) -> None:
            self.half = half

        def weight(self) -> Tensor:
            return 2 * self.half

    block = make(use_dora=use_dora, lora_dropout=0.0)
    if not at_once:
        monkeypatch.setattr(lora, "steps_on", lambda device: plain_linear)
    expected = results(block)

    def held(base: nn.Linear, dtype: torch.dtype) -> Frozen:
        return Doubled(base.weight.detach().to(dtype) / 2)

    monkeypatch.setattr(several_linear, "frozen_linear", held)
    check(results(block), expected)


def test_equals_the_pass_of_a_cpu(monkeypatch) -> None:
    block = make(lora_dropout=0.0)
    found = results(block)
    monkeypatch.setattr(lora, "steps_on", lambda device: plain_linear)
    check(found, results(block))


def test_gate_and_up(sizes, base_of, batch) -> None:
    """In a model, with attention: two groups of siblings a layer, and two projections alone."""
    names = [*NAMES, "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(base_of(), config)
    set_kernel(model, "exact")
    layers = model.config.num_hidden_layers
    for _ in range(2):
        sizes.clear()
        model(**batch).loss.backward()
        assert sizes == [3, 1, 2, 1] * layers


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(sizes, reentrant) -> None:
    block = make()
    expected = results(block)

    def run(x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=reentrant)

    check(results(block, run), expected)
    assert sizes == [3, 1] * 3


def test_nothing_stays_after_a_pass() -> None:
    block = make()
    kept = []
    for layer in (block.q_proj, block.k_proj, block.v_proj):
        layer.register_forward_hook(lambda module, args, y: kept.append(weakref.ref(y)))
    x = draw().requires_grad_()
    kept.append(weakref.ref(x))
    y = block(x)
    assert PENDING.waiting is None
    y.sum().backward()
    del x, y
    gc.collect()
    assert len(kept) == 4
    assert not any(ref() is not None for ref in kept)


def test_no_gradients(sizes) -> None:
    block = make().eval()
    with torch.no_grad():
        expected = alone(block)(draw())
        sizes.clear()
        torch.testing.assert_close(block(draw()), expected)
        with torch.inference_mode():
            torch.testing.assert_close(block(draw()), expected)
    assert sizes == [3, 1] * 2


@pytest.fixture
def as_compiled(monkeypatch) -> Callable[[nn.Module], Callable[..., Tensor]]:
    # The compiler finds modules by their names.
    monkeypatch.setitem(sys.modules, linear_launch.__name__, linear_launch)
    torch.compiler.reset()
    return lambda block: torch.compile(block, backend="aot_eager", fullgraph=True)


def test_compiled_as_one_graph(sizes, as_compiled) -> None:
    block = make(lora_dropout=0.0)
    expected = results(alone(block))
    sizes.clear()
    check(results(block, as_compiled(block)), expected)
    assert 3 in sizes
    assert 2 not in sizes
    check(results(block), expected)


def test_compiled_with_another_input_for_the_siblings(sizes, as_compiled) -> None:
    block, other = make(lora_dropout=0.0), draw(4)
    expected = results(alone(block), None, other)
    compiled = as_compiled(block)
    for _ in range(3):
        sizes.clear()
        check(results(block, compiled, other), expected)
    # What the last pass runs: nothing in vain.
    assert 3 not in sizes
    assert 2 not in sizes


def test_another_input_for_the_siblings(sizes) -> None:
    """Cross attention: exact, and after the first pass nothing is computed in vain."""
    block, other = make(), draw(4)
    expected = results(alone(block), None, other)
    for launched in ([3, 2, 1], [1, 1, 1, 1]):
        sizes.clear()
        check(results(block, None, other), expected)
        if launched[0] == 3:
            assert sizes[0] == 3
        else:
            assert sizes == launched


def test_input_changed_in_between(sizes) -> None:
    block = make()

    class Changed(Attention):
        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            x = x.clone()
            y = self.q_proj(x)
            x.mul_(2)
            return y + self.k_proj(x)

    block.__class__ = Changed
    single = alone(block)
    with torch.no_grad():
        torch.testing.assert_close(block(draw()), single(draw()))


def test_called_again_with_the_same_input(sizes) -> None:
    block = make(lora_dropout=0.0)
    x = draw()
    with torch.no_grad():
        expected = alone(block).q_proj(x)
        for _ in range(2):
            torch.testing.assert_close(block.q_proj(x), expected)


def test_a_projection_that_is_never_called(sizes) -> None:
    """Others follow: the group is given up rather than computed in vain."""
    block = make()

    class Keyless(Attention):
        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            return self.o_proj(self.q_proj(x))

    block.__class__ = Keyless
    with torch.no_grad():
        for _ in range(3):
            block(draw())
    assert sizes == [3, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("targets", "launched"),
    [
        pytest.param(("q_proj", "v_proj"), [2], id="none on k"),
        pytest.param(("k_proj", "o_proj"), [1, 1], id="none on q and v"),
    ],
)
def test_a_sibling_without_an_adapter(sizes, targets, launched) -> None:
    block = make(targets)
    check(results(block), results(alone(block)))
    assert sizes[: len(launched)] == launched


def test_what_happens_before_a_call_matters(sizes) -> None:
    """A hook may change the input, or fetch the weights."""
    block = make()
    block.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    check(results(block), results(alone(block)))
    assert sizes[0] == 2


def switch_off(block: Attention) -> None:
    block.k_proj.enable_adapters(False)


def merge(block: Attention) -> None:
    block.k_proj.merge()


def take_away(block: Attention) -> None:
    block.k_proj.delete_adapter("default")


@pytest.mark.parametrize("change", [switch_off, merge, take_away])
def test_a_sibling_that_runs_otherwise(sizes, change) -> None:
    block = make(lora_dropout=0.0)
    block(draw())
    change(block)
    sizes.clear()
    with torch.no_grad():
        found = block(draw())
        assert sizes == [2, 1]
        torch.testing.assert_close(found, alone(block)(draw()))


def test_adapters_are_added_and_deleted(sizes, base_of, batch) -> None:
    def lora(rank: int) -> LoraConfig:
        return LoraConfig(r=rank, target_modules=list(NAMES), task_type="CAUSAL_LM")

    model = get_peft_model(base_of(), lora(2))
    set_kernel(model, "exact")
    model.eval()

    def launches(model: PeftModel) -> set[int]:
        sizes.clear()
        with torch.no_grad():
            model(**batch)
        return set(sizes)

    assert launches(model) == {3}
    model.add_adapter("other", lora(5))
    model.set_adapter("other")
    assert launches(model) == {3}
    model.delete_adapter("other")
    model.set_adapter("default")
    assert launches(model) == {3}
    with model.disable_adapter():
        assert launches(model) == set()
    assert launches(model) == {3}


@pytest.mark.parametrize(
    "copied",
    [deepcopy, lambda block: pickle.loads(pickle.dumps(block))],
    ids=["deepcopy", "pickle"],
)
def test_copies_have_groups_of_their_own(sizes, copied) -> None:
    block = make()
    expected = results(block)
    copy = copied(block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    for _ in range(2):
        sizes.clear()
        check(results(copy), expected)
    assert sizes == [3, 1]


def test_a_copy_of_one_layer_leaves_the_others() -> None:
    layer = deepcopy(make().q_proj)
    assert layer(draw()).shape == (2, 5, 8)
    assert PENDING.waiting is None


def test_group_survives_an_error_between_the_calls(sizes) -> None:
    """The next pass is right, whatever still waits."""
    block = make()
    expected = results(alone(block))
    block.q_proj(draw())
    check(results(block), expected)
