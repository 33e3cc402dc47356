"""Which examples make up an optimizer step, and in which process."""

from __future__ import annotations

from dataclasses import replace

import pytest
from composed import compose

from mixlora_exp.data.encoding import Example
from mixlora_exp.training.steps import optimizer_steps, total_steps

WORDS = ["experiment=smoke", "trainer.batch_size=8", "trainer.micro_batch_size=2"]
EXAMPLES = [Example([1, *range(3, 3 + n), 2], 2, "arc_e") for n in range(21)]


@pytest.mark.parametrize("order", ["bucketed", "fixed"])
def test_an_epoch_has_every_example_once(order: str) -> None:
    words = ["trainer.max_steps=null", "trainer.epochs=2", f"trainer.order={order}"]
    config = compose([*WORDS, *words])
    steps = optimizer_steps(config, EXAMPLES)
    assert len(steps) == total_steps(config, 21) == 6
    assert [step.epoch for step in steps] == pytest.approx(
        [4 / 11, 8 / 11, 1, 1 + 4 / 11, 1 + 8 / 11, 2]
    )
    for epoch in (steps[:3], steps[3:]):
        seen = [i for step in epoch for part in step.micro_batches for i in part.examples]
        assert sorted(seen) == list(range(21))


def test_examples_are_numbered_over_micro_batches() -> None:
    step = optimizer_steps(compose([*WORDS, "trainer.max_steps=1"]), EXAMPLES)[0]
    assert [part.first for part in step.micro_batches] == [0, 2, 4, 6]


def test_processes_share_a_step_and_number_its_examples_together() -> None:
    config = compose([*WORDS, "trainer.max_steps=3"])
    alone = optimizer_steps(config, EXAMPLES)
    shares = [optimizer_steps(config, EXAMPLES, process, 2) for process in range(2)]
    for one, first, second in zip(alone[:2], *(share[:2] for share in shares), strict=True):
        assert one.micro_batches[0::2] == first.micro_batches
        assert one.micro_batches[1::2] == second.micro_batches
    # Five examples are left, in micro-batches of 2, 2 and 1: one process has none to begin with.
    assert [len(step.micro_batches) for step in (alone[2], shares[0][2], shares[1][2])] == [3, 2, 2]
    assert [share[2].parts for share in (alone, *shares)] == [3, 3, 3]
    parts = [part for share in shares for part in share[2].micro_batches]
    (added,) = [part for part in parts if part.repeated]
    assert added == replace(parts[0], repeated=True)
    assert {part for part in parts if not part.repeated} == set(alone[2].micro_batches)
