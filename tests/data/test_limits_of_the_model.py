"""Labels that a model cannot tell apart, and items with more tokens than it has positions."""

from __future__ import annotations

import dataclasses

import pytest
from composed import compose
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mixlora_exp.config.schema import (
    AnswerForm,
    ArcLabels,
    DataConfig,
    DataSource,
    EvaluationConfig,
    Protocol,
)
from mixlora_exp.data.encoding import encode_examples, encode_questions
from mixlora_exp.data.loaded import LoadedSplit
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation import encode_tests
from mixlora_exp.models import load_tokenizer
from mixlora_exp.tasks import Item

QUIZ = Item("arc_e", "q7", "Which?", ("ice", "wool", "rain"), 1, ("A", "B", "C"))
PASSAGE = Item(
    "boolq", "b3", "is it", ("true", "false"), 1, ("true", "false"), "one two three " * 60
)
LETTERS = [Protocol.label_logits, Protocol.generate]


def words(*known: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that spells letters small, so that "A" and "a" are one."""
    names = ["<unk>", "</s>", *dict.fromkeys(known)]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


def alike() -> PreTrainedTokenizerFast:
    """One for which B and C are the same token."""
    from tokenizers import normalizers

    tokenizer = words("A", "B", "no", "yes")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("C", "B")
    return tokenizer


def data(**changes: object) -> DataConfig:
    return DataConfig(name=DataSource.embedded, **changes)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """Of a model with 100 positions."""
    few = "model.config.max_position_embeddings=100"
    return load_tokenizer(compose(["model=tiny", few]).model)


@pytest.mark.parametrize("protocol", LETTERS)
def test_labels_of_one_token_are_refused_by_name(protocol: Protocol) -> None:
    tests = {"arc_e": LoadedSplit([QUIZ], [])}
    with pytest.raises(UserError, match="gives 'B' and 'C', labels of q7, the same token"):
        encode_tests(protocol, alike(), tests, data(), EvaluationConfig())
    with pytest.raises(UserError, match=r"not know the label 'C' of q7 \(it gives <unk>\)"):
        encode_tests(protocol, words("A", "B"), tests, data(), EvaluationConfig())


def test_labels_of_training_are_looked_at_too() -> None:
    with pytest.raises(UserError, match="'B' and 'C', labels of q7"):
        encode_examples(alike(), [QUIZ], data())
    encode_examples(alike(), [QUIZ], data(forms=[AnswerForm.text]))


def test_labels_that_other_items_have_are_looked_at_too() -> None:
    """With the nine labels of the official packages every item may be answered by each."""
    tests = {"arc_e": LoadedSplit([QUIZ], [])}
    known = words("A", "B", "C", "D")
    encode_tests(Protocol.label_logits, known, tests, data(), EvaluationConfig())
    nine = EvaluationConfig(arc_labels=ArcLabels.nine)
    with pytest.raises(UserError, match="does not know the label '1' of q7"):
        encode_tests(Protocol.label_logits, known, tests, data(), nine)


def test_the_words_of_lm_eval_are_looked_at_too() -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    row = {"passage": "p", "question": "q", "answer": False}
    tests = {"boolq": LoadedSplit([PASSAGE], [], [row])}
    encode_tests(Protocol.lm_eval, alike(), tests, data(), EvaluationConfig())
    with pytest.raises(UserError, match="does not know the label 'no' of every item of boolq"):
        encode_tests(Protocol.lm_eval, words("yes"), tests, data(), EvaluationConfig())


def test_training_examples_beyond_the_positions_are_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(UserError, match=r"b3 of boolq needs \d+ tokens.*100 positions") as caught:
        encode_examples(tokenizer, [PASSAGE], data())
    assert "set data.cutoff_length=100 or less" in str(caught.value)
    (example,) = encode_examples(tokenizer, [PASSAGE], data(cutoff_length=100))
    assert 90 < len(example.input_ids) <= 100


@pytest.mark.parametrize("form", list(AnswerForm))
def test_questions_beyond_the_positions_are_refused(
    form: AnswerForm, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match=r"b3 of boolq needs .*data\.cutoff_length=100 or less"):
        encode_questions(tokenizer, [PASSAGE], form, data())
    (question,) = encode_questions(tokenizer, [PASSAGE], form, data(cutoff_length=100))
    assert question.shortened


def test_generation_needs_positions_for_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    tests = {"boolq": LoadedSplit([PASSAGE], [])}
    evaluation = EvaluationConfig(max_new_tokens=16)
    with pytest.raises(UserError, match=r"set data\.cutoff_length=84 or less"):
        encode_tests(Protocol.generate, tokenizer, tests, data(cutoff_length=100), evaluation)
    encode_tests(Protocol.generate, tokenizer, tests, data(cutoff_length=84), evaluation)


def test_what_may_not_be_cut_is_distinguished(tokenizer: PreTrainedTokenizerBase) -> None:
    long = dataclasses.replace(QUIZ, question="one two three " * 60)
    for items in ([long], [dataclasses.replace(PASSAGE, question="one two three " * 60)]):
        with pytest.raises(UserError, match="it has no context to truncate"):
            encode_questions(tokenizer, items, AnswerForm.label, data(cutoff_length=90))


def test_just_the_positions_fit(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = encode_examples(tokenizer, [QUIZ], data())
    tokenizer.model_max_length = len(example.input_ids)
    assert encode_examples(tokenizer, [QUIZ], data()) == [example]
    tokenizer.model_max_length -= 1
    with pytest.raises(UserError, match="it has no context to truncate"):
        encode_examples(tokenizer, [QUIZ], data())
