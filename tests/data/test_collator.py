"""Batches: labels, padding in front, and the columns whose logits are needed."""

from __future__ import annotations

import pytest
import torch
from composed import compose
from transformers import PreTrainedModel

from mixlora_exp.config.schema import LossOn
from mixlora_exp.data.collator import Collator, pad_left
from mixlora_exp.data.encoding import Example, encode_examples
from mixlora_exp.data.sources import load_split
from mixlora_exp.models import load_model, load_tokenizer

PAD = 0
EXAMPLES = [
    Example([1, 5, 6, 7, 8, 2], 2, "t"),
    Example([1, 9, 2], 1, "t"),
    Example([1, 3, 4, 5, 2], 3, "t"),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["tiny", "tiny_gemma"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    built = load_model(compose([f"model={request.param}"]).model, torch.float32, seed=1)
    built.set_attn_implementation("eager")
    return built


def embedded_examples(count: int) -> list[Example]:
    config = compose(["model=tiny", "data=embedded"])
    items = [load_split(config.data, t, "train").items[0] for t in ("boolq", "arc_e", "piqa")]
    items += load_split(config.data, "siqa", "train").items
    return encode_examples(load_tokenizer(config.model), items[:count], config.data)


def test_padding_stands_in_front() -> None:
    batch = pad_left([[4, 5, 6], [7]], pad_id=9)
    assert batch["input_ids"].tolist() == [[4, 5, 6], [9, 9, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_examples_are_numbered_within_the_optimizer_step() -> None:
    for padding in (False, True):
        collate = Collator(PAD, LossOn.all, padding=padding)
        assert collate(EXAMPLES)["example"].tolist() == [0, 1, 2]
        assert collate(EXAMPLES[:2], first=6)["example"].tolist() == [6, 7]


def test_padding_counts_where_a_switch_asks_for_it() -> None:
    batch = Collator(PAD, LossOn.all, padding=True, padding_side="right")(EXAMPLES)
    assert batch["labels"].tolist() == batch["input_ids"].tolist()
    # After the answer, where it acts as an end of the sequence.
    assert batch["labels"][1].tolist() == [1, 9, 2, PAD, PAD, PAD]
    # It is still not attended to.
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, 0, 0, 0]
    # Positions count through it, so that padding tokens can be told apart.
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    in_front = Collator(PAD, LossOn.all, padding=True)(EXAMPLES)
    assert in_front["labels"][1].tolist() == [PAD, PAD, PAD, 1, 9, 2]
    assert in_front["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]] * 3


def test_loss_on_the_answer_alone() -> None:
    batch = Collator(PAD, LossOn.answer)(EXAMPLES)
    assert batch["labels"].tolist() == [
        [-100, -100, 8, 2],
        [-100, -100, -100, 2],
        [-100, 4, 5, 2],
    ]
    # The longest answer and the token before it, which predicts its first.
    assert batch["logits_to_keep"].tolist() == [2, 3, 4, 5]
    assert batch["input_ids"].shape == (3, 6)


def test_loss_on_everything_but_padding() -> None:
    batch = Collator(PAD, LossOn.all)(EXAMPLES)
    assert "logits_to_keep" not in batch
    assert batch["labels"].tolist() == [
        [-100, 5, 6, 7, 8, 2],
        [-100, -100, -100, -100, 9, 2],
        [-100, -100, 3, 4, 5, 2],
    ]


@pytest.mark.parametrize("loss_on", list(LossOn))
def test_a_padding_token_inside_an_example_counts(loss_on: LossOn) -> None:
    """Padding is what the mask says, not what has the id of the padding token."""
    batch = Collator(2, loss_on)(EXAMPLES)
    assert (batch["labels"][:, -1] == 2).all()
    assert batch["attention_mask"].sum().item() == 14


@pytest.mark.parametrize("loss_on", list(LossOn))
@torch.no_grad()
def test_loss_of_a_batch_is_the_mean_over_its_tokens(
    loss_on: LossOn, model: PreTrainedModel
) -> None:
    examples = embedded_examples(6)
    assert len({len(example.input_ids) for example in examples}) > 1
    collate = Collator(PAD, loss_on)
    together = model(**collate(examples)).loss
    total, tokens = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        likelihoods = model(ids).logits[0, :-1].log_softmax(-1)
        wanted = -likelihoods.gather(1, ids[0, 1:, None])[:, 0]
        counted = wanted[-example.answer_length :] if loss_on is LossOn.answer else wanted
        alone = model(**collate([example])).loss
        assert float(alone) == pytest.approx(float(counted.mean()), rel=1e-5)
        total, tokens = total + float(counted.sum()), tokens + len(counted)
    assert float(together) == pytest.approx(total / tokens, rel=1e-5)


@torch.no_grad()
def test_padding_in_front_changes_no_logits(model: PreTrainedModel) -> None:
    examples = embedded_examples(5)
    rows = [example.input_ids for example in examples]
    batch = pad_left(rows, PAD)
    logits = model(**batch).logits
    for row, padded in zip(rows, logits, strict=True):
        alone = model(torch.tensor([row])).logits[0]
        torch.testing.assert_close(padded[-len(row) :], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_kept_columns_are_the_last_logits(model: PreTrainedModel) -> None:
    batch = Collator(PAD, LossOn.answer)(embedded_examples(4))
    labels = batch.pop("labels")
    kept = batch.pop("logits_to_keep")
    full = model(**batch).logits
    some = model(**batch, logits_to_keep=kept).logits
    assert some.shape[1] == labels.shape[1] == len(kept)
    torch.testing.assert_close(some, full[:, -len(kept) :], rtol=0, atol=1e-5)
