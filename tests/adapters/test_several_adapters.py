"""Several adapters of any method on one base: rows told apart by `adapter_names`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cpu_kernels import CPU_KERNELS
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from mixlora_exp.adapters import load_adapters, set_kernel
from mixlora_exp.adapters.build import save_adapter
from mixlora_exp.adapters.mixed_adapters import add_guest, parameters_of
from mixlora_exp.errors import UserError

KINDS = {
    "experts": {"kind": "mixlora"},
    "dora_experts": {"kind": "mixlora", "use_dora": True, "num_experts": 3, "r": 2},
    "plain": {"kind": "lora", "r": 3},
    "dora": {"kind": "dora"},
}


@pytest.fixture
def folders(kit, tmp_path: Path) -> dict[str, Path]:
    """An adapter of each kind, saved by itself."""
    for number, (name, options) in enumerate(KINDS.items()):
        torch.manual_seed(number)
        kit.adapter(tmp_path / name, **options)
    return {name: tmp_path / name for name in KINDS}


@torch.no_grad()
def run(model, batch, **kwargs) -> torch.Tensor:
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return model(**inputs, **kwargs).logits


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_rows_are_those_of_the_adapter_alone(kit, base_of, folders, batch_of, kernel) -> None:
    """In any order, repeated, and beside rows of the base model; padding and all."""
    batch = batch_of(rows=6, length=14)
    names = ["plain", "experts", "__base__", "dora_experts", "plain", "dora"]
    model = load_adapters(base_of(), folders)
    set_kernel(model, kernel)
    found = run(model, batch, adapter_names=names)
    for name in dict.fromkeys(names):
        rows = [i for i, other in enumerate(names) if other == name]
        alone = base_of().eval()
        if name != "__base__":
            alone = PeftModel.from_pretrained(alone, str(folders[name])).eval()
        part = {key: value[rows] for key, value in batch.items()}
        torch.testing.assert_close(found[rows], run(alone, part), rtol=1e-4, atol=1e-5)


def test_active_adapter_without_names(base_of, folders, batch) -> None:
    """`set_adapter` chooses one as ever, and none can be active at all."""
    model = load_adapters(base_of(), folders)
    for name, folder in folders.items():
        model.set_adapter(name)
        alone = PeftModel.from_pretrained(base_of(), str(folder)).eval()
        torch.testing.assert_close(run(model, batch), run(alone, batch), rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(run(model, batch), run(base_of().eval(), batch))


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_of_several_adapters(base_of, folders, batch_of, beams) -> None:
    batch = batch_of(rows=3)
    names = ["dora", "experts", "plain"]
    model = load_adapters(base_of(), folders)
    # Padding stands in front for generation.
    mask = batch["attention_mask"].flip(1)
    inputs = {"input_ids": batch["input_ids"].flip(1), "attention_mask": mask}
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    found = model.generate(**inputs, **options, adapter_names=names)
    for row, name in enumerate(names):
        alone = PeftModel.from_pretrained(base_of(), str(folders[name])).eval()
        part = {key: value[row : row + 1] for key, value in inputs.items()}
        expected = alone.generate(**part, **options)[0]
        assert found[row].tolist()[: len(expected)] == expected.tolist()


@pytest.mark.parametrize("victim", list(KINDS))
def test_nothing_leaks_from_a_poisoned_adapter(base_of, folders, batch_of, victim) -> None:
    """The logits of the other rows do not change by a bit."""
    batch = batch_of(rows=4, length=12)
    names = list(KINDS)
    model = load_adapters(base_of(), folders)
    sound = run(model, batch, adapter_names=names)
    with torch.no_grad():
        for parameter in parameters_of(model, victim).values():
            parameter.fill_(float("nan"))
    model.eval()
    broken = run(model, batch, adapter_names=names)
    hurt = names.index(victim)
    assert broken[hurt].isnan().any()
    others = [row for row in range(len(names)) if row != hurt]
    assert torch.equal(broken[others], sound[others])


def test_guests_are_saved_as_plain_lora(base_of, folders, batch, tmp_path) -> None:
    """Names, values and settings are those of PEFT's own files, which stock PEFT loads."""
    model = load_adapters(base_of(), folders)
    for name in ("plain", "dora"):
        save_adapter(model, tmp_path / "again" / name, name)
        written = load_file(tmp_path / "again" / name / "adapter_model.safetensors")
        expected = load_file(folders[name] / "adapter_model.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[key], value) for key, value in expected.items())
        before, after = (
            json.loads((folder / "adapter_config.json").read_text())
            for folder in (folders[name], tmp_path / "again" / name)
        )
        assert after["peft_type"] == "LORA"
        assert {**after, "target_modules": None} == {**before, "target_modules": None}
        assert sorted(after["target_modules"]) == sorted(before["target_modules"])


def test_order_of_adding_does_not_matter(base_of, folders, batch) -> None:
    """Experts around a block that carries LoRA already, or LoRA inside one that has experts."""
    names = ["plain", "experts"]
    results = [
        run(load_adapters(base_of(), {n: folders[n] for n in order}), batch, adapter_names=names)
        for order in (names, names[::-1])
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_unloading_gives_the_base_model_back(base_of, folders, batch) -> None:
    base = base_of().eval()
    expected, modules = run(base, batch), [type(m) for m in base.modules()]
    model = load_adapters(base, folders)
    again = model.unload()
    assert [type(m) for m in again.modules()] == modules
    torch.testing.assert_close(run(again, batch), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["plain", "other"], "adapter_names has other, the model has"),
        (["plain"] * 3, "3 names, but there are 2 sequences"),
    ],
)
def test_wrong_names_are_reported(base_of, folders, batch, names, message) -> None:
    model = load_adapters(base_of(), folders)
    with pytest.raises(ValueError, match=message):
        run(model, batch, adapter_names=names)
    # And the model can be used after it.
    assert run(model, batch, adapter_names=["plain", "experts"]).isfinite().all()


