"""`method.match_params`: the rank of experts for the parameters of another method."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from composed import compose

from mixlora_exp.adapters import MixLoraFeedForward, attach_adapter
from mixlora_exp.cli.train import execute
from mixlora_exp.config.resolve import fingerprint
from mixlora_exp.config.run_names import run_name
from mixlora_exp.config.schema import Config
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model
from mixlora_exp.models.budget import budget_line, with_matched_rank
from mixlora_exp.models.parameters import count_parameters

METHODS = ["mixlora", "mixdora", "mola", "loramoe", "hydralora", "adamole", "goat", "moslora"]


def matched(*words: str, model: str = "llama2_7b") -> Config:
    return with_matched_rank(compose([f"model={model}", *words]))


def size(config: Config, **changes: int) -> int:
    method = dataclasses.replace(config.method, **changes)
    return count_parameters(config.model, method).trainable


@pytest.mark.parametrize(
    ("method", "reference", "rank", "expected"),
    [
        # LoRA of rank 80 has 32 x 80 x 78,080 = 199,884,800. Attention of rank 16 has
        # 32 x 16 x 32,768, the routers 32 x 8 x 4,096; each rank of the experts 32 x 8 x 45,312.
        ("mixlora", "lora_r80", 16, 203_423_744),
        ("mixlora", "lora_r40", 7, 99_024_896),
        # Magnitudes too: 32 x 16,384 + 32 x 8 x 26,112.
        ("mixdora", "lora_r80", 15, 199_032_832),
        # Routers 160 x 35,584; each rank 160 x 78,080.
        ("mola", "lora_r80", 16, 205_578_240),
        # Each rank 32 x (19,200 + 4 x 26,112); routers 32 x 4 x 19,200.
        ("hydralora", "lora_r16", 9, 38_068_224),
        ("moslora", "lora_r16", 23, 40_405_664),
        ("mixlora", "mixdora_r16", 17, 215_023_616),
    ],
)
def test_at_the_shape_of_llama(method: str, reference: str, rank: int, expected: int) -> None:
    config = matched(f"method={method}", f"method.match_params={reference}")
    assert config.method.expert_rank == rank
    assert size(config) == expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "reference",
    ["lora_r20", *(pytest.param(r, marks=pytest.mark.slow) for r in ("dora_r9", "mixlora_r3"))],
)
def test_no_other_rank_comes_closer(method: str, reference: str) -> None:
    words = [f"method={method}", "method.rank=2"]
    words += ["method.num_experts=2"] if method == "goat" else []
    config = matched(*words, f"method.match_params={reference}", model="tiny")
    name, _, rank = reference.rpartition("_r")
    wanted = size(compose(["model=tiny", f"method={name}", f"method.rank={rank}"]))
    ranks = range(1, 17 if method == "goat" else 200)
    best = min(ranks, key=lambda rank: abs(size(config, expert_rank=rank) - wanted))
    assert config.method.expert_rank == best
    assert config.method.rank == 2
    assert with_matched_rank(config) == config
    line = budget_line(config)
    assert "\n" not in line
    assert f"experts of rank {best}" in line
    assert f"{size(config):,} trainable parameters, {wanted:,} there" in line


def test_the_rank_decides_the_fingerprint_and_the_name() -> None:
    words = ["method=mixlora", "model=tiny"]
    config = with_matched_rank(compose([*words, "method.match_params=lora_r20"]))
    rank = config.method.expert_rank
    assert rank not in (None, config.method.rank)
    given = compose([*words, f"method.expert_rank={rank}"])
    assert fingerprint(config) == fingerprint(given) != fingerprint(compose(words))
    assert run_name(config) == run_name(given)
    # The rank that the method has anyway.
    usual = compose([*words, "method.expert_rank=16"])
    assert fingerprint(usual) == fingerprint(compose(words))


def test_attention_keeps_its_rank_and_experts_the_scaling() -> None:
    config = compose(["model=tiny", "method=mixdora", "method.expert_rank=6"])
    model = attach_adapter(load_model(config.model, torch.float32), config.method, config.kernel, 0)
    attention = model.base_model.model.model.layers[0].self_attn.q_proj
    (block, *_) = (m for m in model.modules() if isinstance(m, MixLoraFeedForward))
    assert (attention.r["default"], attention.scaling["default"]) == (16, 2)
    assert (block.r["default"], block.scaling["default"]) == (6, 2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == count_parameters(config.model, config.method).trainable
    mola = compose(["model=tiny", "method=mola", "method.expert_rank=6"])
    model = attach_adapter(load_model(mola.model, torch.float32), mola.method, mola.kernel, 0)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert (layer.r["default"], layer.scaling["default"]) == (6, 2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == count_parameters(mola.model, mola.method).trainable


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("mola match_params=lora_r1", "the routers alone have 5,693,440 trainable parameters, and"),
        ("mixlora match_params=lora_r1", "experts of rank 1 make 29,425,664 trainable parameters"),
        ("mixlora match_params=nola_r8", "method=nola is not an option of method"),
        ("mixlora match_params=none_r8", "method.rank is not a setting"),
        ("mixlora match_params=lora_r80 expert_rank=3", "expert_rank=3: .* chooses 16: give one"),
        ("goat match_params=lora_r9999", "the largest rank that these experts can have is 512"),
        ("mixlora match_params=lora", "match_params=lora is not valid: write a method and its"),
        ("mixlora match_params=lora_r0", "match_params=lora_r0 is not valid"),
        ("mixlora expert_rank=0", "method.expert_rank=0 is not valid: must be >= 1"),
        ("lora match_params=lora_r8", "method.match_params is not a setting"),
    ],
)
def test_out_of_reach(words: str, told: str) -> None:
    method, *changes = words.split()
    with pytest.raises(UserError, match=told) as raised:
        matched(f"method={method}", *(f"method.{change}" for change in changes))
    assert "\n" not in str(raised.value)


def test_the_largest_rank_that_there_can_be_is_an_exact_match() -> None:
    """Two runs of 96 singular values are all that the narrowest projection has."""
    words = ["method=lora_ga", "method.match_params=lora_r96"]
    config = matched(*words, model="smollm2_135m")
    assert config.method.rank_of_experts == 96
    assert budget_line(config).endswith("(+0.00 %)")


def test_the_command_line_prints_the_rank(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["dry_run=true", "model=tiny", "method=mixlora", "method.match_params=lora_r20"]
    assert execute(given) == 0
    chosen = budget_line(matched("method=mixlora", "method.match_params=lora_r20", model="tiny"))
    assert f"budget      {chosen}" in capsys.readouterr().out
