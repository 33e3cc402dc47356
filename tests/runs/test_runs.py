"""Whole runs: what is recorded, and what is repeated."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import compose
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.config.resolve import fingerprint, to_dict
from mixlora_exp.config.run_names import run_name
from mixlora_exp.config.schema import Config
from mixlora_exp.data.sources import load_split
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.models.parameters import count_parameters
from mixlora_exp.plans.plan import plan
from mixlora_exp.runs import run as experiment
from mixlora_exp.runs import state

METHODS = ["none", *PAPER_METHODS]
VARIANTS = [(f"method={method}",) for method in METHODS]
VARIANTS += [("model=tiny_gemma", "method=mixdora"), ("model=tiny_gemma", "method=none")]
BOTH = ("evaluation.protocols=[label_logits,answer_text]", "evaluation.before_training=true")
Configure = Callable[..., Config]
Start = Callable[..., Any]


def test_a_run_says_which_special_tokens_it_adds(
    run: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder whose configuration asks for BOS, and whose tokenizer.json does not."""
    source = compose(["model=tiny"]).model
    load_model(source, torch.float32).save_pretrained(tmp_path / "model")
    load_tokenizer(source).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "add_bos_token": True}))
    done = run("method=none", f"model.path={tmp_path / 'model'}", "evaluation.limit=2")
    assert "Special tokens: <s> before a text, </s> after an answer" in capsys.readouterr().out
    assert done.record["special_tokens"]["before_text"] == ["<s>"]


