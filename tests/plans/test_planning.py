"""Plans: exact parameter counts, steps and tokens, without weights and without the network."""

from __future__ import annotations

import dataclasses
import itertools
import socket
from pathlib import Path

import pytest
import torch
import transformers
from composed import compose

from mixlora_exp.adapters import attach_adapter
from mixlora_exp.cli.train import execute
from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.config.command import compose_cell
from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.config.resolve import open_session
from mixlora_exp.config.schema import Config, LoraMethodConfig
from mixlora_exp.data.encoding import encode_examples
from mixlora_exp.data.sources import load_split
from mixlora_exp.kernels import MIXTURES as REGISTERED
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.models.parameters import count_parameters
from mixlora_exp.plans.plan import count_steps, plan
from mixlora_exp.results.paper import MODEL_TITLES
from mixlora_exp.results.tables.sizes import percentages
from mixlora_exp.training import fit

METHODS = ["none", *PAPER_METHODS]
MIXTURES = {
    "mola": 105_635_840,
    "loramoe": 51_314_688,
    "hydralora": 18_284_544,
    "adamole": 38_273_152,
    "goat": 63_111_168,
    "moslora": 28_090_368,
}
"""Trained parameters for LLaMA-2 7B with the settings of each file."""
CONTROLS = {
    # 32 layers of rank r at seven projections, whose inputs and outputs add up to 78,080.
    "lora_r32": 79_953_920,  # 32 * 32 * 78,080
    "lora_r128": 319_815_680,  # 32 * 128 * 78,080
    "mixlora_one_expert": 39_976_960,  # 32 * 16 * 78,080
    # And a magnitude per output: of four times 4,096 in attention, and of 2 * 11,008 + 4,096 for
    # the block or each of 8 experts.
    "dora": 201_244_672,  # 199,884,800 + 32 * 42,496
    "mixdora": 210_632_704,  # 203,423,744 + 32 * (16,384 + 8 * 26,112)
}
"""The same of others, counted by hand."""
BASE = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama3_8b": 8_030_261_248,
    "gemma_2b": 2_506_172_416,
    "smollm2_135m": 134_515_008,
    "qwen2.5_0.5b": 494_032_768,
    "qwen3_0.6b": 596_049_920,
    "mistral_7b": 7_241_732_096,
    "llama3.2_1b": 1_235_814_400,
    "llama3.2_3b": 3_212_749_824,
    "gemma3_270m": 268_098_176,
}
PAPER = [
    ("llama2_7b", "lora", 199_884_800, "2.9"),
    ("llama2_7b", "mixlora", 203_423_744, "2.9"),
    ("llama2_13b", "lora", 312_934_400, "2.4"),
    ("llama2_13b", "mixlora", 318_832_640, "2.5"),
    ("llama3_8b", "lora", 209_715_200, "2.6"),
    ("llama3_8b", "mixlora", 241_172_480, "3.0"),
    ("gemma_2b", "lora", 98_058_240, "3.2"),
    ("gemma_2b", "mixlora", 131_383_296, "4.3"),
]
RANKS = [
    (2, 26_345_472, "0.38"),
    (4, 51_642_368, "0.74"),
    (8, 102_236_160, "1.46"),
    (16, 203_423_744, "2.91"),
    (32, 405_798_912, "5.80"),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def published(model: str, method: str) -> str:
    """The #Params figure as Tables 1, 2, 5 and 8 print it."""
    config = compose([f"model={model}", f"method={method}"])
    percent = count_parameters(config.model, config.method).percent_paper
    assert percent is not None
    return f"{percent:.1f}"


@pytest.mark.parametrize(("model", "expected"), BASE.items())
def test_base_parameters(model: str, expected: int) -> None:
    config = compose([f"model={model}", "method=none"])
    counts = count_parameters(config.model, config.method)
    assert counts.base == expected
    assert (counts.trainable, counts.adapter, counts.percent_true) == (0, 0, 0.0)


@pytest.mark.parametrize(("model", "method", "expected", "percent"), PAPER)
def test_published_sizes(model: str, method: str, expected: int, percent: str) -> None:
    config = compose([f"model={model}", f"method={method}"])
    counts = count_parameters(config.model, config.method)
    assert counts.adapter == counts.trainable == expected
    assert published(model, method) == percent
    # The paper's column leaves magnitudes out; the true count does not.
    dora = compose([f"model={model}", f"method={method.replace('lora', 'dora')}"])
    with_magnitudes = count_parameters(dora.model, dora.method)
    assert with_magnitudes.adapter == expected
    assert with_magnitudes.trainable == expected + with_magnitudes.magnitude > expected


@pytest.mark.parametrize(("method", "expected"), MIXTURES.items())
def test_sizes_of_mixtures(method: str, expected: int) -> None:
    config = compose(["model=llama2_7b", f"method={method}"])
    counts = count_parameters(config.model, config.method)
    assert counts.trainable == counts.adapter == expected


@pytest.mark.parametrize(("method", "expected"), CONTROLS.items())
def test_sizes_of_controls_and_of_magnitudes(method: str, expected: int) -> None:
    config = compose(["model=llama2_7b", f"method={method}"])
    assert count_parameters(config.model, config.method).trainable == expected


@pytest.mark.parametrize("model", MODEL_TITLES)
def test_tables_count_without_torch_what_a_plan_counts(model: str) -> None:
    by_layer = ["method.num_experts=2/4", "method.top_k=1/2"]
    for method, words in [*((method, []) for method in METHODS[1:]), ("mixlora", by_layer)]:
        targets = "method.targets=[k_proj,up_proj]"
        config = compose([f"model={model}", f"method={method}", targets, *words])
        counted = count_parameters(config.model, config.method)
        expected = (counted.percent_paper or 0.0, counted.percent_true)
        assert percentages(config.model, config.method) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("rank", "expected", "percent"), RANKS)
