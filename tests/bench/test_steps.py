"""A row's step is the one that training takes: the Trainer's loss, its autocast, its labels."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from mixlora_exp.bench.baselines import patch_with_liger, use_axolotl
from mixlora_exp.bench.batch import StepBatch, batch_of
from mixlora_exp.bench.kinds.steps import benchmark_parts, check
from mixlora_exp.bench.measure import step_loss, training_step
from mixlora_exp.bench.model import adapted, base_model, model_config, model_of
from mixlora_exp.bench.options import StepOptions
from mixlora_exp.bench.row_registry import ROWS, NotHere
from mixlora_exp.bench.step_profile import kernel_times, launches_per_layer, step_profile
from mixlora_exp.config.choices import LossOn
from mixlora_exp.errors import UserError

CPU = torch.device("cpu")
SMALL = {"model": "tiny", "batch": 2, "length": 16, "answer": 4, "memory": False}


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return base_model(model_config("tiny", None), torch.bfloat16, "cpu", 0)


def batch(**changes) -> StepBatch:
    options = StepOptions(**{**SMALL, **changes})
    return batch_of(options, model_config("tiny", None).config["vocab_size"], "cpu")


@pytest.mark.parametrize("name", ["lora_peft", "dora_peft", "lora_peft_all_logits"])
def test_the_baseline_is_what_the_trainer_computes(
    name: str, base: nn.Module, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, made = ROWS[name], batch()
    model = adapted(base, row, 0.0, 0)
    loss = step_loss(model.train(), row, made)
    loss.backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    arguments = TrainingArguments(str(tmp_path), bf16=True, use_cpu=True, report_to=[])
    trainer = Trainer(model=model, args=arguments)
    given = made.given_to(all_logits=row.all_logits)
    items = given.pop("num_items_in_batch")
    # The Trainer prepares the model when it begins to train.
    prepared = trainer.accelerator.prepare(model)
    theirs = trainer.training_step(prepared, given, items)
    assert torch.equal(loss.detach(), theirs)
    assert ours
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(ours[key], parameter.grad), key


def products(model: nn.Module, name: str, made: StepBatch) -> tuple[torch.dtype, int]:
    """Precision of A's first product, and of how many positions the head computes logits."""
    seen: dict[str, Tensor] = {}
    core = model.base_model.model
    low = core.model.layers[0].self_attn.q_proj.lora_A["default"]
    hooks = [
        low.register_forward_hook(lambda m, a, y: seen.update(low=y)),
        core.lm_head.register_forward_hook(lambda m, a, y: seen.update(head=y)),
    ]
    training_step(model, ROWS[name], made)
    for hook in hooks:
        hook.remove()
    return seen["low"].dtype, seen["head"].shape[1]


@pytest.mark.parametrize(
    ("name", "dtype", "positions"),
    [
        ("lora_peft", torch.bfloat16, 5),
        ("lora_peft_no_autocast", torch.float32, 5),
        ("lora_peft_bf16", torch.bfloat16, 5),
        ("lora_peft_all_logits", torch.bfloat16, 16),
    ],
)
def test_autocast_and_logits(name: str, dtype: torch.dtype, positions: int, base) -> None:
    assert products(adapted(base, ROWS[name], 0.0, 0), name, batch()) == (dtype, positions)


def test_the_loss_is_on_answers_or_on_all_tokens(base: nn.Module) -> None:
    answers, whole = batch(), batch(loss_on=LossOn.all)
    assert (answers.items, whole.items) == (2 * 4, 2 * 15)
    assert answers.inputs["labels"].shape == (2, 5)
    assert (answers.all_labels != -100).sum() == 2 * 4
    assert torch.equal(answers.ids, whole.ids)
    model = adapted(base, ROWS["lora_peft"], 0.0, 0).train()
    # The same loss, whichever logits are computed, to bf16's rounding.
    with torch.no_grad():
        kept = float(step_loss(model, ROWS["lora_peft"], answers))
        every = float(step_loss(model, ROWS["lora_peft_all_logits"], answers))
        other = float(step_loss(model, ROWS["lora_peft"], whole))
    assert kept == pytest.approx(every, rel=1e-3)
    assert other != pytest.approx(every, rel=1e-3)


