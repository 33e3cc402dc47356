"""Training: it learns, it repeats itself, and what it reports is what it did."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import compose

from mixlora_exp.config.choices import PAPER_METHODS, Order
from mixlora_exp.data.encoding import Example
from mixlora_exp.data.sampler import sampler_of
from mixlora_exp.errors import UserError
from mixlora_exp.training import MixLoraTrainer
from mixlora_exp.training.steps import optimizer_steps

METHODS = PAPER_METHODS
Train = Callable[..., Any]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# MixDoRA has the parts of all four; each method's losses are held by the reference losses too.
MIXDORA_FIRST = [
    pytest.param(name, marks=() if name == "mixdora" else pytest.mark.slow) for name in METHODS
]


@pytest.mark.parametrize("method", MIXDORA_FIRST)
def test_loss_falls(method: str, train: Train) -> None:
    run = train(f"method={method}", "trainer.max_steps=30", "trainer.learning_rate=5e-3")
    assert len(run.losses) == 30
    assert all(math.isfinite(loss) for loss in run.losses)
    # It starts at the log of the vocabulary; the frozen random head sets a floor near 5.9.
    assert run.losses[0] == pytest.approx(math.log(1024), abs=0.3)
    assert sum(run.losses[-5:]) / 5 < run.losses[0] - 0.8


@pytest.mark.parametrize("method", [pytest.param("dora", marks=pytest.mark.slow), "mixdora"])
def test_same_seed_same_bits(method: str, train: Train) -> None:
    changes = [f"method={method}", "trainer.max_steps=4", "method.dropout=0.1"]
    first, second = train(*changes), train(*changes)
    assert same(first.before, second.before)
    assert same(first.after, second.after)
    assert first.losses == second.losses
    other = train(*changes, "seed=43")
    assert other.losses != first.losses
    assert not same(other.before, first.before), "the adapter is drawn from the seed"


def test_dropout_is_drawn_from_the_seed_alone(train: Train) -> None:
    changes = ["trainer.max_steps=2", "method.dropout=0.5"]
    first = train(*changes)
    torch.manual_seed(999)
    assert same(train(*changes).after, first.after)
    assert not same(train("trainer.max_steps=2", "method.dropout=0").after, first.after)


@pytest.mark.parametrize("method", METHODS)
def test_every_trainable_weight_is_trained(method: str, train: Train) -> None:
    # On all tokens: only those at answers would reach the last layer's experts otherwise.
    run = train(
        f"method={method}",
        "trainer.max_steps=2",
        "trainer.weight_decay=0",
        "trainer.batch_size=8",
        "trainer.loss_on=all",
    )
    optimized = {p for group in run.trainer.optimizer.param_groups for p in group["params"]}
    trainable = {p for p in run.trainer.model.parameters() if p.requires_grad}
    assert optimized == trainable
    assert sum(p.numel() for p in optimized) == sum(t.numel() for t in run.before.values())
    unchanged = [name for name in run.before if torch.equal(run.before[name], run.after[name])]
    assert not unchanged
    kinds = {"lora_A", "lora_B"}
    kinds |= {"lora_router"} if method.startswith("mix") else set()
    kinds |= {"lora_magnitude"} if method.endswith("dora") else set()
    assert all(any(kind in name for name in run.before) for kind in kinds)
    for name, weight in run.before.items():
        if method.startswith("mix") and ".mlp." in name:
            # One slice per expert; each saw tokens, so each moved.
            moved = (run.after[name] - weight).flatten(1).abs().amax(dim=1)
            assert (moved > 0).all(), name


def test_the_base_is_frozen(train: Train) -> None:
    run = train("trainer.max_steps=2")
    fresh = train("trainer.max_steps=1")
    base, other = (
        {n: p for n, p in r.trainer.model.named_parameters() if not p.requires_grad}
        for r in (run, fresh)
    )
    assert same(base, other)
    assert all("lora_" in name for name in run.before)


def accumulated(train: Train, micro: int, *changes: str) -> Any:
    return train(
        "data.train_limit=32",
        "trainer.batch_size=16",
        f"trainer.micro_batch_size={micro}",
        "trainer.max_steps=2",
        "method.dropout=0",
        *changes,
    )


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "mixlora"])
def test_micro_batches_change_nothing(method: str, train: Train) -> None:
    """Adam divides by the gradient's own size, so an element whose gradient is rounding error may
    go either way: the weights are compared where Adam's epsilon does not hide that."""
    changes = [f"method={method}"]
    changes += ["method.router_loss_coef=0"] if method == "mixlora" else []
    runs = [accumulated(train, micro, *changes) for micro in (16, 8, 4)]
    for run in runs[1:]:
        assert run.losses == pytest.approx(runs[0].losses, abs=2e-4)
        assert largest_difference(run.after, runs[0].after) < 1e-5


