"""Whole runs with a budget, and what records say of costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mixlora_exp.errors import UserError
from mixlora_exp.records.record import read_run
from mixlora_exp.runs import run as experiment
from mixlora_exp.runs import state

Start = Callable[..., Any]


def test_a_matched_run(run: Start, capsys: pytest.CaptureFixture[str]) -> None:
    done = run("method=mixlora", "method.match_params=lora_r20")
    told = capsys.readouterr()
    line = next(x for x in (told.out + told.err).splitlines() if "match_params" in x)
    record = read_run(done.path)
    method, parameters = record["config"]["method"], record["parameters"]
    assert method["match_params"] == "lora_r20"
    assert f"experts of rank {method['expert_rank']} beside LoRA of rank 16" in line
    assert f"{parameters['trainable']:,} trainable parameters" in line
    assert record["fingerprint"][:10] == done.folder.name.rpartition("-")[2]
    # The same run by its rank is not carried out again.
    run("method=mixlora", f"method.expert_rank={method['expert_rank']}")
    told = capsys.readouterr()
    assert "Already finished" in told.out + told.err


@pytest.mark.parametrize("dry_run", ["false", "true"])
@pytest.mark.parametrize(
    ("method", "budget", "told"),
    [
        ("mola", "lora_r1", "the routers alone have"),
        ("mixlora", "lora_r1", "experts of rank 1 make"),
        ("mixlora", "nola_r1", "method=nola is not an option"),
    ],
)
def test_out_of_reach_before_weights_are_read(
    method: str, budget: str, told: str, dry_run: str, configure: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(state, "load_model", None)
    words = [f"method={method}", f"method.match_params={budget}", f"dry_run={dry_run}"]
    words += ["method.num_experts=99"] if method == "mola" else []
    with pytest.raises(UserError, match=told) as raised:
        experiment.run(configure(*words))
    assert str(raised.value).startswith(f"method.match_params={budget}: ")
    assert "\n" not in str(raised.value)


def test_a_dry_run_shows_the_rank(configure: Start, capsys: pytest.CaptureFixture[str]) -> None:
    experiment.run(configure("method=mola", "method.match_params=lora_r80", "dry_run=true"))
    assert "budget      method.match_params=lora_r80: experts of rank" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["lora", "mixdora", "mola", "mixlora_one_expert"])
def test_costs_in_the_record(finished: Start, method: str) -> None:
    record = read_run(finished(f"method={method}").path)
    parts, cost, train = record["parameters"]["components"], record["cost"], record["train"]
    assert sum(parts.values()) == record["parameters"]["trainable"]
    present = {name for name, count in parts.items() if count}
    assert (
        present
        == {
            "lora": {"attention", "other"},
            "mixdora": {"attention", "experts", "router", "magnitude"},
            "mola": {"experts", "router"},
            "mixlora_one_expert": {"attention", "experts"},
        }[method]
    )
    flops = cost["forward_flops_per_token"]
    assert flops["base"] == 315_392
    assert flops["adapter"] > 0
    assert train["tokens_per_second"] > 0
    # The estimate is without the loss and the head, and with SDPA's attention.
    estimate = cost["estimated_kept_bytes_per_token"]
    assert 0.5 * estimate < train["kept_bytes_per_token"] < 4 * estimate


def test_the_base_model_has_no_adapter_s_costs(finished: Start) -> None:
    record = read_run(finished("method=none").path)
    assert record["cost"]["forward_flops_per_token"]["adapter"] == 0
    assert record["cost"]["estimated_kept_bytes_per_token"] is None
