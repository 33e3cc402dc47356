"""The last layer at the positions that carry a loss: loss, gradients and statistics stay."""

from __future__ import annotations

import pytest
import torch
from cpu_kernels import CPU_KERNELS
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Olmo2Config

from mixlora_exp.adapters import MixLoraConfig, set_kernel
from mixlora_exp.adapters.dropout import use_dropout_stream
from mixlora_exp.config.choices import PAPER_METHODS, Head
from mixlora_exp.kernels import DropoutKey, DropoutStream
from mixlora_exp.training import last_layer
from mixlora_exp.training.last_layer import last_layer_at_kept_rows
from mixlora_exp.training.losses import single_loss

FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
METHODS = PAPER_METHODS
SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "use_cache": False,
}  # fmt: skip
ARCHITECTURES = {
    "llama": LlamaConfig(**SHAPE),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=8),
    "olmo2": Olmo2Config(**SHAPE),
}
ROWS, LENGTH, KEEP = 3, 11, 4


def model_of(method: str, architecture: str = "llama", kernel: str = "auto") -> nn.Module:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture], dtype=torch.float64)
    settings = {
        "r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "use_dora": method.endswith("dora"),
        "target_modules": ["q_proj", "v_proj", "o_proj", *FEED_FORWARD],
    }  # fmt: skip
    mixture = method.startswith("mix")
    experts = MixLoraConfig(**settings, num_experts=4, top_k=2, router_loss_coef=0.5)
    plain = LoraConfig(**settings, task_type="CAUSAL_LM")
    model = get_peft_model(base, experts if mixture else plain)
    set_kernel(model, kernel)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.double()
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch_of() -> dict[str, Tensor]:
    """Padded on the left; one answer is shorter than the columns that are kept."""
    torch.manual_seed(1)
    ids = torch.randint(1, 50, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, : LENGTH - 2] = 0
    labels = ids.masked_fill(mask == 0, -100)[:, -KEEP:]
    labels[2, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels,
            "logits_to_keep": torch.arange(LENGTH - KEEP, LENGTH)}  # fmt: skip


def step(model: nn.Module, *, narrow: bool) -> dict[str, Tensor]:
    """Loss, gradients and the router's report of one pass."""
    base, batch, stream = model.base_model.model, batch_of(), DropoutStream(5)
    use_dropout_stream(model, "default", stream)
    model.zero_grad()
    with last_layer_at_kept_rows(base) as rows:
        numbers = rows.use(batch["input_ids"].shape, batch["logits_to_keep"] if narrow else None)
        position = torch.arange(LENGTH) - (1 - batch["attention_mask"]).sum(dim=1, keepdim=True)
        example = torch.arange(ROWS).repeat_interleave(LENGTH)
        stream.begin(7, example, position.flatten(), numbers)
        loss = single_loss(model, base, batch, 5, Head.chunked)
        loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    report = getattr(model.base_model, "router_report", None)
    if report is not None:
        found |= {"router loss": report.loss, "counts": report.counts}
    return {**found, "loss": loss.detach()}


def assert_same(model: nn.Module) -> None:
    full, narrow = step(model, narrow=False), step(model, narrow=True)
    assert full.keys() == narrow.keys()
    for name, value in full.items():
        torch.testing.assert_close(narrow[name], value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_changes_in_float64(method, checkpointing) -> None:
    model = model_of(method)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    assert_same(model)


@pytest.mark.parametrize("method", ["lora", "mixlora"])
@pytest.mark.parametrize("architecture", ["gemma3", "olmo2"])
def test_layers_with_norms_behind(method, architecture) -> None:
    assert_same(model_of(method, architecture))


@pytest.mark.parametrize("kernel", [name for name in CPU_KERNELS if name != "exact"])
@pytest.mark.parametrize("method", ["dora", "mixdora"])
def test_other_kernels(method, kernel) -> None:
    assert_same(model_of(method, kernel=kernel))


@pytest.mark.parametrize(
    ("method", "all_rows"), [("lora", set()), ("mixlora", {"o_proj"})], ids=["lora", "mixlora"]
)
def test_the_last_layer_has_fewer_rows(monkeypatch, method, all_rows) -> None:
    """In all products but those before attention, and before a router."""
    model, seen = model_of(method), {}
    last = model.base_model.model.model.layers[-1]
    frozen = [(path, m) for path, m in last.named_modules() if type(m) is nn.Linear]
    names = {id(m.weight): path.replace(".base_layer", "").split(".")[-1] for path, m in frozen}
    own = functional.linear

    def linear(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        seen[names.get(id(weight))] = x.shape[:-1].numel()
        return own(x, weight, *bias)

    monkeypatch.setattr(functional, "linear", linear)
    step(model, narrow=True)
    short = {"o_proj", *FEED_FORWARD} - all_rows
    assert {n for n in names.values() if seen.get(n) == ROWS * KEEP} == short
    assert seen["q_proj"] == ROWS * LENGTH


@pytest.mark.parametrize("hashed", [False, True], ids=["drawn", "hashed"])
@pytest.mark.parametrize("p", [0.1, 0.7])
def test_kept_rows_keep_their_masks(hashed, p) -> None:
    stream, rows = DropoutStream(3), torch.tensor([2, 3, 6, 7, 8, 19])
    numbers, cpu = torch.arange(20), torch.device("cpu")
    stream.begin(4, numbers // 7, numbers % 7, rows)
    key = DropoutKey(stream, "layers.1.mlp")
    whole = key.mask("input", (20, 30), p, cpu, hashed=hashed).kept()
    assert torch.equal(key.mask("input", (6, 30), p, cpu, hashed=hashed).kept(), whole[rows])
    with pytest.raises(ValueError, match="has 20 rows"):
        key.mask("input", (5, 30), p, cpu, hashed=hashed)


@pytest.mark.parametrize(
    "method", ["mixdora", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[:-1])]
)
def test_training_is_the_same(train, monkeypatch, method) -> None:
    """With accumulation and dropout; afterwards the layers are as before."""
    words = [
        *(f"method={method}", "method.dropout=0.1", "trainer.max_steps=3"),
        *("trainer.logging_steps=1", "trainer.batch_size=4", "trainer.micro_batch_size=2"),
    ]
    narrow = train(*words)
    (job,) = narrow.trainer.jobs.values()
    assert job.kept.rows is not None
    base = narrow.trainer.model.base_model.model
    assert not any("forward" in vars(module) for module in base.modules())
    monkeypatch.setattr(last_layer, "_modules", lambda base: [])
    full = train(*words)
    assert narrow.losses == pytest.approx(full.losses, rel=1e-6)
    for name, weight in full.after.items():
        torch.testing.assert_close(narrow.after[name], weight, rtol=1e-2, atol=1e-5)
