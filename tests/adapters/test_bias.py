"""Bases whose projections have biases: DoRA's scale leaves them alone, in every kernel and path."""

from __future__ import annotations

import runpy
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import compose
from cpu_kernels import CPU_KERNELS
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mixlora_exp.adapters import MixLoraFeedForward, load_adapters, set_kernel
from mixlora_exp.adapters.mixed_adapters import add_guest, parameters_of
from mixlora_exp.adapters.row_map import Segment
from mixlora_exp.cli.train import execute
from mixlora_exp.models import load_model, load_tokenizer

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = {
    "lora": {"kind": "lora", "r": 3},
    "dora": {"kind": "dora"},
    "mixlora": {"kind": "mixlora"},
    "mixdora": {"kind": "mixlora", "use_dora": True, "num_experts": 3, "r": 2},
}


@cache
def _biased(where: str) -> PreTrainedModel:
    base = load_model(compose(["model=tiny"]).model, torch.float32, seed=1)
    generator = torch.Generator().manual_seed(5)
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and where in name:
            bias = 0.5 * torch.randn(module.out_features, generator=generator)
            module.bias = nn.Parameter(bias, requires_grad=False)
    return base.eval()


def biased(where: str = "layers") -> PreTrainedModel:
    """The tiny model with drawn biases on all projections, or on those whose name says `where`."""
    return deepcopy(_biased(where))


@pytest.fixture
def folders(kit, tmp_path: Path) -> dict[str, Path]:
    """An adapter of each method, saved by itself."""
    for number, (name, options) in enumerate(METHODS.items()):
        torch.manual_seed(number)
        kit.adapter(tmp_path / name, **options)
    return {name: tmp_path / name for name in METHODS}


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return model(**inputs, **options).logits


def alone(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Plain PEFT, but for experts, which run by their definition."""
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    if any(isinstance(module, MixLoraFeedForward) for module in model.modules()):
        set_kernel(model, "reference")
    return model


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@torch.no_grad()
def test_experts_are_their_definition(config_of, draw, literal, kernel, dora) -> None:
    torch.manual_seed(0)
    model = get_peft_model(biased(), config_of(use_dora=dora))
    draw(model)
    set_kernel(model, kernel)
    block = model.eval().base_model.feed_forwards()[0]
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(block(x), literal(block, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("method", METHODS)
def test_one_adapter(folders, batch, method, kernel) -> None:
    expected = logits(alone(biased(), folders[method]), batch)
    model = PeftModel.from_pretrained(biased(), str(folders[method])).eval()
    set_kernel(model, kernel)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "where"),
    [
        *((kernel, "layers") for kernel in CPU_KERNELS),
        *(("exact", where) for where in ("self_attn", "mlp")),
    ],
)
def test_rows_by_adapter_names(folders, batch_of, kernel, where) -> None:
    """In one pass with rows of the base model, each row as if its adapter were alone."""
    batch = batch_of(rows=6, length=14)
    names = ["lora", "mixlora", "__base__", "mixdora", "lora", "dora"]
    model = load_adapters(biased(where), folders)
    set_kernel(model, kernel)
    found = logits(model, batch, adapter_names=names)
    for name in dict.fromkeys(names):
        rows = [i for i, other in enumerate(names) if other == name]
        single = biased(where) if name == "__base__" else alone(biased(where), folders[name])
        part = {key: value[rows] for key, value in batch.items()}
        torch.testing.assert_close(found[rows], logits(single, part), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merged(folders, batch, method) -> None:
    expected = logits(alone(biased(), folders[method]), batch)
    model = PeftModel.from_pretrained(biased(), str(folders[method])).eval()
    set_kernel(model, "exact")
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        logits(model.merge_and_unload(), batch), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_training_together_is_training_alone(config_of, draw, kernel) -> None:
    """Gradients of all adapters where each has a share of the rows: equal shares of one kind and
    rank are computed in batches."""
    kinds = {name: options for name, options in METHODS.items() if name != "lora"} | {"dora2": {}}

    def config(name: str) -> LoraConfig:
        changes = {key: value for key, value in METHODS.get(name, {}).items() if key != "kind"}
        if name.startswith("mix"):
            return config_of(**changes)
        return LoraConfig(r=4, target_modules=PROJECTIONS, use_dora=True, task_type="CAUSAL_LM")

    def gradients(names: list[str], rows: Tensor) -> dict[str, Tensor]:
        model = biased()
        for seed, name in enumerate(kinds):
            torch.manual_seed(seed)
            model = add_guest(model, name, config(name))
            model.base_model.set_adapter(name)
            draw(model, seed)
        for name in kinds:
            for parameter in parameters_of(model, name).values():
                parameter.requires_grad_()
        set_kernel(model, kernel)
        tuner = model.train().base_model
        spans = [Segment(name, slice(i * 4, i * 4 + 4)) for i, name in enumerate(names)]
        layer = tuner.model.model.layers[0]
        tuner.row_map.use(segments=spans)
        try:
            loss = 0
            for module in (layer.self_attn.q_proj, layer.mlp):
                y = module(rows)
                loss = loss + (y * torch.linspace(-1, 1, y.shape[-1])).sum()
            loss.backward()
        finally:
            tuner.row_map.use()
        return {
            f"{name}/{key}": p.grad
            for name in names
            for key, p in parameters_of(model, name).items()
            if p.grad is not None
        }

    torch.manual_seed(1)
    rows = torch.randn(4 * len(kinds), 64)
    together = gradients(list(kinds), rows)
    separate: dict[str, Tensor] = {}
    for i, name in enumerate(kinds):
        separate |= gradients([name], rows[i * 4 : i * 4 + 4])
    assert together.keys() == separate.keys()
    assert any("magnitude" in key for key in together)
    for key, gradient in together.items():
        torch.testing.assert_close(
            gradient, separate[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs that are shared beside the repository, written anew."""
    script = Path(__file__).resolve().parents[3] / "shared" / "cases" / "make_cases.py"
    if not script.is_file():
        pytest.skip("shared cases are absent")
    folder = tmp_path_factory.mktemp("cases")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), str(folder)])
        runpy.run_path(str(script), run_name="__main__")
    return folder


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_shared_dora_on_bias(cases, kernel) -> None:
    folder, place = cases / "models" / "attention_bias", cases / "adapters" / "dora_on_bias"
    ids = torch.arange(20).view(2, 10) + 30
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), place).eval()
    model = load_adapters(AutoModelForCausalLM.from_pretrained(folder), {"one": place})
    set_kernel(model, kernel)
    with torch.no_grad():
        found = model(input_ids=ids, adapter_names=["one", "__base__"]).logits[0]
        torch.testing.assert_close(found, expected(input_ids=ids).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    ["mixdora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dora", "mixlora"))],
)
def test_run_on_a_folder_with_biases(method, tmp_path: Path) -> None:
    """Trained, saved, loaded again and scored, where the model's projections have biases."""
    base = biased()
    base.config.attention_bias = base.config.mlp_bias = True
    base.save_pretrained(tmp_path / "model")
    load_tokenizer(compose(["model=tiny"]).model).save_pretrained(tmp_path / "model")
    argv = [
        "experiment=smoke",
        f"method={method}",
        f"model.path={tmp_path / 'model'}",
        "trainer.precision=float32",
        "trainer.max_steps=2",
        "data.train_limit=8",
        "evaluation.batch_check=2",
        f"output_dir={tmp_path / 'runs'}",
    ]
    assert execute(argv) == 0
    assert len(list(tmp_path.glob("runs/*/record.json"))) == 1
