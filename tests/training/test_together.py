"""Several adapters trained on one base: each as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from composed import compose
from cpu_kernels import CPU_KERNELS
from encoded import examples_of

from mixlora_exp.adapters import attach_adapter, attach_together, linear
from mixlora_exp.adapters.mixed_adapters import parameters_of
from mixlora_exp.config.schema import Config
from mixlora_exp.data.encoding import Example
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.training import TrainSummary, fit, fit_jointly, make_job, stability

SMALL = [
    "experiment=smoke",
    "trainer.precision=float32",
    "data.train_limit=24",
    "trainer.batch_size=8",
    "trainer.max_steps=50",
]
# Four methods that differ in whatever may differ.
FOUR = {
    "mixlora": ["method=mixlora", "method.rank=4", "trainer.micro_batch_size=4", "seed=1"],
    "dora": ["method=dora", "task=obqa", "method.rank=2", "seed=2", "trainer.max_grad_norm=0.5"],
    "mixdora": [
        "method=mixdora", "task=piqa", "method.num_experts=4", "seed=3", "method.dropout=0.2",
        "trainer.learning_rate=1e-3", "trainer.schedule=linear", "trainer.warmup_steps=3",
    ],
    "lora": ["method=lora", "seed=4", "trainer.micro_batch_size=2", "trainer.loss_on=all"],
}  # fmt: skip

# Steps of each: all together at first, then fewer and fewer adapters, the last one alone.
STEPS = {"mixlora": 6, "mixdora": 5, "dora": 4, "lora": 3}
MANY = {"mixlora": 50, "mixdora": 50, "dora": 12, "lora": 9}


# And what else may differ or be odd: presets, orders, targets, short last steps, other families.
ODD = {
    "official": ["method=mixdora", "preset=official", "trainer.micro_batch_size=2", "seed=5"],
    "fixed order": ["method=mixlora", "trainer.order=fixed", "trainer.loss_on=all",
                    "trainer.padding_in_loss=true", "trainer.micro_batch_size=2", "seed=6"],
    "experts on down": ["method=mixdora", "method.targets=[q_proj,down_proj]", "method.dropout=0",
                        "data.train_limit=21", "trainer.micro_batch_size=4", "seed=7"],
    "frozen magnitude": ["method=dora", "method.train_magnitude=false", "trainer.epochs=1.5",
                         "trainer.max_steps=null", "data.train_limit=21", "seed=8"],
    "attention alone": ["method=lora", "method.targets=[k_proj,o_proj]",
                        "trainer.weight_decay=0.5", "seed=9"],
    "gate alone": ["method=lora", "method.targets=[gate_proj]", "seed=10"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def exact_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records round losses and norms; here they are compared as they are."""
    monkeypatch.setattr(stability, "round", lambda value, digits: value, raising=False)


@dataclass
class Result:
    """An adapter's weights, by names that do not depend on what else the model carries."""

    weights: dict[str, torch.Tensor]
    summary: TrainSummary | UserError


def plain(name: str, adapter: str) -> str:
    return name.replace(".base_layer", "").replace(f".{adapter}.", ".").removesuffix(f".{adapter}")


def base_of(config: Config, dtype: torch.dtype):
    model = load_model(config.model, torch.float32, seed=7).to(dtype)
    # Plain attention takes its softmax in float32.
    model.set_attn_implementation("sdpa")
    return model


@pytest.fixture
def alone(tmp_path: Path) -> Callable[..., Result]:
    def train(config: Config, dtype: torch.dtype) -> Result:
        base = base_of(config, dtype)
        model = attach_adapter(base, config.method, config.kernel, config.seed)
        folder = tmp_path / f"alone-{config.method.name}"
        folder.mkdir(exist_ok=True)
        tokenizer = load_tokenizer(config.model)
        examples = examples_of(config)
        summary = fit(
            config=config, model=model, tokenizer=tokenizer, examples=examples, folder=folder,
            dtype=dtype,
        )  # fmt: skip
        owned = parameters_of(model, "default")
        return Result({plain(n, "default"): p.detach() for n, p in owned.items()}, summary)

    return train


@pytest.fixture
def together(tmp_path: Path) -> Callable[..., dict[str, Result]]:
    def train(
        configs: dict[str, Config],
        dtype: torch.dtype = torch.float32,
        change: Callable[..., None] | None = None,
        examples: dict[str, list[Example]] | None = None,
    ) -> dict[str, Result]:
        jobs = []
        for number, (name, config) in enumerate(configs.items()):
            folder = tmp_path / f"together-{name}"
            folder.mkdir(exist_ok=True)
            given = (examples or {}).get(name)
            jobs.append(
                make_job(
                    name=f"adapter{number}",
                    config=config,
                    examples=examples_of(config) if given is None else given,
                    folder=folder,
                    tokenizer=load_tokenizer(config.model),
                )
            )
        first = next(iter(configs.values()))
        methods = {
            job.name: (config.method, config.seed)
            for job, config in zip(jobs, configs.values(), strict=True)
        }
        model = attach_together(base_of(first, dtype), methods, first.kernel)
        if change is not None:
            change(model)
        found = fit_jointly(model=model, jobs=jobs, dtype=dtype)
        return {
            name: Result(
                {plain(n, job): p.detach() for n, p in parameters_of(model, job).items()},
                found[job],
            )
            for name, job in zip(configs, found, strict=True)
        }

    return train


