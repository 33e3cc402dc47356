"""The steps of docs/extending/model.md, carried out as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from fake_hub import fake_hub

from mixlora_exp.cli.train import execute
from mixlora_exp.config.schema import ModelConfig, ModelSource
from mixlora_exp.models import load_model, load_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "extending" / "model.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.S)
COMMANDS = [
    shlex.split(line)[2:] for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the two files of the page, where it says that they go."""
    (yaml,) = [text for kind, text in BLOCKS if kind == "yaml"]
    (shape,) = [text for kind, text in BLOCKS if kind == "json"]
    place = tmp_path / yaml.splitlines()[0].removeprefix("# ")
    assert f"`{place.relative_to(tmp_path).with_suffix('.json')}`" in PAGE
    place.parent.mkdir(parents=True)
    place.write_text(yaml)
    place.with_suffix(".json").write_text(shape)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = [words for words in COMMANDS if "dry_run=true" in words]
    assert execute(words) == 0
    out = capsys.readouterr().out
    shape = json.loads(next(text for kind, text in BLOCKS if kind == "json"))
    layers, width = shape["num_hidden_layers"], shape["hidden_size"]
    assert f"small_qwen: {layers} layers, hidden {width}" in out
    # 1024 tied embeddings; per layer four projections with three biases, three of the block and
    # two norms; one norm more.
    attention = 2 * 64 * 64 + 2 * 64 * 32 + 64 + 2 * 32
    assert f"{1024 * 64 + 2 * (attention + 3 * 64 * 160 + 2 * 64) + 64:,} frozen" in out


def test_random_weights_are_trained_in_both_depths(folder: Path) -> None:
    tried = [words for words in COMMANDS if "experiment=smoke" in words]
    assert len(tried) == 2
    depths = []
    for words in tried:
        assert execute([*words, "output_dir=out", "data.train_limit=8", "evaluation.limit=4"]) == 0
    for record in Path("out").glob("small_qwen-*/record.json"):
        found = json.loads(record.read_text())
        assert found["status"] == "finished"
        depths.append(found["config"]["model"]["config"]["num_hidden_layers"])
    assert sorted(depths) == [1, 2]


def test_the_other_commands_have_plans(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = json.loads(next(text for kind, text in BLOCKS if kind == "json"))
    model = ModelConfig(name="small", source=ModelSource.random, config=shape)
    load_model(model, torch.float32).save_pretrained("DIR")
    load_tokenizer(model).save_pretrained("DIR")
    others = [words for words in COMMANDS if not {"dry_run=true", "experiment=smoke"} & {*words}]
    assert len(others) == 3
    with fake_hub(monkeypatch, str(folder / "hub")) as hub:
        hub.commit("owner/small-qwen", {"config.json": json.dumps(shape).encode()})
        for words in others:
            assert execute([*words, "dry_run=true"]) == 0
        assert hub.fetched() == {"config.json"}
    out = capsys.readouterr().out
    # By a folder, by a repository and by a name: the same shape, and the place names the run.
    assert out.count("2 layers, hidden 64") == 3
    for name in ("DIR", "small-qwen", "small_qwen"):
        assert f"{name}-mixlora-" in out or f"{name}-mixdora-" in out
