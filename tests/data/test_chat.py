"""`data=chat`: the model's template, with the loss on the completion; and free text without it."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from composed import compose
from transformers.utils import chat_template_utils

from mixlora_exp.cli.train import execute
from mixlora_exp.config.command import compose as compose_anew
from mixlora_exp.config.schema import DataConfig, DataSource, Protocol
from mixlora_exp.data.chat import dated_template
from mixlora_exp.data.encoding import encode_examples
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation.free_text import encode_free_text
from mixlora_exp.models.tiny import build_tokenizer
from mixlora_exp.records.record import read_run
from mixlora_exp.runs.run import run
from mixlora_exp.serving.text_generation import _prompt_ids
from mixlora_exp.tasks import Item

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ITEM = Item(
    "t", "t-0", "Question: What is 3 + 4?\nAnswer:", ("It is 7",), 0, ("7",),
    turns=(("system", "Be brief."), ("user", "What is 3 + 4?")),
)  # fmt: skip
CHAT = DataConfig(name=DataSource.chat, path="data")


@pytest.fixture
def tokenizer():
    found = build_tokenizer()
    found.chat_template = TEMPLATE
    found.model_max_length = 128
    return found


def test_the_loss_is_on_the_completion_and_its_end(tokenizer) -> None:
    (example,) = encode_examples(tokenizer, [ITEM], CHAT)
    prompt = "<s>[system] Be brief.\n[user] What is 3 + 4?\n[assistant] "
    ids = example.input_ids
    assert tokenizer.decode(ids[-example.answer_length :]) == "It is 7</s>"
    assert tokenizer.decode(ids[: -example.answer_length]) == prompt
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1


def test_a_template_without_eos_gets_one(tokenizer) -> None:
    tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }}", "")
    (example,) = encode_examples(tokenizer, [ITEM], CHAT)
    assert tokenizer.decode(example.input_ids[-example.answer_length :]) == "It is 7\n</s>"


def test_a_template_that_writes_the_date_has_the_same_tokens_on_each_day(
    tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 2, 3)

    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
    (today,) = encode_examples(tokenizer, [ITEM], CHAT)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    turns = [{"role": "user", "content": "a"}]
    assert "03 Feb 2031" in tokenizer.apply_chat_template(turns, tokenize=False)
    assert encode_examples(tokenizer, [ITEM], CHAT) == [today]
    assert "26 Jul 2024" in tokenizer.decode(today.input_ids)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("  \n{{ strftime_now('%d %b %Y') }}|", "  \n26 Jul 2024|"),
        (
            "{{ strftime_now('%B %-d, %Y, %A, %H:%M %F') }}",
            "July 26, 2024, Friday, 00:00 2024-07-26",
        ),
        ("{% if strftime_now is defined %}{{ strftime_now(format='%e%%') }}{% endif %}", "26%"),
        ("{% macro m() %}{{ strftime_now('%y') }}{% endmacro %}{{ m() }}", "24"),
    ],
)
def test_other_formats_of_the_date(tokenizer, template: str, wanted: str) -> None:
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": "a"}]
    dated = dated_template(tokenizer)
    assert tokenizer.apply_chat_template(turns, tokenize=False, chat_template=dated) == wanted
    asked = _prompt_ids(SimpleNamespace(tokenizer=tokenizer), turns)
    assert tokenizer.decode(asked).endswith(wanted.strip())


def test_a_template_without_the_date_is_used_as_it_is(tokenizer) -> None:
    assert dated_template(tokenizer) is None
    tokenizer.chat_template = {"default": "{{ strftime_now('%d') }}", "tools": "x"}
    assert dated_template(tokenizer).endswith("{{ strftime_now('%d') }}")


def test_without_a_template_it_is_a_question(tokenizer) -> None:
    data = DataConfig(name=DataSource.local, path="data", forms=CHAT.forms)
    data.forms = compose(["data.forms=[text]"]).data.forms
    (example,) = encode_examples(tokenizer, [ITEM], data)
    text = tokenizer.decode(example.input_ids)
    assert text.endswith("Question: What is 3 + 4?\nAnswer: It is 7</s>")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no system') }}", r"refuses item t-0 of t \(\w+: no system\)"),
        ("{% for m in messages|reverse %}{{ m['content'] }}{% endfor %}", "changes the messages"),
    ],
)
def test_a_template_that_cannot_is_reported(tokenizer, template: str | None, told: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=told):
        encode_examples(tokenizer, [ITEM], CHAT)


def test_what_is_too_long_or_has_no_number_is_reported(tokenizer) -> None:
    evaluation = compose([]).evaluation
    assert len(encode_free_text(tokenizer, [ITEM], CHAT, evaluation)) == 1
    tokenizer.model_max_length = 20
    with pytest.raises(UserError, match="item t-0 of t needs .* tokens"):
        encode_examples(tokenizer, [ITEM], CHAT)
    with pytest.raises(UserError, match="item t-0 of t needs .* tokens"):
        encode_free_text(tokenizer, [ITEM], CHAT, evaluation)
    words = Item("t", "t-1", "a", ("b",), 0, ("",), turns=(("user", "a"),))
    with pytest.raises(UserError, match="t-1 of t has an answer without a number"):
        encode_free_text(tokenizer, [words], CHAT, evaluation)
    with pytest.raises(UserError, match="t-1 of t has an answer without a label: answer_pattern"):
        encode_free_text(tokenizer, [words], CHAT, evaluation, Protocol.answer_pattern)


def test_texts_that_will_be_cut_off_are_told(tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = compose(["evaluation.max_new_tokens=3"]).evaluation
    encode_free_text(tokenizer, [ITEM], CHAT, evaluation)
    told = capsys.readouterr().err
    assert "t: half of its own answers have more than" in told
    assert "evaluation.max_new_tokens=3" in told
    for quiet in (
        {"evaluation": compose(["evaluation.max_new_tokens=60"]).evaluation},
        {"evaluation": evaluation, "protocol": Protocol.answer_pattern},
    ):
        encode_free_text(tokenizer, [ITEM], CHAT, **quiet)
        assert not capsys.readouterr().err


FREE = "task=metamath_gsm8k"
EXACT = "evaluation.protocols=[exact_match]"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data=local", EXACT], "data.forms=.label. .*is not valid: .*gsm8k is free text"),
        (["data=local", "data.forms=[text]"], "gsm8k is free text, which exact_match scores"),
        (
            ["data=chat", "evaluation.protocols=[answer_pattern]"],
            "gsm8k is free text, which exact_match scores",
        ),
        (["data=hub", "data.forms=[text]", EXACT], "gsm8k is a custom task"),
        (["data=chat", "task.custom.gsm8k.options=[a]", EXACT], "free text has none"),
    ],
)
def test_free_text_has_a_form_and_a_protocol(words: list[str], told: str) -> None:
    assert compose_anew([FREE, "data=chat", EXACT]).data.name is DataSource.chat
    with pytest.raises(UserError, match=told):
        compose_anew([FREE, *words])


def test_other_tasks_have_others() -> None:
    with pytest.raises(UserError, match="exact_match and answer_pattern score free"):
        compose_anew(["task=arc_e", EXACT])
    with pytest.raises(UserError, match="it takes tasks of free text only"):
        compose_anew(["task=arc_e", "data=chat"])
    messages = ["task.custom.gsm8k.answer_as=messages", "task.custom.gsm8k.answer=question"]
    assert compose_anew([FREE, "data=chat", EXACT, *messages])
    with pytest.raises(UserError, match="messages are one field, the question's"):
        compose_anew([FREE, "data=chat", EXACT, messages[0]])
    with pytest.raises(UserError, match="gsm8k has messages: use data=chat"):
        compose_anew([FREE, "data=local", "data.forms=[text]", EXACT, *messages])


def test_the_experiment_is_that_of_peft(tmp_path: Path) -> None:
    """Trained and scored end to end, with the prompt that PEFT's comparison asks with."""
    for task, row in {
        "metamath/train": {"query": "What is 1 + 1?", "response": "The answer is: 2"},
        "gsm8k/test": {"question": "What is 1 + 2?", "answer": "1 + 2 = 3\n#### 3"},
    }.items():
        path = tmp_path / "data" / f"{task}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    config = compose_anew(
        [
            "experiment=metamath_gsm8k", "model=tiny", "method=lora", "trainer.max_steps=1",
            "evaluation.max_new_tokens=4", f"data.path={tmp_path / 'data'}",
            f"output_dir={tmp_path / 'out'}", "trainer.precision=float32",
        ]
    )  # fmt: skip
    own = config.trainer
    assert (config.method.rank, config.method.alpha, config.seed) == (32, 64, 0)
    assert (own.batch_size, own.learning_rate, own.weight_decay) == (4, 1e-4, 0.1)
    assert (own.schedule, own.warmup_steps, own.max_grad_norm) == ("cosine", 500, 1.0)
    assert (own.loss_on.value, own.order.value) == ("all", "bucketed")
    assert config.data.cutoff_length == 768
    record = read_run(run(config))
    (score,) = record["scores"]
    assert (score["task"], score["protocol"], score["n"]) == ("gsm8k", "exact_match", 4)
    assert (score["chance"], score["majority_class"]) == (0, 1)
    predictions = Path(record["config"]["output_dir"]) / record["name"] / "predictions"
    rows = (predictions / "gsm8k.exact_match.jsonl").read_text().splitlines()
    for row in map(json.loads, rows):
        assert row["prediction"] in (None, 0, 1)
        assert isinstance(row["text"], str)


@pytest.mark.parametrize("dry_run", ["false", "true"])
@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"content": "a"}, "field 'messages[0]' has role None, which is none of system, user, a"),
        ({"role": "bot", "content": "a"}, "field 'messages[0]' has role 'bot', which is none of"),
        ("a", "field 'messages[0]' must be an object with role and content"),
    ],
)
def test_a_row_without_roles_is_told_in_one_line(
    message: object, told: str, dry_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in ("metamath/train", "gsm8k/test"):
        path = tmp_path / "data" / f"{task}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"messages": [message, {"role": "assistant", "content": "1"}]}))
    argv = [
        "model=tiny", "method=lora", FREE, EXACT, "data=chat", f"data.path={tmp_path / 'data'}",
        *(f"task.custom.{task}.{field}=messages" for task in ("metamath", "gsm8k")
          for field in ("question", "answer", "answer_as")),
        f"dry_run={dry_run}", f"output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    assert execute(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'data'}")
    assert told in line
    assert not (tmp_path / "out").exists()