@pytest.mark.parametrize(
    ("dtype", "tolerance", "steps"),
    [
        pytest.param(torch.float64, 1e-9, STEPS, id="f64"),
        pytest.param(torch.float64, 1e-9, MANY, id="f64, long", marks=pytest.mark.slow),
        pytest.param(torch.float32, 1e-4, MANY, id="f32", marks=pytest.mark.slow),
    ],
)
def test_each_trajectory_is_that_of_a_run_alone(alone, together, dtype, tolerance, steps) -> None:
    """Methods, ranks, experts, tasks, batch sizes, rates, schedules, clipping, lengths, dropout and
    losses of their own."""
    configs = {
        name: compose([*SMALL, *FOUR[name], f"trainer.max_steps={count}"])
        for name, count in steps.items()
    }
    found = together(configs, dtype)
    for name, config in configs.items():
        expected = alone(config, dtype)
        assert found[name].weights.keys() == expected.weights.keys()
        for key, weight in expected.weights.items():
            torch.testing.assert_close(
                found[name].weights[key], weight, rtol=0, atol=tolerance, msg=f"{name} {key}"
            )
        summary, truth = found[name].summary, expected.summary
        assert (summary.steps, summary.tokens) == (truth.steps, truth.tokens)
        close = {"abs": tolerance, "rel": tolerance}
        assert summary.stability.step_losses == pytest.approx(truth.stability.step_losses, **close)
        norms = truth.stability.step_gradient_norms
        assert summary.stability.step_gradient_norms == pytest.approx(norms, **close)
        assert summary.expert_load == truth.expert_load or dtype is torch.float32
        for ours, theirs in zip(summary.curve, truth.curve, strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny_gemma", "tiny"])
def test_odd_settings_too(alone, together, model) -> None:
    steps = ["trainer.max_steps=4", f"model={model}"]
    configs = {name: compose([*SMALL, *steps, *changes]) for name, changes in ODD.items()}
    found = together(configs, torch.float64)
    for name, config in configs.items():
        expected = alone(config, torch.float64)
        for key, weight in expected.weights.items():
            torch.testing.assert_close(
                found[name].weights[key], weight, rtol=0, atol=1e-9, msg=f"{name} {key}"
            )
        summary, truth = found[name].summary, expected.summary
        assert summary.steps == truth.steps
        losses = truth.stability.step_losses
        assert summary.stability.step_losses == pytest.approx(losses, rel=1e-9, abs=1e-9)
        assert [e["epoch"] for e in summary.curve] == [e["epoch"] for e in truth.curve]


def test_adapters_of_one_shape_are_batched(alone, together, monkeypatch) -> None:
    """Same method, rank and rows, so that their products are made in one go."""
    calls = []
    real = linear.FusedLinear.add

    def counted(frozen, rows, *parts):
        calls.append(len(parts))
        return real(frozen, rows, *parts)

    monkeypatch.setattr(linear.FusedLinear, "add", staticmethod(counted))
    steps = ["trainer.max_steps=3", "method.dropout=0.2"]
    configs = {
        f"{method} {rate}": compose(
            [*SMALL, f"method={method}", f"trainer.learning_rate={rate}", *steps]
        )
        for method in ("lora", "dora")
        for rate in (1e-4, 1e-2)
    }
    found = together(configs, torch.float64)
    # Each is checked by itself before the first step, for its gradients, and after the last one,
    # for its loss.
    first, last = calls.index(2), len(calls) - calls[::-1].index(2)
    assert set(calls[first:last]) == {2}
    assert set(calls[:first]) == set(calls[last:]) == {1}
    for name, config in configs.items():
        expected = alone(config, torch.float64)
        for key, weight in expected.weights.items():
            torch.testing.assert_close(found[name].weights[key], weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(name, marks=[] if name == "shared" else pytest.mark.slow)
        for name in CPU_KERNELS
        if name != "exact"
    ],
)
def test_every_kernel_trains_together(alone, together, kernel) -> None:
    steps = ["trainer.max_steps=3", f"kernel={kernel}"]
    configs = {name: compose([*SMALL, *changes, *steps]) for name, changes in FOUR.items()}
    found = together(configs, torch.float64)
    for name, config in configs.items():
        expected = alone(config, torch.float64)
        for key, weight in expected.weights.items():
            torch.testing.assert_close(found[name].weights[key], weight, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_checkpointing_changes_nothing(together) -> None:
    steps = ["trainer.max_steps=2"]
    results = []
    for extra in ([], ["trainer.gradient_checkpointing=true"]):
        configs = {n: compose([*SMALL, *c, *steps, *extra]) for n, c in FOUR.items()}
        results.append(together(configs, torch.float64))
    for name in FOUR:
        for key, weight in results[0][name].weights.items():
            torch.testing.assert_close(results[1][name].weights[key], weight, rtol=0, atol=1e-12)


def poison(adapter: str) -> Callable[..., None]:
    def change(model) -> None:
        with torch.no_grad():
            for parameter in parameters_of(model, adapter).values():
                parameter.fill_(float("nan"))

    return change


@pytest.mark.parametrize(
    "victim",
    [
        "mixlora",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "dora", "mixdora")),
    ],
)
def test_one_adapters_nan_stops_it_alone(together, victim) -> None:
    """It is taken out at its first step with a message, and the others do not change by a bit."""
    steps = ["trainer.max_steps=3"]
    configs = {name: compose([*SMALL, *c, *steps]) for name, c in FOUR.items()}
    sound = together(configs)
    broken = together(configs, change=poison(f"adapter{list(FOUR).index(victim)}"))
    assert isinstance(broken[victim].summary, UserError)
    assert "at step 1" in str(broken[victim].summary)
    assert "trainer.learning_rate" in str(broken[victim].summary)
    for name in set(FOUR) - {victim}:
        assert broken[name].summary.stability == sound[name].summary.stability
        for key, weight in sound[name].weights.items():
            assert torch.equal(broken[name].weights[key], weight), (name, key)


