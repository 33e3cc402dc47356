"""What adapters do not fit is found on the meta device, and told before a run and in a plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from mixlora_exp.cli.train import execute
from mixlora_exp.config.schema import ModelConfig, ModelSource
from mixlora_exp.errors import UserError
from mixlora_exp.models import architecture_of, build_hf_config
from mixlora_exp.models.skeleton import projections, skeleton

SMALL = {"num_hidden_layers": 2}
REFUSED = {
    "phi3": "it has qkv_proj and gate_up_proj, several projections in one matrix",
    "gpt2": "it has c_attn, several projections in one matrix",
    "starcoder2": "2 layers have 0 gate_proj, 0 up_proj, 0 down_proj as nn.Linear, and also c_fc",
    "falcon_h1": "2 layers have 0 feed-forward blocks named mlp",
    "seed_oss": "its mlp(x) is dropout(down_proj(mul(act_fn(gate_proj(x)), up_proj(x)))",
    "mixtral": "it is already a mixture of experts",
    "qwen3_moe": "it is already a mixture of experts",
    "gemma3": "model_type=gemma3 is not a text-only causal language model",
    "t5": "model_type=t5 is not a text-only causal language model",
}


def model_of(kind: str, **fields: object) -> ModelConfig:
    return ModelConfig(
        name="mine", source=ModelSource.random, config={"model_type": kind, **fields}
    )


@pytest.mark.parametrize("kind", REFUSED)
def test_other_architectures_are_refused_by_what_they_lack(kind: str) -> None:
    found = CONFIG_MAPPING[kind]()
    if kind not in ("gemma3", "t5"):
        found = CONFIG_MAPPING[kind](**SMALL)
    with pytest.raises(UserError) as caught:
        skeleton(found, "model=mine")
    assert str(caught.value).startswith("model=mine: ")
    assert REFUSED[kind] in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            "{model_type: phi3, hidden_size: 64, num_hidden_layers: 1}",
            "phi3 is not supported: it has qkv_proj and gate_up_proj",
        ),
        ("{model_type: mistrl}", "model_type=mistrl is unknown to transformers"),
        ("{num_hidden_layer: 2}", "correct it, or remove it; did you mean num_hidden_layers"),
        ("{num_hidden_layers: two}", "expected int, got str (value: 'two')"),
        ("{num_key_value_heads: 3}", "does not divide num_attention_heads=4"),
        ("{hidden_act: siluu}", "no model can be built from its configuration"),
        ("{_attn_implementation: owner/kernels}", "is not a field of LlamaConfig"),
        ("{quantization_config: {bits: 4}}", "is not a field of LlamaConfig"),
    ],
)
@pytest.mark.parametrize("dry_run", ["dry_run=true", "dry_run=false"])
def test_nothing_begins(
    config: str, words: str, dry_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["experiment=smoke", f"model.config={config}", f"output_dir={tmp_path / 'out'}"]
    assert execute([*given, dry_run]) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert not shown.out
    assert "Run" not in shown.err
    assert "Traceback" not in shown.err
    assert not (tmp_path / "out").exists()


def test_a_skeleton_has_no_weights_and_is_made_once() -> None:
    found = build_hf_config(model_of("gemma2", num_hidden_layers=3))
    model = skeleton(found, "here")
    assert {p.device for p in model.parameters()} == {torch.device("meta")}
    assert model is skeleton(build_hf_config(model_of("gemma2", num_hidden_layers=3)), "here")
    # Seven in each of three layers; a tied head is the embedding.
    assert len(list(projections(model))) == 21
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_formula_of_a_block_is_read_and_not_its_names(monkeypatch) -> None:
    """A block with the same parts that computes something else is not taken."""
    from transformers.models.llama import modeling_llama

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    found = build_hf_config(model_of("llama", num_hidden_layers=1, hidden_size=64))
    with pytest.raises(UserError, match=r"its mlp\(x\) is down_proj\(mul\(act_fn\(up_proj\(x\)\)"):
        skeleton(found, "elsewhere")


def test_older_forms_of_a_config_json_are_understood() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    fields = {"rope_theta": 5e5, "rope_scaling": rope, "torch_dtype": "bfloat16"}
    fields |= {"cache_implementation": "hybrid", "use_cache": True}
    who = {"architectures": ["LlamaForCausalLM"], "transformers_version": "4.40.0"}
    found = architecture_of(model_of("llama", **fields, **who))
    assert found.rope_parameters["rope_theta"] == 5e5
    assert found.rope_parameters["rope_type"] == "llama3"