@pytest.mark.parametrize("name", ["lora", "mixlora", "mixdora"])
def test_own_rows_compute_the_methods_of_peft(name: str, base: nn.Module) -> None:
    """With kernels of this project, dropout from the run's stream, and the loss in chunks."""
    stock = {"lora": "lora_peft", "mixlora": "mixlora_peft", "mixdora": "mixdora_shared"}[name]
    losses = [
        float(step_loss(adapted(base, ROWS[row], 0.0, 0).train(), ROWS[row], batch()).detach())
        for row in (name, stock)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_dropout_is_drawn_as_in_training(base: nn.Module) -> None:
    model = adapted(base, ROWS["mixlora"], 0.5, 0).train()
    made = batch()
    losses = {float(step_loss(model, ROWS["mixlora"], made).detach()) for _ in range(3)}
    assert len(losses) == 3, "each step has masks of its own"
    assert model.dropout_stream.rows is not None
    assert not hasattr(adapted(base, ROWS["lora_peft"], 0.5, 0), "dropout_stream")


def test_launches_of_a_layer(base: nn.Module) -> None:
    found = {}
    for name in ("floor", "lora_peft", "mixlora"):
        # Without dropout: the second layer's routing, and with it the number of experts that the
        # grouped form multiplies, would depend on the masks of the step.
        model = adapted(base, ROWS[name], 0.0, 0)
        found[name] = launches_per_layer(model, ROWS[name], batch())
        assert launches_per_layer(model, ROWS[name], batch()) == found[name]
        training_step(model, ROWS[name], batch())
    assert 0 < found["floor"] < found["lora_peft"] < found["mixlora"]
    assert base.config.num_hidden_layers == 2
    one = base_model(model_config("tiny", 1), torch.bfloat16, "cpu", 0)
    assert launches_per_layer(one, ROWS["floor"], batch()) is None


def rows_of(config: StepOptions) -> dict[str, Any]:
    *_, last = benchmark_parts(config, echo=lambda text: None)
    return last["rows"]


def test_a_profile_names_what_took_the_time(base: nn.Module) -> None:
    x = torch.randn(32, 32)
    times = kernel_times(lambda: [x @ x for _ in range(7)], CPU)
    found = {one.name: one for one in times}
    assert found["aten::mm"].count == 7
    assert found["aten::mm"].us > 0
    assert [one.us for one in times] == sorted((one.us for one in times), reverse=True)
    model = adapted(base, ROWS["mixlora"], 0.05, 0)
    step = step_profile(lambda: training_step(model, ROWS["mixlora"], batch()), CPU, top=5)
    assert len(step["by_kernel"]) == 5
    assert step["busy_us"] >= sum(one["us"] for one in step["by_kernel"]) > 0
    assert step["kernels"] > sum(one["count"] for one in step["by_kernel"])


def test_what_cannot_be_measured_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments, **options):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(nn.Module, "compile", broken)
    monkeypatch.setitem(sys.modules, "axolotl", None)
    names = ["lora_peft", "lora_peft_no_autocast", "lora_peft_compiled", "lora_axolotl"]
    config = StepOptions(**SMALL, dtype="float32", rounds=1, rows=names)
    rows = rows_of(config)
    assert rows["lora_peft"]["rounds"] == 1
    assert [rows[name]["error"] for name in names[1:3]] == [
        "not measured: there is no autocast beside float32",
        "not measured: torch.compile failed: RuntimeError: no compiler",
    ]
    assert rows["lora_axolotl"]["error"].startswith("not installed: axolotl.kernels.lora")


@pytest.mark.skipif(torch.cuda.is_available(), reason="liger-kernel can run on a GPU")
def test_liger_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="liger=true needs a CUDA GPU"):
        check(StepOptions(liger=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("mixlora_exp.bench.baselines.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install liger-kernel"):
        check(StepOptions(liger=True))


def test_liger_patches_the_base_and_leaves_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    stub = ModuleType("liger_kernel.transformers")
    stub._apply_liger_kernel_to_instance = lambda **options: asked.append(options)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stub)
    model = nn.Linear(1, 1)
    patch_with_liger(model)
    expected = {"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}
    assert asked == [expected]


def test_axolotls_functions_get_the_modules_that_they_read(base: nn.Module) -> None:
    """With stand-ins of the same names and arguments that compute what PEFT does."""
    row, made = ROWS["lora_axolotl"], batch()
    plain = adapted(base, row, 0.0, 0).train()
    expected = step_loss(plain, row, made)
    calls = []

    def low(projection: nn.Module, x: Tensor) -> Tensor:
        return type(projection).forward(projection, x)

    def swiglu(mlp: nn.Module, x: Tensor, inplace: bool = True) -> Tensor:
        calls.append("mlp")
        return type(mlp).forward(mlp, x)

    def qkv(attention: nn.Module, x: Tensor, inplace: bool = True) -> tuple[Tensor, ...]:
        calls.append("qkv")
        return tuple(low(getattr(attention, f"{role}_proj"), x) for role in "qkv")

    def o(attention: nn.Module, x: Tensor) -> Tensor:
        calls.append("o")
        return low(attention.o_proj, x)

    functions = SimpleNamespace(apply_lora_mlp_swiglu=swiglu, apply_lora_qkv=qkv, apply_lora_o=o)
    model = use_axolotl(adapted(base, row, 0.0, 0), functions).train()
    assert torch.equal(step_loss(model, row, made), expected)
    assert calls == ["qkv", "o", "mlp"] * 2


def test_axolotl_needs_a_gpu(base: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("axolotl", "axolotl.kernels", "axolotl.kernels.lora"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(NotHere, match="needs a GPU"):
        model_of("lora_axolotl", base, 0.0, 0)


@pytest.mark.slow  # The compiler takes a minute.
def test_the_compiled_row_is_measured_in_training_alone() -> None:
    config = StepOptions(**SMALL, rounds=2, rows=["lora_peft", "lora_peft_compiled"])
    row = rows_of(config)["lora_peft_compiled"]
    assert row.get("error") is None
    assert row["rounds"] == 2
    assert "infer_forward_us_per_token" not in row
    assert "launches_per_layer" not in row
