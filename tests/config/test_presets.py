"""The two presets and their single switches."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml

from mixlora_exp.config import switches
from mixlora_exp.config.command import compose
from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.config.resolve import fingerprint, to_dict
from mixlora_exp.config.schema import PresetConfig
from mixlora_exp.errors import UserError
from mixlora_exp.models.parameters import count_parameters

# Switch -> where it acts, its value here and in the official packages.
SWITCHES: dict[str, tuple[str, Any, Any]] = {
    "loss_on": ("trainer.loss_on", "answer", "all"),
    "padding_in_loss": ("trainer.padding_in_loss", False, True),
    "order": ("trainer.order", "bucketed", "fixed"),
    "train_magnitude": ("method.train_magnitude", True, False),
    "router_loss": ("method.router_loss", "argmax", "topk"),
    "router_loss_pooling": ("method.router_loss_pooling", "layer", "all"),
    "router_loss_coef": ("method.router_loss_coef", 1e-3, 1e-3),
    "boolq_passage": ("data.boolq_passage", True, False),
    "arc_labels": ("evaluation.arc_labels", "own", "nine"),
    "dropout_at_evaluation": ("evaluation.dropout", False, True),
}


def at(tree: dict[str, Any], dotted: str) -> Any:
    group, name = dotted.split(".")
    return tree[group].get(name)


def test_every_switch_is_listed() -> None:
    fields = {field.name for field in dataclasses.fields(PresetConfig)} - {"name"}
    assert fields == SWITCHES.keys()
    assert {name: where for name, (where, *_) in SWITCHES.items()} == switches.SWITCHES
    assert switches.SWITCHES.keys() == switches.ONLY.keys()
    sweep = yaml.safe_load((CONF_DIR / "experiment" / "switches.yaml").read_text(encoding="utf-8"))
    swept = sweep["hydra"]["sweeper"]["params"]["preset"].split(",")
    assert swept == ["correct", "official", *(f"only_{name}" for name in switches.ONLY)]


# Each two of the three meet.
@pytest.mark.parametrize(
    ("preset", "column", "data", "method"),
    [
        (preset, column, ("hub", "embedded", "local")[(first + second) % 3], method)
        for first, (preset, column) in enumerate([(None, 1), ("correct", 1), ("official", 2)])
        for second, method in enumerate(("none", "lora", "dora", "mixlora", "mixdora"))
    ],
)
def test_presets_reach_their_fields(
    preset: str | None, column: int, data: str, method: str
) -> None:
    words = [f"method={method}", f"data={data}"]
    words += ["data.path=x"] if data == "local" else []
    tree = to_dict(compose([*words, *([f"preset={preset}"] if preset else [])]))
    assert tree["preset"]["name"] == (preset or "correct")
    for name, (where, *values) in SWITCHES.items():
        if at(tree, where) is not None:
            assert at(tree, where) == values[column - 1], name
        else:
            assert where.startswith("method.")
            assert not method.startswith("mix")


@pytest.mark.parametrize("name", [n for n, (_, own, other) in SWITCHES.items() if own != other])
def test_a_single_switch(name: str) -> None:
    """Alone, over a preset, and through the preset: nothing else moves."""
    where, own, official = SWITCHES[name]
    word = f"{where}={str(official).lower() if isinstance(official, bool) else official}"
    needs = ["trainer.loss_on=all"] if name == "padding_in_loss" else []
    plain = to_dict(compose(["method=mixdora", *needs]))
    switched = to_dict(compose(["method=mixdora", *needs, word]))
    group, field = where.split(".")
    plain[group][field] = official
    assert switched == plain
    back = "padding_in_loss=false" if name == "loss_on" else None
    value = str(own).lower() if isinstance(own, bool) else own
    words = ["preset=official", "method=mixdora", f"{where}={value}"]
    without = compose([*words, *([f"trainer.{back}"] if back else [])])
    assert at(to_dict(without), where) == own


@pytest.mark.parametrize("name", SWITCHES)
def test_a_preset_of_one_switch(name: str) -> None:
    where, own, official = SWITCHES[name]
    tree = to_dict(compose([f"preset=only_{name}", "method=mixdora"]))
    # The coefficient is the same in both packages; the paper's text has another.
    assert at(tree, where) == (1e-2 if name == "router_loss_coef" else official) != own
    others = {n: w for n, (w, *_) in SWITCHES.items() if n != name}
    if name == "padding_in_loss":
        assert at(tree, others.pop("loss_on")) == "all"
    assert all(at(tree, other) == SWITCHES[n][1] for n, other in others.items())


def test_a_run_is_known_by_its_switches_and_not_by_the_preset() -> None:
    words = [
        f"{where}={str(v).lower() if isinstance(v, bool) else v}"
        for where, _, v in SWITCHES.values()
    ]
    named = compose(["preset=official", "method=mixdora"])
    assert fingerprint(named) == fingerprint(compose(["method=mixdora", *words]))
    assert fingerprint(named) != fingerprint(compose(["method=mixdora"]))


def test_padding_needs_the_loss_on_all_tokens() -> None:
    with pytest.raises(UserError, match=r"trainer\.padding_in_loss=true.*loss_on=all"):
        compose(["trainer.padding_in_loss=true"])
    with pytest.raises(UserError, match=r"preset"):
        compose(["preset=oficial"])
    with pytest.raises(UserError, match=r"evaluation\.dropout=true.*lm-eval"):
        compose(["preset=official", "evaluation.protocols=[lm_eval]"])


def test_frozen_magnitudes_are_not_counted_as_trained() -> None:
    trained, frozen = (
        count_parameters(config.model, config.method)
        for config in (
            compose(["method=mixdora"]),
            compose(["method=mixdora", "method.train_magnitude=false"]),
        )
    )
    assert frozen.magnitude == trained.magnitude > 0
    assert frozen.trainable == frozen.adapter == trained.trainable - trained.magnitude
