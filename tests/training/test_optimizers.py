"""Optimizers and schedules by name: what runs, what it keeps, what is refused before loading."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from composed import compose
from encoded import examples_of
from killed import killed_after
from small_methods import base_of, config_of, train, weights_of

from mixlora_exp.adapters import attach_together
from mixlora_exp.adapters.mixed_adapters import plain_parameters_of
from mixlora_exp.config.optimizers import OPTIMIZERS, SCHEDULES
from mixlora_exp.config.together import packs_of
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_tokenizer
from mixlora_exp.plans.disk import disk_bytes
from mixlora_exp.plans.memory import memory_of
from mixlora_exp.runs import optimizer_checks
from mixlora_exp.runs.optimizer_checks import check_optimizer
from mixlora_exp.training import fit_jointly, make_job
from mixlora_exp.training.parameter_groups import schedule_of
from mixlora_exp.training.trainer import MixLoraTrainer

WIDE = ["method=lora", "method.rank=64", "method.alpha=64", "method.dropout=0.2"]
"""Large enough that states of 8 bits are of 8 bits."""
CLASSES = {
    "adamw_torch_fused": ("torch.optim", "AdamW"),
    "adamw_torch": ("torch.optim", "AdamW"),
    "adamw_torch_8bit": ("torchao.optim", "AdamW8bit"),
    "adamw_torch_4bit": ("torchao.optim", "AdamW4bit"),
    "adamw_bnb_8bit": ("bitsandbytes.optim", "AdamW"),
    "paged_adamw_8bit": ("bitsandbytes.optim", "AdamW"),
    "paged_adamw_32bit": ("bitsandbytes.optim", "AdamW"),
    "muon": ("torch.optim", "Muon"),
}
COMPILED = ("adamw_torch_8bit", "adamw_torch_4bit")
assert CLASSES.keys() == OPTIMIZERS.keys()


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[MixLoraTrainer]:
    kept: list[MixLoraTrainer] = []
    real = MixLoraTrainer.__init__

    def made(self: MixLoraTrainer, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        kept.append(self)

    monkeypatch.setattr(MixLoraTrainer, "__init__", made)
    return kept


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state, tables that all parameters share apart."""
    total = 0
    for state in optimizer.state.values():
        for key, held in state.items():
            if not isinstance(held, torch.Tensor) or held.dim() == 0 or key.startswith("qmap"):
                continue
            inner = getattr(held, "__tensor_flatten__", None)
            names = [n for n in inner()[0] if n != "qmap"] if inner else []
            parts = [getattr(held, name) for name in names] or [held]
            total += sum(part.numel() * part.element_size() for part in parts)
    return total


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in COMPILED else n for n in CLASSES],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_the_named_optimizer_runs(
    tmp_path: Path, trainers: list[MixLoraTrainer], name: str
) -> None:
    package, kind = CLASSES[name]
    owner = pytest.importorskip(package, reason=f"{package} is not installed")
    config = config_of("lora", *WIDE, f"trainer.optim={name}", "trainer.max_steps=3")
    _, summary = train(config, tmp_path / "run")
    optimizer = trainers[0].optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)
    assert type(optimizer) is getattr(owner, kind)
    assert summary.steps == 3
    each, expected = OPTIMIZERS[name].state_bytes, 0
    for parameter in optimizer.state:
        # Small ones stay in float32.
        small = parameter.numel() < 4096 and name != "muon"
        expected += parameter.numel() * (8 if small else each)
    assert state_bytes(optimizer) == expected
    kept = list((tmp_path / "run").glob("checkpoints/step-*"))
    assert bool(kept) == OPTIMIZERS[name].resumes
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    # Linear, from 2e-3: what the schedule has for a fourth step.
    assert rates == pytest.approx([0.0] * len(rates), abs=1e-9)


