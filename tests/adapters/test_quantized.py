"""Adapters on a quantised base compute what they do on its dequantised weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import compose
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mixlora_exp.adapters import attach_adapter, load_adapter, save_adapter, set_kernel
from mixlora_exp.adapters.linear import FusedLinear
from mixlora_exp.adapters.mixed_adapters import load_adapters
from mixlora_exp.config.choices import PAPER_METHODS, Quantization
from mixlora_exp.kernels import MIXTURES, is_quantized, matrix_of, quantized
from mixlora_exp.models import load_model
from mixlora_exp.models.quantization import quantization_options
from mixlora_exp.runs.quantized_base import WORKING_TYPES

CPU = torch.device("cpu")
KINDS = ["nf4", "int8", "int8_torchao"]
# bitsandbytes' own forward pass needs widths in multiples of 32 on some CPUs.
TINY = ["model=tiny", "model.config={intermediate_size: 192}"]
METHODS = [*PAPER_METHODS, *(n for n, one in MIXTURES.items() if not one.starts_from_gradient)]
ROUTERS = ["mixlora_top_p", "mixlora_switch", "mixlora_dense", "mixlora_threshold"]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
# Every two of kind, dtype and method meet; the other triples are slow.
TRIPLES = [
    pytest.param(kind, dtype, method, id=f"{kind}-{name}-{method}",
                 marks=[pytest.mark.slow] if (i + j + k) % 2 else [])
    for i, kind in enumerate(KINDS)
    for j, (name, dtype) in enumerate(DTYPES.items())
    for k, method in enumerate(METHODS)
]  # fmt: skip
# All of them slow but the first.
TRIPLES += [
    pytest.param(kind, dtype, method, id=f"{kind}-{name}-{method}",
                 marks=[pytest.mark.slow] if (kind, name, method) != ("nf4", "float32", ROUTERS[0])
                 else [])
    for kind in KINDS for name, dtype in DTYPES.items() for method in ROUTERS
]  # fmt: skip
for _kind in KINDS:
    pytest.importorskip("torchao" if "torchao" in _kind else "bitsandbytes")


def base_of(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    words = [*TINY, f"model.quantization={kind}", "method=none"]
    return load_model(compose(words).model, dtype, seed=1)


def dense(base: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A plain model with the dequantised weights."""
    made = base_of("none", dtype)
    for name, module in base.named_modules():
        if is_quantized(module):
            weight = matrix_of(module).to(dtype)
            made.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    return made


def adapted(base: PreTrainedModel, method: str, draw: Any, **words: Any) -> PeftModel:
    own = [f"{name}={value}" for name, value in words.items()]
    config = compose(["model=tiny", f"method={method}", *own])
    model = attach_adapter(base, config.method, config.kernel, seed=5)
    draw(model)
    return model


def gradients(model: PeftModel, batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(9)  # of dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss = model.train()(**batch).loss
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **{name: p.grad for name, p in trained.items()}}


@pytest.mark.parametrize(("kind", "dtype", "method"), TRIPLES)
def test_gradients_are_those_on_the_dequantised_weights(kind, dtype, method, draw, batch) -> None:
    base = base_of(kind, dtype)
    plain = dense(base, dtype)
    models = [adapted(m, method, draw) for m in (base, plain)]
    # PEFT rounds the first weights of an adapter to those of a bf16 base, not to quantised ones.
    own = {name: p for name, p in models[0].named_parameters() if "lora_" in name}
    models[1].load_state_dict({name: p.detach() for name, p in own.items()}, strict=False)
    check_gradients(models, batch, dtype)


