"""From items to tokens: what is cut, what never is, and where the answer begins."""

from __future__ import annotations

import dataclasses

import pytest
from composed import compose
from tokenizers import Tokenizer, models, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mixlora_exp.config.schema import AnswerForm, DataConfig, DataSource
from mixlora_exp.data.encoding import encode_examples, encode_questions
from mixlora_exp.data.sources import load_split
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_tokenizer
from mixlora_exp.tasks import TASKS, Item

WORDS = "the old lamp in the hall was lit again by a woman who came back from the sea "


def boolq(passage: str, **changes: object) -> Item:
    item = Item(
        task="boolq",
        id="boolq-9",
        question="was the lamp lit again",
        options=("true", "false"),
        answer=1,
        labels=("true", "false"),
        context=passage,
    )
    return dataclasses.replace(item, **changes)


def data(**changes: object) -> DataConfig:
    return DataConfig(name=DataSource.embedded, **changes)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(compose(["model=tiny"]).model)


def split(tokenizer: PreTrainedTokenizerBase, example) -> tuple[str, str]:
    ids, length = example.input_ids, example.answer_length
    assert ids[0] != tokenizer.eos_token_id
    return tokenizer.decode(ids[:-length]), tokenizer.decode(ids[-length:])


@pytest.mark.parametrize("cutoff", [100, 101, 128, 200, 512])
@pytest.mark.parametrize("form", list(AnswerForm))
def test_a_long_passage_is_all_that_is_cut(
    cutoff: int, form: AnswerForm, tokenizer: PreTrainedTokenizerBase
) -> None:
    item = boolq(WORDS * 40)
    config = data(cutoff_length=cutoff, forms=[form])
    (example,) = encode_examples(tokenizer, [item], config)
    assert cutoff - 8 < len(example.input_ids) <= cutoff
    prompt, answer = split(tokenizer, example)
    assert answer == " false</s>"
    before, after = prompt.split("\nQuestion: ")
    assert after == (
        "was the lamp lit again?\nSay true if the answer is yes, false if it is no.\nAnswer:"
    )
    assert item.context.startswith(before.removeprefix("Passage: "))
    assert len(before) > len("Passage: "), "no more is cut than must be"
    (question,) = encode_questions(tokenizer, [item], form, config)
    assert question.shortened
    assert question.prompt == example.input_ids[: -example.answer_length]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("form", list(AnswerForm))
def test_every_task_keeps_question_options_and_answer(
    name: str, form: AnswerForm, tokenizer: PreTrainedTokenizerBase
) -> None:
    embedded = data(seed=0)
    items = [
        dataclasses.replace(item, context=WORDS * 60) if item.context else item
        for item in load_split(embedded, name, "train").items[:20]
    ]
    config = data(cutoff_length=256, forms=[form])
    for item, example in zip(items, encode_examples(tokenizer, items, config), strict=True):
        assert len(example.input_ids) <= 256
        prompt, answer = split(tokenizer, example)
        # Winogrande's options fill the gap in the sentence, its answer the rest of it.
        if name != "winogrande":
            assert item.question.rstrip("?") in prompt
        if form is AnswerForm.label:
            assert answer == f" {item.labels[item.answer]}</s>"
            for option in item.options if name != "boolq" else ():
                assert option in prompt
        else:
            assert answer == f" {item.options[item.answer]}</s>"
        assert example.task == name


