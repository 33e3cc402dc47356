"""Limits on training rows, for all tasks alike and task by task."""

from __future__ import annotations

import pytest
from composed import compose

from mixlora_exp.config.resolve import fingerprint, fingerprint_of, to_dict
from mixlora_exp.data.sources import load_split
from mixlora_exp.errors import UserError
from mixlora_exp.plans.plan import plan
from mixlora_exp.runs.inputs import gather_inputs, scored_split

SMALL = ["model=tiny", "method=lora", "data=embedded", "task=multi"]
ONE = [*SMALL, "data.train_limit=30", "+data.train_limits.piqa=7"]


def test_a_task_has_its_own_limit() -> None:
    config = compose(ONE)
    rows = plan(config).rows
    assert rows == {"arc_e": 30, "arc_c": 30, "boolq": 30, "obqa": 30, "piqa": 7}
    assert config.data.train_limit_of("piqa") == 7
    assert compose([*SMALL, "+data.train_limits.piqa=7"]).data.train_limit_of("arc_e") is None


def test_held_out_rows_are_those_that_the_tasks_limit_leaves() -> None:
    config = compose([*ONE, "evaluation.held_out=true"])
    inputs = gather_inputs(config)
    for task, limit in (("piqa", 7), ("obqa", 30)):
        every = load_split(config.data, task, "train")
        trained = {item.id for item in every.limited(limit, config.data.seed).items}
        held_out = {item.id for item in scored_split(config, inputs, task).items}
        assert len(trained) == limit
        assert not trained & held_out
        assert trained | held_out == {item.id for item in every.items}
        assert plan(config).test_rows[task] == len(held_out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+data.train_limits.piga=7"], "data.train_limits=piga is not valid: the run's tasks are"),
        (["+data.train_limits.piqa=0"], "data.train_limits.piqa=0 is not valid: must be >= 1"),
        (["data.train_limits={piqa:7}"], "add it with +data.train_limits.piqa=VALUE"),
        (
            ["+data.train_limits.piqa=7", "evaluation.held_out=true"],
            "or data.train_limits for arc_e, arc_c, boolq, obqa",
        ),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        compose([*SMALL, *words])
    assert message in str(error.value)


def test_a_limit_that_leaves_nothing_is_named() -> None:
    limits = ["data.train_limit=30", "+data.train_limits.piqa=1000000"]
    config = compose([*SMALL, *limits, "evaluation.held_out=true"])
    with pytest.raises(UserError, match=r"data\.train_limits\.piqa=1000000 leaves no row of piqa"):
        scored_split(config, gather_inputs(config), "piqa")


def test_runs_from_before_keep_their_fingerprint() -> None:
    config = compose(SMALL)
    older = to_dict(config)
    del older["data"]["train_limits"]
    assert fingerprint_of(older) == fingerprint(config)
    assert fingerprint(compose([*SMALL, "+data.train_limits.piqa=7"])) != fingerprint(config)
