"""`data.packing`: a micro-batch as one row of tokens, equal to the padded one up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import same_runs
import torch
from composed import compose
from encoded import examples_of
from peft import PeftModel
from ranks import train_in
from same_runs import UNEVEN
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MistralConfig, PreTrainedModel

from mixlora_exp.adapters import attach_adapter, attach_together
from mixlora_exp.adapters.mixed_adapters import plain_parameters_of
from mixlora_exp.config.schema import Config, LossOn
from mixlora_exp.data.collator import Collator
from mixlora_exp.data.encoding import Example
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.runs.method_checks import check_method
from mixlora_exp.training import TrainSummary, fit, fit_jointly, make_job, stability
from mixlora_exp.training.checkpoints import Checkpoints
from mixlora_exp.training.packed import pack_batches, packed_attention

WORDS = ["experiment=smoke", "trainer.precision=float32", "trainer.batch_size=8",
         "trainer.micro_batch_size=4", "data.train_limit=24", "trainer.max_steps=2",
         "trainer.logging_steps=1", "trainer.order=fixed"]  # fmt: skip
PACKED = "data.packing=true"


@pytest.fixture(autouse=True)
def exact_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records round losses and norms; here they are compared as they are."""
    torch.set_num_threads(1)
    monkeypatch.setattr(stability, "round", lambda value, digits: value, raising=False)


@dataclass
class Result:
    weights: dict[str, torch.Tensor]
    summary: TrainSummary


def result_of(model: PeftModel, name: str, summary: TrainSummary) -> Result:
    owned = plain_parameters_of(model, name)
    return Result({n: p.detach() for n, p in owned.items()}, summary)


def base_of(config: Config, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    model = load_model(config.model, torch.float32, seed=7).to(dtype)
    # Plain attention takes its softmax in float32.
    model.set_attn_implementation(attention)
    return model


def job_of(config: Config, name: str, folder: Path):
    folder.mkdir(exist_ok=True)
    tokenizer = load_tokenizer(config.model)
    return make_job(
        name=name, config=config, examples=examples_of(config), folder=folder, tokenizer=tokenizer
    )


def trained(
    config: Config,
    folder: Path,
    dtype: torch.dtype,
    attention: str = "sdpa",
    watch: Callable[[int, float], None] | None = None,
) -> Result:
    base = base_of(config, dtype, attention)
    model = attach_adapter(base, config.method, config.kernel, config.seed)
    folder.mkdir(exist_ok=True)
    summary = fit(
        config=config, model=model, tokenizer=load_tokenizer(config.model),
        examples=examples_of(config), folder=folder, dtype=dtype, watch=watch,
        checkpoints=Checkpoints(folder / "checkpoints", {"data": "a"}, 2),
    )  # fmt: skip
    return result_of(model, "default", summary)


def check_equal(found: Result, expected: Result, rtol: float, atol: float) -> None:
    one, two = found.summary.stability, expected.summary.stability
    assert one.step_losses == pytest.approx(two.step_losses, rel=rtol)
    assert one.step_gradient_norms == pytest.approx(two.step_gradient_norms, rel=100 * rtol)
    assert found.summary.tokens == expected.summary.tokens
    assert found.summary.expert_load == expected.summary.expert_load
    assert found.summary.not_chosen == expected.summary.not_chosen
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=rtol, atol=atol)


METHODS = {
    "mixlora": ["method=mixlora", "method.dropout=0.2"],
    "mixdora": ["method=mixdora", "method.dropout=0.2", "trainer.loss_on=all"],
    "lora": ["method=lora", "method.dropout=0.2"],
    "checkpointing": ["method=mixlora", "method.dropout=0.2",
                      "trainer.gradient_checkpointing=true"],
    "another family": ["method=mixlora", "model=tiny_gemma"],
    "linear mixture": ["method=hydralora", "method.dropout=0.2"],
    "of PEFT": ["method=vera"],
    "one at a time": ["method=mixlora", "trainer.micro_batch_size=1", "method.dropout=0.2"],
}  # fmt: skip