def test_one_that_diverges_later_stops_alone_and_its_weights_are_not_kept(
    together, tmp_path
) -> None:
    configs = {name: compose([*SMALL, *c, "trainer.max_steps=4"]) for name, c in FOUR.items()}
    # Too large for float32 after its first step.
    trainer = replace(configs["lora"].trainer, learning_rate=1e30)
    configs["lora"] = replace(configs["lora"], trainer=trainer)
    found = together(configs)
    assert "the loss became nan at step 2 (first in " in str(found["lora"].summary)
    assert not (tmp_path / "together-lora" / "last_good").exists()
    assert found["mixlora"].summary.steps == 4


def test_no_examples_are_refused_by_name(together) -> None:
    configs = {"lora": compose([*SMALL, *FOUR["lora"]])}
    with pytest.raises(UserError, match=r"task\.train=.*no training examples"):
        together(configs, examples={"lora": []})


def test_a_finished_one_leaves_the_batch(together) -> None:
    """Its weights stay as they were after its own last step."""
    few, many = ["trainer.max_steps=2"], ["trainer.max_steps=4"]
    short = {n: compose([*SMALL, *FOUR[n], *few]) for n in ("mixlora", "lora")}
    mixed = {**short, "lora": compose([*SMALL, *FOUR["lora"], *many])}
    expected, found = together(short), together(mixed)
    for key, weight in expected["mixlora"].weights.items():
        assert torch.equal(found["mixlora"].weights[key], weight)
    assert found["lora"].summary.steps == 4


def test_a_batch_knows_its_examples_in_the_optimizer_step(tmp_path: Path) -> None:
    """Over its micro-batches; the model does not get them."""
    config = compose([*SMALL, "trainer.micro_batch_size=2"])
    job = make_job(
        name="one", config=config, examples=examples_of(config), folder=tmp_path,
        tokenizer=load_tokenizer(config.model),
    )  # fmt: skip
    seen = []
    for number in range(4):
        batch = job.collated(0, number, 4)
        assert not {"example", "step"} & set(job.begin_pass(0, batch))
        seen.append(batch["example"].tolist())
    assert seen == [[0, 1], [2, 3], [4, 5], [6, 7]]
    # Among others with more micro-batches its own come last.
    assert job.collated(0, 0, 6) is None
    assert job.collated(0, 2, 6)["example"].tolist() == [0, 1]


def test_an_adapter_with_fewer_micro_batches_is_checked_too(together) -> None:
    """It comes in the last passes of the first step alone."""
    words = [*SMALL, "trainer.max_steps=2", "trainer.batch_size=8"]
    sizes = {"many": 2, "few": 8}
    configs = {
        name: compose(
            [*words, "method=mixlora", f"seed={size}", f"trainer.micro_batch_size={size}"]
        )
        for name, size in sizes.items()
    }
    found = together(configs)
    assert all(found[name].summary.not_chosen is not None for name in sizes)

    def cut(model) -> None:
        """Nothing that the loss depends on."""
        path = "base_model.model.model.layers.0.self_attn.q_proj"
        model.get_submodule(path).scaling["adapter1"] = 0.0

    broken = together(configs, change=cut)
    assert broken["many"].summary.steps == 2
    told = str(broken["few"].summary)
    assert "lora_A" in told or "lora_B" in told
    assert "has no gradient on the first micro-batch" in told


def test_an_optimizer_step_is_asked_for_once_for_all_adapters(together, reads_of_steps) -> None:
    """Their losses and norms, as those of one adapter."""
    words = [*SMALL, "trainer.max_steps=2"]
    together({name: compose([*words, *FOUR[name]]) for name in ("mixlora", "lora")})
    assert reads_of_steps == [1, 1]
