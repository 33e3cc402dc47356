"""Use after training: what cannot be right is told in one line, before work is done or lost."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixlora_exp.cli import generate as generation
from mixlora_exp.cli.main import main
from mixlora_exp.cli.train import execute
from mixlora_exp.errors import UserError
from mixlora_exp.serving import answer
from mixlora_exp.serving.merge import write_merged
from mixlora_exp.serving.open import open_adapter
from mixlora_exp.serving.text_generation import continuations, harmless
from mixlora_exp.system.exit_codes import guarded
from mixlora_exp.system.signals import Terminated

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ["experiment=smoke", "evaluation.limit=2", "trainer.max_steps=1"]
ALONE = ["model=tiny", "trainer.precision=float32"]


def trained(folder: Path, *words: str) -> Path:
    """A run's folder."""
    assert execute([*SMOKE, *words, f"output_dir={folder}"]) == 0
    (record,) = folder.rglob("record.json")
    return record.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA in float32, with a seed of its own."""
    folder = tmp_path_factory.mktemp("run")
    return trained(folder, "method=lora", "seed=7", "trainer.precision=float32")


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a command that is refused."""
    assert guarded(generation.run, words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_the_base_model_is_that_of_the_record(run: Path) -> None:
    """A random one is drawn from the run's seed, and the run's precision is taken."""
    opened = open_adapter(str(run))
    assert (opened.config.seed, opened.config.trainer.precision.value) == (7, "float32")
    assert next(opened.model.parameters()).dtype == torch.float32
    # Another seed is another base, which has to be asked for.
    with pytest.raises(UserError, match=r"was trained on tiny \(random tiny seed=7\)"):
        open_adapter(str(run), ["seed=8"])
    given = open_adapter(str(run), ["seed=8", "trainer.precision=bfloat16", "base=accept"])
    assert given.config.seed == 8
    assert given.model.get_base_model().lm_head.weight.dtype == torch.bfloat16


def test_the_command_alone_shows_its_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate"]) == 0
    assert "generate.py adapter=DIR 'prompt=" in capsys.readouterr().out


def test_no_prompt_at_a_terminal_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = io.StringIO()
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", typed)
    monkeypatch.setattr(answer, "answer", lambda *_: pytest.fail("a model was loaded"))
    message = told(capsys, "max_new_tokens=4")
    assert "no prompt was given" in message
    assert "prompts=FILE" in message
    assert "adapter=DIR" in message


def test_an_empty_pipe_is_reported_before_a_model_is_loaded(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    monkeypatch.setattr(answer, "open_adapter", lambda *_: pytest.fail("a model was loaded"))
    shown = told(capsys, f"adapter={run}")
    assert shown == "error: no prompt was given: give 'prompt=...' or prompts=FILE"


def test_what_is_written_is_harmless_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '{"answer": "\x9b2J\u202e \u00e9"}'
    assert harmless(text) == text
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    assert harmless(text) == '{"answer": "\\x9b2J\\u202e \u00e9"}'


def test_adapters_of_different_bases_do_not_answer_together(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = trained(tmp_path, "method=lora", "model=tiny_gemma")
    message = told(capsys, f"adapters=[{run},{other}]", "prompt=a")
    assert "give adapters of one base model" in message
    assert str(run) in message
    assert str(other) in message


def broken(run: Path, folder: Path) -> Path:
    """A copy of the run whose adapter has a NaN."""
    shutil.copytree(run, folder)
    path = folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def test_an_adapter_without_numbers_is_not_used(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = broken(run, tmp_path / "bad")
    for words in ([f"adapter={bad}"], [f"adapters=[{run},{bad}]"]):
        message = told(capsys, *words, "prompt=a")
        assert message.startswith(f"error: adapter={bad / 'adapter'}: ")
        assert "contains values that are not finite" in message


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_without_numbers_are_no_answer(run: Path, temperature: float) -> None:
    opened = open_adapter(str(run))
    with torch.no_grad():
        for name, weight in opened.model.named_parameters():
            if "lora_B" in name:
                weight.fill_(1e30)
    with pytest.raises(UserError, match="logits are not finite"):
        list(continuations(opened, ["Is it?"], max_new_tokens=3, temperature=temperature))


def test_no_prompt_goes_beyond_the_model_s_positions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_adapter(None, ALONE)
    limit = opened.model.config.max_position_embeddings
    tokens = len(opened.tokenizer("one " * 50)["input_ids"])
    words = [*ALONE, "prompt=" + "one " * 50]
    message = told(capsys, *words, f"max_new_tokens={limit}")
    assert f"has {tokens:,} tokens" in message
    assert f"set max_new_tokens={limit - tokens} or less" in message
    assert guarded(generation.run, [*words, "max_new_tokens=2"]) == 0
    # Of a file none is answered: all are looked at first.
    path = tmp_path / "many.txt"
    path.write_text("short\n" + "one " * limit + "\n")
    assert "shorten it" in told(capsys, *ALONE, f"prompts={path}", "batch_size=1")
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n\n\n{"prompt": 1}\n', ":4: this is not a JSON object"),
        (b'{"prompt": "a"}\n{"prompt": " "}\n', ":2: prompt is empty"),
        (b'{"prompt": "a"}\n{"prompt": "a\\ud800b"}\n', ":2: prompt is not UTF-8 text"),
        (b'{"prompt": "a", "adapter": "\\udc00"}\n', ":1: adapter is not UTF-8 text"),
        (b'{"prompt": "a"}\n\n{"prompt": "\xff"}\n', "prompts.jsonl:3: this is not UTF-8 text"),
        (b'{"prompt": "a", "adapter": "b"}\n', "names the unknown adapter b: name adapters=["),
        (b"\n \n", "is empty: give a prompt per line"),
        (b"", "is empty: give a prompt per line"),
    ],
)
def test_a_file_of_prompts_is_checked_before_a_model_is_loaded(
    content: bytes,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(answer, "open_adapter", loaded)
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    assert message in told(capsys, *ALONE, f"prompts={path}")


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_marks_and_separators_of_unicode_are_text(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """U+2028 stands in JSON as it is, also in what generate.py writes; editors put a mark first."""
    prompts = ["one\u2028two", "three"]
    lines = [json.dumps({"prompt": p}, ensure_ascii=False) for p in prompts]
    path = tmp_path / f"prompts.{suffix}"
    text = "\r\n".join(prompts if suffix == "txt" else lines)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert guarded(generation.run, [*ALONE, f"prompts={path}", "max_new_tokens=1"]) == 0
    out = capsys.readouterr().out
    assert [json.loads(line)["prompt"] for line in out.rstrip("\n").split("\n")] == prompts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt=caf\udce9"], "prompt is not UTF-8 text"),
        (["prompt=  "], "prompt= is not valid: it is empty"),
        (["adapters=docs"], "adapters=docs is not valid: expected a list"),
        (["adapters=[[docs]]"], "adapter=[docs] does not exist"),
        (["max_new_tokens=1.5"], "max_new_tokens=1.5 is not valid: expected a whole number"),
        (["max_new_tokens=0"], "max_new_tokens=0 is not valid: must be >= 1"),
        (["temperature=hot"], "temperature=hot is not valid: expected a number"),
        (["chat=maybe"], "chat=maybe is not valid: expected true or false"),
        (["adapter="], "adapter= is not valid: give a value"),
        (["prompts="], "prompts= is not valid: give a value"),
        (["prompt=a", "prompts=b"], "prompt is also given: give one of them"),
        (["tempo=1"], "random_seed, model, kernel, seed, trainer"),
        (["tempratur=1"], "did you mean temperature?"),
        (["task=arc_e"], "task"),
    ],
)
def test_a_wrong_value_is_named(
    words: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in told(capsys, *ALONE, *words)


def test_what_a_failed_run_left_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = tmp_path / "failed"
    shutil.copytree(run / "adapter", failed / "last_good")
    message = told(capsys, f"adapter={failed}", "prompt=a")
    assert f"adapter={failed / 'last_good'} is its last good adapter" in message
    # It tells its base model itself, as any adapter does.
    assert guarded(generation.run, [f"adapter={failed / 'last_good'}", "prompt=a"]) == 0
    assert capsys.readouterr().err == f"tiny with {failed / 'last_good'}\n"
    message = told(capsys, f"adapter={failed / 'last_good'}", "model=tiny_gemma", "prompt=a")
    assert "was trained on tiny (random tiny seed=7)" in message


@pytest.mark.slow
def test_who_reads_may_stop(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a\n" * 40)
    command = f"{sys.executable} generate.py adapter={run} prompts={path} max_new_tokens=1"
    script = f"set -o pipefail; {command} batch_size=1 | head -n 1"
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "BrokenPipe" not in done.stderr


def test_a_command_that_resumes_nothing_does_not_say_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(_: Sequence[str]) -> None:
        raise Terminated

    assert guarded(stopped, [], resumes=False) == 143
    assert capsys.readouterr().err == "terminated\n"
    assert guarded(stopped, []) == 75
    assert "resumes from there" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Terminated])
def test_an_interrupted_merge_leaves_nothing(
    stop: type[BaseException], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_adapter(str(run))

    def interrupted(_: object, path: Path, **__: object) -> None:
        (Path(path) / "model.safetensors").write_text("half")
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(type(opened.model.get_base_model()), "save_pretrained", interrupted)
        with pytest.raises(stop):
            write_merged(opened, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_goes_to_one_s_home(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["merge", str(run), "~/merged"]) == 0
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "float32", "the run's precision"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "the following arguments are required: OUT"),
        (["a", "."], ". already exists"),
        (["a", "b", "task=arc_e"], "'task=arc_e' is not a setting of merge"),
        (["adapter=a", "output=b"], "adapter=a is not valid: write the folders alone"),
        (["a", "b", "--force"], "there is no option --force"),
    ],
)
def test_mistakes_of_merging_are_reported(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", *words]) == 2
    assert message in capsys.readouterr().err
