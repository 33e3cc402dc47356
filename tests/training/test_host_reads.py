"""How often the host waits for the device: per optimizer step, batch or checkpoint, not per
parameter, item or adapter."""

from __future__ import annotations

import pytest
import torch
from host_reads import host_reads
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mixlora_exp.bench.launches import LaunchCounter
from mixlora_exp.evaluation.head import _plain
from mixlora_exp.evaluation.label_logits import _batch_scores
from mixlora_exp.tasks.base import Item
from mixlora_exp.training.checkpoints import Checkpoints


def test_an_optimizer_step_is_asked_for_once(train, reads_of_steps) -> None:
    """Its loss and its norm, however many micro-batches it has."""
    train("trainer.batch_size=8", "trainer.micro_batch_size=2", "trainer.max_steps=3")
    assert reads_of_steps == [1, 1, 1]


def test_a_batch_of_items_is_read_once() -> None:
    labels = ("A", "B", "C")
    items = [
        Item(id=str(i), task="arc_e", question="?", labels=labels, options=labels, answer=i % 3)
        for i in range(7)
    ]
    logits = torch.randn(7, 50)
    ids = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(7)]
    with host_reads() as reads:
        scores = _batch_scores(items, logits, ids, [[49]] * 7)
    assert reads == {"tolist": 1}
    for i, score in enumerate(scores):
        own = logits[i]
        assert score.scores == own[ids[i]].tolist()
        best = int(own[ids[i]].argmax())
        assert score.prediction == (None if own[49] > own[ids[i]].max() else best)
        expected = own.double().log_softmax(-1)[ids[i][i % 3]].item()
        assert score.gold_log_likelihood == pytest.approx(expected, abs=1e-5)


def test_ties_go_to_the_first_label_and_nan_leads() -> None:
    labels = ("A", "B")
    item = Item(id="x", task="piqa", question="?", labels=labels, options=labels, answer=0)
    logits = torch.tensor([[1.0, 1.0], [0.0, float("nan")]])
    tie, broken = _batch_scores([item, item], logits, [[0, 1]] * 2, [[], []])
    assert (tie.prediction, broken.prediction) == (0, 1)


def test_a_checkpoint_asks_once_whether_weights_are_finite(tmp_path) -> None:
    parameters = {f"w{i}": nn.Parameter(torch.ones(3)) for i in range(9)}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    checkpoints = Checkpoints(tmp_path, {})
    with host_reads() as reads:
        assert checkpoints.save(1, parameters, optimizer, {}) is not None
    assert reads["__bool__"] == 1
    with torch.no_grad():
        parameters["w8"][1] = float("inf")
    assert checkpoints.save(2, parameters, optimizer, {}) is None


def test_a_generated_token_casts_no_vocabulary() -> None:
    """On a GPU one product of narrow numbers, summed in float32."""
    head = nn.Linear(16, 64, bias=False, device="meta")
    with torch.no_grad(), FakeTensorMode(), LaunchCounter() as counter:
        head.weight = nn.Parameter(
            torch.empty(64, 16, dtype=torch.bfloat16, device="cuda"), requires_grad=False
        )
        hidden = torch.empty(3, 1, 16, device="cuda")
        logits = _plain(head, hidden, torch.bfloat16)
    assert logits.dtype is torch.float32
    assert logits.shape == (3, 1, 64)
    assert counter.launches["mm"] == 1
    # The other is a copy of the hidden states.
    assert counter.total <= 2, counter.launches


def test_host_reads_are_seen_from_any_caller() -> None:
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    with host_reads() as reads:
        torch.equal(x, x)
        x[mask]
        x[mask] = 0.0
        x.masked_select(mask)
        if x.sum() > 0:
            x.add_(1)
    assert reads == {
        "equal": 1, "index by a mask": 1, "index_put_ by a mask": 1, "masked_select": 1,
        "__bool__": 1,
    }  # fmt: skip
    with host_reads() as reads:
        x[torch.tensor([0, 2, 1, 3])] + x.where(mask, 1.0)
    assert not reads