def test_published_ranks(rank: int, expected: int, percent: str) -> None:
    config = compose(["model=llama2_7b", "method=mixlora", f"method.rank={rank}"])
    counts = count_parameters(config.model, config.method)
    assert counts.adapter == expected
    assert f"{counts.percent_paper:.2f}" == percent
    assert counts.percent_true == pytest.approx(100 * expected / (6_738_415_616 + expected))


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        # Low rank 202,375,168; the matrices 32 x 8 x 4,096; a threshold 32 x (4,096 + 1).
        ("top_p", 203_423_744),
        ("switch", 203_423_744),
        ("dense", 203_423_744),
        ("threshold", 203_554_848),
        ("random_frozen", 202_375_168),
        ("uniform", 202_375_168),
    ],
)
def test_sizes_with_other_routers(router: str, expected: int) -> None:
    config = compose(["model=llama2_7b", "method=mixlora", f"method.router={router}"])
    assert count_parameters(config.model, config.method).trainable == expected


def test_no_denominator_means_no_published_percentage() -> None:
    cut = compose(["model=llama2_7b", "model.weights=random", "model.config.num_hidden_layers=2"])
    assert count_parameters(cut.model, cut.method).percent_paper is None
    tiny = compose(["model=tiny"])
    assert count_parameters(tiny.model, tiny.method).percent_paper is None


@pytest.mark.parametrize("model", ["tiny", "tiny_gemma"])
@pytest.mark.parametrize("method", [*METHODS, *REGISTERED])
@pytest.mark.parametrize("targets", [None, "[q_proj,up_proj,down_proj]"])
def test_counts_equal_those_of_built_models(model: str, method: str, targets: str | None) -> None:
    changed = [f"method.targets={targets}"] if targets and method != "none" else []
    config = compose([f"model={model}", f"method={method}", *changed])
    counts = count_parameters(config.model, config.method)
    built = load_model(config.model, torch.float32)
    assert sum(p.numel() for p in built.parameters()) == counts.base
    if not isinstance(config.method, LoraMethodConfig):
        return
    adapted = attach_adapter(built, config.method, config.kernel, seed=0)
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    found = {
        part: sum(p.numel() for name, p in trainable.items() if f"lora_{part}" in name)
        for part in ("router", "magnitude")
    }
    assert found == {"router": counts.router, "magnitude": counts.magnitude}
    fixed = sum(p.numel() for name, p in adapted.named_parameters() if name[:-8].endswith("0"))
    assert (fixed > 0) == (method in REGISTERED and bool(REGISTERED[method].fixed))
    assert adapted.get_nb_trainable_parameters() == (
        counts.trainable,
        counts.base + counts.trainable + fixed,
    )


TINY_RUN = [
    "experiment=smoke",
    "trainer.precision=float32",
    "trainer.max_steps=null",
    "method=lora",
    "data.train_limit=10",
]


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        (["trainer.epochs=1"], 3),
        (["trainer.epochs=2"], 6),
        (["trainer.epochs=1.5"], 5),
        (["trainer.max_steps=7"], 7),
        (["trainer.epochs=1", "trainer.micro_batch_size=1"], 3),
        (["trainer.epochs=1", "data.forms=[label,text]"], 5),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_steps_and_tokens_are_those_of_training(
    changes: list[str], steps: int, tmp_path: Path
) -> None:
    config = compose([*TINY_RUN, *changes])
    expected = plan(config)
    assert expected.steps == steps
    assert expected.tokens_counted
    items = load_split(config.data, "arc_e", "train").limited(10, config.data.seed).items
    tokenizer = load_tokenizer(config.model)
    examples = encode_examples(tokenizer, items, config.data)
    base = load_model(config.model, torch.float32)
    model = attach_adapter(base, config.method, config.kernel, config.seed)
    summary = fit(
        config=config, model=model, tokenizer=tokenizer, examples=examples,
        folder=tmp_path / "trainer", dtype=torch.float32,
    )  # fmt: skip
    assert (summary.steps, summary.examples) == (steps, expected.examples)
    assert expected.tokens == sum(len(example.input_ids) for example in examples)
    if config.trainer.epochs == 1:
        assert summary.tokens == expected.tokens