@pytest.mark.parametrize("dry_run", ["true", "false"])
@pytest.mark.parametrize("protocol", ["lm_eval", "generate"])
def test_what_is_longer_than_the_model_is_refused_before_training(
    dry_run: str, protocol: str, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval cuts what it scores, so that training alone is too long."""
    monkeypatch.setattr(experiment, "fit", lambda *_: pytest.fail("it was trained"))
    config = configure(
        "method=lora", "task=boolq", f"dry_run={dry_run}",
        "model.config.max_position_embeddings=64",
        f"evaluation.protocols=[{protocol}]",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"of boolq needs .* tokens, and the model has 64 pos"):
        experiment.run(config)


NO_EXPERTS = ("method=mixlora", "method.router=threshold", "+method.router_options.t_max=0.9")


def test_a_run_whose_tokens_have_no_expert_is_stopped(run: Start, tmp_path: Path) -> None:
    """Before its first step: none would ever be trained, nor the threshold."""
    with pytest.raises(UserError, match="no row of the first micro-batch has an expert"):
        run(*NO_EXPERTS)
    assert not list(tmp_path.rglob("record.json"))


@pytest.mark.parametrize("overrides", VARIANTS, ids=" ".join)
def test_record_is_complete(overrides: tuple[str, ...], finished: Start) -> None:
    run = finished(*overrides)
    record, config = run.record, run.config
    assert record["status"] == "finished"
    assert record["name"] == run.folder.name == run_name(config)
    assert record["fingerprint"] == fingerprint(config)
    assert record["config"] == to_dict(config)
    assert record["model"]["source"] == "random"
    assert record["special_tokens"] == {
        "before_text": [],
        "after_prompt": [],
        "after_answer": "</s>",
    }
    assert record["dtype"] == "float32"
    assert record["seconds"] >= 0
    counts = count_parameters(config.model, config.method)
    assert record["parameters"]["trainable"] == counts.trainable
    for name in ("git", "python", "packages", "hardware"):
        assert name in record["provenance"]
    assert record["provenance"]["packages"]["torch"]
    splits = ["arc_e/test"] if config.method.name == "none" else ["arc_e/train", "arc_e/test"]
    assert sorted(record["data"]) == sorted(splits)
    for split, files in record["data"].items():
        (file,) = files
        loaded = load_split(config.data, *split.split("/"))
        assert file["rows"] == len(loaded.items)
        assert file["sha256"] == loaded.files[0].sha256
        assert len(file["sha256"]) == 64
    assert json.loads(run.path.read_text()) == record
    assert not list(run.folder.rglob("*.tmp"))
    assert not list(run.folder.rglob("*partial*"))


@pytest.mark.parametrize("overrides", VARIANTS, ids=" ".join)
def test_scores_follow_from_the_predictions(overrides: tuple[str, ...], finished: Start) -> None:
    run = finished(*overrides)
    (score,) = run.record["scores"]
    predictions = run.predictions("arc_e/label_logits")
    assert len(predictions) == score["n"] == 8
    assert score["accuracy"] == sum(p["prediction"] == p["answer"] for p in predictions) / 8
    for entry in predictions:
        assert entry["prediction"] == entry["scores"].index(max(entry["scores"]))
    nats = [entry["gold_log_likelihood"] for entry in predictions]
    assert score["gold_log_likelihood"] == pytest.approx(sum(nats) / 8)
    chosen = load_split(run.config.data, "arc_e", "test").limited(8, run.config.data.seed).items
    assert [entry["id"] for entry in predictions] == [item.id for item in chosen]
    assert [entry["answer"] for entry in predictions] == [item.answer for item in chosen]
    assert score["chance"] == pytest.approx(sum(1 / len(item.options) for item in chosen) / 8)
    p = score["accuracy"]
    assert score["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 8))
    assert score["batch_check"]["items"] == 2


@pytest.mark.parametrize("method", METHODS[1:])
def test_training_is_summed_up(method: str, finished: Start) -> None:
    run = finished(f"method={method}")
    train = run.record["train"]
    expected = plan(run.config)
    assert (train["steps"], train["examples"]) == (expected.steps, expected.examples) == (2, 8)
    assert train["tokens"] == expected.tokens, "two steps of four are one epoch of eight"
    assert [entry["step"] for entry in train["curve"]] == [1, 2]
    assert train["final_loss"] == train["curve"][-1]["loss"]
    mixture = method.startswith("mix")
    assert (train["expert_load"] is not None) is mixture
    assert (run.record["scores"][0]["expert_load"] is not None) is mixture
    assert run.record["kernel"] == "exact", "what auto stands for on a CPU, fused LoRA included"
    adapter = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["peft_type"] == ("MIXLORA" if mixture else "LORA")
    assert adapter["use_dora"] is method.endswith("dora")
    weights = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert sum(w.numel() for w in weights.values()) == run.record["parameters"]["trainable"]
    log = (run.folder / "train_log.jsonl").read_text().splitlines()
    assert len([line for line in log if '"loss"' in line]) == 2


def test_the_base_model_alone_is_not_trained(finished: Start) -> None:
    run = finished("method=none")
    assert run.record["train"] is None
    assert run.record["kernel"] is None
    assert run.record["parameters"]["trainable"] == 0
    assert not (run.folder / "adapter").exists()


def test_both_protocols_before_and_after(finished: Start) -> None:
    run = finished("method=mixlora", "task.evaluate=[arc_e,boolq]", *BOTH)
    keys = [(s["task"], s["protocol"]) for s in run.record["scores"]]
    assert sorted(keys) == sorted(
        (t, p) for t in ("arc_e", "boolq") for p in ("label_logits", "answer_text")
    )
    assert [(s["task"], s["protocol"]) for s in run.record["scores_before"]] == keys
    assert set(run.record["predictions"]) == {f"{t}/{p}" for t, p in keys}
    for score in run.record["scores"]:
        predictions = run.predictions(f"{score['task']}/{score['protocol']}")
        assert score["accuracy"] == sum(p["prediction"] == p["answer"] for p in predictions) / 8
        if score["protocol"] == "answer_text":
            right = sum(p["prediction_normalized"] == p["answer"] for p in predictions)
            assert score["accuracy_normalized"] == right / 8
    base = finished("method=none")
    before = [s for s in run.record["scores_before"] if s["protocol"] == "label_logits"]
    assert before[0]["gold_log_likelihood"] == base.record["scores"][0]["gold_log_likelihood"]
    assert before[0]["expert_load"] is None


def test_a_finished_run_is_not_repeated(
    run: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run("method=lora")
    stamp = first.path.stat().st_mtime_ns
    # As it is left where the run is killed just after its record.
    (first.folder / "checkpoints").mkdir()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(state, "load_model", lambda *a, **k: pytest.fail("it ran again"))
        again = run("method=lora")
    told = capsys.readouterr().out
    assert told.startswith(f"Already finished: {first.path}")
    assert "arc_e" in told
    assert again.path == first.path
    assert not (first.folder / "checkpoints").exists()
    assert first.path.stat().st_mtime_ns == stamp
    forced = run("method=lora", "force=true")
    assert forced.path == first.path
    assert first.path.stat().st_mtime_ns != stamp
    assert forced.predictions("arc_e/label_logits") == first.predictions("arc_e/label_logits")
    assert forced.record["scores"][0]["accuracy"] == first.record["scores"][0]["accuracy"]
    losses = [[e["loss"] for e in r.record["train"]["curve"]] for r in (first, forced)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", ["lora", "mixdora"])
def test_what_is_scored_is_what_is_on_disk(
    method: str, run: Start, finished: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the saved B set to zero (and DoRA's magnitude at the norm) only the base is left."""
    changes = ["trainer.learning_rate=0.05"]
    base, trained = finished("method=none"), finished(f"method={method}", *changes)
    original = experiment.save_adapter

    def save_zeroed(model: PeftModel, folder: Path) -> None:
        original(model, folder)
        file = folder / "adapter_model.safetensors"
        weights = load_file(file)
        for name, weight in weights.items():
            if "lora_B" in name:
                weights[name] = torch.zeros_like(weight)
            if "magnitude" in name:
                weights[name] = start[name].clone()
        save_file(weights, file, metadata={"format": "pt"})

    start: dict[str, torch.Tensor] = {}
    attach = experiment.attach_adapter

    def attach_and_keep(*args: Any) -> PeftModel:
        model = attach(*args)
        start.update({n: w.detach().clone() for n, w in get_peft_model_state_dict(model).items()})
        return model

    monkeypatch.setattr(experiment, "save_adapter", save_zeroed)
    monkeypatch.setattr(experiment, "attach_adapter", attach_and_keep)
    zeroed = run(f"method={method}", *changes)
    found, expected, other = (
        [entry["scores"] for entry in r.predictions("arc_e/label_logits")]
        for r in (zeroed, base, trained)
    )
    for one, two in zip(found, expected, strict=True):
        assert one == pytest.approx(two, abs=1e-4)
    difference = torch.tensor(found) - torch.tensor(other)
    assert difference.abs().max() > 1e-2, "the trained weights score otherwise"


def write_rows(folder: Path, change: str = "") -> Path:
    """ARC-Easy in the official schema: a few rows per split."""
    for split, count in (("train", 8), ("test", 6)):
        rows = [
            {
                "id": f"{split}-{n}",
                "question": f"What is {n} and {n}?{change}",
                "choices": {"text": [str(2 * n), str(n), str(2 * n + 1)], "label": list("ABC")},
                "answerKey": "A",
            }
            for n in range(count)
        ]
        (folder / "arc_e").mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "arc_e" / f"{split}.jsonl").write_text(text)
    return folder