QUICK = ("mixlora", "lora", "checkpointing", "linear mixture", "of PEFT")


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in METHODS]
)
def test_a_packed_run_is_the_padded_one(tmp_path: Path, method: str) -> None:
    words = [*WORDS, *METHODS[method]]
    expected = trained(compose(words), tmp_path / "padded", torch.float64)
    found = trained(compose([*words, PACKED]), tmp_path / "packed", torch.float64)
    check_equal(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_in_float32_it_is_so_up_to_rounding(tmp_path: Path, attention: str) -> None:
    words = [*WORDS, *METHODS["mixlora"]]
    # AdamW divides a gradient by its size: near zero, rounding moves a weight by part of a step.
    expected = trained(compose(words), tmp_path / "padded", torch.float32, attention)
    found = trained(compose([*words, PACKED]), tmp_path / "packed", torch.float32, attention)
    check_equal(found, expected, rtol=1e-4, atol=2e-5)


TINY = {
    "sliding_window": 3, "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
WINDOWS = {
    "mistral": MistralConfig(**TINY),
    "gemma3": Gemma3TextConfig(**TINY, layer_types=["sliding_attention", "full_attention"]),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", WINDOWS)
def test_a_sliding_window_counts_within_an_example(family: str, attention: str) -> None:
    config = WINDOWS[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).model
    examples = [Example(list(range(1, 9)), 1, "t"), Example(list(range(2, 7)), 1, "t")]
    padded = Collator(0, LossOn.all)(examples)
    inputs = {n: padded[n] for n in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state[padded["attention_mask"] == 1]
        row = Collator(0, LossOn.all, packing=True)(examples)
        for batch, real in ((padded, padded["attention_mask"].flatten() == 1), (row, slice(None))):
            with packed_attention(model) as inner:
                packed = pack_batches(model, {"one": batch}, inner)
                found = model(
                    input_ids=packed.input_ids, position_ids=packed.position_ids, packed=packed,
                    use_cache=False,
                ).last_hidden_state[0]  # fmt: skip
            torch.testing.assert_close(found[real], expected, rtol=1e-5, atol=1e-5)


class Killed(BaseException):
    """Stands in for a kill: nothing after it is carried out."""


def test_a_packed_run_resumes(tmp_path: Path) -> None:
    config = compose([*WORDS, *METHODS["mixlora"], PACKED, "trainer.save_steps=1",
                      "trainer.max_steps=3"])  # fmt: skip

    def kill(step: int, loss: float) -> None:
        if step == 2:
            raise Killed

    expected = trained(config, tmp_path / "whole", torch.float32)
    with pytest.raises(Killed):
        trained(config, tmp_path / "killed", torch.float32, watch=kill)
    assert [p.name for p in (tmp_path / "killed" / "checkpoints").glob("step-*")]
    found = trained(config, tmp_path / "killed", torch.float32)
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name], weight), name
    assert found.summary.curve == expected.summary.curve


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(parallel: str, tmp_path: Path) -> None:
    words = [word.replace("ddp", parallel) for word in UNEVEN]
    for count in (1, 2):
        folder = tmp_path / str(count)
        assert train_in(count, [*words, PACKED, f"output_dir={folder}"]) == [0] * count
    same_runs.check_equal(tmp_path / "2", tmp_path / "1", 2)


def test_packed_and_padded_adapters_train_together(tmp_path: Path) -> None:
    configs = {
        "one": compose([*WORDS, *METHODS["mixlora"], PACKED]),
        "two": compose([*WORDS, *METHODS["lora"], "seed=3"]),
    }
    jobs = [job_of(config, name, tmp_path / name) for name, config in configs.items()]
    base = base_of(configs["one"], torch.float64)
    methods = {job.name: (job.config.method, job.config.seed) for job in jobs}
    model = attach_together(base, methods, configs["one"].kernel)
    summaries = fit_jointly(model=model, jobs=jobs, dtype=torch.float64)
    for name, config in configs.items():
        alone = trained(config, tmp_path / f"alone-{name}", torch.float64)
        check_equal(result_of(model, name, summaries[name]), alone, rtol=1e-9, atol=1e-11)


EXAMPLES = [Example([1, 5, 6, 7, 2], 2, "t"), Example([1, 9, 2], 1, "t")]


def test_a_row_of_examples() -> None:
    batch = Collator(0, LossOn.answer, packing=True)(EXAMPLES, first=3)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7, 2, 1, 9, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch["unpack"].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 0, 0]]
    assert batch["logits_to_keep"].tolist() == [2, 3, 4, 6, 7]
    assert batch["labels"].tolist() == [[-100, 7, 2, -100, 2]]
    assert batch["example"].tolist() == [3, 4]
    everything = Collator(0, LossOn.all, packing=True)(EXAMPLES)
    assert everything["labels"].tolist() == [[-100, 5, 6, 7, 2, -100, 9, 2]]
    assert "logits_to_keep" not in everything


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["trainer.loss_on=all", "trainer.padding_in_loss=true"], "padding_in_loss=true has"),
        (["trainer.compile=layer"], "trainer.compile=layer needs batches of few lengths"),
        (["method=loramoe", "method.type1_tasks=[arc_e]"], "method.type1_tasks needs the sequ"),
        (["method=mixlora_switch", "+method.router_options={capacity:4}"], "counts by sequence"),
    ],
)
def test_what_cannot_be_packed_is_reported(words: list[str], why: str) -> None:
    with pytest.raises(UserError, match=f"data.packing=true: .*{why}.*leave one of them out"):
        check_method(compose(["experiment=smoke", "task=arc_e", PACKED, *words]))
