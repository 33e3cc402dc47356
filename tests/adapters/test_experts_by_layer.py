"""MixLoRA's blocks whose numbers of experts, and of those that a token gets, differ by layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from composed import compose
from peft import PeftModel, get_peft_model

from mixlora_exp.adapters import attach_adapter, load_adapter, load_adapters, save_adapter
from mixlora_exp.adapters.model import set_kernel
from mixlora_exp.config.schema import KernelConfig, KernelName
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import KERNELS
from mixlora_exp.models import load_model
from mixlora_exp.models.parameters import count_parameters

LISTS = {"num_experts": [2, 4], "top_k": [1, 2]}
KERNEL = KernelConfig(name=KernelName.exact)
WORDS = ["model=tiny", "method.rank=2", "method.num_experts=[2,4]", "method.top_k=[1,2]"]


@torch.no_grad()
def run(model: PeftModel, batch: dict[str, torch.Tensor], **given) -> torch.Tensor:
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return model.eval()(**inputs, **given).logits


def blocks(model: PeftModel) -> list[torch.nn.Module]:
    return [layer.mlp for layer in model.get_base_model().model.layers]


@pytest.mark.parametrize(
    ("words", "attention", "experts", "router"),
    [
        # q, k, v, o: 2 x (128 + 96 + 96 + 128); 6 experts of 3 x 2 x (64 + 176); rows of 64.
        (["method=mixlora", *WORDS], 2 * 2 * 448, 6 * 3 * 2 * 240, 6 * 64),
        (["method=mixlora", *WORDS, "method.layers_to_transform=[1]"], 896, 4 * 1440, 4 * 64),
        # 8 layers each of 2, 4, 6 and 8.
        (
            ["model=llama2_7b", "method=mixlora", "method.num_experts=2/4/6/8"],
            32 * 4 * 16 * 8192, 160 * 3 * 16 * (4096 + 11008), 160 * 4096,
        ),
    ],
)  # fmt: skip
def test_parameters(words: list[str], attention: int, experts: int, router: int) -> None:
    config = compose(words)
    counted = count_parameters(config.model, config.method)
    expected = {"attention": attention, "experts": experts, "router": router}
    assert {name: n for name, n in counted.components.items() if n} == expected
    assert counted.trainable == attention + experts + router
    if config.model.name == "tiny":
        base = load_model(config.model, torch.float32)
        model = attach_adapter(base, config.method, config.kernel, seed=0)
        built = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert built == counted.trainable


CPU = [(name, False) for name, kernel in KERNELS.items() if kernel.device is None]


@pytest.mark.parametrize(("kernel", "dora"), [*CPU, ("exact", True)])
def test_each_layer_is_as_alone(
    model_of: Callable[..., PeftModel], batch, literal, kernel: str, dora: bool
) -> None:
    """Forward pass, loss and gradients are those of blocks that were made with their own numbers;
    each block is what its parameters say."""
    common = {"use_dora": dora, "router_loss_coef": 0.1}
    model = model_of(**LISTS, **common)
    alone = model_of(num_experts=2, top_k=1, **common)
    other = model_of(num_experts=4, top_k=2, **common)
    alone.get_base_model().model.layers[1].mlp = blocks(other)[1]
    assert [len(block.lora_router["default"]) for block in blocks(model)] == [2, 4]
    alone.load_state_dict(model.state_dict())
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for number, block in enumerate(blocks(model)):
        block.register_forward_hook(lambda _, x, y, number=number: seen.update({number: (x[0], y)}))
    results = []
    for each in (model, alone):
        set_kernel(each, kernel)
        output = each.train()(**batch)
        output.loss.backward()
        grads = {n: p.grad for n, p in each.named_parameters() if p.requires_grad}
        results.append((output, grads))
    (output, grads), (expected, wanted) = results
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.logits, expected.logits)
    assert grads.keys() == wanted.keys()
    assert all(torch.equal(grad, wanted[name]) for name, grad in grads.items())
    losses = []
    for number, block in enumerate(blocks(model)):
        x, y = seen[number]
        torch.testing.assert_close(y, literal(block, x), rtol=1e-4, atol=1e-5)
        p = (x @ block.lora_router["default"].T).softmax(dim=-1)[batch["attention_mask"].bool()]
        first = torch.nn.functional.one_hot(p.argmax(dim=-1), p.shape[1]).double().mean(dim=0)
        losses.append(p.shape[1] * (first * p.mean(dim=0)).sum())
    assert output.aux_loss.item() == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    report = model.base_model.router_report
    assert report.counts.shape == (2, 4)
    assert report.counts[0, 2:].tolist() == [0, 0]
    tokens = int(batch["attention_mask"].sum())
    assert report.counts.sum(dim=1).tolist() == [tokens, 2 * tokens]


@pytest.mark.parametrize(
    "changes",
    [LISTS, {"num_experts": "2/4", "top_k": "1/2"}, {**LISTS, "layers_to_transform": [0]}],
    ids=["lists", "groups", "in the layer with fewer"],
)
def test_saved_and_loaded_again(model_of, base_of, batch, tmp_path: Path, changes) -> None:
    model = model_of(**changes)
    expected = run(model, batch)
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name: written[name] for name in LISTS} == LISTS
    stock = PeftModel.from_pretrained(base_of(), str(tmp_path))
    for again in (stock, load_adapter(base_of(), tmp_path, KERNEL)):
        assert torch.equal(run(again, batch), expected)


def test_rows_beside_those_of_other_adapters(kit, base_of, batch, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("lists", "even", "plain")}
    alone = [
        kit.adapter(folders["lists"], **LISTS)[1][:1], kit.adapter(folders["even"])[1][1:],
    ]  # fmt: skip
    kit.adapter(folders["plain"], "lora")
    model = load_adapters(base_of(), folders)
    found = run(model, batch, adapter_names=["lists", "even"])
    real = batch["attention_mask"].bool()
    for row, one in enumerate(alone):
        own = real[row]
        torch.testing.assert_close(found[row][own], one[0][own], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": [2, 10**6]}, "num_experts=1000000"),
        ({"num_experts": [2, "4"]}, "must be an integer above 0, or a list"),
        ({"num_experts": "2/4"}, "must be an integer above 0, or a list"),
        ({"num_experts": [4, 2]}, "rank or experts"),
        ({"num_experts": [2, 4, 4]}, "num_experts has 3 entries"),
        ({"top_k": [1, 5]}, "top_k=.* must be in"),
    ],
)
def test_files_of_others(model_of, base_of, tmp_path: Path, changes, message: str) -> None:
    save_adapter(model_of(**LISTS), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message) as raised:
        load_adapter(base_of(), tmp_path, KERNEL)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": [2, 2, 2]}, "num_experts has 3 entries, and the model has 2 layers"),
        ({"num_experts": "2/4/4/4", "top_k": "3/1"}, "top_k=3/1 is 3 in layer 0, which has 2"),
    ],
)
def test_what_does_not_fit_the_model(base_of, config_of, changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(base_of(), config_of(**changes))
