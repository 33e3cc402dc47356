"""docs/methods.md: its methods are those of README, and their sizes are what a plan counts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from composed import compose

from mixlora_exp.config.choices import PEFT_TYPES
from mixlora_exp.config.paths import CONF_DIR, RESULTS
from mixlora_exp.config.together import packs_of
from mixlora_exp.kernels.router_base import ROUTERS
from mixlora_exp.models.parameters import count_parameters

PAGE = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
METHODS = sorted(path.stem for path in (CONF_DIR / "method").glob("*.yaml"))


def rows(heading: str) -> dict[str, list[str]]:
    """The table whose head begins with a heading, by the name in its first column."""
    table = PAGE.split(f"| {heading} |")[1].split("\n\n")[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {row[0].strip("`"): row for row in cells}


# `peft` has no size without a type.
SIZED = rows("`method=`").keys() - {"peft"}


@pytest.mark.parametrize("method", [name for name in METHODS if name in SIZED])
def test_size_of_a_method(method: str) -> None:
    config = compose(["model=llama2_7b", f"method={method}"])
    counted = count_parameters(config.model, config.method).trainable
    assert rows("`method=`")[method][-1] == f"{counted:,}"


def test_times_of_a_step_are_the_record_s() -> None:
    """Every row of it stands on the page with its ratio to PEFT's LoRA."""
    record = json.loads((RESULTS / "bench" / "methods-smollm2_135m.json").read_text())
    text = PAGE.split("methods-smollm2_135m.md)")[1].split("the last four")[0]
    shown = {}
    for names, ratio in re.findall(r"((?:`\w+`(?:, | and )?)+) (\d\.\d\d)", text):
        shown |= dict.fromkeys(re.findall(r"`(\w+)`", names), ratio)
    measured = {name: f"{row['train_ratio']:.2f}" for name, row in record["rows"].items()}
    assert measured.pop("lora_peft") == "1.00"
    assert shown == measured
    assert f"medians of {record['config']['rounds']} rounds" in text
    assert record["provenance"]["hardware"]["cpu"] in text


def test_routers_and_methods_of_the_page_exist() -> None:
    """Who adds one need not add a row; this project's have theirs."""
    assert set(rows("`method.router=`")) <= set(ROUTERS)
    assert set(rows("`method=`")) <= set(METHODS)
    assert len(rows("`method=`")) >= 29
    assert len(rows("`method.router=`")) >= 7
    readme = (CONF_DIR.parent / "README.md").read_text(encoding="utf-8")
    table = readme.split("## Methods")[1].split("##")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(rows("`method=`"))


def test_pefts_types_are_named() -> None:
    named = PAGE.split("`method=peft` takes")[1].split("Not served")[0]
    assert set(re.findall(r"`([A-Z0-9]+)`", named)) == set(PEFT_TYPES)
    assert f"{len(PEFT_TYPES)} of PEFT's types" in PAGE


def test_methods_that_are_trained_alone_are_named() -> None:
    of = {name: [f"method={name}"] for name in METHODS if name != "none"}
    of["peft"].append("method.peft_type=LOKR")
    configs = {name: compose(["model=llama2_7b", *words]) for name, words in of.items()}
    alone = {name for name, own in configs.items() if len(packs_of([configs["lora"], own], 2)) > 1}
    told = PAGE.split(", but for ")[1].split("which are trained alone")[0]
    assert set(re.findall(r"`(\w+)`", told)) == alone
