"""Dropout of a run: the same masks whatever the micro-batch and the number of processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composed import compose
from encoded import examples_of

from mixlora_exp.kernels import DropoutKey
from mixlora_exp.models import load_tokenizer
from mixlora_exp.training.job import make_job

WORDS = ["experiment=smoke", "trainer.batch_size=8", "trainer.max_steps=3", "data.train_limit=16"]


def masks_of(
    folder: Path, patch: pytest.MonkeyPatch, micro: int, processes: int, hashed: bool, *more: str
) -> dict[tuple[int, int, int], torch.Tensor]:
    """By optimizer step, example of the step and position: what is kept of a row of 64."""
    config = compose([*WORDS, f"trainer.micro_batch_size={micro}", *more])
    found = {}
    for process in range(processes):
        state = SimpleNamespace(
            process_index=process, num_processes=processes, is_main_process=process == 0
        )
        patch.setattr("mixlora_exp.training.job.processes", lambda state=state: state)
        job = make_job(
            name="one", config=config, examples=examples_of(config), folder=folder,
            tokenizer=load_tokenizer(config.model),
        )  # fmt: skip
        key = DropoutKey(job.stream, "layers.3.mlp")
        for step, planned in enumerate(job.plan):
            count = len(planned.micro_batches)
            for number in range(count):
                batch = job.collated(step, number, count)
                job.begin_pass(step, batch)
                real, ids = batch["attention_mask"].bool(), batch["position_ids"]
                shape = (real.numel(), 64)
                kept = key.mask("input", shape, 0.3, real.device, hashed=hashed).kept()
                rows = batch["example"].repeat_interleave(real.shape[1]).view(-1, real.shape[1])
                if config.data.packing:
                    rows = batch["example"][(ids.flatten() == 0).cumsum(0) - 1].view(real.shape)
                for example, position, row in zip(
                    rows[real].tolist(), ids[real].tolist(), kept[real.flatten()], strict=True
                ):
                    assert (step, example, position) not in found
                    found[step, example, position] = row
    return found


@pytest.mark.parametrize("hashed", [False, True], ids=["drawn", "hashed"])
@pytest.mark.parametrize(("micro", "processes"), [(4, 1), (2, 1), (4, 2), (1, 4)])
def test_micro_batches_and_processes_change_no_mask(
    tmp_path, monkeypatch, micro, processes, hashed
) -> None:
    expected = masks_of(tmp_path, monkeypatch, 8, 1, hashed)
    found = masks_of(tmp_path, monkeypatch, micro, processes, hashed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[place], expected[place]) for place in expected)
    assert len({tuple(row.tolist()) for row in expected.values()}) == len(expected)


@pytest.mark.parametrize("hashed", [False, True], ids=["drawn", "hashed"])
def test_packing_changes_no_mask(tmp_path, monkeypatch, hashed: bool) -> None:
    expected = masks_of(tmp_path, monkeypatch, 4, 1, hashed)
    found = masks_of(tmp_path, monkeypatch, 4, 1, hashed, "data.packing=true")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[place], expected[place]) for place in expected)


def test_another_seed_has_other_masks(tmp_path, monkeypatch) -> None:
    one = masks_of(tmp_path, monkeypatch, 8, 1, False, "seed=1")
    two = masks_of(tmp_path, monkeypatch, 8, 1, False, "seed=2")
    common = one.keys() & two.keys()
    assert common
    assert not any(torch.equal(one[place], two[place]) for place in common)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_accumulation_changes_a_run_with_dropout_by_rounding_alone(train, method) -> None:
    words = [f"method={method}", "method.dropout=0.3", "trainer.batch_size=8",
             "trainer.max_steps=2", "trainer.logging_steps=1"]  # fmt: skip
    whole = train(*words, "trainer.micro_batch_size=8")
    parts = train(*words, "trainer.micro_batch_size=2")
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for name, weight in whole.after.items():
        torch.testing.assert_close(parts.after[name], weight, rtol=1e-3, atol=1e-5)