def test_router_loss_counts_once_per_step(train: Train) -> None:
    """Its gradient does not grow with the number of micro-batches."""
    runs = [accumulated(train, m, "method.router_loss_coef=1") for m in (16, 4)]
    for run in runs:
        assert run.losses[0] == pytest.approx(math.log(1024) + 1, abs=0.3)
    assert runs[0].losses == pytest.approx(runs[1].losses, abs=0.05)


def test_optimizer_is_that_of_table_3(train: Train) -> None:
    """AdamW at a constant rate of 2e-4 without warm-up or clipping, 16 examples to a step."""
    plain = compose([]).trainer
    assert (plain.batch_size, plain.accumulation_steps, plain.epochs) == (16, 2, 2)
    assert plain.max_steps is None
    assert (plain.max_grad_norm, plain.warmup_steps, plain.weight_decay) == (None, 0, 0.01)
    run = train("trainer.max_steps=3")
    optimizer = run.trainer.optimizer.optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert {entry["learning_rate"] for entry in run.summary.curve} == {2e-4}
    assert {group["lr"] for group in optimizer.param_groups} == {2e-4}
    (decayed,) = [g for g in optimizer.param_groups if g["weight_decay"] == 0.01]
    assert any(p.dim() > 1 for p in decayed["params"])
    assert not run.trainer.args.bf16


def test_other_schedules(train: Train) -> None:
    """By hand: up from zero in two of six steps, then down to zero along a line or half a wave."""
    words = ["method=lora", "trainer.warmup_steps=2", "trainer.max_steps=6"]
    rates = {
        name: [e["learning_rate"] for e in train(*words, f"trainer.schedule={name}").summary.curve]
        for name in ("constant", "linear", "cosine")
    }
    assert rates["constant"] == pytest.approx([0, 1e-4, 2e-4, 2e-4, 2e-4, 2e-4])
    assert rates["linear"] == pytest.approx([0, 1e-4, 2e-4, 1.5e-4, 1e-4, 0.5e-4])
    wave = [1e-4 * (1 + math.cos(math.pi * quarter / 4)) for quarter in range(4)]
    assert rates["cosine"] == pytest.approx([0, 1e-4, *wave])


def test_a_schedule_may_end_above_zero(train: Train) -> None:
    """By hand: the line from 2e-4 to a quarter of it, and the rise before it as ever."""
    words = ["method=lora", "trainer.warmup_steps=2", "trainer.max_steps=6"]
    found = train(*words, "trainer.schedule=linear", "trainer.final_rate=0.25").summary.curve
    rates = [entry["learning_rate"] for entry in found]
    falling = [2e-4 * (0.25 + 0.75 * left / 4) for left in (4, 3, 2, 1)]
    assert rates == pytest.approx([0, 1e-4, *falling])


def test_the_betas_are_adams(train: Train) -> None:
    """With no memory every step is the learning rate wherever there is a gradient, by the sign of
    that step's gradient: two steps move a weight of B by 0 or 4e-4."""
    run = train("trainer.max_steps=2", "method=lora", "trainer.betas=[0,0]", "method.dropout=0",
                "trainer.weight_decay=0")  # fmt: skip
    assert {group["betas"] for group in run.trainer.optimizer.optimizer.param_groups} == {(0, 0)}
    moved = torch.cat([w.abs().flatten() for n, w in run.after.items() if "lora_B" in n])
    near = torch.minimum(moved, (moved - 4e-4).abs())
    # But for gradients near epsilon.
    assert float((near < 2e-5).float().mean()) > 0.9


def test_first_step_is_adams(train: Train) -> None:
    """Without clipping and warm-up, Adam's first step is the learning rate wherever there is a
    gradient, and B starts at zero."""
    run = train("trainer.max_steps=1", "method=lora")
    for name, weight in run.after.items():
        if "lora_B" in name:
            assert float(weight.abs().max()) == pytest.approx(2e-4, rel=1e-3)


