"""The time of a run: from a record of such a machine, from a probe, or not known."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
from composed import compose

from mixlora_exp.cli.train import execute
from mixlora_exp.config.paths import ROOT
from mixlora_exp.config.schema import Config
from mixlora_exp.errors import NotEnoughMemory
from mixlora_exp.plans.hours import scored_tokens, trained_tokens
from mixlora_exp.plans.plan import plan
from mixlora_exp.plans.speed import Speed, recorded_speed, time_line
from mixlora_exp.runs import probe
from mixlora_exp.runs.probe import probed_speed
from mixlora_exp.runs.state import Run

H100 = {"gpus": ["NVIDIA H100 80GB HBM3"], "cpu": "any", "cpu_threads": 16}
CPU = {"gpus": [], "cpu": "A CPU", "cpu_threads": 2}


def record(
    folder: Path, name: str, hardware: dict[str, Any], kernel: str, us: float, **more: Any
) -> None:
    row = {
        "method": "mixlora", "kernel": kernel, "num_experts": 8, "top_k": 2, "rounds": 3,
        "train_forward_us_per_token": us, "train_backward_us_per_token": us,
        "infer_forward_us_per_token": us,
    }  # fmt: skip
    settings = {
        "model": "llama2_7b", "batch": 4, "length": 512, "dtype": "bfloat16", "dropout": 0.05,
        "loss_on": "answer", **more,
    }  # fmt: skip
    found = {
        "provenance": {"hardware": hardware}, "config": settings, "layers": 32, "rows": {"a": row},
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(found))


def test_a_record_of_the_machine_counts_and_no_other(tmp_path: Path) -> None:
    record(tmp_path, "card", H100, "triton", 100.0)
    record(tmp_path, "cpu", CPU, "exact", 1000.0)
    config = compose(["model=llama2_7b"])
    assert recorded_speed(config, H100, "bfloat16", tmp_path) == Speed(
        5000.0, 10000.0, "results/bench/card.json"
    )
    assert recorded_speed(config, CPU, "bfloat16", tmp_path) == Speed(
        500.0, 1000.0, "results/bench/cpu.json"
    )
    assert recorded_speed(config, {**CPU, "cpu_threads": 64}, "bfloat16", tmp_path) is None
    assert recorded_speed(config, CPU, "float32", tmp_path) is None


def test_a_record_with_the_loss_on_other_tokens_is_named_so(tmp_path: Path) -> None:
    """It stands in where there is no other: logits of all tokens take more time."""
    answers = compose(["model=llama2_7b"])
    everything = compose(["model=llama2_7b", "trainer.loss_on=all"])
    record(tmp_path, "all", H100, "triton", 200.0, loss_on="all")

    def found(config: Config) -> Speed:
        speed = recorded_speed(config, H100, "bfloat16", tmp_path)
        assert speed is not None
        return speed

    assert found(answers).source == "results/bench/all.json, whose loss is on all tokens"
    assert found(everything).source == "results/bench/all.json"
    record(tmp_path, "answers", H100, "triton", 100.0)
    assert found(answers) == Speed(5000.0, 10000.0, "results/bench/answers.json")
    assert found(everything).source == "results/bench/all.json"


@pytest.mark.parametrize(
    "word",
    ["method=lora", "model=gemma_2b", "method.top_k=4", "trainer.gradient_checkpointing=true",
     "model.quantization=nf4", "method.dropout=0", "kernel=shared", "method.rank=4",
     "method.expert_rank=8", "method.layers_to_transform=0-7", "method.num_experts=4",
     "method.num_experts=8/4", "method.targets=[gate_proj,up_proj,down_proj]"],
)  # fmt: skip
def test_a_record_of_other_settings_does_not_count(word: str, tmp_path: Path) -> None:
    record(tmp_path, "card", H100, "triton", 100.0)
    config = compose(["model=llama2_7b", word])
    assert recorded_speed(config, H100, "bfloat16", tmp_path) is None


@pytest.mark.parametrize("method", ["loramoe", "hydralora", "mola"])
def test_a_mixture_of_other_sizes_has_no_recorded_speed(method: str) -> None:
    """The committed rows have eight experts of rank 16 on all projections."""
    record = json.loads((ROOT / "results/bench/methods-smollm2_135m.json").read_text())
    hardware, dtype = record["provenance"]["hardware"], record["config"]["dtype"]
    all_alike = ["method.rank=16", "method.num_experts=8", "method.targets=all-linear"]
    words = ["model=smollm2_135m", f"method={method}", "kernel=exact"]
    assert recorded_speed(compose(words), hardware, dtype) is None
    assert recorded_speed(compose([*words, *all_alike]), hardware, dtype) is not None


def test_committed_records_have_speeds() -> None:
    found = recorded_speed(compose(["model=llama2_7b", "method=lora", "kernel=peft"]), H100,
                           "bfloat16")  # fmt: skip
    assert found is not None
    assert found.training == pytest.approx(6570, rel=0.2)


def test_the_line() -> None:
    assert time_line(None, 1.0, 1.0) == "not known (plan.probe=true measures)"
    speed = Speed(100.0, 200.0, "a record")
    assert time_line(speed, 36_000, 12_000) == (
        "about 7 min here: training 6 min, scoring 60 s (100 and 200 tokens/s by a record)"
    )
    assert "training 3 min" in time_line(speed, 36_000, 12_000, processes=2)


def test_tokens_follow_epochs_steps_and_protocols() -> None:
    words = ["model=llama2_7b", "task=arc_e"]

    def tokens(*more: str) -> tuple[float, float]:
        config = compose([*words, *more])
        found = plan(config)
        return trained_tokens(config, found), scored_tokens(config, found)

    trained, scored = tokens()
    assert tokens("trainer.epochs=4") == (pytest.approx(2 * trained), scored)
    assert tokens("trainer.max_steps=141")[0] == pytest.approx(trained / 2, rel=0.01)
    assert tokens("evaluation.protocols=[label_logits,answer_text]")[1] == 2 * scored
    assert tokens("method=none") == (0.0, scored)


def test_a_probe_measures_and_leaves_nothing(tmp_path: Path) -> None:
    config = compose(
        ["experiment=smoke", "dry_run=true", "plan.probe=true", f"output_dir={tmp_path}"]
    )
    found = probed_speed(config)
    assert found.training > 0
    assert found.scoring > 0
    assert not list(tmp_path.iterdir())


def test_a_probe_belongs_to_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["experiment=smoke", "plan.probe=true"]) == 2
    assert "plan.probe=true is not valid: it is part of a plan: add dry_run=true" in (
        capsys.readouterr().err
    )


def test_a_probe_halves_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, real = [], probe.fit

    def fit(*, config: Config, **others):
        sizes.append(config.trainer.micro_batch_size)
        if config.trainer.micro_batch_size > 1:
            raise NotEnoughMemory("out of memory")
        return real(config=config, **others)

    monkeypatch.setattr(probe, "fit", fit)
    words = ["experiment=smoke", "dry_run=true", "plan.probe=true", f"output_dir={tmp_path}"]
    assert probed_speed(compose([*words, "trainer.auto_micro_batch=true"])).training > 0
    assert sizes == [2, 1]
    with pytest.raises(NotEnoughMemory):
        probed_speed(compose(words))


def test_a_probe_of_adalora_has_fewer_steps_than_its_schedule(tmp_path: Path) -> None:
    words = ["experiment=smoke", "method=adalora", "dry_run=true", "plan.probe=true",
             "trainer.max_steps=40", "method.peft.tinit=10", "method.peft.tfinal=10"]  # fmt: skip
    assert probed_speed(compose([*words, f"output_dir={tmp_path}"])).training > 0


def test_a_probe_frees_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is given back when nothing refers to the model."""
    models, left, load = [], [], Run.load_base

    def loaded(self: Run):
        base = load(self)
        models.append(weakref.ref(base))
        return base

    monkeypatch.setattr(Run, "load_base", loaded)
    real = probe.free_memory

    def free() -> None:
        real()
        left.append(models[0]())

    monkeypatch.setattr(probe, "free_memory", free)
    words = ["experiment=smoke", "dry_run=true", "plan.probe=true", f"output_dir={tmp_path}"]
    probed_speed(compose(words))
    assert left == [None]
