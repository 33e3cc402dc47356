"""MixLoRA and MixDoRA as PEFT adapters: build, save, load, switch, disable, remove, generate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from mixlora_exp.adapters import MixLoraConfig, MixLoraFeedForward


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def trainable(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def saved_name(name: str) -> str:
    """PEFT drops the adapter's name, and of its DoRA layers the last attribute."""
    name = name.replace(".default", "")
    return name.removesuffix(".weight") if "magnitude_vector" in name else name


def test_fresh_adapter_is_the_base_model(model_of, base_of, batch, family, dora) -> None:
    """B is zero, a magnitude is the norm of W and the weights of the experts sum to 1."""
    model = model_of(family, drawn=False, use_dora=dora).eval()
    expected = logits(base_of(family), batch)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_logits_agree_to_the_bit(
    model_of, base_of, batch, family, dora, tmp_path: Path
) -> None:
    model = model_of(family, use_dora=dora).eval()
    before = logits(model, batch)
    assert not torch.allclose(before, logits(base_of(family), batch), atol=1e-2)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    files = {path.name for path in tmp_path.iterdir()} - {"README.md"}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(base_of(family), tmp_path)
    assert isinstance(loaded.peft_config["default"], MixLoraConfig)
    assert not loaded.training
    assert torch.equal(logits(loaded, batch), before)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_experts"], config["top_k"]) == ("MIXLORA", 4, 2)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"low_cpu_mem_usage": True}, id="tensors are made on no device first"),
        pytest.param({"adapter_name": "other"}, id="under another name"),
        pytest.param({"is_trainable": True}, id="to be trained on"),
    ],
)
def test_loading_options(model_of, base_of, batch, tmp_path: Path, options) -> None:
    model = model_of(use_dora=True).eval()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(base_of(), tmp_path, **options)
    assert bool(trainable(loaded)) == options.get("is_trainable", False)
    assert torch.equal(logits(loaded.eval(), batch), logits(model, batch))


def test_adapter_of_a_bf16_base_is_float32_and_keeps_its_bits(
    model_of, base_of, batch, dora, tmp_path: Path
) -> None:
    model = model_of(dtype=torch.bfloat16, use_dora=dora).eval()
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(base_of(dtype=torch.bfloat16), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_every_trainable_tensor_is_saved_and_gets_a_gradient(
    model_of, batch, family, dora, tmp_path: Path
) -> None:
    model = model_of(family, use_dora=dora).train()
    model(**batch).loss.backward()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    parameters = trainable(model)
    assert {saved_name(name) for name in parameters} == saved.keys()
    parts = 3 if dora else 2
    # Per layer: four attention projections, three of experts, one router.
    assert len(parameters) == 2 * (7 * parts + 1)
    for name, parameter in parameters.items():
        assert torch.equal(saved[saved_name(name)], parameter.detach())
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert frozen
    assert all(p.grad is None for p in frozen)


def test_first_step_of_a_fresh_adapter_moves_b_and_the_router(model_of, batch, dora) -> None:
    """A has no gradient while B is zero; B, router (by its loss) and magnitudes have."""
    model = model_of(drawn=False, use_dora=dora).train()
    model(**batch).loss.backward()
    for name, parameter in trainable(model).items():
        assert (parameter.grad.abs().max() > 0) == ("lora_A" not in name), name


def test_disable_adapter_is_the_base_model(model_of, base_of, batch, family, dora) -> None:
    model = model_of(family, use_dora=dora).eval()
    adapted = logits(model, batch)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(base_of(family), batch))
        assert model.base_model.router_report is None
    assert torch.equal(logits(model, batch), adapted)


def test_two_adapters_take_turns(model_of, config_of, batch, draw, dora) -> None:
    """Of other rank, number of experts and K, as their tensors are their own."""
    model = model_of(use_dora=dora).eval()
    first = logits(model, batch)
    model.add_adapter("second", config_of(r=2, num_experts=3, top_k=1, use_dora=dora))
    assert torch.equal(logits(model, batch), first)
    model.set_adapter("second")
    draw(model, seed=8)
    second = logits(model, batch)
    assert not torch.allclose(first, second, atol=1e-2)
    assert model.base_model.router_report.counts.shape == (2, 3)
    assert all("second" in name for name in trainable(model))
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), first)
    assert all("default" in name for name in trainable(model))
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(logits(model, batch), second)


