"""The share of padding that a plan tells is that of the batches that training gets."""

from __future__ import annotations

import pytest
from composed import compose

from mixlora_exp.cli.train import execute
from mixlora_exp.data.collator import Collator
from mixlora_exp.data.encoding import encode_examples
from mixlora_exp.data.sources import load_split
from mixlora_exp.models import load_tokenizer
from mixlora_exp.plans.plan import plan
from mixlora_exp.training.steps import optimizer_steps

WORDS = [
    "model=tiny", "data=embedded", "task=multi", "data.forms=[label,text]", "trainer.epochs=1",
    "trainer.batch_size=8", "trainer.micro_batch_size=4", "data.train_limit=10",
]  # fmt: skip


@pytest.mark.parametrize("order", ["bucketed", "fixed"])
def test_padding_is_that_of_the_first_epochs_batches(
    order: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, f"trainer.order={order}"]
    config = compose(words)
    items = [
        item
        for task in config.task.train
        for item in load_split(config.data, task, "train").limited(10, config.data.seed).items
    ]
    examples = encode_examples(load_tokenizer(config.model), items, config.data)
    collate = Collator(0, config.trainer.loss_on)
    real, positions = 0, 0
    parts = [part for step in optimizer_steps(config, examples) for part in step.micro_batches]
    for batch in parts:
        mask = collate([examples[i] for i in batch.examples])["attention_mask"]
        real, positions = real + int(mask.sum()), positions + mask.numel()
    found = plan(config)
    assert found.padding == pytest.approx(1 - real / positions)
    assert execute([*words, "dry_run=true"]) == 0
    told = f"(counted; {100 * found.padding:.0f} % of the batches is padding)"
    assert told in capsys.readouterr().out


def test_batches_of_like_length_have_less_padding() -> None:
    alike, mixed = (plan(compose([*WORDS, f"trainer.order={o}"])) for o in ("bucketed", "fixed"))
    assert 0 < alike.padding < mixed.padding / 2


def test_without_a_tokenizer_padding_is_not_counted() -> None:
    found = plan(compose(["model=llama2_7b"]))
    assert found.tokens > 0
    assert found.padding is None
