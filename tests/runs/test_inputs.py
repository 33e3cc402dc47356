"""What a run reads: an existing adapter, a local model, several processes, the cells of a sweep."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import compose
from opens import opens_below
from safetensors.torch import load_file, save_file

from mixlora_exp.cli.train import execute
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.models.file_cache import SETTLED
from mixlora_exp.runs import inputs, state
from mixlora_exp.runs import run as experiment
from mixlora_exp.tasks.embedded import rows as embedded_rows

SCORE = ("method=none", "evaluation.limit=8")


def test_an_adapter_is_scored_with_no_kernel_that_would_not_run(
    finished: Callable[..., Any], configure: Callable[..., Any]
) -> None:
    adapter = finished("method=moslora").folder / "adapter"
    told = "kernel=shared changes nothing in method=moslora"
    with pytest.raises(UserError, match=told):
        experiment.run(configure(*SCORE, f"adapter={adapter}", "kernel=shared"))


def test_an_existing_adapter_scores_as_in_its_own_run(
    finished: Callable[..., Any], run: Callable[..., Any]
) -> None:
    trained = finished("method=mixlora")
    scored = run(*SCORE, f"adapter={trained.folder / 'adapter'}")
    assert scored.record["train"] is None
    assert scored.record["adapter"]["peft_type"] == "MIXLORA"
    assert scored.record["kernel"] == "exact"
    for now, then in zip(scored.record["scores"], trained.record["scores"], strict=True):
        assert now == then


def test_another_adapter_in_the_same_folder_is_no_finished_run(
    finished: Callable[..., Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    source = finished("method=lora").folder / "adapter"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((source / name).read_bytes())
    run(*SCORE, f"adapter={folder}")
    tensors = {k: v + 1 for k, v in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"other inputs \(adapter differ\)"):
        run(*SCORE, f"adapter={folder}")


@pytest.mark.parametrize("dry_run", [False, True], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("router=top_p +router_options.p=1.5", r"router_options.p=1.5 must be in \(0, 1\]"),
        ("router=top_p +router_options.p=0", r"router_options.p=0.0 must be in \(0, 1\]"),
        ("router=top_p +router_options.limit=9", r"limit=9 must be in \[0, num_experts=8\]"),
        ("router=top_p +router_options.limit=1.5", "limit=1.5 must be an integer"),
        ("router=switch +router_options.capacity_factor=0", "capacity_factor=0.0 must be > 0"),
        ("router=threshold +router_options.t_max=2", r"t_max=2.0 must be in \(0, 1\]"),
        ("router=dense +router_options.temperature=0", "temperature=0.0 must be > 0"),
        ("+router_options.jitter=1", r"jitter=1.0 must be in \[0, 1\)"),
        ("+router_options.z_loss=-1", "z_loss=-1.0 must be >= 0"),
        ("+router_options.z_loss=1 router_loss_coef=0", "which router_loss_coef=0 switches off"),
        ("+router_options.normalise=2", "normalise=2 must be true or false"),
        ("+router_options.temperature=hot", "temperature=hot must be a finite number"),
        ("+router_options.p=0.5", "p is not an option of router=top_k: it has temperature,"),
        ("router_options.q=1", "q is not an option of router=top_k: it has temperature,"),
        ("router=uniform +router_options.p=1", "not an option of router=uniform: it has none"),
    ],
)
def test_a_router_s_options_are_checked_before_weights_are_read(
    words: str, told: str, dry_run: bool, configure: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(state, "load_model", None)
    own = [f"+method.{w[1:]}" if w[0] == "+" else f"method.{w}" for w in words.split()]
    config = configure("method=mixlora", *own, f"dry_run={str(dry_run).lower()}")
    with pytest.raises(UserError, match=told) as raised:
        experiment.run(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dry_run", [False, True], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("mixlora top_k=1 router_loss_coef=0", "router_loss_coef=0: the router of layer 0 would"),
        ("mola num_experts=2 top_k=2/1", "router_loss_coef=0: the router of layer 1 would learn"),
        ("mixlora_top_p router_options.limit=1 router_loss_coef=0", "router of layer 0 would"),
        ("mixlora router=switch", "method.top_k=2: router=switch gives a token one expert: set"),
        ("mola router=switch top_k=1/2 router_loss_coef=1e-3", "method.top_k=1/2: router=switch"),
        ("mola router=switch top_k=1 +router_options.normalise=true +router_options.z_loss=0",
         "router of layer 0 would learn nothing"),
        ("mola router=switch +router_options.z_loss=0 +router_options.skip=true",
         "method.router_options.skip=True: a single projection has no feed-forward block"),
        ("mixlora_dense top_k=3", "method.top_k=3: router=dense does not read it: leave it out"),
        ("mixlora_top_p num_experts=1/4 top_k=1/3", "method.top_k=1/3: router=top_p does not"),
        ("mola router=uniform top_k=1", "method.top_k=1: router=uniform does not read it"),
        ("hydralora top_k=2", "method.top_k=2: router=dense does not read it"),
        ("goat kernel=reference", "kernel=reference changes nothing in method=goat"),
        ("loramoe mixture_options.d=0.5", "method.mixture_options.d=0.5 acts on the loss alone"),
    ],
)  # fmt: skip
def test_options_that_do_nothing_are_reported_before_weights_are_read(
    words: str, told: str, dry_run: bool, configure: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(state, "load_model", None)
    method, *rest = words.replace("kernel=", "@kernel=").split()
    group = {"+": "+method.", "@": ""}
    own = [f"{group[w[0]]}{w[1:]}" if w[0] in group else f"method.{w}" for w in rest]
    config = configure(f"method={method}", *own, f"dry_run={str(dry_run).lower()}")
    with pytest.raises(UserError, match=told) as raised:
        experiment.run(config)
    assert "\n" not in str(raised.value)


def test_what_cannot_run_leaves_nothing(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that cannot be had is found before the run has a folder."""

    def refuse(*_: Any) -> None:
        raise UserError("the hub cannot be reached")

    monkeypatch.setattr(state, "load_tokenizer", refuse)
    config = configure("method=lora")
    with pytest.raises(UserError, match="hub cannot be reached"):
        experiment.run(config)
    assert not Path(config.output_dir).exists()