def test_loss_on_all_tokens_or_on_the_answer(train: Train) -> None:
    """The first step's loss, by hand from the untrained model."""
    for loss_on in ("answer", "all"):
        run = train(
            "method=lora", "trainer.max_steps=1", f"trainer.loss_on={loss_on}", "method.dropout=0"
        )
        model = run.trainer.model.unload().eval()
        parts = optimizer_steps(run.config, run.examples)[0].micro_batches
        batch = [i for part in parts for i in part.examples]
        total, tokens = 0.0, 0
        for example in (run.examples[i] for i in batch):
            ids = torch.tensor([example.input_ids])
            with torch.no_grad():
                likelihoods = model(ids).logits[0, :-1].log_softmax(-1)
            wanted = -likelihoods.gather(1, ids[0, 1:, None])[:, 0]
            counted = wanted[-example.answer_length :] if loss_on == "answer" else wanted
            total, tokens = total + float(counted.sum()), tokens + len(counted)
        assert run.losses[0] == pytest.approx(total / tokens, abs=2e-4)


@pytest.mark.parametrize("method", MIXDORA_FIRST)
def test_checkpointing_changes_nothing(method: str, train: Train) -> None:
    changes = [f"method={method}", "trainer.max_steps=3", "method.dropout=0"]
    plain = train(*changes)
    recomputed = train(*changes, "trainer.gradient_checkpointing=true")
    assert recomputed.trainer.model.is_gradient_checkpointing
    assert recomputed.losses == plain.losses
    assert largest_difference(recomputed.after, plain.after) < 1e-6
    assert recomputed.summary.expert_load == plain.summary.expert_load


@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
def test_router_figures_are_logged(method: str, train: Train) -> None:
    run = train(f"method={method}", "trainer.max_steps=4", "trainer.logging_steps=2")
    logged = run.summary.curve
    assert [entry["step"] for entry in logged] == [2, 4]
    for entry in logged:
        # 1 at perfect balance; a fresh router is near it.
        assert 0.9 < entry["router_loss"] < 1.5
        assert 0 < entry["expert_load_std"] < 0.3
    lines = [json.loads(line) for line in (run.folder / "train_log.jsonl").open()]
    written = [line for line in lines if "loss" in line]
    assert [line["step"] for line in written] == [2, 4]
    for line, entry in zip(written, logged, strict=True):
        assert line["router_loss"] == entry["router_loss"]
        assert [len(layer) for layer in line["expert_load"]] == [8, 8]
        assert all(sum(layer) == pytest.approx(1, abs=1e-3) for layer in line["expert_load"])
    load = run.summary.expert_load
    assert [len(layer) for layer in load] == [8, 8]
    assert all(sum(layer) == pytest.approx(1) for layer in load)
    # Every real token of every pass was sent to two experts in each layer.
    assert run.trainer.jobs["default"].track.counts.sum(-1).tolist() == [2 * run.summary.tokens] * 2


def test_counts_since_the_last_log_are_not_lost(train: Train) -> None:
    run = train("trainer.max_steps=3", "trainer.logging_steps=2")
    assert run.trainer.jobs["default"].track.counts.sum(-1).tolist() == [2 * run.summary.tokens] * 2


def test_plain_lora_logs_no_router(train: Train) -> None:
    run = train("method=lora", "trainer.max_steps=2")
    assert run.summary.expert_load is None
    assert not any("router_loss" in entry for entry in run.summary.curve)
    text = (run.folder / "train_log.jsonl").read_text()
    assert "expert_load" not in text
    assert "router" not in text