@pytest.mark.parametrize("name", ["muon", "adamw_torch"])
def test_resumed_to_the_bit(tmp_path: Path, name: str) -> None:
    config = config_of("lora", "method.rank=4", "method.dropout=0.2", f"trainer.optim={name}")
    model, truth = train(config, tmp_path / "whole")
    expected = weights_of(model)
    with killed_after(34):
        train(config, tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    model, summary = train(config, tmp_path / "run")
    for key, weight in weights_of(model).items():
        assert torch.equal(expected[key], weight), key
    assert summary.curve == truth.curve


def test_without_checkpoints_an_interrupted_run_begins_anew(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = config_of("lora", *WIDE, "trainer.optim=adamw_bnb_8bit", "trainer.max_steps=4")
    model, truth = train(config, tmp_path / "whole")
    expected = weights_of(model)
    with killed_after(18):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    model, summary = train(config, tmp_path / "run")
    assert all(torch.equal(expected[key], weight) for key, weight in weights_of(model).items())
    assert summary.curve == truth.curve


def test_the_optimizer_is_shared_by_adapters_that_train_together() -> None:
    one, same, other = (
        compose(["experiment=smoke", "method=lora", f"seed={seed}", f"trainer.optim={name}"])
        for seed, name in ((1, "muon"), (1, "muon"), (1, "adamw_torch"))
    )
    assert packs_of([one, same, other], 3) == [[0, 1], [2]]


def test_schedules_of_adapters_together_are_their_own(tmp_path: Path) -> None:
    """`polynomial` compares its end with the run's learning rate, which the optimizer as a whole
    does not have."""
    jobs, methods = [], {}
    own = {
        "a": ["trainer.schedule=polynomial", "trainer.schedule_options={lr_end:1e-3}"],
        "b": ["trainer.schedule=cosine", "trainer.schedule_options={num_cycles:1}"],
    }
    for name, words in own.items():
        config = config_of("lora", "method.rank=4", *words)
        (tmp_path / name).mkdir()
        tokenizer = load_tokenizer(config.model)
        job = make_job(name=f"adapter_{name}", config=config, examples=examples_of(config),
                       folder=tmp_path / name, tokenizer=tokenizer)  # fmt: skip
        jobs.append(job)
        methods[jobs[-1].name] = (config.method, config.seed)
    together = attach_together(base_of(jobs[0].config), methods, jobs[0].config.kernel)
    found = fit_jointly(model=together, jobs=jobs, dtype=torch.float32)
    rates = {name: [e["learning_rate"] for e in found[f"adapter_{name}"].curve] for name in own}
    # 2e-3 falls to 1e-3 in 6 steps, in equal parts.
    expected = [2e-3 - 1e-3 * step / 6 for step in range(6)]
    assert rates["a"] == pytest.approx(expected)
    assert rates["b"][3] == pytest.approx(0.0, abs=1e-9)
    assert all(plain_parameters_of(together, job.name) for job in jobs)


OPTIONS = {
    "cosine": {"num_cycles": 1.5},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"lr_end": 1e-5, "power": 2.0},
    "inverse_sqrt": {"timescale": 5},
    "cosine_with_min_lr": {"min_lr": 2e-5},
    "warmup_stable_decay": {"num_decay_steps": 6, "decay_type": "linear", "min_lr_ratio": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_schedule_is_transformers_own(name: str) -> None:
    options = OPTIONS[name]
    given = "{" + ",".join(f"{key}:{value}" for key, value in options.items()) + "}"
    config = compose(
        ["method=lora", "trainer.learning_rate=1e-3", f"trainer.schedule={name}",
         "trainer.warmup_steps=4", f"trainer.schedule_options={given}"]
    )  # fmt: skip
    factor, steps = schedule_of(config, 20), 20
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = transformers.get_scheduler(name, optimizer, 4, steps, options)
    for step in range(steps):
        assert 1e-3 * factor(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()
    assert set(options) <= set(SCHEDULES[name])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("method=mixlora trainer.optim=muon", "muon updates matrices alone, and method=mixlora"),
        ("method=dora trainer.optim=muon", "muon updates matrices alone, and method=dora"),
        ("method=vera trainer.optim=muon", "muon updates matrices alone, and method=vera"),
        ("method=adalora trainer.optim=adamw_bnb_8bit", "was not tried with method=adalora"),
        ("method=lora_ga trainer.optim=adamw_torch_8bit", "was not tried with method=lora_ga"),
        ("method=lora trainer.schedule=polynomial trainer.schedule_options={lr_end:1}",
         r"trainer.schedule=polynomial .* must be smaller"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_told_before_anything_loads(words: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_optimizer(compose(["experiment=smoke", *words.split()]))


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(["experiment=smoke", "method=lora", "trainer.optim=adamw_bnb_8bit"])
    absent = SimpleNamespace(find_spec=lambda name: None)
    monkeypatch.setattr(optimizer_checks.importlib, "util", absent)
    with pytest.raises(UserError, match="needs the package bitsandbytes: run `pip install bitsan"):
        check_optimizer(config)
    check_optimizer(config, here=False)
    monkeypatch.undo()
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match="trainer.optim=muon needs torch 2.9 or later"):
        check_optimizer(compose(["experiment=smoke", "method=lora", "trainer.optim=muon"]))
    assert importlib.util.find_spec("torch") is not None


def test_plans_know_the_state(tmp_path: Path) -> None:
    def sizes(name: str) -> tuple[int, int]:
        config = compose(["model=llama2_7b", "method=lora", f"trainer.optim={name}"])
        memory = memory_of(config)["adapter_and_optimizer"]
        return memory, disk_bytes(config)["checkpoints"]

    trained, whole = 199_884_800, sizes("adamw_torch")
    assert sizes("adamw_torch_fused") == whole
    memory, disk = sizes("adamw_bnb_8bit")
    assert whole[0] - memory == pytest.approx((8 - 2 - 8 / 256) * trained, rel=1e-6)
    assert disk == 0
    memory, disk = sizes("muon")
    assert whole[0] - memory == pytest.approx(4 * trained, rel=1e-6)
    assert disk == pytest.approx(whole[1] * 8 / 12)
