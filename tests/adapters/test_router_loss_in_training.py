"""The router loss beside the model's own, in training with and without gradient checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

COEFFICIENT = 0.5


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_loss_is_the_models_own_plus_the_router_loss(model_of, batch, family, dora) -> None:
    model = model_of(family, use_dora=dora, router_loss_coef=COEFFICIENT)
    own = model.eval()(**batch)
    assert "aux_loss" not in own
    output = model.train()(**batch)
    report = model.base_model.router_report
    assert torch.equal(output["aux_loss"], report.loss)
    assert output["aux_loss"].item() > 1.0 - 1e-3
    torch.testing.assert_close(output.loss, own.loss + COEFFICIENT * report.loss)
    as_tuple = model(**batch, return_dict=False)
    torch.testing.assert_close(as_tuple[0], output.loss)


def test_router_loss_without_labels_stands_alone(model_of, batch) -> None:
    model = model_of().train()
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert output.loss is None
    assert output["aux_loss"].requires_grad


@pytest.mark.parametrize("kind", ["argmax", "topk"])
@pytest.mark.parametrize("pooling", ["layer", "all"])
def test_report_is_eq_8_over_real_tokens(model_of, batch, kind, pooling) -> None:
    model = model_of(router_loss=kind, router_loss_pooling=pooling).eval()
    model(**batch)
    real = batch["attention_mask"].flatten().bool()
    layers = [block.routing for block in model.base_model.feed_forwards()]
    shares, masses, counts = [], [], []
    for routing in layers:
        chosen = torch.nn.functional.one_hot(routing.experts[real], 4).float()
        counts.append(chosen.sum(dim=(0, 1)))
        shares.append((chosen if kind == "topk" else chosen[:, :1]).sum(dim=1).mean(dim=0))
        masses.append(routing.probabilities[real].mean(dim=0))
    share, mass = torch.stack(shares), torch.stack(masses)
    if pooling == "all":
        expected = 4 * (share.mean(dim=0) * mass.mean(dim=0)).sum()
    else:
        expected = torch.stack([4 * (f * p).sum() for f, p in zip(share, mass, strict=True)]).mean()
    report = model.base_model.router_report
    torch.testing.assert_close(report.loss, expected)
    torch.testing.assert_close(report.counts, torch.stack(counts))


def test_padding_does_not_change_the_router_loss(model_of, batch_of) -> None:
    model = model_of().train()
    batch = batch_of(rows=1)
    plain = model(**batch)
    wider = {
        key: torch.nn.functional.pad(value, (0, 5), value=-100 if key == "labels" else 0)
        for key, value in batch.items()
    }
    padded = model(**wider)
    torch.testing.assert_close(padded["aux_loss"], plain["aux_loss"])
    torch.testing.assert_close(padded.loss, plain.loss)


def test_router_loss_counts_once_per_optimizer_step(model_of, batch_of, dora) -> None:
    """Each micro-batch adds its share of the step's label tokens, in loss and gradient."""
    model = model_of(use_dora=dora, router_loss_coef=COEFFICIENT).train()
    batches = [batch_of(rows=1, seed=1), batch_of(rows=3, seed=2), batch_of(rows=2, seed=4)]
    tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    assert len(set(tokens)) == 3
    items = torch.tensor(sum(tokens))
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=items).loss
        loss.backward()
        total += loss.item()
    summed = gradients(model)
    model.zero_grad()
    expected = 0.0
    for batch, count in zip(batches, tokens, strict=True):
        loss = model(**batch).loss * count / sum(tokens)
        loss.backward()
        expected += loss.item()
    assert total == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about names of methods
def test_checkpointing_gives_the_same_loss_and_gradients(model_of, batch, family, dora) -> None:
    """With dropout, whose masks are drawn again; the router loss reaches through it too."""
    results = []
    for checkpointed in (False, True):
        model = model_of(
            family, use_dora=dora, lora_dropout=0.2, router_loss_coef=COEFFICIENT
        ).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(4)
        passes = 0

        def count(*_) -> None:
            nonlocal passes
            passes += 1

        model.base_model.feed_forwards()[0].register_forward_pre_hook(count)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        assert passes == 1 + checkpointed
        results.append((loss.item(), gradients(model)))
    (plain, expected), (loss, found) = results
    assert loss == plain
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    "scoring",
    [
        pytest.param(torch.no_grad, id="no_grad"),
        pytest.param(torch.inference_mode, id="inference_mode, whose tensors autograd refuses"),
    ],
)
def test_scoring_first_does_not_change_training(model_of, batch, dora, scoring) -> None:
    found = []
    for scored in (False, True):
        model = model_of(use_dora=dora)
        if scored:
            with scoring():
                model.eval()(**batch)
        loss = model.train()(**batch).loss
        loss.backward()
        found.append((loss.item(), gradients(model)))
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name


