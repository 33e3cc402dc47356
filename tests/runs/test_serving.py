"""Use after training: generation, merging, and loading by other libraries."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import compose
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixlora_exp.adapters import attach_adapter, save_adapter
from mixlora_exp.cli import generate as generation
from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model
from mixlora_exp.serving import answer
from mixlora_exp.serving.merge import merge, write_merged
from mixlora_exp.serving.open import Opened, open_adapter
from mixlora_exp.serving.text_generation import continuations
from mixlora_exp.system.exit_codes import guarded

WORDS = ["model=tiny", "trainer.precision=float32"]
METHODS = PAPER_METHODS
PROMPTS = ["Question: Which of these?\nAnswer:", "Is it true?", "The moon goes around the earth"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny adapter of a method, away from its start."""
    made: dict[str, Path] = {}

    def make(method: str) -> Path:
        if method not in made:
            config = compose([*WORDS, f"method={method}"])
            base = load_model(config.model, torch.float32, config.seed)
            model = attach_adapter(base, config.method, config.kernel, seed=6)
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if "lora_B" in name or "lora_router" in name:
                        weight += 0.3 * torch.randn(weight.shape, generator=generator)
            made[method] = tmp_path_factory.mktemp(method) / "adapter"
            save_adapter(model, made[method])
        return made[method]

    return make


@torch.no_grad()
def slow_greedy(opened: Opened, prompt: str, steps: int) -> str:
    """One whole forward pass per token, no cache, no batch."""
    ids = opened.tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(steps):
        following = opened.model(ids, use_cache=False).logits[0, -1].argmax()
        if int(following) == opened.tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, following.view(1, 1)], dim=1)
    return opened.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("method", METHODS)
def test_generation_is_that_of_a_slow_loop(method: str, adapter: Callable[[str], Path]) -> None:
    opened = open_adapter(str(adapter(method)), WORDS)
    expected = [slow_greedy(opened, prompt, 12) for prompt in PROMPTS]
    assert len(set(expected)) == 3
    for size in (1, 3):
        found = continuations(opened, PROMPTS, max_new_tokens=12, batch_size=size)
        assert list(found) == expected