def test_local_files(run: Start, tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "mine")
    local = ["data=local", f"data.path={folder}", "data.train_limit=null"]
    result = run("method=mixlora", *local)
    for split, rows in (("train", 8), ("test", 6)):
        file = folder / "arc_e" / f"{split}.jsonl"
        (entry,) = result.record["data"][f"arc_e/{split}"]
        assert entry == {
            "path": str(file),
            "rows": rows,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
    assert result.record["scores"][0]["n"] == 6
    assert result.record["scores"][0]["majority_class"] == 1.0
    # The same rows elsewhere are the same run.
    moved = folder.rename(tmp_path / "elsewhere")
    again = run("method=mixlora", "data=local", f"data.path={moved}", "data.train_limit=null")
    assert again.path == result.path


def test_changed_data_under_the_same_settings_is_refused(run: Start, tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "mine")
    local = ["method=lora", "data=local", f"data.path={folder}", "data.train_limit=null"]
    first = run(*local)
    before = first.path.read_bytes()
    write_rows(folder, change=" Please!")
    with pytest.raises(UserError, match=r"other inputs \(arc_e/.*force=true"):
        run(*local)
    assert first.path.read_bytes() == before
    forced = run(*local, "force=true")
    assert forced.record["data"] != first.record["data"]


def test_mistakes_in_data_come_before_any_model(
    run: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "load_model", lambda *a, **k: pytest.fail("too late"))
    with pytest.raises(UserError, match=r"data\.path"):
        run("data=local", f"data.path={tmp_path / 'nowhere'}")
    folder = write_rows(tmp_path / "mine")
    (folder / "arc_e" / "test.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(UserError, match=r"test\.jsonl"):
        run("data=local", f"data.path={folder}")


def test_a_dry_run_writes_nothing(configure: Configure) -> None:
    config = configure("dry_run=true")
    assert experiment.run(config) is None
    assert not Path(config.output_dir).exists()


def test_the_random_state_before_a_run_does_not_matter(finished: Start, run: Start) -> None:
    torch.manual_seed(987)
    again = run("method=mixlora")
    once = finished("method=mixlora")
    assert again.predictions("arc_e/label_logits") == once.predictions("arc_e/label_logits")
    files = [r.folder / "adapter" / "adapter_model.safetensors" for r in (again, once)]
    one, other = (load_file(file) for file in files)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_seeds_give_runs_of_their_own(finished: Start, run: Start) -> None:
    other = run("method=lora", "seed=7")
    once = finished("method=lora")
    assert other.record["fingerprint"] != once.record["fingerprint"]
    assert other.predictions("arc_e/label_logits") != once.predictions("arc_e/label_logits")


def test_kernels_agree(finished: Start) -> None:
    reference = finished("method=mixdora", "kernel=reference", "method.dropout=0")
    auto = finished("method=mixdora", "kernel=auto", "method.dropout=0")
    assert reference.record["kernel"] == "reference"
    assert auto.record["kernel"] != "auto"
    losses = [[e["loss"] for e in r.record["train"]["curve"]] for r in (reference, auto)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    found = [r.record["scores"][0]["gold_log_likelihood"] for r in (reference, auto)]
    assert found[0] == pytest.approx(found[1], abs=1e-3)