def test_adapter_added_under_the_name_of_a_deleted_one_is_new(
    model_of, config_of, base_of, batch
) -> None:
    model = model_of(use_dora=True).eval()
    logits(model, batch)
    model.add_adapter("other", config_of(use_dora=True))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", config_of(use_dora=True))
    model.set_adapter("default")
    expected = logits(base_of(), batch)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)


def test_what_one_router_cannot_do_is_refused(model_of, config_of, batch) -> None:
    model = model_of().eval()
    model.add_adapter("second", config_of())
    with pytest.raises(ValueError, match="cannot be combined"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"one adapter at a time.*default.*second"):
        logits(model, batch)


@pytest.mark.parametrize("action", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_before_anything_changes(model_of, batch, dora, action) -> None:
    model = model_of(use_dora=dora).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model, batch)
    with pytest.raises(ValueError, match="MixLoRA cannot be merged"):
        getattr(model, action)()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model, batch), expected)


def test_unload_gives_back_the_base_model(model_of, base_of, batch, family, dora) -> None:
    model = model_of(family, use_dora=dora).eval()
    logits(model, batch)
    unloaded, base = model.unload(), base_of(family)
    assert not any(isinstance(m, MixLoraFeedForward) for m in unloaded.modules())
    state, expected = unloaded.state_dict(), base.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert torch.equal(logits(unloaded, batch), logits(base, batch))


