"""Routers in models: what files hold, what is trained, rows of several adapters, noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixlora_exp.adapters import attach_adapter, load_adapter, save_adapter
from mixlora_exp.adapters.dropout import use_dropout_stream
from mixlora_exp.config.command import compose
from mixlora_exp.evaluation.packing import Request, pack, pad_packed
from mixlora_exp.kernels import ROUTERS, DropoutKey, DropoutStream, make_router
from mixlora_exp.models import load_model
from mixlora_exp.models.parameters import count_parameters, routers_of

OPTIONS = {
    "top_k": "router_options={temperature:2.0,normalise:false}",
    "top_p": "router_options={p:0.6,limit:3,z_loss:0.01}",
    "switch": "router_options={capacity_factor:0.5}",
    "threshold": "router_options={t_max:0.9,shifted_loss:true}",
    "uniform": "router_loss_reduction=sum",
}
WORDS = {name: f"router={name} {OPTIONS.get(name, '')}".strip() for name in ROUTERS}


def attach(words: str, seed: int = 0):
    own = [f"{'+' * ('={' in word)}method.{word}" for word in words.split()]
    config = compose(["model=tiny", "method=mixlora", "method.rank=2", "kernel=exact", *own])
    base = load_model(config.model, torch.float32, seed=1)
    return attach_adapter(base, config.method, config.kernel, seed), config


@torch.no_grad()
def spread(model) -> None:
    """Routers that decide, and experts that differ."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            size = 0.5 if "lora_router" in name else 0.1
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(model, batch, **given) -> torch.Tensor:
    return model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **given
    ).logits


@pytest.mark.parametrize("router", ROUTERS)
def test_saved_and_loaded(router, batch, tmp_path: Path) -> None:
    model, config = attach(WORDS[router])
    counted = count_parameters(config.model, config.method)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == counted.trainable
    spread(model)
    expected = logits(model.eval(), batch)
    save_adapter(model, tmp_path)
    loaded = load_adapter(load_model(config.model, torch.float32, seed=1), tmp_path, config.kernel)
    assert torch.equal(logits(loaded, batch), expected)


@pytest.mark.parametrize("router", ROUTERS)
def test_what_is_trained(router, batch) -> None:
    model, config = attach(WORDS[router])
    spread(model)
    model.set_adapter("default")
    # Noise of a router is drawn for rows with names.
    stream, rows = DropoutStream(seed=1), torch.arange(batch["input_ids"].numel())
    stream.begin(0, rows // batch["input_ids"].shape[1], rows % batch["input_ids"].shape[1])
    use_dropout_stream(model, "default", stream)
    model.train()(**batch).loss.backward()
    own, frozen = routers_of(config.model, config.method)[0], ROUTERS[router].frozen
    routers = {n: p for n, p in model.named_parameters() if "lora_router" in n}
    assert len(routers) == 2 * len(own.initial(8))
    for parameter in routers.values():
        assert parameter.requires_grad is not frozen
        assert (parameter.grad is None) if frozen else parameter.grad.abs().max() > 0
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kernel", ["exact", "reference"])
def test_rows_of_several_adapters(kernel, batch, tmp_path: Path) -> None:
    """Each decides about its own rows, padding left out, as if it were alone."""
    chosen = [WORDS["switch"], WORDS["threshold"], "router=top_k"]
    alone, names = [], []
    for number, words in enumerate(chosen):
        model, config = attach(words, number)
        spread(model)
        save_adapter(model, tmp_path / str(number))
        model.eval()
        rows = {key: value[number : number + 1] for key, value in triple(batch).items()}
        alone.append(logits(model, rows))
        names.append(f"of{number}")
    base = load_model(config.model, torch.float32, seed=1)
    config.kernel.name = type(config.kernel.name)[kernel]
    model = load_adapter(base, tmp_path / "0", config.kernel)
    for number, name in enumerate(names):
        model.load_adapter(str(tmp_path / str(number)), name)
    found = logits(model.eval(), triple(batch), adapter_names=names)
    real = triple(batch)["attention_mask"].bool()
    for one, other, keep in zip(found, alone, real, strict=True):
        torch.testing.assert_close(one[keep], other[0][keep], rtol=1e-4, atol=1e-5)


def triple(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([value, value[1:]]) for key, value in batch.items()}


def test_padding_takes_no_place_where_questions_are_packed() -> None:
    """An expert of `switch` holds so many rows: others beside them would change the output."""
    model, _ = attach(WORDS["switch"])
    spread(model)
    model.eval()
    rows = [list(range(5, 16)), [7, 3, 9, 4]]
    packed = pad_packed([pack([Request([*row, 0], 1)]) for row in rows], 0, torch.float32)
    mask = torch.tensor([[0] * (11 - len(row)) + [1] * len(row) for row in rows])
    found = [
        model(**{**packed, "attention_mask": own}).logits[mask.bool()]
        for own in (packed["attention_mask"], mask)
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


class TestNoise:
    EXPERTS, WIDTH = 4, 9

    def router(self, jitter: float = 0.1):
        return make_router("top_k", {"num_experts": self.EXPERTS, "top_k": 2}, {"jitter": jitter})

    def logits(self, rows: list[int], step: int = 5, place: str = "a", **given) -> torch.Tensor:
        stream = DropoutStream(seed=7)
        examples = torch.tensor(rows)
        stream.begin(step, examples // 4, examples % 4)
        x = torch.randn(12, self.WIDTH, generator=torch.Generator().manual_seed(1))
        weight = torch.randn(self.EXPERTS, self.WIDTH, generator=torch.Generator().manual_seed(2))
        self.bound = 0.1 * x.abs() @ weight.abs().T
        given = {"training": True, "key": DropoutKey(stream, place), **given}
        route = self.router().route_masked
        if given.pop("compiled", False):
            route = torch.compile(route, backend="aot_eager", fullgraph=True)
        return route(x[rows], {"": weight}, None, **given).logits

    def test_it_depends_on_names_and_not_on_the_batch(self) -> None:
        before = torch.get_rng_state()
        whole = self.logits(list(range(12)))
        parts = [self.logits([7, 3, 8]), self.logits([0, 11])]
        assert torch.equal(torch.get_rng_state(), before)
        torch.testing.assert_close(torch.cat(parts), whole[[7, 3, 8, 0, 11]])
        torch.testing.assert_close(self.logits(list(range(12)), compiled=True), whole)
        plain = self.logits(list(range(12)), training=False)
        others = [self.logits(list(range(12)), **c) for c in ({"step": 6}, {"place": "b"})]
        for found in (whole, *others):
            difference = (found - plain).abs()
            assert (difference > 0).all()
            assert (difference <= self.bound).all()
        assert not torch.equal(whole, others[0])
        assert not torch.equal(whole, others[1])

    def test_rows_without_names_have_none(self) -> None:
        with pytest.raises(ValueError, match=r"router_options.jitter=0.1 needs rows with names"):
            self.logits([0, 1], key=None)
        with torch.no_grad():
            scored = self.logits([0, 1], key=None)
        assert torch.equal(scored, self.logits([0, 1], training=False))
