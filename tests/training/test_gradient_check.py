"""Before the first step every trained parameter must take part in the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encoded import examples_of
from torch import Tensor, nn

from mixlora_exp.adapters import attach_adapter
from mixlora_exp.adapters.layer import MixLoraFeedForward
from mixlora_exp.adapters.linear import FusedLinear
from mixlora_exp.adapters.mixed_adapters import plain_parameters_of, routed_layers_of
from mixlora_exp.adapters.mixtures.layer import MixtureLinear
from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.config.command import compose
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import MIXTURES, ROUTERS, Mixture, Routing, make_router
from mixlora_exp.kernels.mixture_base import mixture
from mixlora_exp.kernels.routers.top_k import TopK
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.training import TrainSummary, fit
from mixlora_exp.training.gradient_check import check_gradients_flow
from mixlora_exp.training.router_decisions import predicting

METHODS = [
    *(*PAPER_METHODS, *MIXTURES),
    *("lora_r32", "lora_r128", "mixlora_one_expert"),
]
SMALL = ["experiment=smoke", "data.train_limit=8", "trainer.max_steps=1", "trainer.batch_size=8"]
Start = Callable[..., TrainSummary]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Trains one step, `change` applied to the model before."""

    def run(*words: str, change: Callable[[nn.Module], None] | None = None) -> TrainSummary:
        config = compose([*SMALL, *words])
        base = load_model(config.model, torch.float32)
        model = attach_adapter(base, config.method, config.kernel, config.seed)
        if change is not None:
            change(model)
        return fit(
            config=config, model=model, tokenizer=load_tokenizer(config.model),
            examples=examples_of(config), folder=tmp_path, dtype=torch.float32,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes(start: Start, method: str) -> None:
    found = start(f"method={method}")
    assert found.steps == 1
    assert found.not_chosen is not None


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_passes(start: Start, router: str) -> None:
    assert start("method=mixlora", f"method.router={router}").not_chosen is not None


def test_a_layer_whose_forward_is_never_called_is_named(start: Start) -> None:
    def bypass(model: nn.Module) -> None:
        layer = model.base_model.model.model.layers[1].self_attn.v_proj
        assert isinstance(layer, FusedLinear)
        layer.forward = layer.base_layer.forward

    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.v_proj\.lora_A\S* has no gradient"):
        start("method=lora", change=bypass)


class ReadsNoMatrix(Mixture):
    """Its forward is `delta`, which nothing calls."""

    router = None

    def branch(self, x, weights, parts, scaling):
        """Compute zeros (T, out) of rows x (T, in)."""
        return x.new_zeros(len(x), parts["B"].shape[1])

    def delta(self, parts, scaling):
        """Return the matrix that the author meant to be added."""
        return scaling * parts["B"][0] @ parts["A"][0]


class OwnMatrix(Mixture):
    """Has a matrix M that `branch` does not read."""

    def shapes(self, sizes):
        """Return the shapes of A, B and M."""
        return {**super().shapes(sizes), "M": (sizes.rank, sizes.rank)}

    def initial(self, sizes, weight, scaling):
        """Return A, B and M."""
        return {**super().initial(sizes, weight, scaling), "M": torch.eye(sizes.rank)}


class DetachedRouter(Mixture):
    """Reads the router's weights without their graph."""

    def branch(self, x, weights, parts, scaling):
        """Compute the branch of rows x (T, in)."""
        return super().branch(x, weights.detach(), parts, scaling)


@pytest.mark.parametrize(
    ("bad", "words", "named"),
    [
        (ReadsNoMatrix, ["method=pissa"], r"q_proj\.lora_A"),
        (OwnMatrix, ["method=mola", "method.num_experts=4"], r"q_proj\.lora_M"),
        (DetachedRouter, ["method=mola", "method.num_experts=4"], r"q_proj\.lora_router"),
        (
            DetachedRouter,
            ["method=mola", "method.num_experts=4", "method.router_loss_coef=0.01"],
            r"q_proj\.lora_router",
        ),
    ],
)
def test_a_registered_method_that_does_not_train_is_named(
    start: Start, monkeypatch: pytest.MonkeyPatch, bad: type[Mixture], words: list[str], named: str
) -> None:
    name = words[0].removeprefix("method=")
    monkeypatch.delitem(MIXTURES, name)  # Put back afterwards; the command line knows the name.
    mixture(name)(bad)
    with pytest.raises(UserError, match=rf"layers\.0\.self_attn\.{named} has no gradient"):
        start(*words)


def test_an_unused_matrix_is_named(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    real = MixLoraFeedForward.block

    def without_up(self: MixLoraFeedForward, *args: object) -> object:
        block = real(self, *args)
        return replace(block, up=replace(block.up, experts=None))

    monkeypatch.setattr(MixLoraFeedForward, "block", without_up)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.lora_A_up has no gradient"):
        start("method=mixlora", "kernel=exact")


def detached(routing: Routing) -> Routing:
    return replace(routing, weights=routing.weights.detach())


def test_a_detached_router_is_named_even_where_its_loss_trains_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MixLoraFeedForward.route
    monkeypatch.setattr(
        MixLoraFeedForward, "route", lambda *given, **more: detached(real(*given, **more))
    )
    for coefficient in ("0", "0.01"):
        with pytest.raises(UserError, match=r"layers\.0\.mlp\.lora_router has no gradient"):
            start("method=mixlora", f"method.router_loss_coef={coefficient}")


def test_modules_without_any_expert_are_listed(start: Start) -> None:
    """Rows that predict a label found no place there."""
    models: list[nn.Module] = []
    words = ["method=mola", "method.router=switch", "method.router_loss_coef=1e-3"]
    found = start(*words, "method.num_experts=4", "method.top_k=1", change=models.append)
    routed = routed_layers_of(models[0], "default")
    everything = {name: list(range(m.router["default"].num_experts)) for name, m in routed.items()}
    assert any(found.not_chosen.get(name) == every for name, every in everything.items())


def test_a_run_without_any_expert_is_stopped(start: Start) -> None:
    """None is above the threshold: but for attention nothing would be trained."""
    with pytest.raises(UserError, match=r"has an expert in \S*layers\.0\.mlp, nor in any other"):
        start("method=mixlora", "method.router=threshold", "+method.router_options.t_max=1")


def test_rows_without_a_loss_of_their_own_teach_experts(start: Start) -> None:
    """The first rows have the places; the answer, which has the loss, sees them by attention."""
    words = ["method=mixlora", "method.router=switch", "method.top_k=1"]
    found = start(*words, "+method.router_options.capacity=4")
    assert found.steps == 1
    assert any("layers.1" in name for name in found.not_chosen)


def test_a_router_that_gives_no_weight_is_stopped(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TopK.choose

    def without(self: TopK, *given: object, **more: object) -> object:
        chosen = real(self, *given, **more)
        return replace(chosen, weights=chosen.weights * 0)

    monkeypatch.setattr(TopK, "choose", without)
    with pytest.raises(UserError, match="no row of the first micro-batch has an expert"):
        start("method=mola")


def test_each_router_decides_which_loss_must_reach_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K = 2 in the first layer, K = 1 in the second, whose routers have their own loss alone."""
    words = ["method=mola", "method.num_experts=4", "method.top_k=2/1"]
    assert start(*words, "method.router_loss_coef=1e-3").steps == 1
    with pytest.raises(UserError, match=r"layers\.1\S*lora_router learns nothing: each row"):
        start(*words, "method.router_loss_coef=0")
    real = MixtureLinear.route
    monkeypatch.setattr(
        MixtureLinear, "route", lambda *given, **more: detached(real(*given, **more))
    )
    with pytest.raises(UserError, match=r"layers\.0\S*lora_router has no gradient"):
        start(*words, "method.router_loss_coef=1e-3")


def test_a_lone_weight_of_1_does_not_count_as_a_gradient(start: Start) -> None:
    """w / w has one by rounding."""
    words = ["method=mola", "method.num_experts=4", "method.router=top_p",
             "+method.router_options.p=0.01"]  # fmt: skip
    with pytest.raises(UserError, match=r"lora_router learns nothing: each row of the first"):
        start(*words, "method.router_loss_coef=0")
    assert start(*words, "method.router_loss_coef=1e-3").steps == 1


def test_rows_that_predict_a_label() -> None:
    ids, labels = torch.zeros(2, 4), torch.tensor([[5, 6, -100], [-100, -100, 7]])
    last = {"labels": labels, "logits_to_keep": torch.tensor([1, 2, 3])}
    found = predicting({"input_ids": ids, **last})
    assert found.view(2, 4).int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
    row = {
        "labels": torch.tensor([[-100, 5, -100, 6]]),
        "logits_to_keep": torch.tensor([1, 2, 5, 6]),
    }
    found = predicting({"input_ids": torch.zeros(1, 8), **row})
    assert found.int().tolist() == [0, 1, 0, 0, 0, 1, 0, 0]
    whole = torch.cat([torch.full((2, 1), 9), labels], dim=1)
    found = predicting({"input_ids": ids, "labels": whole})
    assert found.view(2, 4).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 0]]


def test_a_router_with_one_expert_a_token_learns_from_its_loss_alone(start: Start) -> None:
    """One weight, normalised, is always 1."""
    assert start("method=mixlora", "method.top_k=1").steps == 1


@pytest.mark.parametrize("method", ["mixlora", "mixdora", "mola"])
@pytest.mark.parametrize("router", [n for n, r in ROUTERS.items() if r.chooses and not r.frozen])
def test_a_router_of_one_expert_is_not_trained(start: Start, method: str, router: str) -> None:
    """It has no gradient. With one expert in the first layer alone, the others' are trained."""
    try:
        make_router(router, {"num_experts": 1, "top_k": 1}, {})
    except ValueError as error:
        pytest.skip(f"{router} takes no single expert: {error}")
    experts = "1/2" if method == "mola" else "1"
    models: list[nn.Module] = []
    words = [f"method.num_experts={experts}", "method.top_k=1", f"method.router={router}"]
    words.append("method.router_loss_coef=0.001")  # All that trains a router of one expert a token.
    start(f"method={method}", *words, change=models.append)
    trained = plain_parameters_of(models[0], "default")
    found = {name.split(".layers.")[1][0] for name in trained if "lora_router" in name}
    assert found == ({"1"} if method == "mola" else set())


class Toy(nn.Module):
    """`x A B` behind experts of which some are chosen."""

    def __init__(self, chosen: list[int]) -> None:
        super().__init__()
        self.chosen = chosen
        self.a = nn.Parameter(torch.ones(4, 2, 3))
        self.b = nn.Parameter(torch.zeros(4, 3, 2))
        self.unused = nn.Parameter(torch.ones(2))

    def loss(self) -> Tensor:
        return sum((self.b[e] @ self.a[e]).sum() for e in self.chosen) / len(self.chosen)


def named(toy: Toy, *names: str) -> dict[str, nn.Parameter]:
    return {f"block.{name}": getattr(toy, name) for name in names}


def test_experts_without_tokens_are_listed_and_weights_stay() -> None:
    toy = Toy([0, 2])
    with torch.no_grad():
        toy.b[0, 0, 0] = -0.0
    before = {name: p.detach().clone() for name, p in toy.named_parameters()}
    state = torch.get_rng_state()
    found = check_gradients_flow(named(toy, "a", "b"), {"block.a": 4, "block.b": 4}, toy.loss)
    assert found == {"block": [1, 3]}
    for name, parameter in toy.named_parameters():
        assert parameter.grad is None
        # Bits, the sign of zero too.
        assert torch.equal(parameter.view(torch.int32), before[name].view(torch.int32))
    assert torch.equal(torch.get_rng_state(), state)


def test_faults_of_single_parameters_and_experts() -> None:
    toy, experts = Toy([0, 1]), {"block.a": 4, "block.b": 4}
    with pytest.raises(UserError, match=r"block\.unused has no gradient"):
        check_gradients_flow(named(toy, "a", "b", "unused"), {}, toy.loss)
    with pytest.raises(UserError, match=r"block\.b has no gradient for expert 1, which runs"):
        check_gradients_flow(
            named(toy, "a", "b"), experts,
            lambda: (toy.b[0] @ toy.a[0]).sum() + (toy.b[1].detach() @ toy.a[1]).sum(),
        )  # fmt: skip
    with pytest.raises(UserError, match=r"block\.a has a gradient that is not finite"):
        check_gradients_flow(named(toy, "a"), {}, lambda: (toy.a - 1).sqrt().sum())
    assert check_gradients_flow(named(toy, "a"), {}, lambda: toy.a.sum() * torch.nan) is None


def test_nothing_of_a_run_changes(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*, checked: bool) -> dict[str, Tensor]:
        models = []
        if not checked:
            monkeypatch.setattr(
                "mixlora_exp.training.trainer.check_gradients_flow", lambda *values: None
            )
        start("method=mixdora", "trainer.max_steps=3", "method.dropout=0.2", change=models.append)
        return {n: p.detach().clone() for n, p in plain_parameters_of(models[0], "default").items()}

    with_check, without = trained(checked=True), trained(checked=False)
    for name, weight in without.items():
        assert torch.equal(with_check[name], weight), name
