"""Adapters on the output projection and on the embedding are in every score, in bf16 too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from composed import compose
from cpu_kernels import ONE_OF_EACH_FORM
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as stock
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mixlora_exp.adapters import set_kernel
from mixlora_exp.config.schema import DataConfig, EvaluationConfig
from mixlora_exp.data.sources import load_split
from mixlora_exp.evaluation import score_tests
from mixlora_exp.evaluation.head import full_precision_head
from mixlora_exp.evaluation.packing import Request
from mixlora_exp.serving.open import Opened
from mixlora_exp.serving.text_generation import continuations

Make = Callable[..., Any]
BF16 = torch.bfloat16
ROWS = [[5, 9, 700, 31, 8], [77, 3, 1000, 12]]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["lm_head"]},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
    "lora with bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "embedding too": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "trained copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "new rows": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 700]},
}


def adapted(base: nn.Module, kernel: str = "auto", **settings: Any) -> PeftModel:
    """A model with an adapter whose weights are all away from their start."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LoraConfig(r=4, lora_alpha=32, task_type="CAUSAL_LM", **settings)
        model = get_peft_model(base, config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.requires_grad and "lora_A" not in name:
                    weight += 0.1 * torch.randn(weight.shape).to(weight.dtype)
    set_kernel(model, kernel)
    return model.eval()


def logits_and_truth(scorer: Any, model: nn.Module, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The logits of a pass, and those that PEFT's own layer has in float64 on the same hidden
    states."""
    head = model.get_output_embeddings()
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = scorer.run_logits(ROWS, 2, **kwargs)
    hook.remove()
    oracle = copy.deepcopy(head).double()
    if isinstance(oracle, stock.Linear):
        oracle.__class__ = stock.Linear
    names = kwargs.get("adapter_names")
    with torch.no_grad():
        truth = oracle(seen[0].double(), **({} if names is None else {"adapter_names": names}))
    return found, truth


@pytest.mark.parametrize("kernel", ONE_OF_EACH_FORM)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["tiny", "tiny_gemma"])
def test_logits_are_those_of_the_module_in_float32(
    base: str, kind: str, kernel: str, make_model: Make, scorer: Make
) -> None:
    plain = make_model("none", base, dtype=BF16)
    without = scorer(plain, dtype=BF16).run_logits(ROWS, 2)
    model = adapted(plain, kernel, **KINDS[kind])
    found, truth = logits_and_truth(scorer(model, dtype=BF16), model)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    assert (found - without).abs().max() > 0.05
    # Nothing of it stays.
    assert "forward" not in vars(model.get_output_embeddings())
    assert next(model.parameters()).dtype is BF16


@pytest.mark.parametrize("state", ["merged", "disabled", "merged and disabled"])
def test_states_of_an_adapter(state: str, make_model: Make, scorer: Make) -> None:
    model = adapted(make_model("none", dtype=BF16), **KINDS["lora"])
    before = copy.deepcopy(model.get_output_embeddings().base_layer.weight)
    if "merged" in state:
        model.merge_adapter()
    with model.disable_adapter() if "disabled" in state else nullcontext():
        found, truth = logits_and_truth(scorer(model, dtype=BF16), model)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    layer = model.get_output_embeddings()
    if layer.merged:
        layer.unmerge()
    # What PEFT says of the layer is true of its weights, but for bf16's rounding.
    torch.testing.assert_close(layer.base_layer.weight, before, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("names", [["default", "other"], ["other", "__base__"]])
def test_rows_with_adapters_of_their_own(names: list[str], make_model: Make, scorer: Make) -> None:
    model = adapted(make_model("none", dtype=BF16), "peft", **KINDS["lora"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.eval()
    found, truth = logits_and_truth(scorer(model, dtype=BF16), model, adapter_names=names)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


def test_two_adapters_at_once(make_model: Make, scorer: Make) -> None:
    model = adapted(make_model("none", dtype=BF16), **KINDS["lora"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    model.eval()
    found, truth = logits_and_truth(scorer(model, dtype=BF16), model)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [None, "lora", "dora"])
def test_a_head_with_bias(kind: str | None, make_model: Make, scorer: Make) -> None:
    model = make_model("none", dtype=BF16)
    biased = nn.Linear(64, 1024, dtype=BF16)
    biased.weight = model.lm_head.weight
    nn.init.normal_(biased.bias, std=2.0)
    model.lm_head = biased.requires_grad_(False)
    if kind is not None:
        # PEFT's own: the fused layer's DoRA is tested with its kernel.
        model = adapted(model, "peft", **KINDS[kind])
    found, truth = logits_and_truth(scorer(model, dtype=BF16), model)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


def test_a_head_in_float32_over_a_bf16_model(make_model: Make, scorer: Make) -> None:
    """Autocast would round it."""
    model = make_model("none", dtype=BF16)
    model.lm_head.float()
    found, truth = logits_and_truth(scorer(model, dtype=BF16), model)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora", "trained copy"])
def test_log_likelihoods(kind: str, make_model: Make, scorer: Make) -> None:
    """Those of the logits; the head is called with a few hidden states instead of a batch."""
    model = adapted(make_model("none", dtype=BF16), **KINDS[kind])
    judge = scorer(model, dtype=BF16)
    questions = [[Request([5, 9, 700, 31], 1), Request([5, 9, 700, 8], 1)]]
    (found,) = judge.log_likelihoods(questions, ["q"])
    expected = judge.run_logits([[5, 9, 700]], 1)[0, -1].log_softmax(-1)
    assert [value for value, _ in found] == pytest.approx(expected[[31, 8]].tolist(), abs=0.02)


@pytest.mark.parametrize(
    ("base", "kind", "protocol"),
    [
        *(
            ("tiny_gemma", "embedding too", p)
            for p in ("label_logits", "answer_text", "lm_eval", "generate")
        ),
        ("tiny", "lora", "label_logits"),
        ("tiny", "lora", "generate"),
        ("tiny_gemma", "lora", "answer_text"),
    ],
)
def test_every_protocol_scores_the_adapter(
    base: str, kind: str, protocol: str, make_model: Make, data: DataConfig, scorer: Make
) -> None:
    if protocol == "lm_eval":
        pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    tests = {"arc_e": load_split(data, "arc_e", "test").limited(6, 0)}
    (name,) = compose([f"evaluation.protocols=[{protocol}]"]).evaluation.protocols
    settings = EvaluationConfig(max_new_tokens=6, batch_check=0)

    def scores(dtype: torch.dtype, adapter: bool) -> list[Any]:
        model = make_model("none", base, dtype=dtype)
        model = adapted(model, **KINDS[kind]) if adapter else model
        (found,) = score_tests(name, scorer(model, dtype=dtype), tests, data, settings)
        return [item.text if protocol == "generate" else item.scores for item in found.items]

    narrow, wide, without = scores(BF16, True), scores(torch.float32, True), scores(BF16, False)
    if protocol == "generate":
        assert all(one != other for one, other in zip(narrow, without, strict=True))
        return
    narrow, wide, without = map(torch.tensor, (narrow, wide, without))
    rounding, effect = (narrow - wide).abs().max(), (without - wide).abs().max()
    assert rounding < 0.2 * effect


@pytest.mark.parametrize("kind", [None, "lora", "dora"])
def test_generation_is_that_of_the_record(
    kind: str | None, make_model: Make, tokenizer: PreTrainedTokenizerBase, scorer: Make
) -> None:
    """`generate.py` and the protocol `generate` take the same token each time, in bf16 too."""
    model = make_model("none", dtype=BF16)
    model = model if kind is None else adapted(model, **KINDS[kind])
    config = compose(["model=tiny", "trainer.precision=bfloat16"])
    prompts = ["Question: Which of these?\nAnswer:", "Is it true?", "The moon goes around"]
    rows = tokenizer(prompts)["input_ids"]
    new = scorer(model, dtype=BF16).generate(rows, 12)
    expected = tokenizer.batch_decode(new, skip_special_tokens=True)
    opened = Opened(model, tokenizer, config)
    found = list(continuations(opened, prompts, max_new_tokens=12, batch_size=3))
    assert found == expected
    # The plain loop over float32 logits, whole passes.
    judge = scorer(model, dtype=BF16)
    first = [int(judge.run_logits([row], 1)[0, -1].argmax()) for row in rows]
    assert first == [tokens[0] for tokens in new]


def test_a_forward_pass_that_was_replaced_is_put_back(make_model: Make) -> None:
    """Libraries put one of their own on a module, accelerate for example."""
    model = make_model("none")
    head = model.get_output_embeddings()

    def theirs(hidden: Tensor) -> Tensor:
        return type(head).forward(head, hidden) + 1

    head.forward = theirs
    hidden = torch.randn(2, 64)
    with full_precision_head(model) as given:
        assert given is head
        assert torch.equal(head(hidden), theirs(hidden))
    assert vars(head)["forward"] is theirs
