"""Special tokens around a text: what the tokenizer's configuration says, and nothing after it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from composed import compose
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mixlora_exp.config.schema import AnswerForm, DataConfig, DataSource, ModelConfig
from mixlora_exp.data.encoding import encode_examples, encode_questions
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.models.special_tokens import (
    settle_special_tokens,
    special_tokens_entry,
    special_tokens_line,
)
from mixlora_exp.models.tiny import build_tokenizer
from mixlora_exp.tasks import Item

Tiny = Callable[..., ModelConfig]

BOS, EOS = ("<s>", 1), ("</s>", 2)
BYTES = processors.ByteLevel(trim_offsets=False)


def template(single: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, special_tokens=[BOS, EOS])


TEMPLATES = {
    "nothing": BYTES,
    "bos": template("<s> $A"),
    "eos": template("$A </s>"),
    "both": template("<s> $A </s>"),
    "bos in a sequence": processors.Sequence([BYTES, template("<s> $A")]),
    "both in a sequence": processors.Sequence([BYTES, template("<s> $A </s>")]),
    "as roberta": processors.RobertaProcessing(EOS, BOS),
    "as bert": processors.BertProcessing(EOS, BOS),
}
BY_TEMPLATE = {name: name not in ("nothing", "eos") for name in TEMPLATES}


def built(name: str) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TEMPLATES[name]
    return tokenizer


def ids(tokenizer: PreTrainedTokenizerBase, text: str = "The cat sat") -> list[int]:
    return tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("add_eos", [None, True, False])
def test_flags_win_over_the_template_and_nothing_follows_a_text(
    name: str, add_bos: bool | None, add_eos: bool | None
) -> None:
    tokenizer = built(name)
    bare = tokenizer("The cat sat", add_special_tokens=False)["input_ids"]
    settle_special_tokens(tokenizer, {"add_bos_token": add_bos, "add_eos_token": add_eos}, "it")
    begins = BY_TEMPLATE[name] if add_bos is None else add_bos
    assert ids(tokenizer) == [*([1] if begins else []), *bare]
    assert tokenizer("The cat sat", add_special_tokens=False)["input_ids"] == bare
    assert special_tokens_entry(tokenizer) == {
        "before_text": ["<s>"] if begins else [],
        "after_prompt": [],
        "after_answer": "</s>",
    }
    assert special_tokens_line(tokenizer) == (
        f"Special tokens: {'<s>' if begins else 'none'} before a text, </s> after an answer"
    )
    # Places in the text, by which contexts are cut, are those of before.
    before = build_tokenizer()("The cat sat", return_offsets_mapping=True)["offset_mapping"]
    after = tokenizer("The cat sat", return_offsets_mapping=True)["offset_mapping"]
    if "roberta" not in name:  # Its places leave the blanks out.
        assert after == [*([(0, 0)] if begins else []), *before]
    # Settled once or twice is the same.
    settled = tokenizer.backend_tokenizer.to_str()
    settle_special_tokens(tokenizer, {"add_bos_token": add_bos, "add_eos_token": add_eos}, "it")
    assert tokenizer.backend_tokenizer.to_str() == settled


@pytest.mark.parametrize("name", ["nothing", "bos", "bos in a sequence"])
def test_a_tokenizer_that_is_right_already_is_not_touched(name: str) -> None:
    tokenizer = built(name)
    before = tokenizer.backend_tokenizer.to_str()
    settle_special_tokens(tokenizer, {"add_bos_token": BY_TEMPLATE[name]}, "it")
    assert tokenizer.backend_tokenizer.to_str() == before


def test_a_tokenizer_that_knows_few_words_is_settled_too() -> None:
    words = Tokenizer(token_models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "cat": 3}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = template("<s> $A </s>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    settle_special_tokens(tokenizer, {}, "it")
    assert ids(tokenizer, "cat") == [1, 3]


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        ({"add_bos_token": "yes"}, "add_bos_token='yes' in tokenizer_config.json: write true or"),
        ({"add_eos_token": 1}, "add_eos_token=1 in tokenizer_config.json"),
    ],
)
def test_a_flag_that_is_no_boolean_is_refused(stated: dict, reason: str) -> None:
    with pytest.raises(UserError, match=f"^the tokenizer of x has {reason}"):
        settle_special_tokens(built("bos"), stated, "the tokenizer of x")


def test_bos_that_does_not_exist_is_refused() -> None:
    tokenizer = built("nothing")
    tokenizer.bos_token = None
    settle_special_tokens(tokenizer, {"add_bos_token": False}, "it")
    with pytest.raises(UserError, match="add_bos_token=true but no bos_token"):
        settle_special_tokens(tokenizer, {"add_bos_token": True}, "it")


def saved(folder: Path, tiny: Tiny, name: str, **stated: bool) -> ModelConfig:
    """A model folder whose tokenizer has one of the templates, and flags in its configuration."""
    load_model(tiny(), torch.float32).save_pretrained(folder)
    built(name).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **stated}))
    return tiny(path=str(folder))


@pytest.mark.parametrize(
    ("name", "stated", "begins"),
    [
        # transformers 5 reads no flag beside a tokenizer.json.
        ("nothing", {"add_bos_token": True}, True),
        ("bos", {"add_bos_token": False}, False),
        ("both", {}, True),
        ("both", {"add_bos_token": True, "add_eos_token": True}, True),
        # As the families have it: LLaMA-2 and Gemma, LLaMA-3, Qwen.
        ("bos", {"add_bos_token": True, "add_eos_token": False}, True),
        ("bos in a sequence", {}, True),
        ("nothing", {"add_bos_token": False}, False),
    ],
)
def test_training_and_scoring_of_a_folder_see_the_same_tokens(
    name: str, stated: dict[str, bool], begins: bool, tiny: Tiny, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(saved(tmp_path / "model", tiny, name, **stated))
    item = Item("boolq", "b1", "is it", ("true", "false"), 1, ("true", "false"), "A text.")
    data = DataConfig(name=DataSource.embedded)
    (example,) = encode_examples(tokenizer, [item], data)
    (question,) = encode_questions(tokenizer, [item], AnswerForm.label, data)
    assert example.input_ids == [*question.prompt, *question.answers[1], 2]
    assert example.input_ids.count(2) == 1
    assert (example.input_ids[0] == 1) == begins
    assert example.input_ids.count(1) == begins
    # What a merged checkpoint is written with says the same to whoever reads it.
    tokenizer.save_pretrained(tmp_path / "again")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")
    assert ids(again) == ids(tokenizer)


SENTENCE = "Question: Which of these melts in the sun?\nA. ice\nB. 12 stones\nAnswer: A"

TINY_IDS = [
    415, 28, 473, 437, 321, 494, 301, 71, 78, 86, 85, 497, 277, 387, 33, 201, 35, 16, 498, 201, 36,
    16, 223, 19, 20, 340, 286, 303, 201, 35, 312, 315, 28, 265,
]  # fmt: skip
SMOLLM2_IDS = [
    17872, 42, 10366, 282, 623, 34294, 281, 260, 2388, 47, 198, 49, 30, 3908, 198, 50, 30, 216, 33,
    34, 8989, 198, 21350, 42, 330,
]  # fmt: skip


def test_ids_of_the_built_in_tokenizer_stay() -> None:
    tokenizer = load_tokenizer(compose(["model=tiny"]).model)
    assert tokenizer.backend_tokenizer.to_str() == build_tokenizer().backend_tokenizer.to_str()
    assert ids(tokenizer, SENTENCE) == TINY_IDS


@pytest.mark.slow
def test_ids_of_smollm2_stay() -> None:
    """No number that was recorded with it may move."""
    tokenizer = load_tokenizer(compose(["model=smollm2_135m"]).model)
    assert ids(tokenizer, SENTENCE) == SMOLLM2_IDS
    assert special_tokens_entry(tokenizer)["before_text"] == []
