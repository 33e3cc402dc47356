"""The loss over the vocabulary without all logits: the same loss and gradients, less memory."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from mixlora_exp.adapters import set_kernel
from mixlora_exp.config.choices import Head
from mixlora_exp.kernels import loss as loss_kernel
from mixlora_exp.kernels.loss import linear_cross_entropy
from mixlora_exp.training.head import loss_from_hidden, resolve_head


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("ignored", [0, 4, 11], ids=["all rows count", "some", "none counts"])
def test_loss_and_gradient_are_those_of_the_whole_logits(rows, ignored, monkeypatch) -> None:
    monkeypatch.setattr(loss_kernel, "CHUNK_ELEMENTS", 29 * rows)
    hidden = torch.randn(11, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(29, 7, dtype=torch.float64)
    labels = torch.randint(29, (11,))
    labels[torch.randperm(11)[:ignored]] = -100
    expected = functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    (truth,) = torch.autograd.grad(3 * expected, hidden)
    found = linear_cross_entropy(hidden, weight, labels)
    (gradient,) = torch.autograd.grad(3 * found, hidden)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, truth, rtol=1e-12, atol=1e-12)


def test_rows_that_do_not_count_may_hold_nan() -> None:
    hidden = torch.randn(4, 7, requires_grad=True)
    weight, labels = torch.randn(29, 7), torch.tensor([1, -100, 3, 4])
    broken = hidden.detach().clone()
    broken[1] = float("nan")
    broken.requires_grad_()
    for rows in (hidden, broken):
        linear_cross_entropy(rows, weight, labels).backward()
    assert torch.equal(broken.grad[[0, 2, 3]], hidden.grad[[0, 2, 3]])
    assert (broken.grad[1] == 0).all()


def test_trained_projection_is_refused() -> None:
    with pytest.raises(ValueError, match="frozen"):
        linear_cross_entropy(
            torch.randn(2, 3), torch.randn(5, 3, requires_grad=True), torch.zeros(2).long()
        )


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
    )
    made = LlamaForCausalLM(config)
    made.lm_head.requires_grad_(False)
    return made


def _loss(model, head: Head, **extra) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(12).view(2, 6) % 50
    labels = ids.masked_fill(ids % 5 == 0, -100)
    model.zero_grad()
    with loss_from_hidden(model, head):
        loss = model(input_ids=ids, labels=labels, **extra).loss
    loss.backward()
    return loss.detach(), model.model.layers[0].mlp.down_proj.weight.grad.clone()


@pytest.mark.parametrize("extra", [{}, {"num_items_in_batch": 17}], ids=["mean", "share of a step"])
def test_inside_a_model(model, extra) -> None:
    full, chunked = _loss(model, Head.full, **extra), _loss(model, Head.chunked, **extra)
    for found, expected in zip(chunked, full, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_model_is_left_as_it_was(model) -> None:
    ids = torch.arange(6).view(1, 6)
    before = model(input_ids=ids).logits
    with pytest.raises(RuntimeError, match="stop"), loss_from_hidden(model, Head.chunked):
        raise RuntimeError("stop")
    after = model(input_ids=ids, labels=ids)
    assert torch.equal(after.logits, before)
    assert "forward" not in vars(model.lm_head)


def test_other_projections_keep_the_models_own_loss(model) -> None:
    """One that is trained has a gradient of its own, which the chunks do not give."""
    model.lm_head.requires_grad_(True)
    ids = torch.arange(6).view(1, 6)
    with loss_from_hidden(model, Head.chunked):
        output = model(input_ids=ids, labels=ids)
    assert output.logits.shape == (1, 6, 50)
    output.loss.backward()
    assert model.lm_head.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["lm_head", "q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
    ],
    ids=["lora", "dora", "trained copy", "embedding"],
)
@pytest.mark.parametrize("kernel", ["auto", "peft"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_the_projection_is_trained(settings, kernel, tied) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=50, tie_word_embeddings=tied,
    )  # fmt: skip
    peft = LoraConfig(r=2, init_lora_weights=False, **settings)
    adapted = get_peft_model(LlamaForCausalLM(config), peft)
    set_kernel(adapted, kernel)
    ids = torch.arange(12).view(2, 6)
    found = []
    for head in (Head.full, Head.chunked):
        adapted.zero_grad()
        with loss_from_hidden(adapted.get_base_model(), head):
            loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        trained = {n: p.grad.clone() for n, p in adapted.named_parameters() if p.requires_grad}
        assert all(gradient.abs().max() > 0 for gradient in trained.values())
        found.append((loss.detach(), trained))
    torch.testing.assert_close(*found)


def test_a_forward_pass_that_was_replaced_is_put_back(model) -> None:
    """Libraries put one of their own on a module, accelerate for example."""

    def theirs(hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    model.lm_head.forward = theirs
    with loss_from_hidden(model, Head.chunked):
        pass
    assert vars(model.lm_head)["forward"] is theirs


def test_auto_is_chunked_on_a_cpu() -> None:
    assert resolve_head(Head.auto, torch.device("cpu")) is Head.chunked
    assert resolve_head(Head.full, torch.device("cuda")) is Head.full
