"""Whole runs of mixtures in linear layers: trained, scored, loaded again, merged, refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixlora_exp.adapters import attach_adapter
from mixlora_exp.cli.train import execute
from mixlora_exp.config.command import compose
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.records.record import read_record
from mixlora_exp.runs import run as experiment
from mixlora_exp.runs import state
from mixlora_exp.serving.merge import write_merged
from mixlora_exp.serving.open import Opened

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    words = ["experiment=smoke", "method=mola", f"output_dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("tiny-mola-*/record.json")
    record = read_record(path)
    assert (record["status"], record["train"]["steps"]) == ("finished", 2)
    # 14 routers; 2 and 6 experts in the two layers, the others' share is 0.
    load = record["train"]["expert_load"]
    assert [len(router) for router in load] == [6] * 14
    assert all(router[2:] == [0] * 4 for router in load[:7])
    assert all(sum(router) == pytest.approx(1) for router in load)
    scored = record["scores"][0]["expert_load"]
    assert [len(router) for router in scored] == [6] * 14
    assert all(router[2:] == [0] * 4 for router in scored[:7])
    told = "method.num_experts=2/4/6/8 has more groups than the model has layers (2): they get 2, 6"
    assert told in done.stdout + done.stderr


def test_an_adapter_scores_as_in_its_own_run(
    finished: Callable[..., Any], run: Callable[..., Any]
) -> None:
    trained = finished("method=goat", "method.num_experts=4")
    scored = run("method=none", "evaluation.limit=8", f"adapter={trained.folder / 'adapter'}")
    found = scored.record["adapter"]
    assert (found["peft_type"], found["method"]) == ("LORA_MIXTURE", "goat")
    assert found["trained_by"]["config"]["method"]["mixture"] == "goat"
    assert scored.path.parent.name.startswith("tiny-goat-")
    assert scored.record["scores"] == trained.record["scores"]


def test_trained_and_scored_together(tmp_path: Path) -> None:
    entries = "adapters=[mola,adamole,{method:goat,method.rank:2},moslora,MIXLORA,lora]"
    entries = entries.replace("MIXLORA", "{method:mixlora,method.num_experts:[2,4]}")
    assert execute(["experiment=smoke", entries, f"output_dir={tmp_path}"]) == 0
    names = {path.parent.name.split("-")[1] for path in tmp_path.glob("*/record.json")}
    assert names == {"mola", "adamole", "goat", "moslora", "mixlora", "lora"}
    (path,) = tmp_path.glob("tiny-mixlora-*/adapter/adapter_config.json")
    assert json.loads(path.read_text())["num_experts"] == [2, 4]


def opened(method: str) -> Opened:
    config = compose(["model=tiny", f"method={method}", "trainer.precision=float32"])
    base = load_model(config.model, torch.float32, 0)
    model = attach_adapter(base, config.method, config.kernel, seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight += 0.1 * torch.randn(weight.shape)
    return Opened(model.eval(), load_tokenizer(config.model), config)


def test_moslora_is_written_merged(tmp_path: Path) -> None:
    """`write_merged` compares what it wrote with the adapter."""
    write_merged(opened("moslora"), tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").is_file()


def test_others_are_not_merged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a hydralora adapter cannot be merged"):
        write_merged(opened("hydralora"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("method", "words", "told"),
    [
        ("mola", "num_experts=[2,2,2]", "method.num_experts has 3 entries, and the model has 2"),
        ("mola", "top_k=[2]", "method.top_k has 1 entries"),
        ("mixlora", "num_experts=[2,2,2]", "method.num_experts has 3 entries, and the model has 2"),
        ("mixdora", "num_experts=2/4/6/8 top_k=3/1", "method.top_k=3/1 is 3 in layer 0, which has"),
        ("mixlora", "num_experts=2/4 router=top_p router_options.limit=3", "limit=3 must be in"),
        ("mola", "num_experts=2/4/6/8 top_k=3/1", "method.top_k=3/1 is 3 in layer 0, which has 2"),
        ("mola", "router=top_p router_options.p=2", r"method.router_options.p=2.0 must be in"),
        ("mola", "mixture_options.d=1", "method.mixture_options.d is not an option of mola"),
        ("goat", "rank=20", "method.rank=20: each of 8 experts starts from"),
        ("loramoe", "mixture_options.d=-1", r"method.mixture_options.d=-1.0 must be in \[0, 1\)"),
        ("moslora", "num_experts=2 top_k=2", "method.num_experts=2: mixture=moslora has 1 expert"),
    ],
)
def test_mistakes_are_reported_before_weights_are_read(
    method: str, words: str, told: str, configure: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(state, "load_model", None)
    own = [f"++method.{word}" for word in words.split()]
    for dry_run in (False, True):
        config = dataclasses.replace(configure(f"method={method}", *own), dry_run=dry_run)
        with pytest.raises(UserError, match=told) as raised:
            experiment.run(config)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("num_experts=0", "method.num_experts=0 is not valid: must be a whole number >= 1, a list"),
        ("num_experts=2/a", "method.num_experts=2/a is not valid"),
        ("num_experts=3.5", "method.num_experts=3.5 is not valid"),
        ("num_experts=4 top_k=5", r"method.top_k=5 is not valid: must be in \[1, num_experts=4\]"),
        ("dora=true", "method.dora=true is not valid"),
        ("mixture=nola", "mixture=nola"),
    ],
)
def test_values_are_checked(words: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        compose(["method=mola", *(f"method.{word}" for word in words.split())])


def test_a_plan_shows_experts_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["method=mixlora", "method.num_experts=[2,4]", "method.top_k=1/2"]
    words = ["experiment=smoke", f"output_dir={tmp_path}", "dry_run=true"]
    assert execute([*words, *own]) == 0
    out = capsys.readouterr().out
    assert "experts     layer 0: E 2, K 1; layer 1: E 4, K 2\n" in out
    assert "router 384," in out  # 6 rows of 64.
    for router, told in (("dense", "K 2; layer 1: E 4, K 4"), ("top_p", "K up to 2; layer 1: E 4")):
        changed = [f"method=mixlora_{router}", "method.num_experts=[2,4]"]
        assert execute([*words, *changed]) == 0
        assert f"experts     layer 0: E 2, {told}" in capsys.readouterr().out
    assert execute([*words, *own, "method.top_k=[1,5]"]) == 2
    told = "error: method.top_k=[1,5] is not valid: must be in [1, num_experts=[2,4]]\n"
    assert capsys.readouterr().err == told
    assert execute([*words, "method=mixlora"]) == 0
    assert "experts " not in capsys.readouterr().out
