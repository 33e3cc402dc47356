"""Whole runs of methods that are no mixtures with routers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from composed import compose

from mixlora_exp.cli.train import execute
from mixlora_exp.config.resolve import fingerprint
from mixlora_exp.errors import UserError
from mixlora_exp.records.record import read_record
from mixlora_exp.runs.together import run_together

METHODS = ["rslora", "lora_plus", "lora_fa", "pissa", "lora_ga", "vera", "adalora", "fedpara",
           "hira"]  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [m if m in ("vera", "adalora") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS],
)
def test_from_the_command_line(tmp_path: Path, method: str) -> None:
    assert execute(["experiment=smoke", f"method={method}", f"output_dir={tmp_path}"]) == 0
    (path,) = tmp_path.glob(f"tiny-{method}-*/record.json")
    record = read_record(path)
    assert (record["status"], record["train"]["steps"]) == ("finished", 2)
    assert record["train"]["not_chosen"] == {}
    assert record["parameters"]["trainable"] > 0


def test_an_adapter_scores_as_in_its_own_run(
    finished: Callable[..., Any], run: Callable[..., Any]
) -> None:
    trained = finished("method=vera")
    scored = run("method=none", "evaluation.limit=8", f"adapter={trained.folder / 'adapter'}")
    found = scored.record["adapter"]
    assert (found["peft_type"], found["method"]) == ("VERA", "vera")
    assert found["trained_by"]["config"]["method"]["peft"] == {"r": 256, "d_initial": 0.1}
    assert scored.record["scores"] == trained.record["scores"]


@pytest.mark.parametrize("method", ["vera", "lora_ga"])
def test_some_train_alone(tmp_path: Path, method: str) -> None:
    words = ["experiment=smoke", f"output_dir={tmp_path}"]
    configs = [compose([*words, f"method={name}"]) for name in ("lora", method)]
    told = f"entry 2 has method={method}, which cannot share a base model"
    with pytest.raises(UserError, match=told):
        run_together(configs)


@pytest.mark.slow
def test_the_others_train_together(tmp_path: Path) -> None:
    entries = "adapters=[rslora,lora_plus,lora_fa,pissa,mixlora]"
    assert execute(["experiment=smoke", entries, f"output_dir={tmp_path}"]) == 0
    names = {path.parent.name.split("-")[1] for path in tmp_path.glob("*/record.json")}
    assert names == {"rslora", "lora_plus", "lora_fa", "pissa", "mixlora"}


def test_each_setting_makes_another_run() -> None:
    """Those of before have their names: the values of then are left out of the fingerprint."""
    changed = ["rslora=true", "lora_fa=true", "lora_plus_ratio=2"]
    found = {fingerprint(compose(["method=lora", f"method.{word}"])) for word in changed}
    assert len(found | {fingerprint(compose(["method=lora"]))}) == 4
