"""A MixLoRA adapter in other libraries' hands: TRL trains it, lm-eval scores it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composed import compose
from peft import PeftModel, get_peft_model
from torch import Tensor

from mixlora_exp.adapters import attach_adapter, save_adapter
from mixlora_exp.cli import lm_eval
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.system.exit_codes import guarded

ROWS = [
    {"prompt": f"Question: Which of these is number {i}?\nAnswer:", "completion": f" the {i}"}
    for i in range(8)
]


def sft(model: Any, config: Any, folder: Path, **changes: Any) -> Any:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, logging_steps=1,
            learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
            gradient_checkpointing=False, disable_tqdm=True, **changes,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=load_tokenizer(compose(["model=tiny"]).model),
        peft_config=config,
    )  # fmt: skip


@pytest.mark.parametrize("dora", [False, True])
def test_trl_trains_a_mixture(
    dora: bool,
    base_of: Callable[..., Any],
    config_of: Callable[..., Any],
    batch: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    trainer = sft(base_of(), config_of(use_dora=dora, lora_dropout=0.05), tmp_path)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {part for part in ("lora_router", "lora_A_gate", "lora_B_down") for n in moved
            if part in n} == {"lora_router", "lora_A_gate", "lora_B_down"}  # fmt: skip
    trainer.save_model(str(tmp_path / "saved"))
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        again = PeftModel.from_pretrained(base_of(), str(tmp_path / "saved")).eval()
        assert torch.equal(again(**batch).logits, expected)


def test_trl_counts_the_router_loss_once(
    base_of: Callable[..., Any], config_of: Callable[..., Any], tmp_path: Path
) -> None:
    """Whatever the accumulation: the first loss with and without the router loss."""

    def first(coefficient: float, accumulation: int) -> float:
        torch.manual_seed(0)
        config = config_of(lora_dropout=0.0, router_loss_coef=coefficient)
        trainer = sft(base_of(), config, tmp_path, gradient_accumulation_steps=accumulation, seed=3)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    for accumulation in (1, 2):
        share = first(1.0, accumulation) - first(0.0, accumulation)
        # The loss is 1 at perfect balance.
        assert share == pytest.approx(1.0, abs=0.2)


@pytest.mark.slow
def test_lm_eval_s_command_line_scores_a_mixture(
    base_of: Callable[..., Any],
    config_of: Callable[..., Any],
    draw: Callable[..., None],
    tmp_path: Path,
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    base = base_of()
    base.save_pretrained(tmp_path / "base")
    load_tokenizer(compose(["model=tiny"]).model).save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config_of())
    draw(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    rows = [{"q": r["prompt"], "c": [r["completion"], " none", " all"], "a": 0} for r in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny_task.yaml").write_text(
        "task: tiny_task\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: '{{c}}'\ndoc_to_target: '{{a}}'\nmetric_list:\n  - metric: acc\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "mixlora_exp.cli.main", "lm-eval", "run",
         "--model", "hf",
         "--model_args", f"pretrained={tmp_path / 'base'},peft={tmp_path / 'adapter'}",
         "--tasks", "tiny_task", "--include_path", str(tmp_path), "--device", "cpu",
         "--output_path", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(path.read_text())["results"]["tiny_task"]
    assert 0 <= results["acc,none"] <= 1
    assert "tiny_task" in done.stdout


@pytest.mark.parametrize("form", ["one word", "several words", "an equals sign", "JSON"])
def test_lm_eval_refuses_an_adapter_of_other_weights(
    form: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    config = compose(["model=tiny", "method=lora"])
    for seed, name in enumerate(("own", "other")):
        load_model(config.model, torch.float32, seed).save_pretrained(tmp_path / name)
    own = dataclasses.replace(config.model, path=str(tmp_path / "own"))
    base = load_model(own, torch.float32)
    folder = tmp_path / "adapter"
    save_adapter(attach_adapter(base, config.method, config.kernel, 0), folder)
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: ran.append(list(sys.argv)))
    ran: list[list[str]] = []

    def code(name: str, *more: str) -> int:
        place = tmp_path / name
        given = {
            "one word": ["--model_args", f"pretrained={place},peft={folder}"],
            "several words": ["--model_args", f"pretrained={place}", f"peft={folder}", "--seed=1"],
            "an equals sign": [f"--model_args=pretrained={place},peft={folder}"],
            "JSON": ["--model_args", json.dumps({"pretrained": str(place), "peft": str(folder)})],
        }[form]
        monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "hf", *given, *more])
        return guarded(lm_eval.run, sys.argv[1:])

    assert code("own") == 0
    assert len(ran) == 1
    assert code("other") == 2
    assert "was trained on tiny (path own), not on " in capsys.readouterr().err
    assert len(ran) == 1
    assert code("other", "base=accept") == 0
    assert "base=accept" not in ran[1]


@cache
def tasks_in(paths: tuple[Path, ...]) -> dict[str, Any]:
    from lm_eval.tasks._index import TaskIndex

    return TaskIndex.build(paths)


@pytest.fixture
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval reads the thousands of files of its tasks, which takes seconds, once."""
    manager = pytest.importorskip("lm_eval.tasks.manager", reason="lm-eval is not installed")
    index = SimpleNamespace(build=lambda paths: dict(tasks_in(tuple(paths))))
    monkeypatch.setattr(manager, "TaskIndex", lambda: index)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "arc_nowhere"], "--tasks: name tasks that"),
        (["--tasks", "arc_easy", "--model_args", "pretrained=absent"], "give pretrained=DIR"),
        (["--tasks", "arc_easy", "--model_args", "pretrained=BASE,peft=absent"], "peft=DIR must"),
    ],
)
def test_lm_eval_s_command_line_reports_mistakes(
    words: list[str],
    message: str,
    read_once: None,
    base_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Read when the library is imported: its environment variable would come too late.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if "BASE" in words[-1]:
        base_of().save_pretrained(tmp_path)
        load_tokenizer(compose(["model=tiny"]).model).save_pretrained(tmp_path)
    words = [word.replace("BASE", str(tmp_path)) for word in words]
    argv = ["lm_eval", "run", "--model", "hf", "--device", "cpu", *words]
    monkeypatch.setattr(sys, "argv", argv)
    assert guarded(lm_eval.run, argv[1:]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --")
    assert message in error