def test_each_input_is_read_once(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Task files, tokenizer and weights of a run that trains and scores before and after."""
    seen: Counter[str] = Counter()

    def counted(module: Any, name: str, key: Callable[..., str]) -> None:
        original = getattr(module, name)

        def spy(*args: Any, **kwargs: Any) -> Any:
            seen[f"{name} {key(*args)}"] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)

    counted(inputs, "load_split", lambda data, task, split, *_: f"{task}/{split}")
    counted(inputs, "check_model", lambda model: model.name)
    counted(state, "load_tokenizer", lambda model: model.name)
    counted(state, "load_model", lambda model, *_: model.name)
    experiment.run(configure("method=lora", "evaluation.before_training=true"))
    assert seen == {
        "load_split arc_e/train": 1,
        "load_split arc_e/test": 1,
        "check_model tiny": 1,
        "load_tokenizer tiny": 1,
        "load_model tiny": 1,
    }


def test_each_file_is_opened_once(run: Callable[..., Any], tmp_path: Path) -> None:
    """Of a model's folder and of local data, by a run from its checks to its record."""
    config = compose(["model=tiny"])
    load_model(config.model, torch.float32).save_pretrained(tmp_path / "model")
    load_tokenizer(config.model).save_pretrained(tmp_path / "model")
    (tmp_path / "data" / "arc_e").mkdir(parents=True)
    for split in ("train", "test"):
        rows = embedded_rows("arc_e", split, 0)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / "arc_e" / f"{split}.jsonl").write_text(text)
    time.sleep(2 * SETTLED / 1e9)  # Files that were written just now are not remembered.
    places = (f"model.path={tmp_path / 'model'}", f"data.path={tmp_path / 'data'}")
    with opens_below(tmp_path) as opened:
        run("method=lora", "task=arc_e", "data=local", *places)
    read = {name: n for name, n in opened.items() if name.startswith(("model/", "data/"))}
    assert read == {
        "data/arc_e/train.jsonl": 1,
        "data/arc_e/test.jsonl": 1,
        # Once here and once by transformers' `AutoConfig`, which reads it for the weights itself.
        "model/config.json": 2,
        "model/generation_config.json": 2,
        # Its header, then samples for the fingerprint. The safetensors library does not count.
        "model/model.safetensors": 2,
        "model/tokenizer.json": 2,
        # Three times by `AutoTokenizer`, which cannot be given its content.
        "model/tokenizer_config.json": 4,
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("adapter=nowhere", "method=none"), "adapter=nowhere does not exist"),
        (("adapter=nowhere", "method=lora"), "add method=none"),
        (("tracker=tensorboard", "method=none"), "use tracker=none"),
        (("data=embedded", "data.path=nowhere"), "data.path=nowhere"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    overrides: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert execute(["experiment=smoke", f"output_dir={tmp_path}", *overrides]) == 2
    assert message in capsys.readouterr().err


def test_truncated_and_foreign_adapters_are_refused(
    finished: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = tmp_path / "adapter"
    # Without the record beside it, which would tell at once what it was trained on.
    shutil.copytree(finished("method=mixlora").folder / "adapter", source)
    common = ["experiment=smoke", "method=none", f"output_dir={tmp_path / 'out'}"]
    assert execute([*common, f"adapter={source}", "model=tiny_gemma"]) == 2
    assert "was trained on tiny (random tiny seed=42), not on tiny_gemma" in capsys.readouterr().err
    (source / "base_model.json").unlink()
    assert execute([*common, f"adapter={source}", "model=tiny_gemma"]) == 2
    assert "does not fit this base model" in capsys.readouterr().err
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    whole = (source / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert execute([*common, f"adapter={folder}"]) == 2
    error = capsys.readouterr().err
    assert "truncated or damaged" in error
    assert "Traceback" not in error
    assert not list((tmp_path / "out").glob("*/record.json"))


def test_a_local_model_brings_its_own_shape(run: Callable[..., Any], tmp_path: Path) -> None:
    config = compose(["model=tiny", "model.config={num_hidden_layers: 3, intermediate_size: 96}"])
    load_model(config.model, torch.float32).save_pretrained(tmp_path / "model")
    load_tokenizer(config.model).save_pretrained(tmp_path / "model")
    done = run("method=mixlora", f"model.path={tmp_path / 'model'}")
    assert done.record["config"]["model"]["config"]["num_hidden_layers"] == 3
    tensors = load_file(done.folder / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == done.record["parameters"]["trainable"]
    # Other weights in the same folder are another input, though every setting is the same.
    load_model(config.model, torch.float32, seed=7).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"other inputs \(model differ\)"):
        run("method=mixlora", f"model.path={tmp_path / 'model'}")


def test_a_sweep_checks_the_data_of_every_cell_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for split in ("train", "test"):
        (tmp_path / "data" / "boolq").mkdir(parents=True, exist_ok=True)
        row = '{"question": "is it so", "passage": "It is.", "answer": true}\n'
        (tmp_path / "data" / "boolq" / f"{split}.jsonl").write_text(row)
    overrides = ["model=tiny", "data=local", f"data.path={tmp_path / 'data'}"]
    out = f"output_dir={tmp_path / 'out'}"
    assert execute(["-m", *overrides, "task=boolq,siqa", "trainer=smoke", out]) == 2
    assert "siqa" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*/record.json"))