def test_log_file_starts_anew(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    for _ in range(2):
        run = train("method=lora", "trainer.max_steps=2", folder=folder)
    steps = [json.loads(line)["step"] for line in (run.folder / "train_log.jsonl").open()]
    assert steps == [1, 2]


@pytest.mark.parametrize("method", ["lora", "mixdora"])
def test_a_loss_that_is_no_number_is_refused(method: str, train: Train) -> None:
    with pytest.raises(UserError, match=r"trainer\.learning_rate=1e\+30: the loss became"):
        train(f"method={method}", "trainer.learning_rate=1e30", "trainer.max_steps=3")


@pytest.mark.parametrize("kind", ["bucketed", "fixed"])
def test_batches_come_in_the_order_of_the_sampler(
    kind: str, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs, each with an incomplete last batch: what the summary counts is what ran."""
    seen: list[list[int]] = []
    original = MixLoraTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        seen.append(inputs["default"]["attention_mask"].sum(-1).tolist())
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MixLoraTrainer, "compute_loss", compute_loss)
    # 11 examples of different lengths, so that a length tells which example it was.
    examples = [Example([1, *range(3, 3 + n), 2], 2, "arc_e") for n in range(5, 16)]
    words = ["method=lora", "trainer.max_steps=null", "trainer.epochs=2", f"trainer.order={kind}"]
    run = train(*words, examples=examples)
    sampler = sampler_of([len(e.input_ids) for e in examples], 4, run.config.seed, Order(kind))
    expected = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = [len(examples[i].input_ids) for i in sampler]
        expected += [order[start : start + 2] for start in range(0, 11, 2)]
    assert seen == expected
    assert (seen[:6] == seen[6:]) is (kind == "fixed")
    assert run.summary.steps == 6
    assert run.summary.tokens == sum(map(sum, seen))


@pytest.mark.parametrize("method", [pytest.param("dora", marks=pytest.mark.slow), "mixdora"])
def test_a_frozen_magnitude_stays(method: str, train: Train) -> None:
    words = [f"method={method}", "trainer.max_steps=3"]
    free, frozen = train(*words), train(*words, "method.train_magnitude=false")
    assert free.before.keys() - frozen.before.keys() == {
        name for name in free.before if "lora_magnitude" in name
    }
    held = {n: p for n, p in frozen.trainer.model.named_parameters() if "lora_magnitude" in n}
    assert held
    for name, weight in held.items():
        assert torch.equal(weight, free.before[name]), name
        assert not torch.equal(weight, free.after[name]), name
    assert free.losses[0] == frozen.losses[0]
    assert free.losses[-1] != frozen.losses[-1]


@pytest.mark.parametrize(
    "method", ["mixdora", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[:-1])]
)
def test_the_official_preset_trains(method: str, train: Train) -> None:
    run = train("preset=official", f"method={method}", "trainer.max_steps=20",
                "trainer.learning_rate=5e-3")  # fmt: skip
    assert sum(run.losses[-5:]) / 5 < run.losses[0] - 0.2


def test_summary(train: Train) -> None:
    run = train("method=lora", "trainer.max_steps=5")
    summary = run.summary
    assert (summary.examples, summary.steps) == (16, 5)
    assert summary.final_loss == run.losses[-1]
    assert summary.seconds > 0
    (job,) = run.trainer.jobs.values()
    first = sum(
        len(run.examples[i].input_ids) for part in job.plan[0].micro_batches for i in part.examples
    )
    # Without the first step, in which kernels are compiled and memory is taken.
    rest = summary.seconds - summary.first_step_seconds
    assert summary.tokens_per_second == pytest.approx((summary.tokens - first) / rest, rel=0.01)
    assert summary.peak_memory_bytes > 2**20
    # Four examples per step, so one epoch and a step more.
    lengths = [len(example.input_ids) for example in run.examples]
    assert sum(lengths) < summary.tokens < sum(lengths) + 4 * max(lengths)
    assert json.dumps(dataclasses.asdict(summary))


def test_speed_of_a_run_of_one_step_is_that_of_the_step(train: Train) -> None:
    summary = train("method=lora", "trainer.max_steps=1").summary
    assert summary.first_step_seconds == pytest.approx(summary.seconds, abs=0.002)
    assert summary.tokens_per_second == pytest.approx(summary.tokens / summary.seconds, rel=0.01)


def test_dora_norms_are_computed_once_per_optimizer_step(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer calls `train()` before each of the accumulated micro-batches."""
    from mixlora_exp.adapters import dora_norms

    calls: list[int] = []
    real = dora_norms.dora_norms
    monkeypatch.setattr(
        dora_norms, "dora_norms", lambda *values: (calls.append(1), real(*values))[1]
    )
    sizes = ("trainer.batch_size=8", "trainer.micro_batch_size=2", "trainer.max_steps=3")
    trained = train("method=dora", *sizes)
    layers = 7 * trained.config.model.config["num_hidden_layers"]
    assert trained.config.trainer.accumulation_steps == 4
    # And once more before the first step, with noise in B, and for the look at what the last left.
    assert len(calls) == (1 + 3 + 1) * layers