def test_count_steps() -> None:
    trainer = compose([]).trainer
    assert count_steps(trainer, 16) == 2
    assert count_steps(trainer, 17) == 4
    assert count_steps(dataclasses.replace(trainer, max_steps=1), 10_000) == 1


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights and no network: whatever asks for them fails."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a plan needs neither weights nor the network")

    for auto in (transformers.AutoModelForCausalLM, transformers.PreTrainedModel):
        monkeypatch.setattr(auto, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_every_combination_has_a_plan(offline: None, tmp_path: Path) -> None:
    """No group reads another one, so each option is composed once and then combined; of methods
    that are alike one stands for all."""
    names = {group: options(group) for group in ("model", "task")}
    # Tasks of files, which data=hub does not have.
    of_files = ("metamath_gsm8k", "commonsense_170k")
    names["task"] = [name for name in names["task"] if name not in of_files]
    names = {"model": names["model"], "method": [*METHODS, "goat"], "task": names["task"]}
    parts: dict[str, list] = {}
    with open_session() as hydra:
        base = compose_cell(hydra, "config", ["data=hub", f"output_dir={tmp_path}"])
        for group, found in names.items():
            composed = [compose_cell(hydra, "config", [f"{group}={name}"]) for name in found]
            parts[group] = [getattr(config, group) for config in composed]
    assert all(len(parts[group]) >= least for group, least in zip(names, (13, 6, 10), strict=True))
    models, methods, tasks = parts.values()
    # Each model with each task, and with each method.
    for (i, model), (j, task) in itertools.product(enumerate(models), enumerate(tasks)):
        method = methods[(i + j) % len(methods)]
        config: Config = dataclasses.replace(base, model=model, method=method, task=task)
        found = plan(config)
        assert model.name in found.name
        assert method.name in found.name
        assert list(found.test_rows) == task.evaluate
        assert all(n > 0 for n in found.test_rows.values())
        assert found.memory["weights"] >= 2 * found.parameters.base
        trains = isinstance(method, LoraMethodConfig)
        assert list(found.rows) == (task.train if trains else [])
        assert (found.examples > 0) is (found.steps > 0) is (found.tokens > 0) is trains
        assert found.steps == 2 * -(-found.examples // 16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model=llama2_7b", "task=multi"],
            ["6,738,415,616 frozen, 203,423,744 trainable", "2.91 % of the paper's 7e+09"],
        ),
        (["model=gemma_2b", "method=mixdora", "task=boolq"], ["boolq 9,427", "boolq 3,270"]),
        (["model=llama3_8b", "method=none"], ["train rows  none", "training    none"]),
        (["experiment=smoke", "method=dora"], ["32 per epoch", "(counted; ", "steps       2 of 4"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_dry_run_prints_the_plan(
    overrides: list[str],
    words: list[str],
    offline: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert execute([*overrides, "dry_run=true"]) == 0
    out = capsys.readouterr().out
    for word in words:
        assert word in out
    assert not list(tmp_path.iterdir())


def test_the_plan_of_the_base_model_has_no_training(
    offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["method=none", "model=tiny", "data=embedded", "task=arc_e", "dry_run=true"]
    assert execute(words) == 0
    out = capsys.readouterr().out
    assert "training    none: the model is scored as it is" in out
    assert "steps" not in out


def test_magnitudes_that_are_not_trained_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=tiny", "data=embedded", "task=arc_e", "method=mixdora", "dry_run=true"]
    assert execute(words) == 0
    assert "not trained" not in capsys.readouterr().out
    assert execute([*words, "preset=official", "evaluation.dropout=false"]) == 0
    assert "magnitude 7,040 (not trained)" in capsys.readouterr().out


def test_a_plan_converts_no_weights(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2's tokenizer comes with its weights: until they are converted, tokens are guessed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = plan(compose(["model=smollm2_135m", "data=embedded", "task=arc_e"]))
    assert not found.tokens_counted
    assert found.tokens > 0
    assert not list(tmp_path.iterdir())


def test_limits_cut_the_rows() -> None:
    limits = ["data.train_limit=5", "evaluation.limit=3"]
    for data in ("hub", "embedded"):
        found = plan(compose(["model=tiny", "task=multi", f"data={data}", *limits]))
        assert set(found.rows.values()) == {5}
        assert set(found.test_rows.values()) == {3}
        assert found.examples == 25


def test_dropout_and_checkpointing_change_the_estimate() -> None:
    base = ["model=llama2_7b", "method=mixlora"]
    plain = plan(compose([*base, "method.dropout=0"])).memory["activations"]
    assert plan(compose(base)).memory["activations"] > plain
    checkpointed = compose([*base, "trainer.gradient_checkpointing=true"])
    assert plan(checkpointed).memory["activations"] < plain / 8
