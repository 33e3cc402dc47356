"""A run's adapter is handed over: with a model card, through the hub, and used from there."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from composed import compose
from fake_hub import FakeHub, fake_hub
from torch import nn

from mixlora_exp.adapters import attach_adapter, save_adapter
from mixlora_exp.cli import generate as generation
from mixlora_exp.cli.evaluate import run as evaluate
from mixlora_exp.cli.push import run as push
from mixlora_exp.cli.train import execute
from mixlora_exp.config.choices import Quantization
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import is_quantized, matrix_of
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.records.card import model_card
from mixlora_exp.records.record import finish_record, read_run, write_json
from mixlora_exp.system.exit_codes import guarded

SCORE = ("data=embedded", "task=arc_e", "evaluation.limit=2", "trainer.precision=float32")
REPO = "owner/name"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch, str(tmp_path / "hub")) as found:
        yield found


@pytest.fixture
def trained(finished, tmp_path: Path) -> Path:
    """The folder of a finished run, to change."""
    shutil.copytree(finished("method=mixlora").folder, tmp_path / "run")
    return tmp_path / "run"


def test_the_run_writes_a_card(finished) -> None:
    run = finished("method=mixlora")
    card = (run.folder / "adapter" / "README.md").read_text()
    assert "More Information Needed" not in card
    assert run.record["content_sha256"] in card
    assert f"| arc_e | label_logits | {100 * run.record['scores'][0]['accuracy']:.1f} |" in card
    for path in (run.folder / "adapter").iterdir():
        assert str(run.folder.parent).encode() not in path.read_bytes(), path.name


def test_the_three_lines_of_the_card_load_it(finished) -> None:
    run = finished("method=mixlora")
    card = (run.folder / "adapter" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert len(code.splitlines()) == 3
    found: dict = {}
    exec(code.replace("DIR", str(run.folder / "adapter")), found)
    assert found["model"](**found["tokenizer"]("a", return_tensors="pt")).logits.isfinite().all()


def test_the_lines_hold_the_base_as_the_run_did(finished, tmp_path: Path) -> None:
    """Without the record beside the adapter, which is not pushed."""
    run = finished("method=mixlora")
    shutil.copytree(run.folder / "adapter", tmp_path / "adapter")
    record = copy.deepcopy(run.record)
    record["config"]["model"]["quantization"] = "nf4"
    code = re.search(r"```python\n(.*?)```", model_card(record), re.DOTALL)[1]
    found: dict = {}
    exec(code.replace("DIR", str(tmp_path / "adapter")), found)
    assert all(map(is_quantized, frozen(found["model"]).values()))


def test_it_goes_to_the_hub_and_is_scored_from_there(
    trained: Path, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push([str(trained), REPO, "--license", "apache-2.0"]) == 0
    commit, files = hub.repositories[REPO][-1]
    assert f"adapter=hub:{REPO}@{commit}" in capsys.readouterr().out
    assert hub.private[REPO] is True
    assert set(files) == {
        "adapter_config.json", "adapter_model.safetensors", "base_model.json", "README.md",
    }  # fmt: skip
    weights = trained / "adapter" / "adapter_model.safetensors"
    assert files["adapter_model.safetensors"] == weights.read_bytes()
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
    assert b"license: apache-2.0" in files["README.md"]
    assert f'"hub:{REPO}@main"'.encode() in files["README.md"]

    words = [f"adapter=hub:{REPO}@main", f"output_dir={tmp_path / 'scored'}", *SCORE]
    assert evaluate(words) == 0
    (path,) = (tmp_path / "scored").glob("*/record.json")
    record = read_run(path)
    assert record["adapter"]["path"] == record["config"]["adapter"] == f"hub:{REPO}@{commit}"
    assert record["config"]["model"]["name"] == "tiny"
    assert (
        record["adapter"]["sha256"] == read_run(trained / "record.json")["saved_adapter"]["sha256"]
    )
    # The same name in train.py is the same run, which is finished.
    assert execute(["method=none", *words]) == 0
    assert "Already finished" in capsys.readouterr().out
    assert guarded(generation.run, [words[0], "prompt=a", "max_new_tokens=2"]) == 0
    assert f"tiny with hub:{REPO}@main" in capsys.readouterr().err
    assert hub.fetched() == {"adapter_config.json", "adapter_model.safetensors", "base_model.json"}


def test_an_adapter_of_an_earlier_version_is_named_portably(
    trained: Path, hub: FakeHub, tmp_path: Path
) -> None:
    """It has a path of its machine, and no note of its base."""
    path = trained / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "base_model_name_or_path": "/home/a/model"}))
    (trained / "adapter" / "base_model.json").unlink()
    assert push([str(trained), REPO, "--public"]) == 0
    files = hub.repositories[REPO][-1][1]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    noted = json.loads(files["base_model.json"])
    assert (noted["source"], noted["seed"]) == ("random", 42)
    assert hub.private[REPO] is False


def test_a_dry_run_sends_nothing(
    trained: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push([str(trained), REPO, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("---\nlibrary_name: peft\nlicense: unknown\n")
    assert not hub.asked


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{run}", "name"], "REPO=name is not valid: write OWNER/NAME"),
        (["{run}", "a/b@main"], "write OWNER/NAME"),
        (["{run}/adapter", REPO], "holds no record.json"),
        (["{run}", REPO, "--license=My own"], "--license=My own is not valid"),
    ],
)
def test_mistakes(trained: Path, words: list[str], told: str, hub: FakeHub) -> None:
    with pytest.raises(UserError) as caught:
        push([word.format(run=trained) for word in words])
    assert told in str(caught.value)
    assert not hub.asked


def test_what_the_record_does_not_say_is_not_published(trained: Path, hub: FakeHub) -> None:
    weights = trained / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="was modified after the run"):
        push([str(trained), REPO])
    record = read_run(trained / "record.json")
    write_json(trained / "record.json", finish_record({**record, "train": None}))
    with pytest.raises(UserError, match="trained nothing"):
        push([str(trained), REPO])
    assert not hub.asked


def test_a_hub_that_refuses_is_reported(trained: Path, hub: FakeHub) -> None:
    hub.refuse = 401
    with pytest.raises(UserError, match="may not"):
        push([str(trained), REPO])


def frozen(model: nn.Module) -> dict[str, nn.Linear]:
    """The base's linear layers but the output projection, by their names without an adapter."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name and not name.endswith("lm_head")
    }


