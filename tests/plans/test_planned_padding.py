"""The share of padding that a plan tells is that of the batches that training gets."""

from __future__ import annotations

import json
import re

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


def test_memory_is_that_of_the_longest_row(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """Free text is not cut at `data.cutoff_length`."""
    words = [
        "model=tiny", "task=metamath_gsm8k", "data=local", f"data.path={tmp_path}",
        "data.forms=[text]", "evaluation.protocols=[exact_match]", "trainer.batch_size=4096",
        "trainer.micro_batch_size=4096", "dry_run=true",
    ]  # fmt: skip
    solution = f"{'1 and ' * 100}so the answer is: 7"
    for name, row in {
        "metamath/train": {"query": "How many?", "response": solution},
        "gsm8k/test": {"question": "How many?", "answer": "#### 7"},
    }.items():
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir()
        path.write_text(json.dumps(row) + "\n")
    longest = plan(compose(words)).longest
    assert longest > 100
    told = []
    for cutoff in (64, longest):
        assert execute([*words, f"data.cutoff_length={cutoff}"]) == 0
        out = capsys.readouterr().out
        told.append(re.findall(r"^memory .*|^16 GB .*\)|^together .*", out, flags=re.MULTILINE))
    assert told[0] == told[1]
    assert len(told[0]) == 3
    assert f" at {longest} tokens per example" in told[0][0]
    # Its tokenizer is not here.
    more = ["model=llama2_7b", "trainer.micro_batch_size=1", "data.cutoff_length=64"]
    assert execute([*words[1:], *more]) == 0
    out = capsys.readouterr().out
    assert "free text is not cut, and longer rows need more)" in out
    # Nor is it in the estimate of its tokens.
    assert int(re.search(r"([0-9,]+) tokens \(estimated", out)[1].replace(",", "")) > 100


def test_without_a_tokenizer_padding_is_not_counted() -> None:
    found = plan(compose(["model=llama2_7b"]))
    assert found.tokens > 0
    assert found.padding is None
