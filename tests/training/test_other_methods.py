"""Methods that are no mixtures under the training loop: proven, resumed, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from composed import compose
from encoded import examples_of
from killed import killed_after
from small_methods import METHODS, OWN_TYPE, base_of, config_of, new_model, run, train, weights_of

from mixlora_exp.adapters import attach_adapter, attach_together, load_adapter, save_adapter
from mixlora_exp.adapters.mixed_adapters import plain_parameters_of
from mixlora_exp.models import load_tokenizer
from mixlora_exp.training import fit_jointly, make_job


@pytest.mark.parametrize("method", METHODS)
def test_trained_saved_and_loaded_again(tmp_path: Path, method: str) -> None:
    config = config_of(method)
    model, plain = new_model(config), base_of(config)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    _, summary = train(config, tmp_path / "run", model)
    # Every parameter had a gradient before the first step.
    assert summary.not_chosen is not None
    after = dict(model.named_parameters())
    # AdaLoRA's singular values begin at zero, and some end there.
    moved = {n: w for n, w in before.items() if "lora_E" not in n}
    assert not [n for n, weight in moved.items() if torch.equal(weight, after[n])]
    expected, untouched = run(model), run(plain)
    save_adapter(model, tmp_path / "saved")
    loaded = load_adapter(base_of(config), tmp_path / "saved", config.kernel)
    torch.testing.assert_close(run(loaded), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(expected, untouched, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(run(model), untouched)
    # The base is as it was, to the bit.
    left = model.unload().state_dict()
    assert all(torch.equal(left[name], own) for name, own in plain.state_dict().items())


# Those with a state of their own; the others run with the slow tests.
STATEFUL = ("lora_ga", "vera", "adalora", "fedpara", "orthogonal")


@pytest.mark.parametrize(
    "method",
    [m if m in STATEFUL else pytest.param(m, marks=pytest.mark.slow) for m in METHODS],
)
def test_resumed_to_the_bit(tmp_path: Path, method: str) -> None:
    config = config_of(method)
    model, truth = train(config, tmp_path / "whole")
    expected = weights_of(model)
    save_adapter(model, tmp_path / "first")
    # LoRA-GA reads the first step's examples twice.
    with killed_after(42 if method == "lora_ga" else 34):
        train(config, tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    torch.manual_seed(999)
    model, summary = train(config, tmp_path / "run")
    found = weights_of(model)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    assert summary.curve == truth.curve
    # After the last checkpoint nothing is left to train; what is saved is the same.
    model, _ = train(config, tmp_path / "run")
    save_adapter(model, tmp_path / "second")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        first, second = ((tmp_path / part / name).read_bytes() for part in ("first", "second"))
        assert first == second, name


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    """As plain LoRA with sqrt(r) times the alpha, in blocks with experts and in mixtures too."""
    for method in ("lora", "mixlora", "mola", "hydralora"):
        logits = []
        for words in (["method.rslora=true", "method.alpha=3"], ["method.alpha=6"]):
            config = compose(["model=tiny", f"method={method}", "method.rank=4", *words])
            model = new_model(config)
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if "lora_B" in name:
                        weight += 0.1 * torch.randn(weight.shape, generator=generator)
            logits.append(run(model))
        assert torch.equal(*logits), method


SLOW = ("lora", "dora", "mixlora", "mola", "goat", "moslora", "pissa")
ALL = [
    *("mixdora", "adamole", "adalora", "hira"),
    *(pytest.param(method, marks=pytest.mark.slow) for method in SLOW),
]


@pytest.mark.parametrize("method", ALL)
def test_lora_plus_goes_with_any_method(tmp_path: Path, monkeypatch, method: str) -> None:
    changed = [] if method in OWN_TYPE else ["method.dropout=0"]
    config = config_of(method, *changed, "method.lora_plus_ratio=8", "trainer.max_steps=3")
    config.trainer.schedule = "constant"
    model, rates = new_model(config), []
    real = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append({id(p): group["lr"] for group in self.param_groups for p in group["params"]})
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(config, tmp_path / "run", model)
    fast = ("lora_B", "hira_B", "magnitude", "threshold_bias")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {any(part in name for part in fast) for name in trained} == {True, False}
    for found in rates:
        assert found.keys() == {id(p) for p in trained.values()}
        for name, parameter in trained.items():
            expected = 8 if any(part in name for part in fast) else 1
            assert found[id(parameter)] == pytest.approx(expected * 2e-3), name


@pytest.mark.slow
def test_each_trajectory_is_that_of_a_run_alone(tmp_path: Path) -> None:
    names = ["rslora", "lora_plus", "lora_fa", "pissa", "mixlora"]
    configs = {name: config_of(name, "trainer.max_steps=3", "method.rank=4") for name in names}
    base, jobs = base_of(configs["rslora"]).double(), []
    base.set_attn_implementation("sdpa")
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        job = make_job(name=f"a_{name}", config=config, examples=examples_of(config),
                       folder=tmp_path / name, tokenizer=load_tokenizer(config.model))  # fmt: skip
        jobs.append(job)
    methods = {f"a_{name}": (config.method, config.seed) for name, config in configs.items()}
    together = attach_together(base, methods, configs["rslora"].kernel)
    fit_jointly(model=together, jobs=jobs, dtype=torch.float64)
    for name, config in configs.items():
        alone = base_of(config).double()
        alone.set_attn_implementation("sdpa")
        model = attach_adapter(alone, config.method, config.kernel, config.seed)
        train(config, tmp_path / f"alone-{name}", model, torch.float64)
        found = plain_parameters_of(together, f"a_{name}")
        for key, weight in weights_of(model).items():
            torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-9, msg=f"{name} {key}")


@pytest.mark.parametrize("method", ["vera", pytest.param("pissa", marks=pytest.mark.slow)])
def test_the_gradient_check_checkpoints_too(tmp_path: Path, method: str) -> None:
    """transformers does so in training mode alone; PEFT's own layers are not in it there."""
    deep = ["trainer.max_steps=1", "+model.config.num_hidden_layers=4"]
    kept = [
        train(config_of(method, *deep, f"trainer.gradient_checkpointing={given}"), tmp_path / given)
        for given in ("false", "true")
    ]
    whole, less = (summary.kept_bytes_per_token for _, summary in kept)
    assert less < 0.6 * whole
