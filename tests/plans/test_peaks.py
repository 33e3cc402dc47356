"""The most bytes that live at once, counted on a CPU, are those of the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from composed import compose
from peft import PeftModel
from small_shape import small

from mixlora_exp.adapters import attach_adapter
from mixlora_exp.bench.live_bytes import LiveBytes
from mixlora_exp.config.schema import Config, Head
from mixlora_exp.evaluation.forward import Scorer
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.models.parameters import count_parameters
from mixlora_exp.models.precision import autocast
from mixlora_exp.models.quantization import base_bytes
from mixlora_exp.plans.memory import memory_of, scoring_bytes
from mixlora_exp.training.losses import single_loss

CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TARGETS = "[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"


def slow(cases: list[tuple[str, ...]]) -> list[Any]:
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def built(config: Config) -> PeftModel:
    base = load_model(config.model, DTYPES[config.trainer.precision.value], seed=1)
    base.set_attn_implementation("sdpa")
    return attach_adapter(base, config.method, config.kernel, seed=1)


def ids_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 900, (rows, length), generator=torch.Generator().manual_seed(0))


def step(config: Config, tokens: int) -> int:
    """Bytes of a step beside gradients, which are there already, with logits at one position."""
    model, ids = built(config).train(), ids_of(2, tokens // 2)
    if config.trainer.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def run(ids: torch.Tensor) -> None:
        with autocast(CPU, DTYPES[config.trainer.precision.value]):
            loss = model(input_ids=ids, logits_to_keep=1).logits.float().square().sum()
        loss.backward()

    run(ids[:1, :8])
    with LiveBytes() as memory:
        run(ids)
    return memory.peak


@pytest.mark.parametrize(
    ("method", "kernel"),
    [
        ("mixlora", "exact"),
        ("mola", "exact"),
        *slow([("lora", "exact"), ("mixlora", "peft"), ("mixdora", "exact")]),
    ],
)
def test_with_checkpointing_a_layer_adds_its_input(method: str, kernel: str) -> None:
    """In the backward pass too: what one layer computes again is gone when the next one does. What
    its routers decided is left for the report: logits, probabilities, experts and weights."""
    few, many, layers = 32, 160, 3
    own = [] if method == "lora" else ["method.num_experts=2", "method.top_k=2"]
    own += [f"method.targets={TARGETS}"] if method == "mola" else []

    def per_token(layers: int) -> tuple[float, float]:
        config = small(
            f"method={method}", f"kernel={kernel}", "method.rank=4", "method.dropout=0", *own,
            "trainer.precision=bfloat16", "trainer.gradient_checkpointing=true",
            "trainer.micro_batch_size=2", "trainer.loss_on=all", "trainer.head=chunked",
            layers=layers,
        )  # fmt: skip
        found, planned = [], []
        for tokens in (few, many):
            config.data.cutoff_length = tokens // 2
            found.append(step(config, tokens))
            planned.append(memory_of(config)["activations"])
        return tuple((more - less) / (many - few) for less, more in (found, planned))

    (found, planned), (more_found, more_planned) = per_token(layers), per_token(layers + 2)
    assert more_planned - planned == pytest.approx(2 * 256 * 2, abs=1)
    routers = {"lora": 0, "mola": 7}.get(method, 1)
    decided = 2 * routers * 2 * (4 + 4 + 8 + 4)
    assert more_found - found == pytest.approx(more_planned - planned + decided, rel=0.03)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_full_logits_of_an_answer_as_long_as_its_example(dtype: str) -> None:
    """As free text can be: per position a plan has the logits of `trainer.head=full`."""
    few, many = 64, 192
    words = ["method=lora", "kernel=exact", "method.rank=2", "method.dropout=0", "data=local",
             "data.forms=[text]", "trainer.head=full", "trainer.micro_batch_size=1",
             f"trainer.precision={dtype}"]  # fmt: skip
    config, found, planned = small(*words, layers=1), [], []
    config.model.config["vocab_size"] = 20_000
    model = built(config).train()
    for tokens in (8, few, many):
        ids = ids_of(1, tokens)
        batch = {"input_ids": ids, "labels": ids}
        with LiveBytes() as memory:
            with autocast(CPU, DTYPES[dtype]):
                loss = single_loss(model, model.base_model.model, batch, tokens, Head.full)
            loss.backward()
        found.append(memory.peak)
        config.data.cutoff_length = tokens
        planned.append(memory_of(config)["activations"])
    assert found[2] - found[1] == pytest.approx(planned[2] - planned[1], rel=0.1)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *zip(("nf4", "int8", "int8_torchao"), ("bfloat16", "bfloat16", "float32"), strict=True),
        *slow([("nf4", "float32"), ("int8", "float32"), ("int8_torchao", "bfloat16")]),
    ],
)
def test_one_matrix_of_a_quantised_base_at_a_time(kind: str, dtype: str) -> None:
    pytest.importorskip("torchao" if "torchao" in kind else "bitsandbytes")
    found = {}
    for quantization in ("none", kind):
        config = small(
            "method=lora", "kernel=exact", "method.rank=2", "method.dropout=0",
            f"trainer.precision={dtype}", f"model.quantization={quantization}", layers=2,
        )  # fmt: skip
        config.model.config |= {"hidden_size": 512, "intermediate_size": 2048}
        found[quantization] = step(config, 16)
    planned = memory_of(config)["dequantized"]
    assert found[kind] - found["none"] == pytest.approx(planned, rel=0.08)


@pytest.mark.parametrize("method", ["lora", "mixdora", *slow([("dora",), ("mixlora",), ("mola",)])])
def test_scoring_takes_no_more_than_its_plan(method: str) -> None:
    """And at least two thirds of it, weights apart."""
    tokens, length = 4096, 64
    own = [f"method.targets={TARGETS}", "method.num_experts=4"] if method == "mola" else []
    config = small(
        f"method={method}", "kernel=exact", "method.rank=8", *own, "trainer.precision=bfloat16",
        f"evaluation.batch_tokens={tokens}", f"data.cutoff_length={length}",
        "evaluation.protocols=[generate]", layers=2,
    )  # fmt: skip
    model, rows = built(config), ids_of(tokens // length, length).tolist()
    tokenizer = load_tokenizer(compose(["model=tiny"]).model)
    scorer = Scorer(model, tokenizer, autocast(CPU, torch.bfloat16), tokens)
    with LiveBytes() as first:
        scorer.generate(rows[:1], 2)
    with LiveBytes() as memory:
        scorer.generate(rows, 2)
    trained = count_parameters(config.model, config.method).trainable
    planned = scoring_bytes(config) - base_bytes(config.model, 2) - 4 * trained
    assert 0.67 * planned < first.live + memory.peak < 1.03 * planned