def test_training_lowers_the_loss(model_of, batch, family, dora) -> None:
    model = model_of(family, drawn=False, use_dora=dora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def checkpoint_all(model) -> None:
    """By transformers, as a Trainer does it."""
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()


def checkpoint_every_second(model) -> None:
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": True}, 2)
    model.enable_input_require_grads()


def checkpoint_one_block(model) -> None:
    """By hand, around one feed-forward block."""
    block = model.base_model.feed_forwards()[1]
    whole = block.forward
    block.forward = lambda x: checkpoint(whole, x, use_reentrant=True)
    model.enable_input_require_grads()


WAYS = [checkpoint_all, checkpoint_every_second, checkpoint_one_block]
SILENT = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, names of methods


def without_labels(batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def frozen_routers(model) -> None:
    """The router loss still has a gradient for what is below a router's input."""
    for block in model.base_model.feed_forwards():
        block.lora_router.requires_grad_(False)


@SILENT
@pytest.mark.parametrize("labels", [True, False], ids=["with labels", "loss by the caller"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained routers", "frozen routers"])
@pytest.mark.parametrize("checkpointed", WAYS)
def test_reentrant_checkpointing_is_refused(model_of, batch, checkpointed, frozen, labels) -> None:
    """It would train without the router loss, and not say so."""
    model = model_of(router_loss_coef=COEFFICIENT).train()
    if frozen:
        frozen_routers(model)
    checkpointed(model)
    inputs = batch if labels else without_labels(batch)
    with pytest.raises(ValueError, match=r"router_loss_coef=0.5 .*'use_reentrant': False"):
        model(**inputs, use_cache=False)


@SILENT
def test_the_way_out_works_after_the_refusal(model_of, batch) -> None:
    model = model_of(router_loss_coef=COEFFICIENT).train()
    checkpoint_all(model)
    with pytest.raises(ValueError, match="from 2 of 2 layers with routers"):
        model(**batch, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch, use_cache=False).loss.backward()
    found = gradients(model)
    plain = model_of(router_loss_coef=COEFFICIENT).train()
    plain(**batch).loss.backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@SILENT
@pytest.mark.parametrize("checkpointed", WAYS)
def test_reentrant_checkpointing_stays_where_no_router_loss_counts(
    model_of, batch, checkpointed
) -> None:
    """With the gradients that the model has without it."""
    found = []
    for way in (None, checkpointed):
        model = model_of(router_loss_coef=0.0).train()
        if way is not None:
            way(model)
        model(**batch, use_cache=False).loss.backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@SILENT
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_model_of_which_nothing_trains_is_not_refused(model_of, batch) -> None:
    model = model_of(router_loss_coef=COEFFICIENT).train().requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert model(**batch, use_cache=False).loss.isfinite()


@SILENT
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("scoring", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("whole", [True, False], ids=["all in training mode", "blocks alone"])
def test_evaluation_with_dropout_left_on_is_no_training(model_of, batch, scoring, whole) -> None:
    """A loss in training mode, without gradients: checkpointing is at rest, and nothing lost."""
    model = model_of(router_loss_coef=COEFFICIENT, lora_dropout=0.1)
    model.train(whole)
    checkpoint_all(model)
    for block in model.base_model.feed_forwards():
        block.train()
    with scoring():
        output = model(**batch, use_cache=False)
    assert output.loss.isfinite()


@SILENT
def test_evaluation_mode_with_gradients_is_no_training(model_of, batch) -> None:
    """As for attributions: no router loss is in it."""
    model = model_of(router_loss_coef=COEFFICIENT)
    checkpoint_one_block(model)
    model.eval()(**batch).loss.backward()


@SILENT
def test_whole_model_checkpointed_keeps_the_router_loss(model_of, batch) -> None:
    """Its loss is computed again with it, so nothing is lost."""
    found = []
    for inside in (False, True):
        model = model_of(router_loss_coef=COEFFICIENT).train()

        def loss_of(switch, model=model) -> torch.Tensor:
            return model(**batch).loss * switch

        switch = torch.ones((), requires_grad=True)
        loss = checkpoint(loss_of, switch, use_reentrant=True) if inside else loss_of(switch)
        loss.backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)
