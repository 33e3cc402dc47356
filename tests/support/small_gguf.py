"""A package that ships the weights of a tiny model as a GGUF file, its tokenizer inside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

from mixlora_exp.models.tiny import build_tokenizer

MODULE, FILE = "tiny_weights", "tiny.gguf"
POSITIONS = 128
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD, VOCABULARY = 64, 176, 2, 4, 2, 16, 1024
"""The shape of the tiny LLaMA in tests/models/conftest.py."""


def write_package(site: Path, *, tokenizer: bool = True) -> Path:
    """Write the package into `site`, as pip would, and return its GGUF file; importing it fails."""
    folder = site / MODULE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('never imported')\n")
    writer = GGUFWriter(folder / FILE, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(VOCABULARY)
    if tokenizer:
        _add_tokenizer(writer)
    draw = np.random.default_rng(0)
    for name, shape in _shapes().items():
        values = np.ones(shape) if "norm" in name else 0.05 * draw.standard_normal(shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / FILE


def _add_tokenizer(writer: GGUFWriter) -> None:
    """The built-in tokenizer; the ids above its size stand for nothing."""
    core = json.loads(build_tokenizer().backend_tokenizer.to_str())
    tokens = sorted(core["model"]["vocab"], key=core["model"]["vocab"].get)
    special = {entry["content"] for entry in core["added_tokens"] if entry["special"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [TokenType.CONTROL if t in special else TokenType.NORMAL for t in tokens]
    )
    writer.add_token_merges([" ".join(pair) for pair in core["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)


def _shapes() -> dict[str, tuple[int, ...]]:
    block = {
        "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
        "attn_q": (HEADS * HEAD, HIDDEN), "attn_k": (KV_HEADS * HEAD, HIDDEN),
        "attn_v": (KV_HEADS * HEAD, HIDDEN), "attn_output": (HIDDEN, HEADS * HEAD),
        "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
    }  # fmt: skip
    layers = {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}
    wide = (VOCABULARY, HIDDEN)
    return {"token_embd": wide, "output": wide, "output_norm": (HIDDEN,), **layers}
