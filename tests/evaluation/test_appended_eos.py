"""A tokenizer whose template appends EOS is used as one whose template appends nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from composed import compose
from tokenizers import processors

from mixlora_exp.cli.lm_eval import _settled
from mixlora_exp.config.schema import DataConfig, DataSource, EvaluationConfig, Protocol
from mixlora_exp.data.encoding import encode_examples
from mixlora_exp.data.sources import load_split
from mixlora_exp.evaluation import Scorer, score_tests
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.models.precision import autocast
from mixlora_exp.models.tiny import build_tokenizer
from mixlora_exp.serving.open import Opened
from mixlora_exp.serving.text_generation import continuations

TASKS = ("boolq", "arc_e", "piqa")
DATA = DataConfig(name=DataSource.embedded)
FOLDERS = {"plain": "<s> $A", "appends": "<s> $A </s>"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two folders with the same weights; the template of one appends EOS."""
    found = {}
    base = load_model(compose(["model=tiny"]).model, torch.float32, seed=5)
    for name, single in FOLDERS.items():
        tokenizer = build_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        found[name] = tmp_path_factory.mktemp(name)
        base.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> dict[str, Opened]:
    configs = {k: compose(["model=tiny", f"model.path={path}"]) for k, path in folders.items()}
    return {
        name: Opened(load_model(config.model, torch.float32), load_tokenizer(config.model), config)
        for name, config in configs.items()
    }


@pytest.mark.parametrize("protocol", list(Protocol))
def test_scores_are_the_same_and_of_the_answers(
    protocol: Protocol, opened: dict[str, Opened]
) -> None:
    if protocol is Protocol.lm_eval:
        pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    tests = {task: load_split(DATA, task, "test").limited(4, 0) for task in TASKS}
    found = {}
    for name, one in opened.items():
        scorer = Scorer(one.model, one.tokenizer, autocast(torch.device("cpu"), torch.float32), 600)
        scores = score_tests(protocol, scorer, tests, DATA, EvaluationConfig(max_new_tokens=3))
        found[name] = [(score.items, score.tied, score.shortened) for score in scores]
    assert found["appends"] == found["plain"]
    generated = (Protocol.generate, Protocol.exact_match, Protocol.answer_pattern)
    if protocol not in generated:
        # " no" and " yes" were one and the same EOS.
        assert all(len(set(item.scores)) > 1 for items, _, _ in found["appends"] for item in items)


def test_training_ends_an_answer_once(opened: dict[str, Opened]) -> None:
    items = load_split(DATA, "obqa", "train").items[:5]
    plain, appends = (encode_examples(one.tokenizer, items, DATA) for one in opened.values())
    assert plain == appends
    assert all(e.input_ids.count(2) == 1 and e.input_ids[-1] == 2 for e in appends)


def test_generation_does_not_go_on_after_an_end(opened: dict[str, Opened]) -> None:
    prompts = ["The moon goes", "Which of these"]
    plain, appends = (
        list(continuations(one, prompts, max_new_tokens=6, batch_size=2)) for one in opened.values()
    )
    assert plain == appends


@pytest.mark.parametrize("chosen", [None, True, False])
def test_the_command_line_of_lm_eval_settles_its_tokenizer(
    chosen: bool | None, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(HFLM, "_create_tokenizer", _settled(HFLM._create_tokenizer))
    options: dict[str, Any] = {} if chosen is None else {"add_bos_token": chosen}
    pairs = {}
    for name, path in folders.items():
        model = HFLM(pretrained=str(path), device="cpu", dtype="float32", **options)
        pairs[name] = [model._encode_pair("Answer:", f" {word}") for word in ("no", "yes")]
    assert pairs["plain"] == pairs["appends"]
    (context, no), (_, yes) = pairs["appends"]
    assert no != yes
    assert (context[0] == 1) == (chosen is not False)
    assert 2 not in [*context, *no, *yes]