@pytest.mark.parametrize("length", range(40, 60))
def test_characters_of_several_tokens_are_cut_whole(
    length: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Each of these takes three or four tokens with one and the same place in the text."""
    config = data(cutoff_length=length + 80)
    (example,) = encode_examples(tokenizer, [boolq("日本語🙂" * 30)], config)
    assert len(example.input_ids) <= length + 80
    prompt, _ = split(tokenizer, example)
    passage = prompt.removeprefix("Passage: ").split("\n")[0]
    assert passage
    assert ("日本語🙂" * 30).startswith(passage)


def test_too_long_without_context_keeps_what_it_needs(tokenizer: PreTrainedTokenizerBase) -> None:
    """Question, options and answer are never cut: such an example stays longer than the cutoff."""
    item, config = boolq(WORDS * 9, question=WORDS * 3), data(cutoff_length=64)
    (example,) = encode_examples(tokenizer, [item], config)
    prompt, answer = split(tokenizer, example)
    assert prompt.startswith(f"Passage: \nQuestion: {WORDS * 3}?\nSay true")
    assert prompt.endswith("\nAnswer:")
    assert answer == " false</s>"
    assert example.shortened
    assert len(example.input_ids) > 64
    bare = dataclasses.replace(item, context="")
    (whole,) = encode_examples(tokenizer, [bare], config)
    assert not whole.shortened, "there was nothing to cut"
    assert tokenizer.decode(whole.input_ids).startswith(f"Question: {WORDS * 3}?")


def test_shortened_says_whether_context_was_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    items = [boolq(WORDS), boolq(WORDS * 40)]
    config = data(cutoff_length=200)
    assert [e.shortened for e in encode_examples(tokenizer, items, config)] == [False, True]
    questions = encode_questions(tokenizer, items, AnswerForm.label, config)
    assert [e.shortened for e in questions] == [False, True]


def test_an_example_of_just_the_cutoff_is_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = encode_examples(tokenizer, [boolq(WORDS)], data())
    length = len(example.input_ids)
    assert encode_examples(tokenizer, [boolq(WORDS)], data(cutoff_length=length)) == [example]
    (cut,) = encode_examples(tokenizer, [boolq(WORDS)], data(cutoff_length=length - 1))
    assert cut.shortened
    assert len(cut.input_ids) < length


def test_answer_begins_after_the_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    items = load_split(data(), "obqa", "train").items[:10]
    for form in AnswerForm:
        examples = encode_examples(tokenizer, items, data(forms=[form]))
        questions = encode_questions(tokenizer, items, form, data())
        for item, example, question in zip(items, examples, questions, strict=True):
            answer = question.answers[item.answer]
            assert example.input_ids == [*question.prompt, *answer, tokenizer.eos_token_id]
            assert example.answer_length == len(answer) + 1
            assert tokenizer.decode(question.prompt).endswith("Answer:")
            assert len(question.answers) == len(item.options)


def check_labels(tokenizer: PreTrainedTokenizerBase) -> None:
    """One token per label, and never the same for two labels of an item."""
    for name in TASKS:
        items = load_split(data(), name, "test").items[:8]
        for encoded in encode_questions(tokenizer, items, AnswerForm.label, data()):
            assert {len(ids) for ids in encoded.answers} == {1}
            assert len({ids[0] for ids in encoded.answers}) == len(encoded.answers)


@pytest.mark.parametrize("model", ["tiny", "tiny_gemma"])
def test_labels_are_single_tokens(model: str) -> None:
    check_labels(load_tokenizer(compose([f"model={model}"]).model))


@pytest.mark.slow
def test_labels_are_single_tokens_of_smollm2() -> None:
    check_labels(load_tokenizer(compose(["model=smollm2_135m"]).model))


def test_every_letter_is_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    letters = tuple("ABCDEFGH")
    item = Item("arc_c", "x", "Which?", tuple(f"thing {c}" for c in letters), 7, letters)
    (encoded,) = encode_questions(tokenizer, [item], AnswerForm.label, data())
    assert [len(ids) for ids in encoded.answers] == [1] * 8


def test_forms_ask_each_row_once_each(tokenizer: PreTrainedTokenizerBase) -> None:
    items = load_split(data(), "piqa", "train").items[:5]
    both = encode_examples(tokenizer, items, data(forms=[AnswerForm.label, AnswerForm.text]))
    label = encode_examples(tokenizer, items, data(forms=[AnswerForm.label]))
    text = encode_examples(tokenizer, items, data(forms=[AnswerForm.text]))
    assert both == label + text
    for item, example in zip(items, text, strict=True):
        prompt, answer = split(tokenizer, example)
        assert answer == f" {item.options[item.answer]}</s>"
        for option in item.options:
            assert f"{option}\n" not in prompt


def test_end_token_stands_once_and_last(tokenizer: PreTrainedTokenizerBase) -> None:
    for name in TASKS:
        items = load_split(data(), name, "train").items[:3]
        for example in encode_examples(tokenizer, items, data()):
            assert example.input_ids.count(tokenizer.eos_token_id) == 1
            assert example.input_ids[-1] == tokenizer.eos_token_id


def test_passage_can_be_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    item = boolq(WORDS)
    (example,) = encode_examples(tokenizer, [item], data(boolq_passage=False))
    prompt, answer = split(tokenizer, example)
    assert prompt.startswith("Question: was the lamp lit again?")
    assert "old lamp" not in prompt
    assert answer == " false</s>"
    # Other tasks keep their context.
    (scene,) = load_split(data(), "siqa", "train").items[:1]
    without, kept = (
        encode_examples(tokenizer, [scene], data(boolq_passage=on)) for on in (False, True)
    )
    assert without == kept
    assert scene.context in tokenizer.decode(kept[0].input_ids)


def test_encoding_is_deterministic_and_item_by_item(tokenizer: PreTrainedTokenizerBase) -> None:
    items = load_split(data(), "arc_e", "train").items[:12]
    items += [boolq(WORDS * 30)]
    config = data(cutoff_length=160)
    together = encode_examples(tokenizer, items, config)
    assert together == encode_examples(tokenizer, items, config)
    again = load_tokenizer(compose(["model=tiny"]).model)
    assert together == [encode_examples(again, [item], config)[0] for item in items]


def test_an_answer_glued_to_the_prompt_is_refused() -> None:
    """This tokenizer has one token for the end of the prompt and a label."""
    core = Tokenizer(models.BPE())
    core.train_from_iterator(
        ["Answer: A"] * 9,
        trainers.BpeTrainer(special_tokens=["<pad>", "<s>", "</s>"], show_progress=False),
    )
    glue = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    item = Item("arc_e", "arc-7", "A?", ("A", "B"), 0, ("A", "B"))
    with pytest.raises(UserError, match="item arc-7 and the answer 'A'"):
        encode_questions(glue, [item], AnswerForm.label, data())
