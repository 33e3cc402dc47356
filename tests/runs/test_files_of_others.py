"""Files of other people, given to every command that reads such a file: one line each, at once, and
nothing is run, opened, copied or written that a file names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import HOSTILE, changed, place, set_field

from mixlora_exp.cli import generate as generation
from mixlora_exp.cli.evaluate import run as evaluate
from mixlora_exp.cli.evaluate import settled
from mixlora_exp.cli.main import main
from mixlora_exp.cli.train import execute
from mixlora_exp.config.command import compose
from mixlora_exp.config.resolve import to_dict
from mixlora_exp.config.schema import Config
from mixlora_exp.config.typed import literal
from mixlora_exp.errors import SCREEN, UserError
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.records.record import read_run
from mixlora_exp.results.runs import load_runs
from mixlora_exp.serving.open import open_adapter
from mixlora_exp.system.exit_codes import guarded
from mixlora_exp.system.runlock import holder_of
from mixlora_exp.system.untrusted import LIMIT
from mixlora_exp.training.progress import restart_log

Start = Callable[..., Any]


READERS: dict[str, tuple[str, Callable[[Path, Path], int]]] = {
    "evaluate run": ("record.json", lambda run, to: guarded(evaluate, [f"run={run}"])),
    "evaluate adapter": (
        "adapter/adapter_config.json",
        lambda run, to: guarded(evaluate, [
            f"adapter={run / 'adapter'}", "model=tiny", "data=embedded", "task=arc_e",
            f"output_dir={to}",
        ]),
    ),
    "evaluate beside a record": (
        "record.json", lambda run, to: guarded(evaluate, [f"adapter={run / 'adapter'}"]),
    ),
    "generate": (
        "record.json", lambda run, to: guarded(generation.run, [f"adapter={run}", "prompt=a"]),
    ),
    "generate with an adapter": (
        "adapter/adapter_config.json",
        lambda run, to: guarded(generation.run, [f"adapter={run}", "prompt=a"]),
    ),
    "generate from prompts": (
        "prompts.jsonl",
        lambda run, to: guarded(generation.run, [f"adapter={run}", f"prompts={run}/prompts.jsonl"]),
    ),
    "merge": (
        "adapter/adapter_config.json",
        lambda run, to: main(["merge", str(run), str(to / "merged")]),
    ),
    "convert": (
        "adapter/adapter_config.json",
        lambda run, to: main(["convert", str(run / "adapter"), str(to / "converted")]),
    ),
    "collect": (
        "record.json",
        lambda run, to: main(["collect", f"--source={run.parent}", f"--results={to}"]),
    ),
    "train on rows": (
        "arc_e/train.jsonl",
        lambda run, to: execute([
            "experiment=smoke", "task=arc_e", "data=local", f"data.path={run}", f"output_dir={to}",
        ]),
    ),
    "train on packed rows": (
        "arc_e/train.jsonl.gz",
        lambda run, to: execute([
            "experiment=smoke", "task=arc_e", "data=local", f"data.path={run}", f"output_dir={to}",
        ]),
    ),
    "train on a model's folder": (
        "base/config.json",
        lambda run, to: execute([
            "experiment=smoke", f"model.path={run}/base", "model.weights=pretrained",
            f"output_dir={to}",
        ]),
    ),
}  # fmt: skip


SLOWER = ("train", "evaluate adapter", "generate with an adapter", "merge")
FEW = ("a pipe", "deep", "a line of megabytes", "escapes", "nothing")
"""What commands are given that take longer to come to the file; they read it with the same function
as the others, and tests/data gives that one all kinds."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("made")
    words = ["method=lora", "trainer.max_steps=1", "evaluation.limit=2"]
    assert execute(["experiment=smoke", *words, f"output_dir={folder}"]) == 0
    (record,) = folder.glob("*/record.json")
    return record.parent


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "out" / made.name)
    return tmp_path / "out" / made.name


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "2")


def one_line(captured: Any) -> str:
    """What was said is one message, harmless and no longer than a screen."""
    begun = ("error: ", "refused: ")
    (error,) = [line for line in captured.err.splitlines() if line.startswith(begun)]
    assert len(error) < SCREEN + 20
    for text in (captured.err, captured.out):
        assert all(line.isprintable() for line in text.splitlines())
        assert "Traceback" not in text
    return error


