"""results/smoke/: a record of every method, trained for 30 steps, and the table made from them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from mixlora_exp.config.paths import CONF_DIR, RESULTS, ROOT
from mixlora_exp.records.record import read_run

FOLDER = RESULTS / "smoke"
# `none` trains nothing, `peft` has no type of its own.
METHODS = {path.stem for path in (CONF_DIR / "method").glob("*.yaml")} - {"none", "peft"}
RECORDS = {
    record["config"]["method"]["name"]: record for record in map(read_run, FOLDER.glob("*.zip"))
}


def line(record: dict) -> str:
    """A row of the table: mean losses of the first and of the last ten steps."""
    losses = record["train"]["stability"]["step_losses"]
    flops = record["cost"]["forward_flops_per_token"]["adapter"]
    cells = [
        f"`{record['config']['method']['name']}`", f"{record['parameters']['trainable']:,}",
        "-" if flops is None else f"{flops / 1e6:.1f}",
        f"{record['train']['kept_bytes_per_token'] / 1e6:.2f}",
        f"{sum(losses[:10]) / 10:.2f}", f"{sum(losses[-10:]) / 10:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def test_every_method_of_the_sweep_ran() -> None:
    """A method that came later is not in it until all are run again: they are of one commit, but
    for `adalora`, in which a constant was trained until then."""
    sweep = yaml.safe_load((CONF_DIR / "experiment" / "smoke_methods.yaml").read_text())
    listed = sweep["hydra"]["sweeper"]["params"]["method"].split(",")
    assert sorted(RECORDS) == sorted(listed)
    assert set(listed) <= METHODS
    for record in RECORDS.values():
        assert record["train"]["steps"] == 30
        losses = record["train"]["stability"]["step_losses"]
        assert all(math.isfinite(loss) for loss in losses)


def test_all_ran_alike() -> None:
    conditions = {
        (r["provenance"]["git"]["commit"], r["model"]["source"], r["config"]["seed"], r["dtype"])
        for name, r in RECORDS.items()
        if name != "adalora"
    }
    assert len(conditions) == 1


def test_lora_plus_diverged_at_lora_s_alpha() -> None:
    (path,) = (FOLDER / "diverged").glob("*-lora_plus-*.zip")
    record = read_run(path)
    assert record["config"]["method"]["alpha"] == 160
    losses = record["train"]["stability"]["step_losses"]
    assert [round(losses[0], 2), round(losses[2], 2)] == [2.62, 8.34]
    text = Path(FOLDER, "README.md").read_text()
    assert "from a loss of 2.62 to 8.34" in text


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_the_table_is_made_from_the_records(name: str) -> None:
    assert line(RECORDS[name]) in Path(FOLDER, "README.md").read_text().splitlines()


HELD = {
    record["config"]["model"]["quantization"]: record
    for record in map(read_run, (FOLDER / "quantization").glob("*.zip"))
}
DISTANCES = {"nf4": 0.6, "int8": 0.04, "int8_torchao": 0.04, "none": 0.0}
"""Within which the mean losses are those on bf16 weights, as docs/quantization.md says."""


def mean_losses(kind: str) -> list[float]:
    """Of the first and of the last ten steps."""
    losses = HELD[kind]["train"]["stability"]["step_losses"]
    return [sum(part) / 10 for part in (losses[:10], losses[-10:])]


def held_line(kind: str) -> str:
    """A row of the table of docs/quantization.md."""
    losses, exact = (HELD[k]["train"]["stability"]["step_losses"] for k in (kind, "none"))
    farthest = max(abs(a - b) for a, b in zip(losses, exact, strict=True))
    numbers = [losses[0], *mean_losses(kind), farthest]
    return f"| `{kind}` | {' | '.join(f'{number:.3f}' for number in numbers)} |"


def test_every_quantisation_ran_alike() -> None:
    sweep = yaml.safe_load((CONF_DIR / "experiment" / "smoke_quantization.yaml").read_text())
    listed = sweep["hydra"]["sweeper"]["params"]["model.quantization"].split(",")
    assert sorted(HELD) == sorted(listed) == sorted(DISTANCES)
    alike = ("seed", "method", "trainer", "data", "task", "evaluation")
    conditions = [
        (r["provenance"]["git"], r["dtype"], {name: r["config"][name] for name in alike})
        for r in HELD.values()
    ]
    assert all(each == conditions[0] for each in conditions)
    assert conditions[0][0]["dirty"] is False


@pytest.mark.parametrize("kind", DISTANCES)
def test_its_losses_are_near_those_on_bf16(kind: str) -> None:
    text = (ROOT / "docs" / "quantization.md").read_text()
    assert held_line(kind) in text.splitlines()
    assert f"within {DISTANCES['nf4']}" in text
    assert f"within {DISTANCES['int8']}" in text
    for own, exact in zip(mean_losses(kind), mean_losses("none"), strict=True):
        assert abs(own - exact) <= DISTANCES[kind]


def test_a_second_model_s_record_stands_beside_it() -> None:
    (path,) = (FOLDER / "gemma3_270m").glob("*.zip")
    record, other = read_run(path), RECORDS["mixlora"]
    assert record["model"]["source"] == "pypi"
    assert record["provenance"]["git"]["dirty"] is False
    assert record["config"]["seed"] == other["config"]["seed"]
    for name in ("method", "trainer", "data", "task", "evaluation"):
        # A later version has more fields.
        own = record["config"][name]
        then = {f: v for f, v in other["config"][name].items() if f != "path"}
        assert then == {field: own[field] for field in then}, name
    losses = record["train"]["stability"]["step_losses"]
    assert len(losses) == 30
    assert all(map(math.isfinite, losses))
    row = line(record).replace("`mixlora`", "`gemma3_270m`")
    assert row in Path(FOLDER, "README.md").read_text().splitlines()


def test_the_quickstart_of_the_second_model_stands_beside_it() -> None:
    (path,) = (FOLDER / "quickstart").glob("*.zip")
    record = read_run(path)
    assert record["config"]["model"]["name"] == "gemma3_270m"
    assert record["train"]["steps"] == 100
    scores = {(score["task"], score["protocol"]): score for score in record["scores"]}
    lines = Path(FOLDER, "README.md").read_text().splitlines()
    for task in record["config"]["task"]["evaluate"]:
        text, letters = (scores[task, protocol] for protocol in ("answer_text", "label_logits"))
        assert text["n"] == letters["n"] == 48
        numbers = (
            text["accuracy"],
            letters["accuracy"],
            text["chance"],
            letters["majority_class"],
        )
        cells = " | ".join(f"{100 * number:.1f}" for number in numbers)
        assert f"| `{task}` | {cells} |" in lines