def test_names_are_for_evaluation(base_of, folders, batch) -> None:
    model = load_adapters(base_of(), folders).train()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        run(model, batch, adapter_names=["plain", "experts"])


def test_a_name_is_taken_once(base_of) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = add_guest(base_of(), "first", config)
    with pytest.raises(ValueError, match="already exists"):
        add_guest(model, "first", config)


def test_guests_do_not_join_a_model_of_stock_peft(base_of, config_of) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base_of(), config)
    with pytest.raises(ValueError, match="different peft types"):
        add_guest(model, "second", config_of())


def damage(folder: Path, what: str) -> None:
    if what == "cut off":
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:200])
    elif what == "no settings":
        (folder / "adapter_config.json").unlink()
    else:
        (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')


@pytest.mark.parametrize("what", ["cut off", "no settings", "another method"])
def test_damaged_folders_are_refused(base_of, folders, what: str) -> None:
    damage(folders["plain"], what)
    with pytest.raises(UserError, match=r"adapter=.*plain"):
        load_adapters(base_of(), folders)


def test_an_adapter_of_another_model_is_refused(base_of, kit, tmp_path) -> None:
    kit.adapter(tmp_path / "gemma", "lora", family="gemma")
    with pytest.raises(UserError, match=r"adapter=.*gemma"):
        load_adapters(base_of(), {"gemma": tmp_path / "gemma"})


UNSERVED = {
    "lora_bias": {"lora_bias": True},
    "target_modules": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("name", UNSERVED)
def test_what_rows_cannot_be_served_with_is_refused(base_of, kit, tmp_path, name) -> None:
    """By name, instead of computing something else for its rows or for the others'."""
    kit.adapter(tmp_path / "odd", "lora", **UNSERVED[name])
    with pytest.raises(UserError, match=f"adapter=.*odd(:| cannot be loaded:) {name}="):
        load_adapters(base_of(), {"odd": tmp_path / "odd"})


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_mixture_on_the_ends_of_the_model_is_refused(base_of, kit, tmp_path, target) -> None:
    """Scoring calls the projection outside of the pass that knows whose rows they are."""
    kit.adapter(tmp_path / "odd", target_modules=["up_proj", target])
    with pytest.raises(UserError, match=f"target_modules=.*{target}.* when several adapters"):
        load_adapters(base_of(), {"odd": tmp_path / "odd"})


@pytest.mark.parametrize("name", ["model", "layers", "q_proj", "0"])
def test_names_of_modules_are_refused(base_of, folders, name) -> None:
    with pytest.raises(UserError, match="is the name of a module: choose another one"):
        load_adapters(base_of(), {name: folders["plain"]})


def test_the_frozen_products_run_once(base_of, folders, batch_of, monkeypatch) -> None:
    """Each frozen matrix meets all rows in one product, whatever the number of adapters."""
    batch = batch_of(rows=4, length=12)
    model = load_adapters(base_of(), folders)
    frozen = {
        parameter.data_ptr(): name
        for name, parameter in model.named_parameters()
        if name.endswith("proj.base_layer.weight") or name.endswith("proj.weight")
    }
    assert len(frozen) == 2 * 7
    products: list[tuple[str, int]] = []
    real = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        if weight.data_ptr() in frozen:
            products.append((frozen[weight.data_ptr()], x.numel() // x.shape[-1]))
        return real(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    run(model, batch, adapter_names=list(KINDS))
    rows = batch["input_ids"].numel()
    assert sorted(name for name, _ in products) == sorted(frozen.values())
    for name, count in products:
        # A MixDoRA has K rows for each of its tokens in the down projection.
        extra = rows // 4 if "down_proj" in name else 0
        assert count == rows + extra, name
