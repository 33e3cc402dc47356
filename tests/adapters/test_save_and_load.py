"""Adapters from configuration to disk and back, and what a user hears when that fails."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import peft.peft_model
import pytest
import torch
from composed import compose
from safetensors import SafetensorError

from mixlora_exp.adapters import MixLoraFeedForward, attach_adapter, load_adapter, save_adapter
from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE = "base_model.json"
METHODS = PAPER_METHODS


def attach(method: str, seed: int = 0, *overrides: str):
    config = compose(["model=tiny", f"method={method}", "method.rank=2", *overrides])
    base = load_model(config.model, torch.float32, seed=1)
    return attach_adapter(base, config.method, config.kernel, seed), config


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.fixture
def saved(tmp_path: Path, draw) -> Path:
    model, _ = attach("mixlora")
    draw(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def kernel():
    return compose(["model=tiny", "kernel=exact"]).kernel


@pytest.mark.parametrize("method", METHODS)
def test_round_trip_of_each_method(method, batch, draw, tmp_path: Path) -> None:
    model, config = attach(method)
    draw(model)
    save_adapter(model, tmp_path / "run" / "adapter")
    expected = logits(model.eval(), batch)
    names = {path.name for path in (tmp_path / "run" / "adapter").iterdir()}
    assert names - {"README.md"} == {WEIGHTS, CONFIG, BASE}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["adapter"]
    base = load_model(config.model, torch.float32, seed=1)
    loaded = load_adapter(base, tmp_path / "run" / "adapter", config.kernel)
    assert not loaded.training
    assert torch.equal(logits(loaded, batch), expected)


@pytest.mark.parametrize("method", METHODS)
def test_method_reaches_peft(method) -> None:
    model, config = attach(method, 0, "method.dropout=0.125", "method.alpha=6")
    built = model.peft_config["default"]
    assert (built.r, built.lora_alpha, built.lora_dropout) == (2, 6, 0.125)
    assert built.use_dora == ("dora" in method)
    assert built.peft_type.value == ("MIXLORA" if method.startswith("mix") else "LORA")
    blocks = [m for m in model.modules() if isinstance(m, MixLoraFeedForward)]
    assert len(blocks) == (2 if method.startswith("mix") else 0)
    for block in blocks:
        assert block.kernel == config.kernel.name.value
        assert block.lora_router["default"].shape == (config.method.num_experts, 64)


def test_adapter_is_drawn_from_its_seed_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, second, other = (attach("mixlora", seed)[0].state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [name for name in first if "lora_A" in name or "router" in name]
    assert drawn
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def cut_weights(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def empty_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def other_rank(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "r": 3}))


def more_targets(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "use_dora": True}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(cut_weights, "truncated or damaged", id="copied half"),
        pytest.param(empty_weights, "truncated or damaged", id="empty file"),
        pytest.param(lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS}", id="no weights"),
        pytest.param(lambda f: (f / CONFIG).unlink(), f"has no {CONFIG}", id="no configuration"),
        pytest.param(
            lambda f: (f / CONFIG).write_text('{"peft_type": "MIX'), "damaged", id="half of a JSON"
        ),
        pytest.param(lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "damaged", id="not text"),
        pytest.param(lambda f: (f / CONFIG).write_text("[]"), "damaged", id="a JSON list"),
        pytest.param(
            lambda f: (f / CONFIG).write_text("{}"), "peft_type", id="JSON of something else"
        ),
        pytest.param(
            lambda f: (f / CONFIG).write_text('{"peft_type": "NEWER"}'), "NEWER", id="unknown type"
        ),
        pytest.param(other_rank, "does not fit its own", id="tensors of another rank"),
        pytest.param(more_targets, "lacks 14 tensors", id="tensors missing, PEFT only warns"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # PEFT's own, about what it finds
def test_damaged_adapter_is_reported_by_its_folder(saved, base_of, kernel, damage, message) -> None:
    damage(saved)
    with pytest.raises(UserError, match=message) as error:
        load_adapter(base_of(), saved, kernel)
    assert f"adapter={saved}" in str(error.value)
    # It is the file that is broken, not the choice of the model.
    assert "model=NAME" not in str(error.value)


def test_missing_folder_is_reported(base_of, kernel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere has no adapter_config.json"):
        load_adapter(base_of(), tmp_path / "nowhere", kernel)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["model=tiny", "model.config.hidden_size=32"], id="other width"),
        pytest.param(["model=tiny", "model.config.intermediate_size=128"], id="other inner width"),
        pytest.param(["model=tiny", "model.config.num_hidden_layers=1"], id="fewer layers"),
        pytest.param(["model=tiny", "model.config.num_hidden_layers=3"], id="more layers"),
        pytest.param(["model=tiny_gemma"], id="another family"),
    ],
)
def test_adapter_of_another_base_model_is_reported(saved, kernel, overrides) -> None:
    base = load_model(compose(overrides).model, torch.float32)
    with pytest.raises(
        UserError, match="was trained on tiny .*: (their weights|give that)"
    ) as error:
        load_adapter(base, saved, kernel)
    assert f"adapter={saved}" in str(error.value)
    # Without a note on its base its shapes tell.
    (saved / BASE).unlink()
    with pytest.raises(UserError, match="does not fit this base model: .*, model=NAME") as error:
        load_adapter(base, saved, kernel)
    assert f"adapter={saved}" in str(error.value)


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(OSError(errno.ENOSPC, "No space left on device"), id="raised by the system"),
        pytest.param(SafetensorError("I/O error: No space left on device"), id="by safetensors"),
    ],
)
@pytest.mark.parametrize("older", [False, True], ids=["nothing there", "an older one there"])
def test_full_disk_leaves_nothing_half_written(
    saved, draw, batch, monkeypatch, tmp_path: Path, failure, older
) -> None:
    model, _ = attach("mixlora", 3)

    def fail(tensors, path, **kwargs) -> None:
        Path(path).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(peft.peft_model, "safe_save_file", fail)
    folder = saved if older else tmp_path / "new"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="No space left") as error:
        save_adapter(model, folder)
    assert str(folder) in str(error.value)
    assert "output_dir" in str(error.value)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_saving_again_replaces_all_of_the_older_adapter(saved) -> None:
    (saved / "left_over.bin").write_bytes(b"old")
    old = (saved / WEIGHTS).read_bytes()
    save_adapter(attach("mixlora", 3)[0], saved)
    assert not (saved / "left_over.bin").exists()
    assert (saved / WEIGHTS).read_bytes() != old
