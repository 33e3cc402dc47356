"""MoLA, LoRAMoE, dynamic and switch adapters of moe-peft, imported: logits, router logits,
auxiliary loss and all gradients as its definitions have them, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from official_format import CONFIG, write_official
from official_forward import ATTENTION, FEED_FORWARD, Official, config_of, tensors_of
from peft import PeftModel
from torch import Tensor

from mixlora_exp.adapters import load_adapter
from mixlora_exp.cli.convert import run
from mixlora_exp.config.command import compose
from mixlora_exp.errors import UserError
from mixlora_exp.official.folders import AdapterFiles
from mixlora_exp.official.imports import import_official
from mixlora_exp.system.exit_codes import guarded

CASES = {
    "mola": ("mola", {}),
    "mola, some projections, all experts": (
        "mola", {"target_modules": ["q_proj", "down_proj"], "top_k": 4, "use_rslora": True},
    ),
    "loramoe": ("loramoe", {}),
    "loramoe, feed-forward alone": ("loramoe", {"target_modules": list(FEED_FORWARD)}),
    "dynamic": ("mixlora-dynamic", {}),
    "dynamic, sharper": ("mixlora-dynamic", {"temperature": 0.5}),
    "dynamic, all experts": ("mixlora-dynamic", {"temperature": 2.0, "top_p": 0.9}),
    "dynamic, one up projection": ("mixlora-dynamic", {"target_modules": ["q_proj", "up_proj"]}),
    "switch": ("mixlora-switch", {}),
    "switch, no row left over": ("mixlora-switch", {"expert_capacity": 32, "num_experts": 2}),
}  # fmt: skip


@pytest.fixture
def pair(kit: Any, tmp_path: Path) -> Callable[..., tuple[Official, PeftModel, dict[str, Any]]]:
    """The adapter of a case by its definition, and imported."""

    def make(kind: str, **changes: Any) -> tuple[Official, PeftModel, dict[str, Any]]:
        base = kit.base_of("llama", torch.float64)
        config = config_of(kind, **changes)
        tensors = tensors_of(config, base)
        source = write_official(tmp_path / "theirs", config, tensors)
        assert guarded(run, [str(source), str(tmp_path / "ours")]) == 0
        ours = PeftModel.from_pretrained(
            kit.base_of("llama", torch.float64), str(tmp_path / "ours"), is_trainable=True
        )
        return Official(base, config, tensors), ours, config

    return make


def routers_of(model: PeftModel) -> list[Tensor]:
    """Their logits in the last pass, in the model's order."""
    layers = [m for m in model.modules() if getattr(m, "routings", None)]
    return [layer.routings["default"].logits for layer in layers]


def both_sides(batch: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    if side == "right":
        return batch
    moved = {name: value.clone() for name, value in batch.items()}
    for row, real in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        for value in moved.values():
            value[row] = value[row].roll(value.shape[1] - real)
        moved["labels"][row, : value.shape[1] - real + 1] = -100
    return moved


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", CASES)
def test_as_the_definition(case: str, side: str, pair: Callable, batch: dict[str, Tensor]) -> None:
    kind, changes = CASES[case]
    theirs, ours, config = pair(kind, **changes)
    batch = both_sides(batch, side)
    real, expected = batch["attention_mask"].bool(), theirs(**batch)
    seen = theirs.logits_seen
    with torch.no_grad():
        found = ours.eval()(**batch)
    torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=0, atol=1e-10)
    for one, other in zip(routers_of(ours), seen, strict=True):
        kept = real.flatten()
        torch.testing.assert_close(one[kept], other[kept], rtol=0, atol=1e-10)
    # Of real tokens alone, whatever the loss counts.
    report, rows = ours.base_model.router_report, int(real.sum())
    if kind in ("mola", "mixlora-switch"):
        assert report.counts.sum(dim=1).max() <= rows * config.get("top_k", 1)
    auxiliary = theirs.auxiliary_loss(batch["attention_mask"])
    loss = expected.loss + auxiliary
    output = ours.train()(**batch)
    torch.testing.assert_close(output.loss, loss, rtol=0, atol=1e-10)
    coefficient = config.get("router_aux_loss_coef", 0.0)
    torch.testing.assert_close(coefficient * output.aux_loss, auxiliary, rtol=0, atol=1e-10)
    names = list(theirs.weights)
    grads = torch.autograd.grad(loss, [theirs.weights[name] for name in names])
    wanted = import_official(AdapterFiles(config, dict(zip(names, grads, strict=True)))).tensors
    output.loss.backward()
    compared = 0
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            other = wanted[name.replace(".default", "")]
            assert other.abs().max() > 0, name
            torch.testing.assert_close(parameter.grad, other, rtol=1e-8, atol=1e-10, msg=name)
            compared += 1
    assert compared == len(wanted)


