from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from composed import compose
from transformers import PreTrainedModel

from mixlora_exp.config.schema import ModelConfig
from mixlora_exp.data.encoding import Example
from mixlora_exp.errors import UserError
from mixlora_exp.models import build_hf_config, load_model, load_tokenizer
from mixlora_exp.models.tiny import LABEL_TOKENS, TOKENIZER_SIZE, build_tokenizer
from mixlora_exp.training.job import make_job

Tiny = Callable[..., ModelConfig]
Same = Callable[[PreTrainedModel, PreTrainedModel], bool]


FAMILY = pytest.mark.parametrize("family", ["llama", "gemma"])


def test_hf_config_carries_every_field(tiny: Tiny) -> None:
    given = {"rope_theta": 5e5, "rms_norm_eps": 3e-6, "max_position_embeddings": 77}
    config = tiny(**given, num_hidden_layers=1)
    built = build_hf_config(config)
    assert built.rope_parameters["rope_theta"] == 5e5
    assert built.rms_norm_eps == 3e-6
    assert built.max_position_embeddings == 77
    assert built.num_hidden_layers == 1
    assert built.hidden_act == "silu"
    assert build_hf_config(tiny("gemma")).hidden_act == "gelu_pytorch_tanh"
    model = load_model(config, torch.float32)
    # The base of the rotary embedding reaches the model, not the config alone.
    assert model.model.rotary_emb.inv_freq[1].item() == pytest.approx(5e5 ** (-2 / 16))


@FAMILY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_model_has_shape_and_dtype(tiny: Tiny, family: str, dtype: torch.dtype) -> None:
    config = tiny(family)
    model = load_model(config, dtype)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert not model.training
    shape = model.config
    assert len(model.model.layers) == 2
    layer = model.model.layers[0]
    attention, feed_forward = layer.self_attn, layer.mlp
    assert attention.q_proj.weight.shape == (4 * shape.head_dim, 64)
    assert attention.k_proj.weight.shape == (shape.num_key_value_heads * shape.head_dim, 64)
    assert feed_forward.gate_proj.weight.shape == (shape.intermediate_size, 64)
    assert model.get_input_embeddings().weight.shape == (1024, 64)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied is shape.tie_word_embeddings
    # Drawn, all of it: neither left empty nor torch's own initialisation.
    assert feed_forward.down_proj.weight.float().std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


@FAMILY
def test_seed_decides_the_weights(tiny: Tiny, same: Same, family: str) -> None:
    first = load_model(tiny(family), torch.float32, seed=1)
    torch.rand(3)
    assert same(first, load_model(tiny(family), torch.float32, seed=1))
    assert not same(first, load_model(tiny(family), torch.float32, seed=2))


def test_global_random_state_is_untouched(tiny: Tiny) -> None:
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    load_model(tiny(), torch.float32, seed=5)
    load_tokenizer(tiny())
    assert torch.equal(torch.rand(4), expected)
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_model_on_a_gpu(tiny: Tiny, same: Same) -> None:
    torch.cuda.manual_seed(7)
    before = torch.cuda.get_rng_state()
    first, second = (load_model(tiny(), torch.float32, 5, torch.device("cuda")) for _ in "12")
    assert first.device.type == "cuda"
    assert same(first, second)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_tiny_tokenizer_is_fixed_and_knows_the_labels(tiny: Tiny) -> None:
    tokenizer = load_tokenizer(tiny())
    assert tokenizer.backend_tokenizer.to_str() == build_tokenizer().backend_tokenizer.to_str()
    assert len(tokenizer) == TOKENIZER_SIZE
    for label in LABEL_TOKENS:
        assert len(tokenizer(f"Answer:{label}").input_ids) == 1 + len(
            tokenizer("Answer:").input_ids
        )
        assert len(tokenizer(label).input_ids) == 1
    built = build_hf_config(tiny())
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(tokenizer, name) == getattr(built, name)
    text = "  Größe: 日本 \n\t<x> 1234 emoji 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    batch = tokenizer(["A", "A longer text"], padding=True)
    assert batch.input_ids[0][-1] == tokenizer.pad_token_id
    assert batch.attention_mask[0][-1] == 0


def test_tokenizer_must_fit_the_vocabulary(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"512 tokens, but .* 100 rows.*config={vocab_size: N}"):
        load_tokenizer(tiny(vocab_size=100))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_the_loss_stands_where_the_tokenizer_says(
    side: str, tiny: Tiny, tmp_path: Path
) -> None:
    """As in the official packages: the side is the folder's, on the way of a run."""
    load_model(tiny(), torch.float32).save_pretrained(tmp_path / "model")
    tokenizer = build_tokenizer()
    tokenizer.padding_side = side
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["model=tiny", f"model.path={tmp_path / 'model'}", "preset=official", "data=embedded"]
    config = compose([*words, "task=arc_e"])
    examples = [Example(list(range(5, 5 + n)), 1, "arc_e", False) for n in (4, 6)]
    job = make_job(
        name="one", config=config, examples=examples, folder=tmp_path / "run",
        tokenizer=load_tokenizer(config.model),
    )  # fmt: skip
    ids = job.collate(examples)["input_ids"][0]
    padding = ids[:2] if side == "left" else ids[-2:]
    assert padding.tolist() == [tokenizer.pad_token_id] * 2