@pytest.mark.parametrize(
    ("reader", "kind"),
    [(r, k) for r in READERS for k in (FEW if r.startswith(SLOWER) else HOSTILE)],
)
def test_every_reader_refuses_in_one_line(
    kind: str, reader: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, command = READERS[reader]
    place(kind, copied / name)
    capsys.readouterr()
    assert command(copied, tmp_path / "to") == 2
    one_line(capsys.readouterr())


@pytest.mark.parametrize("kind", HOSTILE)
def test_notes_of_other_processes_are_passed_over(kind: str, copied: Path) -> None:
    for name in ("lock/1", "failure.json", "train_log.jsonl"):
        place(kind, copied / name)
    assert holder_of(copied / "lock") is None or kind == "escapes"
    log = copied / "train_log.jsonl"
    restart_log(log, 9)
    assert not log.is_file() or not log.read_bytes()


CALLBACK = {"callbacks": {"x": {"_target_": "pathlib.Path.touch", "self": "MARKER"}}}
ODD_RECORDS = {
    "hydra": ("config.hydra", CALLBACK),
    "a key that adds": ("config.+hydra/callbacks", "x"),
    "a target in a group": ("config.model._target_", "os.system"),
    "defaults": ("config.defaults", ["x"]),
    "a field of a later version": ("config.trainer.warp", 3),
    "text for a number": ("config.seed", "${oc.env:HOME}"),
    "a list for text": ("config.model.hub_id", ["a"]),
    "a number for a list": ("config.task.train", 3),
    "true for a number": ("config.trainer.batch_size", True),
    "an object for text": ("config.data.path", {"a": 1}),
    "no choice": ("config.kernel.name", "${kernel.name}"),
    "a path for a name": ("config.model.name", "../../x"),
    "a name that is code": ("config.task.train", ["${task.name}"]),
    "a long text": ("config.model.access", "a" * 10**5),
    "no object": ("config", []),
    "a custom task of paths": ("config.task.custom", {"../x": {}}),
    "scores of text": ("scores", "arc_e"),
    "a share above one": ("scores", [{"task": "a", "protocol": "b", "n": 0, "accuracy": 3.0}]),
    "predictions elsewhere": ("predictions", {"arc_e/label_logits": "../../../src/code.py"}),
    "no provenance": ("provenance", {}),
}


@pytest.mark.parametrize("kind", ODD_RECORDS)
def test_an_odd_record_is_refused_by_every_reader(
    kind: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(copied, set_field(*ODD_RECORDS[kind]))
    with pytest.raises(UserError):
        read_run(copied / "record.json")
    for reader in ("evaluate run", "evaluate beside a record", "generate", "collect"):
        capsys.readouterr()
        assert READERS[reader][1](copied, tmp_path / "to") == 2
        assert str(copied / "record.json") in one_line(capsys.readouterr()) or reader == "collect"
    assert not load_runs(copied.parent)[0]


TEXTS = (
    "${oc.env:HOME}", r"\${seed}", r"\\${oc.env:HOME}", "a'b", "a\\", r"a\'b", "${", "'${seed}'\\",
    "x,y=[z]{w}:#", "\n\t", "$HOME `id` é",
)  # fmt: skip


def scoring(folder: Path) -> Config:
    """The configuration that scores the run in `folder`."""
    lines, recorded = settled([f"run={folder}"])
    return compose(lines, "evaluate", recorded)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_of_a_record_stays_that_text(text: str, copied: Path) -> None:
    for field in ("model.access", "trainer.schedule", "model.revision"):
        group, name = field.split(".")
        if name == "schedule":
            # The schema refuses it, as what it is and not as what it would resolve to.
            with pytest.raises(UserError):
                compose([f"{field}={literal(text)}"])
            continue
        changed(copied, set_field(f"config.{field}", text))
        assert to_dict(scoring(copied))[group][name] == text


def test_a_record_does_not_say_where_to_write(made: Path, tmp_path: Path) -> None:
    assert scoring(made).output_dir == str(made.parent)
    moved = shutil.copytree(made, tmp_path / made.name)
    assert scoring(moved).output_dir == "outputs"
    changed(moved, set_field("config.output_dir", str(tmp_path / "elsewhere")))
    assert scoring(moved).output_dir == "outputs"


# Adapters

ADAPTERS = {
    "a type that loads a tokenizer": ({"peft_type": "PROMPT_TUNING"}, "is not served"),
    "a type that loads adapters": ({"peft_type": "XLORA"}, "is not served"),
    "a module to import": (
        {"megatron_config": {"a": 1}, "megatron_core": "this"},
        "megatron_config",
    ),
    "a module's name": ({"megatron_core": "antigravity"}, "megatron_core"),
    "a file of statistics": ({"corda_config": {"cache_file": "/etc/passwd"}}, "corda_config"),
    "a file of gradients": ({"lora_ga_config": {"cache_file": "/etc/passwd"}}, "lora_ga_config"),
    "another base": ({"layer_replication": [[0, 10**9]]}, "layer_replication"),
    "a pattern without end": ({"target_modules": r"(a+)+b"}, "could take forever"),
    "a pattern of stars": ({"target_modules": ".*" * 9 + "x"}, "could take forever"),
    "a pattern that looks back": ({"exclude_modules": r"(.)\1*"}, "could take forever"),
    "a key that is a pattern": ({"rank_pattern": {"(x|x)*y": 2}}, "could take forever"),
    "no pattern": ({"target_modules": "("}, "is not a regular expression"),
    "a rank beyond the file": ({"r": 10**9}, "is larger than in any tensor"),
    "a rank that is no number": ({"r": 4.0}, "integer"),
    "a rank of text": ({"r": "4"}, "integer"),
    "a rank by layer": ({"rank_pattern": {"q_proj": 10**9}}, "is larger than in any tensor"),
    "experts without end": ({"num_experts": 10**9}, "num_experts"),
}


OPENERS = ("evaluate adapter", "generate with an adapter", "merge")


@pytest.mark.parametrize(
    ("kind", "reader"), [(kind, OPENERS[n % 3]) for n, kind in enumerate(ADAPTERS)]
)
def test_what_an_adapter_requests_is_not_done(
    kind: str, reader: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They open it with one function."""
    change, word = ADAPTERS[kind]
    path = copied / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    capsys.readouterr()
    assert READERS[reader][1](copied, tmp_path / "to") == 2
    assert word in one_line(capsys.readouterr())


@pytest.mark.parametrize("field", ["shape", "data_offsets"])
def test_a_header_with_floats_is_damaged(
    field: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "adapter" / "adapter_model.safetensors"
    found = path.read_bytes()
    size = int.from_bytes(found[:8], "little")
    header = json.loads(found[8 : 8 + size])
    first = next(name for name in header if name != "__metadata__")
    header[first][field] = [float(number) for number in header[first][field]]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + found[8 + size :])
    for reader in (*OPENERS, "convert"):
        capsys.readouterr()
        assert READERS[reader][1](copied, tmp_path / "to") == 2
        one_line(capsys.readouterr())


# Models

MODELS = {
    "an adapter that names a base": ("adapter_config.json", {"base_model_name_or_path": "a/b"}),
    "an index that leads out": (
        "model.safetensors.index.json",
        {"metadata": {}, "weight_map": {"w": "../../x.safetensors"}},
    ),
    "an index of full paths": (
        "model.safetensors.index.json", {"metadata": {}, "weight_map": {"w": "/x.safetensors"}},
    ),
    "an index that is none": ("model.safetensors.index.json", []),
    "quantization": ("config.json", {"quantization_config": {"quant_method": "gptq"}}),
    "weights elsewhere": ("config.json", {"transformers_weights": "../x.safetensors"}),
    "a tokenizer elsewhere": ("tokenizer_config.json", {"fast_tokenizer_files": ["../t.json"]}),
    "attention of a stranger": ("config.json", {"_attn_implementation": "somebody/kernel"}),
    "attention under its other name": ("config.json", {"attn_implementation": "somebody/kernel"}),
    "attention that may be fetched": ("config.json", {"_attn_implementation": "flash_attention_2"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model."""
    folder = tmp_path_factory.mktemp("base")
    config = compose(["model=tiny"]).model
    load_model(config, torch.float32).save_pretrained(folder)
    load_tokenizer(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", MODELS)
def test_what_a_model_s_folder_requests_is_not_done(
    kind: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Read when the library is imported: its environment variable would come too late.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = shutil.copytree(base, tmp_path / "base")
    name, change = MODELS[kind]
    path = folder / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **change} if isinstance(change, dict) else change))
    words = ["model=tiny", f"model.path={folder}", "trainer.precision=float32", "prompt=a"]
    assert guarded(generation.run, words) == 2
    assert str(folder) in one_line(capsys.readouterr())


def test_a_program_beside_a_model_is_not_run(base: Path, tmp_path: Path) -> None:
    folder, marker = shutil.copytree(base, tmp_path / "base"), tmp_path / "marker"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    for name, kinds in (
        ("config.json", ("AutoConfig", "AutoModelForCausalLM")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        path = folder / name
        programs = {"auto_map": dict.fromkeys(kinds, "own.Own")}
        path.write_text(json.dumps({**json.loads(path.read_text()), **programs}))
    # The family's own classes are taken, whatever the files name.
    open_adapter(None, ["model=tiny", f"model.path={folder}", "trainer.precision=float32"])
    assert not marker.exists()