def check_gradients(
    models: list[PeftModel], batch: dict[str, Tensor], dtype: torch.dtype, bf16_bound: float = 2e-3
) -> None:
    """Of a model on quantised and one on dequantised weights."""
    found, expected = (gradients(model, batch, dtype) for model in models)
    assert found.keys() == expected.keys()
    bound = 1e-5 if dtype is torch.float32 else bf16_bound
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert value.norm() > 0
        assert error < bound, name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("kind", "peft_type"), [(kind, name) for kind, names in WORKING_TYPES.items() for name in names]
)
def test_gradients_of_peft_s_own_types(kind, peft_type, dtype, batch) -> None:
    base = base_of(kind.value, dtype)
    words = ["method=peft", f"method.peft_type={peft_type}", "method.peft={r: 4}"]
    if peft_type == "ADALORA":
        words = ["method=adalora"]
    config = compose(["model=tiny", *words])
    models = [
        attach_adapter(m, config.method, config.kernel, seed=5) for m in (base, dense(base, dtype))
    ]
    torch.manual_seed(3)
    with torch.no_grad():
        trained = [dict(m.named_parameters()) for m in models]
        for name, parameter in trained[0].items():
            if parameter.requires_grad:
                # Away from their start, where half of the weights have no gradient.
                parameter.add_(torch.randn_like(parameter) * 0.05)
                trained[1][name].copy_(parameter)
    # PEFT's layers of these on bitsandbytes' weights keep float32 where those on bf16 ones round.
    rounds_otherwise = (kind is Quantization.int8 and peft_type in ("ADALORA", "HIRA")) or (
        kind is not Quantization.int8_torchao and peft_type == "PVERA"
    )
    check_gradients(models, batch, dtype, 3e-2 if rounds_otherwise else 2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_products_with_the_base_alone_are_those_with_its_weights(kind, batch) -> None:
    """Of layers without an adapter too: bitsandbytes' own int8 product would round its input."""
    base = base_of(kind)
    torch.testing.assert_close(base(**batch).logits, dense(base, torch.float32)(**batch).logits)


@pytest.fixture
def dequantised(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often the weight of each layer was made a matrix."""
    counts: Counter[int] = Counter()
    make = matrix_of

    def counted(layer: nn.Linear) -> Tensor:
        counts[id(layer)] += is_quantized(layer)
        return make(layer)

    for module in ("kernels.quantized", "adapters.cache_source"):
        monkeypatch.setattr(f"mixlora_exp.{module}.matrix_of", counted)
    return counts


@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
def test_each_weight_is_dequantised_once_in_each_direction(
    method, dequantised, draw, batch
) -> None:
    """Not for each expert. DoRA's norms take one more after an optimizer step; the row norms of the
    weight itself are kept."""
    model = adapted(base_of("nf4"), method, draw).train()
    own = [m for m in model.modules() if isinstance(m, nn.Linear) and is_quantized(m)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    model(**batch)  # The first one takes the row norms too.
    for step in range(2):
        dequantised.clear()
        for _ in range(2):
            model(**batch).loss.backward()
        norms = 1 if method == "mixdora" and step else 0
        # Nothing before the first layer asks for a gradient.
        first = {id(m) for m in model.base_model.model.model.layers[0].self_attn.modules()}
        assert {dequantised[id(m)] for m in own if id(m) not in first} == {4 + norms}
        optimizer.step()


def test_layers_are_the_fused_ones_and_peft_s_own_on_request(draw) -> None:
    for kind in KINDS:
        model = adapted(base_of(kind), "lora", draw)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert type(layer) is FusedLinear
        set_kernel(model, "peft")
        assert type(layer).__module__ in ("peft.tuners.lora.bnb", "peft.tuners.lora.torchao")
        set_kernel(model, "auto")
        assert type(layer) is FusedLinear


@pytest.mark.parametrize("kind", KINDS)
def test_fused_layers_compute_what_peft_s_do(kind, dora, draw, batch) -> None:
    model = adapted(base_of(kind), "dora" if dora else "lora", draw).eval()
    with torch.no_grad():
        found = model(**batch).logits
        set_kernel(model, "peft")
        torch.testing.assert_close(found, model(**batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "mixdora", "moslora"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_them_on_a_base_that_transformers_quantised(
    kind, method, draw, batch, tmp_path: Path
) -> None:
    config = compose([*TINY, f"model.quantization={kind}", f"method={method}"])
    base_of("none").save_pretrained(tmp_path / "base")
    model = adapted(base_of(kind), method, draw).eval()
    save_adapter(model, tmp_path / "adapter")
    options = quantization_options(config.model, torch.float32, CPU)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, **options)
    loaded = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    with torch.no_grad():
        found, expected = loaded(**batch).logits, model(**batch).logits
    # Layers without an adapter are bitsandbytes' own here, which round more: their input to int8,
    # or NF4's products to bf16 on some CPUs. MixDoRA leaves none.
    bound = 3e-2 if kind != "int8_torchao" and method != "mixdora" else 1e-5
    assert (found - expected).norm() / expected.norm() < bound
    again = load_adapter(base_of(kind), tmp_path / "adapter", config.kernel)
    assert torch.equal(again(**batch).logits, expected)


def test_several_adapters_share_a_quantised_base(draw, batch_of, tmp_path: Path) -> None:
    batch, alone = batch_of(rows=3), {}
    for method in ("mixlora", "dora"):
        model = adapted(base_of("nf4"), method, draw).eval()
        save_adapter(model, tmp_path / method)
        alone[method] = model(**batch).logits
        assert isinstance(model, PeftModel)
    both = load_adapters(base_of("nf4"), {name: tmp_path / name for name in alone})
    with torch.no_grad():
        found = both(**batch, adapter_names=["mixlora", "dora", "mixlora"]).logits
    for row, name in enumerate(["mixlora", "dora", "mixlora"]):
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(found[row][real], alone[name][row][real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "moslora"])
def test_merging_is_refused(method, draw) -> None:
    for kind in KINDS:
        model = adapted(base_of(kind), method, draw)
        with pytest.raises(ValueError, match="cannot be merged into a quantised base"):
            model.merge_and_unload()


def test_a_layer_that_is_not_quantised_yet_is_none() -> None:
    """On a CPU bitsandbytes' layers begin with a plain weight."""
    from bitsandbytes.nn import Linear4bit

    assert not is_quantized(Linear4bit(8, 4))
    assert not is_quantized(nn.Linear(8, 4))
    assert not is_quantized(nn.ReLU())
    assert quantized.stored(nn.Linear(8, 4).weight).shape == (4, 8)
    assert issubclass(FusedLinear, Linear)


@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (96, 64), (96, 96)])
def test_blocks_of_4_bits_that_go_on_in_the_next_row(rows: int, columns: int) -> None:
    """The numbers are those of the matrix quantised as one long row, whose blocks these are."""
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(rows, columns)
    held, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    flat = functional.quantize_4bit(weight.view(1, -1), quant_type="nf4", blocksize=64)
    layer = nn.Linear(columns, rows)
    layer.weight = nn.Parameter(held, requires_grad=False)
    layer.weight.quant_state = state
    expected = functional.dequantize_4bit(*flat).view(rows, columns)
    assert torch.equal(quantized._of_4_bits(layer.weight), expected)
    assert float((expected - weight).abs().max()) < 0.6