def test_switch_leaves_rows_over(pair: Callable, batch: dict[str, Tensor]) -> None:
    """In the case above, or it would not show what becomes of them."""
    theirs, ours, _ = pair("mixlora-switch")
    theirs(**batch)
    for logits in theirs.logits_seen:
        each = logits.argmax(dim=1).view(batch["input_ids"].shape)
        assert max(int(row.bincount().max()) for row in each) > 2
    with torch.no_grad():
        some = ours.eval()(input_ids=batch["input_ids"][:1]).logits
        whole = ours(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(whole[:1], some)


@pytest.mark.parametrize("kind", ["mola", "loramoe", "mixlora-dynamic", "mixlora-switch"])
def test_loaded_saved_and_loaded(kind: str, kit: Any, tmp_path: Path) -> None:
    """By this project's own commands as well, in float32."""
    compare: list[Tensor] = []
    config = config_of(kind)
    source = write_official(tmp_path / "theirs", config, tensors_of(config, kit.base_of()))
    assert guarded(run, [str(source), str(tmp_path / "ours")]) == 0
    kernel = compose(["model=tiny", "kernel=exact"]).kernel
    model = load_adapter(kit.base_of(), tmp_path / "ours", kernel, accept=True)
    compare.append(kit.of(model))
    model.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    compare.append(kit.logits(tmp_path / "again"))
    assert torch.equal(*compare)
    with torch.no_grad():
        theirs = Official(kit.base_of(), config, tensors_of(config, kit.base_of()))
        real = kit.batch["attention_mask"].bool()
        expected = theirs(**kit.batch).logits[real]
    assert (compare[0][real] - expected).abs().max() < 2e-5


def test_what_is_not_written_is_what_moe_peft_reads(kit: Any) -> None:
    def settings(kind: str, *left_out: str, **changes: Any) -> tuple[dict[str, Any], str]:
        config = config_of(kind, **changes)
        tensors = tensors_of(config, kit.base_of())
        for name in left_out:
            del config[name]
        made = import_official(AdapterFiles(config, tensors))
        return dict(made.config), " ".join(made.notes)

    loss = ("router_aux_loss_coef",)
    mola, _ = settings("mola", "router_loss", "top_k", *loss)
    assert (mola["router_loss_coef"], mola["top_k"]) == (0.0, 2)
    dynamic, notes = settings("mixlora-dynamic", "top_p", "temperature", *loss)
    assert dynamic["router_loss_coef"] == 1e-3
    assert (dynamic["router_options"]["p"], dynamic["router_options"]["divisor"]) == (0.8, 0.0)
    assert "not divided by their sum" in notes
    switch, notes = settings(
        "mixlora-switch", "expert_capacity", "sparse_step", "router_z_loss_coef", *loss
    )
    options = switch["router_options"]
    assert (options["capacity"], options["z_loss"], options["jitter"]) == (32, 1e-3, 0.0)
    assert switch["router_init_std"] == 1.0
    assert "in inference too" in notes
    assert "jitter_noise: moe-peft does not write it" in notes
    quiet, notes = settings("mixlora-switch", router_loss=False, jitter_noise=0.02)
    assert (quiet["router_loss_coef"], quiet["router_options"]["z_loss"]) == (0.0, 0.0)
    assert quiet["router_options"]["jitter"] == 0.02
    assert "jitter_noise" not in notes
    assert settings("mola", router_init_range=3.0)[0]["router_init_std"] is None


def test_attention_alone_is_lora(kit: Any) -> None:
    config = config_of("loramoe", target_modules=list(ATTENTION))
    made = import_official(AdapterFiles(config, tensors_of(config, kit.base_of())))
    assert made.config["peft_type"] == "LORA"
    assert "imported as LoRA" in made.notes[0]


def test_use_dora_is_plain_lora(kit: Any) -> None:
    config = config_of("loramoe", use_dora=True)
    tensors = tensors_of(config, kit.base_of())
    made = import_official(AdapterFiles(config, tensors))
    assert made.config["use_dora"] is False
    assert "compute plain LoRA" in made.notes[0]
    for name, b in list(tensors.items()):
        if "self_attn" in name and "lora_B" in name:
            tensors[name.replace("B.weight", "magnitude_vector")] = torch.ones(len(b))
    with pytest.raises(UserError, match="magnitudes are not supported in an adapter of loramoe"):
        import_official(AdapterFiles(config, tensors))


REFUSED = [
    ("mola", {"routing_strategy": "mixlora"}, "peft_type=MOLA has mola"),
    ("mola", {"top_p": 0.5}, "top_p is not supported"),
    ("mola", {"top_k": 5}, "top_k=5 must be"),
    ("mola", {"top_k": [2, 2]}, "top_k=.* must be an integer"),
    ("mola", {"num_experts": [2, 4]}, "num_experts=.* must be an integer"),
    ("mola", {"num_experts": 5}, "num_experts=5 asks for"),
    ("mola", {"r": 4}, "does not fit r=4"),
    ("mola", {"target_modules": ["q_proj"]}, "not among target_modules"),
    ("mola", {"router_init_range": -1.0}, "router_init_range=-1.0"),
    ("mola", {"peft_type": "LORAMOE", "routing_strategy": "loramoe"}, "top_k"),
    ("loramoe", {"peft_type": "MIXLORA"}, "routing_strategy=loramoe is not supported"),
    ("loramoe", {"peft_type": "LORA"}, "routing_strategy"),
    ("loramoe", {"router_loss": True}, "router_loss is not supported"),
    ("mixlora-dynamic", {"top_p": 0.0}, "top_p=0.0 must be in"),
    ("mixlora-dynamic", {"top_p": 1.5}, "top_p=1.5 must be in"),
    ("mixlora-dynamic", {"temperature": -1.0}, "temperature=-1.0 must be >= 0"),
    ("mixlora-dynamic", {"temperature": "warm"}, "temperature='warm' must be a number"),
    ("mixlora-dynamic", {"jitter_noise": 0.1}, "what the experts see too"),
    ("mixlora-dynamic", {"top_k": 2}, "top_k is not supported"),
    ("mixlora-switch", {"expert_capacity": 0}, "expert_capacity=0 must be from 1"),
    ("mixlora-switch", {"expert_capacity": 1.5}, "expert_capacity=1.5 must be an integer"),
    ("mixlora-switch", {"sparse_step": "a"}, "sparse_step='a'"),
    ("mixlora-switch", {"ffn_dropout": 0.1}, "ffn_dropout=0.1 must be 0"),
    ("mixlora-switch", {"jitter_noise": 1.0}, "jitter_noise=1.0"),
    ("mixlora-switch", {"router_aux_loss_coef": 0.0}, "router_aux_loss_coef=0 must be above 0"),
    ("mixlora-switch", {"routing_strategy": "mixlora-noisy"}, "peft_type=MIXLORA has mixlora, "),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED, ids=str)
def test_fields_that_do_not_fit_are_named(
    kind: str, changes: dict[str, Any], message: str, kit: Any
) -> None:
    config = config_of(kind)
    tensors = tensors_of(config, kit.base_of())
    with pytest.raises(UserError, match=message):
        import_official(AdapterFiles(config | changes, tensors))


def gone(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[next(name for name in tensors if part in name)]

    return change


def renamed(part: str, other: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if part in name)
        tensors[name.replace(part, other)] = tensors.pop(name)

    return change


def cut(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if part in name)
        tensors[name] = tensors[name][:, :-1].contiguous()

    return change


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("mola", gone("v_proj.moe_gate"), "router is missing: 1 of 14, .* layer 0, v_proj"),
        ("mola", gone("v_proj.experts.1.lora_B"), "layer 0, v_proj, lora_B: there are experts"),
        ("mola", renamed("v_proj.moe_gate", "moe_gate"), "unknown: it cannot be imported"),
        ("mola", renamed("mlp.up_proj.moe_gate", "mlp.moe_gate"), "router is missing"),
        ("mola", renamed("mola.layers.0", "mixlora.layers.0"), "unknown: it cannot be imported"),
        ("mola", renamed("v_proj.moe_gate", "w_proj.moe_gate"), "w_proj is not a projection"),
        ("mola", renamed("mlp.up_proj.moe_gate", "self_attn.up_proj.moe_gate"), "not a projection"),
        ("mola", cut("v_proj.moe_gate"), r"layer 0, v_proj has shape \(4, 63\), not \(4, 64\)"),
        ("loramoe", renamed("q_proj.lora_A", "q_proj.experts.0.lora_A"), "there are experts"),
        ("loramoe", renamed("self_attn.q_proj.lora_A", "mlp.up_proj.lora_A"), "lora_A of layer 0"),
        ("loramoe", gone("up_proj.moe_gate"), "router is missing: 1 of 6"),
        ("loramoe", cut("up_proj.experts.0.lora_A"), "experts differ in shape"),
        ("mixlora-switch", gone("layers.1.mlp.moe_gate"), "router is missing: 1 of 2"),
        ("mixlora-switch", renamed("mlp.moe_gate", "mlp.up_proj.moe_gate"), "router is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    kind: str, change: Callable[[dict[str, Tensor]], None], message: str, kit: Any
) -> None:
    config = config_of(kind)
    tensors = tensors_of(config, kit.base_of())
    change(tensors)
    with pytest.raises(UserError, match=message):
        import_official(AdapterFiles(config, tensors))


@pytest.mark.parametrize("targets", ["q_proj", [1], ["k_proj"], ["q_proj", "up_proj"], {"up": 1}])
def test_lora_targets_are_checked(
    targets: Any, kit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of("loramoe", target_modules=["q_proj", "up_proj"])
    source = write_official(tmp_path / "theirs", config, tensors_of(config, kit.base_of()))
    assert guarded(run, [str(source), str(tmp_path / "ours")]) == 0
    path = tmp_path / "ours" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_targets": targets}))
    kernel = compose(["model=tiny", "kernel=exact"]).kernel
    with pytest.raises(UserError, match="lora_targets="):
        load_adapter(kit.base_of(), tmp_path / "ours", kernel, accept=True)
