"""`trainer.compile=graph`. What records needs a GPU; here a stand-in repeats the computation on the
memory that it was recorded with, as a replay does."""

from __future__ import annotations

import pytest
import torch
from stand_in_recorder import StandIn
from torch import Tensor

from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.config.command import compose
from mixlora_exp.training import graph_step
from mixlora_exp.training.cuda_graphs import CapturedPass, Recorder, StaticGradients
from mixlora_exp.training.graph_step import recorder
from mixlora_exp.training.trainer import MixLoraTrainer

FEW = ["trainer.max_steps=4", "trainer.logging_steps=1", "method.dropout=0.1"]
TWO = ["trainer.batch_size=4", "trainer.micro_batch_size=2"]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(graph_step, "recorder", lambda config, device: made)
    # Layers run as they are: what compiles them is tested by itself.
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    return made


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name == "mixdora" else pytest.mark.slow)
        for name in PAPER_METHODS
    ],
)
def test_losses_and_weights_are_those_of_eager_training(train, stand_in, method) -> None:
    words = [f"method={method}", *FEW, *TWO]
    eager = train(*words)
    found = train(*words, "trainer.compile=graph")
    # The first pass runs as it is, the second is recorded.
    assert stand_in.recorded == 1
    assert stand_in.replayed == 4 * 2 - 1
    assert found.losses == pytest.approx(eager.losses, rel=1e-5)
    for name, weight in eager.after.items():
        torch.testing.assert_close(found.after[name], weight, rtol=1e-2, atol=1e-5)


def test_gradients_do_not_move(train, stand_in, monkeypatch) -> None:
    """One buffer for each parameter in all steps, zero before a step's first micro-batch."""
    places = []
    own = MixLoraTrainer.check_gradients

    def watched(self) -> None:
        places.append([p.grad.data_ptr() for p in self.jobs["default"].parameters.values()])
        own(self)

    monkeypatch.setattr(MixLoraTrainer, "check_gradients", watched)
    train("method=mixlora", *FEW, *TWO, "trainer.compile=graph")
    assert len(places) == 4
    assert places[1:] == places[:-1]


def test_what_cannot_be_recorded_runs_as_it_is(train, stand_in, monkeypatch, capsys) -> None:
    class Refuses(Recorder):
        def record(self, compute):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    eager = train("method=mixlora", *FEW, *TWO)
    monkeypatch.setattr(graph_step, "recorder", lambda config, device: Refuses())
    found = train("method=mixlora", *FEW, *TWO, "trainer.compile=graph")
    lines = [line for line in capsys.readouterr().err.splitlines() if "trainer.compile" in line]
    assert lines == [
        "trainer.compile=graph: runs as layer, because a pass cannot be recorded: operation not "
        "permitted when stream is capturing"
    ]
    assert found.losses == pytest.approx(eager.losses, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "device", "reason"),
    [
        ([], "cpu", "a CPU has no graphs to record"),
        (["trainer.gradient_checkpointing=true"], "cuda", "gradient checkpointing reads the"),
        (["method=vera"], "cuda", "method=vera is PEFT's"),
    ],
)
def test_a_line_says_why_it_runs_as_layer(capsys, words, device, reason) -> None:
    config = compose(["model=tiny", "trainer.compile=graph", *words])
    assert recorder(config, torch.device(device)) is None
    told = capsys.readouterr().err
    assert told.startswith(f"trainer.compile=graph: {reason}")
    assert told.endswith(": it runs as layer\n")


def test_nothing_is_recorded_by_default(capsys) -> None:
    config = compose(["model=tiny", "trainer.compile=layer"])
    assert recorder(config, torch.device("cuda")) is None
    assert capsys.readouterr().err == ""


def test_each_shape_and_place_has_its_recording() -> None:
    """The first pass of a shape computes, the second is recorded; results stay when another pass
    overwrites the recording's; recordings with memory of before are not replayed."""
    record, place = StandIn(), [1]
    passes = CapturedPass(lambda given: [given["x"] * 2], lambda: list(place), record)

    def doubled(*values: float) -> Tensor:
        return passes({"x": torch.tensor(values)})[0]

    found = [doubled(1.0), doubled(2.0), doubled(3.0), doubled(1.0, 2.0)]
    assert [f.tolist() for f in found] == [[2.0], [4.0], [6.0], [2.0, 4.0]]
    assert (record.recorded, record.replayed) == (1, 2)
    doubled(1.0, 2.0)
    assert record.recorded == 2
    place[0] = 2
    assert doubled(5.0).tolist() == [10.0]
    assert record.recorded == 3


def test_memory_that_is_short_is_not_a_reason_to_go_on() -> None:
    class Short(Recorder):
        def record(self, compute):
            raise torch.OutOfMemoryError("out of memory")

    passes = CapturedPass(lambda given: [given["x"]], list, Short())
    passes({"x": torch.zeros(1)})
    with pytest.raises(torch.OutOfMemoryError):
        passes({"x": torch.zeros(1)})


def test_frozen_parameters_get_no_buffer() -> None:
    trained, frozen = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    frozen.requires_grad_(False)
    gradients = StaticGradients([trained, frozen])
    gradients.restore()
    place = trained.grad.data_ptr()
    trained.grad += 1
    gradients.restore()
    assert trained.grad.tolist() == [1.0, 1.0]  # A second micro-batch adds to it.
    trained.grad = None
    gradients.restore()
    assert trained.grad.tolist() == [0.0, 0.0]
    assert trained.grad.data_ptr() == place
    assert frozen.grad is None
