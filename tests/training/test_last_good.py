"""A training whose numbers break leaves an adapter that gives numbers, or says there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from composed import compose
from safetensors.torch import load_file

from mixlora_exp.adapters import load_adapter
from mixlora_exp.cli.train import execute
from mixlora_exp.config.schema import KernelConfig, KernelName
from mixlora_exp.models import load_model

SMOKE = ["experiment=smoke", "trainer.precision=float32", "evaluation.limit=4"]


def broken(words: Sequence[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert execute([*SMOKE, *words, f"output_dir={folder}"]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def gives_numbers(adapter: Path) -> bool:
    config = compose(SMOKE)
    base = load_model(config.model, torch.float32, config.seed)
    model = load_adapter(base, adapter, KernelConfig(name=KernelName.exact))
    with torch.no_grad():
        return bool(model(torch.arange(4, 40)[None]).logits.isfinite().all())


def steps_kept(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.rglob("step-*"))


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("every", [1, 2])
def test_weights_that_grew_too_large_are_not_called_good(
    method: str, every: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are numbers, and what they give is none: the newest checkpoint from before is good."""
    words = [f"method={method}", "trainer.learning_rate=1e3", "trainer.max_steps=20"]
    message = broken([*words, f"trainer.save_steps={every}"], tmp_path, capsys)
    assert "the loss became nan at step" in message
    failed = int(message.partition("at step ")[2].split()[0])
    (kept,) = tmp_path.rglob("last_good")
    step = failed - 2 - (failed - 2) % every
    assert f"from step {step}, is in {kept} (model=tiny)" in message
    assert gives_numbers(kept)
    assert max(steps_kept(tmp_path)) == step, "what is not good is not gone on from"


def test_weights_that_are_no_numbers_are_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["method=dora", "trainer.learning_rate=1e39", "trainer.schedule=linear"]
    words += ["trainer.warmup_steps=1", "trainer.max_steps=6", "trainer.save_steps=1"]
    message = broken([*words, "trainer.keep_checkpoints=1"], tmp_path, capsys)
    assert "is not finite" in message
    assert steps_kept(tmp_path) == [1]
    for path in tmp_path.rglob("step-*/adapter.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(path).values())
    (kept,) = tmp_path.rglob("last_good")
    assert f"from step 1, is in {kept}" in message
    assert gives_numbers(kept)


def test_the_last_step_is_looked_at_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["method=lora", "trainer.learning_rate=1e30", "trainer.max_steps=1"]
    message = broken(words, tmp_path, capsys)
    assert "after the last step, 1 (" in message
    assert "first in" in message, "the layer"
    assert not list(tmp_path.rglob("record.json"))
    assert not list(tmp_path.rglob("last_good")), "nothing was learned before"
    assert not list(tmp_path.rglob("step-*"))


def test_of_adapters_trained_together_the_layer_is_named_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["adapters=[lora,{method:dora,trainer.learning_rate:1e3}]", "trainer.max_steps=20"]
    assert execute([*SMOKE, *words, "trainer.save_steps=1", f"output_dir={tmp_path}"]) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "became" in line][:1]
    assert "first in" in told, "the layer"
    (kept,) = tmp_path.rglob("last_good")
    assert f"is in {kept}" in told
    assert gives_numbers(kept)
    assert len(list(tmp_path.rglob("record.json"))) == 1, "the other one's"


@pytest.mark.slow
def test_the_last_step_of_adapters_trained_together_is_looked_at_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["adapters=[lora,{method:dora,trainer.learning_rate:1e30}]", "trainer.max_steps=1"]
    assert execute([*SMOKE, *words, f"output_dir={tmp_path}"]) == 2
    assert "after the last step, 1 (first in" in capsys.readouterr().err
    assert len(list(tmp_path.rglob("record.json"))) == 1, "the other one's"