@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        pytest.param(["down_proj"], {"A_down", "B_down"}, id="experts on one projection only"),
        pytest.param(
            ["q_proj", "gate_proj", "up_proj"],
            {"A_gate", "B_gate", "A_up", "B_up"},
            id="two projections and one of attention",
        ),
    ],
)
def test_partial_targets(model_of, batch, targets, parts) -> None:
    model = model_of(target_modules=targets).train()
    model(**batch).loss.backward()
    names = {name.rsplit(".", 2)[-2] for name in trainable(model) if ".mlp." in name}
    assert names == {"lora_router", *(f"lora_{part}" for part in parts)}
    assert any("q_proj" in name for name in trainable(model)) == ("q_proj" in targets)
    assert all(p.grad is not None for p in trainable(model).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"top_k": 5}, r"top_k=5 .*num_experts=4", id="more experts chosen than are"),
        pytest.param({"top_k": 0}, r"top_k=0", id="no expert chosen"),
        pytest.param({"top_k": [1, 5]}, r"top_k=\[1, 5\] must be in \[1, n", id="chosen by layer"),
        pytest.param({"num_experts": [2, 2.5]}, "a list of one for each layer", id="half experts"),
        pytest.param({"num_experts": "2/x"}, "or text as 2/4/6/8", id="no groups of layers"),
        pytest.param(
            {"router_loss_pooling": "all", "num_experts": [2, 4]}, "a number each", id="all pooled"
        ),
        pytest.param({"router_options": {"q": 1}, "num_experts": [2, 4]}, "q is not", id="option"),
        pytest.param({"r": 0}, r"r\b.*0", id="no rank"),
        pytest.param({"lora_dropout": 1.0}, "lora_dropout=1.0", id="everything dropped"),
        pytest.param({"router_loss_coef": -0.1}, "router_loss_coef=-0.1", id="rewards imbalance"),
        pytest.param({"router_loss": "mean"}, "router_loss='mean'", id="unknown count"),
        pytest.param({"router_loss_pooling": "sum"}, "router_loss_pooling='sum'", id="unknown"),
        pytest.param({"target_modules": ["q_proj"]}, "names none of", id="without experts"),
        pytest.param({"target_modules": "all-linear"}, "as a list", id="a pattern"),
        pytest.param({"bias": "all"}, "bias='all'", id="biases stay frozen"),
        pytest.param({"init_lora_weights": "pissa"}, "'pissa'", id="changes the base weights"),
        pytest.param({"rank_pattern": {"q_proj": 2}}, "rank_pattern", id="rank_pattern"),
        pytest.param({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern", id="alpha_pattern"),
        pytest.param({"init_lora_weights": "orthogonal"}, "'orthogonal'", id="not drawn"),
        pytest.param({"layer_replication": [[0, 2]]}, "layer_replication", id="layer_replication"),
        pytest.param({"lora_bias": True}, "lora_bias", id="lora_bias"),
        pytest.param({"fan_in_fan_out": True}, "fan_in_fan_out", id="fan_in_fan_out"),
        pytest.param({"exclude_modules": ["o_proj"]}, "exclude_modules", id="exclude_modules"),
        pytest.param({"target_parameters": ["w"]}, "target_parameters", id="target_parameters"),
        pytest.param({"trainable_token_indices": [1]}, "trainable_token", id="token_indices"),
        pytest.param({"use_qalora": True}, "use_qalora", id="use_qalora"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # PEFT's own, about the options it is given
def test_what_experts_lack_is_refused_by_name(config_of, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**options)


def test_block_that_is_no_plain_gated_block_is_refused(base_of, config_of) -> None:
    base = base_of()
    base.model.layers[1].mlp.up_proj = torch.nn.Bilinear(64, 64, 176)
    with pytest.raises(ValueError, match=r"up_proj of LlamaMLP to be an nn.Linear, found Bilin"):
        get_peft_model(base, config_of())


def test_adapter_of_another_kind_beside_is_refused(model_of) -> None:
    with pytest.raises(ValueError, match="different peft types"):
        model_of().add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("rslora", "scaling"),
    [pytest.param(False, 2.0, id="alpha / r"), pytest.param(True, 4.0, id="alpha / sqrt(r)")],
)
def test_scaling_of_experts_is_that_of_attention(model_of, rslora, scaling) -> None:
    model = model_of(use_rslora=rslora)
    assert model.base_model.feed_forwards()[0].scaling["default"] == scaling
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == scaling


def test_initial_values(model_of) -> None:
    """A uniform in +-1/sqrt(in), B zero, router N(0, 0.02), magnitude the row norm of W."""
    model = model_of(drawn=False, use_dora=True, num_experts=8, router_init_std=0.05)
    block = model.base_model.feed_forwards()[0]
    for role, features in (("gate", 64), ("up", 64), ("down", 176)):
        a = getattr(block, f"lora_A_{role}")["default"]
        bound = features**-0.5
        assert a.abs().max() <= bound
        assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert (getattr(block, f"lora_B_{role}")["default"] == 0).all()
        norm = getattr(block.base_layer, f"{role}_proj").weight.norm(dim=-1)
        for magnitude in getattr(block, f"lora_magnitude_{role}")["default"]:
            torch.testing.assert_close(magnitude.detach(), norm.detach())
    assert block.lora_router["default"].std().item() == pytest.approx(0.05, rel=0.15)


def test_generation_with_and_without_cache(model_of, family, dora) -> None:
    """Greedy, for a batch padded on the left, as a tokenizer would; logits too, since the tokens
    of a random model may repeat."""
    model = model_of(family, use_dora=dora).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (2, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0

    def generate(cache: bool):
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            use_cache=cache,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )

    cached, whole = generate(True), generate(False)
    assert cached.sequences.shape == (2, 11)
    assert torch.equal(cached.sequences, whole.sequences)
    for one, other in zip(cached.logits, whole.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        base = generate(True)
    assert not torch.allclose(base.logits[0], cached.logits[0], atol=1e-2)


def test_router_report_of_a_pass_with_a_cache(model_of) -> None:
    """The mask covers the past too; only the new token's column is counted."""
    model = model_of().eval()
    ids = torch.arange(5, 17).view(2, 6)
    with torch.no_grad():
        first = model(input_ids=ids[:, :5], attention_mask=torch.ones(2, 5), use_cache=True)
        mask = torch.ones(2, 6)
        mask[1, :2] = 0
        model(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values)
    assert model.base_model.router_report.counts.sum(dim=1).tolist() == [4, 4]
