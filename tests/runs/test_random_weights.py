"""A hub model with random weights, from training to merging, without a hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixlora_exp.cli import generate as generation
from mixlora_exp.cli.evaluate import run as evaluate
from mixlora_exp.cli.train import execute
from mixlora_exp.records.record import read_record
from mixlora_exp.serving.merge import write_merged
from mixlora_exp.serving.open import open_adapter
from mixlora_exp.system.exit_codes import guarded
from mixlora_exp.training.trainer import MixLoraTrainer

# LLaMA-2 7B in all but its size.
WORDS = [
    "experiment=smoke", "model=llama2_7b", "model.weights=random",
    "model.config={num_hidden_layers: 2, hidden_size: 64, intermediate_size: 96, head_dim: 32, "
    "num_attention_heads: 2, num_key_value_heads: 2, vocab_size: 700}",
    "trainer.precision=float32", "trainer.save_steps=1", "data.train_limit=8",
    "evaluation.protocols=[label_logits,generate]", "evaluation.limit=4",
]  # fmt: skip


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the hub was asked")

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", refuse)


def kill_in_second_step(patch: pytest.MonkeyPatch) -> None:
    real = MixLoraTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise Killed
        return real(self, *args, **kwargs)

    patch.setattr(MixLoraTrainer, "training_step", training_step)


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "mixlora"])
def test_from_training_to_use(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    torch.set_num_threads(1)
    argv = [*WORDS, f"method={method}", f"output_dir={tmp_path / 'runs'}"]
    with monkeypatch.context() as patch:
        kill_in_second_step(patch)
        with pytest.raises(Killed):
            execute(argv)
    assert execute(argv) == 0
    assert "resuming after step 1 of 2" in capsys.readouterr().err
    (path,) = (tmp_path / "runs").glob("*/record.json")
    record, folder = read_record(path), path.parent
    assert (record["model"]["source"], record["train"]["steps"]) == ("random", 2)
    assert [score["n"] for score in record["scores"]] == [4, 4]
    again = [f"run={folder}", f"output_dir={tmp_path / 'again'}"]
    assert guarded(evaluate, again) == 0
    (rescored,) = (tmp_path / "again").glob("*/record.json")
    found, expected = read_record(rescored)["scores"], record["scores"]
    assert [s["accuracy"] for s in found] == [s["accuracy"] for s in expected]
    adapter, prompts = folder / "adapter", ["prompt=The moon", "max_new_tokens=4"]
    assert guarded(generation.run, [f"adapter={adapter}", *prompts]) == 0
    if method == "lora":
        opened = open_adapter(str(adapter))
        ids = torch.tensor([opened.tokenizer("The moon").input_ids])
        with torch.no_grad():
            logits = opened.model(ids).logits
        write_merged(opened, tmp_path / "merged")
        merged = open_adapter(None, [f"model.path={tmp_path / 'merged'}", "model=llama2_7b",
                                     "trainer.precision=float32"])  # fmt: skip
        assert merged.tokenizer("The moon").input_ids == ids[0].tolist()
        with torch.no_grad():
            torch.testing.assert_close(merged.model(ids).logits, logits, rtol=1e-4, atol=1e-4)