def test_sampling_is_drawn_from_the_seed(adapter: Callable[[str], Path]) -> None:
    opened = open_adapter(str(adapter("mixlora")), WORDS)

    def sample(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return list(continuations(opened, PROMPTS[:1], max_new_tokens=20, temperature=1.0))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def command(*words: str) -> int:
    return guarded(generation.run, words)


def test_the_command_streams_an_answer(
    adapter: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(adapter("mixlora"))
    words = [*WORDS, f"adapter={folder}", "max_new_tokens=12"]
    assert command(*words, f"prompt={PROMPTS[1]}") == 0
    expected = slow_greedy(open_adapter(folder, WORDS), PROMPTS[1], 12)
    assert capsys.readouterr().out.strip() == expected.strip()


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_file_of_prompts(
    suffix: str,
    adapter: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = [prompt.splitlines()[0] for prompt in PROMPTS]
    path = tmp_path / f"prompts.{suffix}"
    lines = prompts if suffix == "txt" else [json.dumps({"prompt": p}) for p in prompts]
    path.write_text("\n".join(lines))
    words = [*WORDS, f"adapter={adapter('mixdora')}", "max_new_tokens=8", "batch_size=2"]
    assert command(*words, f"prompts={path}") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    opened = open_adapter(str(adapter("mixdora")), WORDS)
    assert [row["answer"] for row in rows] == [slow_greedy(opened, p, 8) for p in prompts]


def test_several_adapters_answer_in_the_same_batches(
    adapter: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each as it answers by itself; a row may choose its adapter."""
    folders = {}
    for method in METHODS:
        folders[method] = tmp_path / method
        folders[method].symlink_to(adapter(method).parent)
    # Resolved, a folder has its own name again.
    names = {method: adapter(method).parent.name for method in METHODS}
    rows = [{"prompt": PROMPTS[1]}, {"prompt": PROMPTS[2], "adapter": names["mixdora"]}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    sizes: list[int] = []
    real = answer.open_adapters

    def spy(*args: Any) -> Opened:
        opened = real(*args)
        generate = opened.model.generate

        def counted(**batch: Any) -> torch.Tensor:
            sizes.append(len(set(batch["adapter_names"])))
            return generate(**batch)

        opened.model.generate = counted
        return opened

    monkeypatch.setattr(answer, "open_adapters", spy)
    listed = ",".join(str(folder) for folder in folders.values())
    words = [*WORDS, f"adapters=[{listed}]", "max_new_tokens=8"]
    assert command(*words, f"prompts={path}") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sizes == [4]
    expected = [(PROMPTS[1], method) for method in METHODS] + [(PROMPTS[2], "mixdora")]
    assert [(row["prompt"], row["adapter"]) for row in found] == [
        (prompt, names[method]) for prompt, method in expected
    ]
    for row, (prompt, method) in zip(found, expected, strict=True):
        assert row["answer"] == slow_greedy(open_adapter(str(adapter(method)), WORDS), prompt, 8)
    assert command(*words, f"prompt={PROMPTS[1]}") == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    path.write_text(json.dumps({"prompt": "a", "adapter": "none"}))
    assert command(*words, f"prompts={path}") == 2
    assert "names the unknown adapter none: give one of " in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True])
def test_prompts_as_they_are_typed(
    terminal: bool,
    adapter: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From a pipe to its end; at a terminal until an empty line."""
    lines = ["Is it true?", "Or not?", "", "Is it?"]
    typed = io.StringIO("\n".join(lines))
    if terminal:
        monkeypatch.setattr(typed, "isatty", lambda: True)
        left = iter(lines)
        monkeypatch.setattr("builtins.input", lambda _: next(left))
    monkeypatch.setattr("sys.stdin", typed)
    assert command(*WORDS, f"adapter={adapter('lora')}", "max_new_tokens=6") == 0
    opened = open_adapter(str(adapter("lora")), WORDS)
    asked = lines[:2] if terminal else [line for line in lines if line]
    expected = "".join(slow_greedy(opened, p, 6) + "\n" for p in asked)
    assert capsys.readouterr().out.split() == expected.split()


def test_a_chat_remembers_what_was_said(
    adapter: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_adapter(str(adapter("lora")), WORDS)
    opened.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    seen: list[str] = []
    generate = opened.model.generate

    def spy(**batch: Any) -> torch.Tensor:
        seen.append(opened.tokenizer.decode(batch["input_ids"][0]))
        return generate(**batch)

    monkeypatch.setattr(opened.model, "generate", spy)
    monkeypatch.setattr(answer, "open_adapter", lambda *_: opened)
    monkeypatch.setattr("sys.stdin", io.StringIO("Is it true?\nAnd now?\n"))
    assert command("chat=true", "max_new_tokens=4") == 0
    assert "user: Is it true?" in seen[0]
    assert "user: Is it true?\nassistant:" in seen[1]
    assert seen[1].index("And now?") > seen[1].index("Is it true?")


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_merged_checkpoint_is_a_plain_model(
    method: str, adapter: Callable[[str], Path], tmp_path: Path
) -> None:
    opened = open_adapter(str(adapter(method)), WORDS)
    ids = opened.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = opened.model(ids).logits
    write_merged(opened, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not isinstance(plain, PeftModel)
    with torch.no_grad():
        found = plain(ids).logits
    assert (found - expected).abs().max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer(PROMPTS[0])["input_ids"] == ids[0].tolist()
    with pytest.raises(UserError, match="already exists"):
        write_merged(opened, tmp_path / "merged")


def test_a_full_disk_leaves_nothing_half_written(
    adapter: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object, path: Path, **__: object) -> None:
        Path(path).mkdir(exist_ok=True)
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    opened = open_adapter(str(adapter("lora")), WORDS)
    monkeypatch.setattr(type(opened.model.get_base_model()), "save_pretrained", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_merged(opened, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_prompt_in_a_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": " "}\n')
    assert command(*WORDS, f"prompts={path}") == 2
    assert f"{path}:2: prompt is empty" in capsys.readouterr().err


def test_what_is_typed_must_be_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    assert command(*WORDS, "max_new_tokens=1") == 2
    assert "the input is not UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
def test_a_mixture_says_why_it_cannot_be_merged(
    method: str, adapter: Callable[[str], Path]
) -> None:
    with pytest.raises(UserError, match="router chooses experts for each token"):
        merge(open_adapter(str(adapter(method)), WORDS))
    with pytest.raises(UserError, match="nothing to merge"):
        merge(open_adapter(None, WORDS))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter=absent"], "adapter=absent does not exist"),
        (["prompt=a", "prompts=b"], "prompt is also given: give one of them"),
        (["prompts=absent.txt"], "absent.txt cannot be read"),
        (["prompt= "], "it is empty"),
        (["max_new_tokens=0"], "max_new_tokens=0"),
        (["temperature=-1"], "temperature=-1"),
        (["temperature=1e-320"], "must be 0 (greedy), or from 1e-4"),
        (["random_seed=99999999999999999999"], "random_seed=99999999999999999999"),
        (["random_seed=-1"], "random_seed=-1"),
        (["top_p=2"], "top_p=2"),
        (["tempo=1"], "tempo"),
        (["adapter=a", "adapters=[b,c]"], "adapter is also given: give one of them"),
        (["adapters=[absent,gone]"], "adapter=absent does not exist"),
        (["adapters=[docs,docs]", "prompt=a"], "both called docs"),
        (["adapters=[docs,conf]", "chat=true"], "chat=true is not valid: it works with one"),
        (["model=llama9"], "llama9"),
        (["chat=true", "prompt=a"], "no chat template"),
    ],
)
def test_mistakes_are_named(
    words: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if any(word.startswith("model=") for word in words) else WORDS
    assert command(*model, *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("terminal", [False, True])
def test_an_answer_does_not_steer_a_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model may have learned to write escapes; a program that reads them gets what it wrote."""
    opened = open_adapter(None, WORDS)
    written = "a\x1b[2Jb\u202e\u200d\nc\td"
    monkeypatch.setattr(type(opened.tokenizer), "decode", lambda *_, **__: written)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    list(continuations(opened, ["a"], max_new_tokens=2, stream=True))
    shown = "a\\x1b[2Jb\\u202e\u200d\nc\td" if terminal else written
    assert shown in capsys.readouterr().out