@pytest.mark.parametrize("kind", ["none", "nf4", "int8", "int8_torchao"])
def test_the_card_s_lines_load_a_base_on_the_hub_too(
    kind: str, finished, tmp_path: Path, monkeypatch
) -> None:
    """With PEFT alone, at the commit that the adapter was trained on; a quantised base from the
    same numbers, in the precision of the run."""
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "hub" / "models--owner--model"
    place = repository / "snapshots" / commit
    config = compose(["model=tiny", "method=mixlora", "method.rank=2"])
    load_model(config.model, torch.float32).save_pretrained(place)
    load_tokenizer(config.model).save_pretrained(place)
    stored = dataclasses.replace(config.model, path=str(place), quantization=Quantization(kind))
    base = load_model(stored, torch.bfloat16)
    expected = {name: matrix_of(layer) for name, layer in frozen(base).items()}
    save_adapter(attach_adapter(base, config.method, config.kernel, 0), tmp_path / "adapter")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    record = copy.deepcopy(finished("method=mixlora").record)
    record["model"] = {"source": "hub", "id": "owner/model", "commit": commit}
    record["config"]["model"]["quantization"], record["dtype"] = kind, "bfloat16"
    code = re.search(
        r"```python\n(.*?)```", model_card(record, str(tmp_path / "adapter")), re.DOTALL
    )[1]
    found: dict = {}
    exec(code, found)
    model = found["model"]
    assert model.peft_config["default"].peft_type == "MIXLORA"
    layers = frozen(model)
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        assert is_quantized(layer) is (kind != "none"), name
        assert torch.equal(matrix_of(layer).to(torch.bfloat16), expected[name]), name
