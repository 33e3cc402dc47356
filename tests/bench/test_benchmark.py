"""The benchmark's arithmetic, its record and table, and that it runs without Hydra."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from mixlora_exp.bench.batch import batch_of
from mixlora_exp.bench.interleaved import interleaved, summary
from mixlora_exp.bench.kinds.steps import benchmark_parts, check
from mixlora_exp.bench.measure import inference_step, step_loss, training_step
from mixlora_exp.bench.model import adapted, base_model, model_config
from mixlora_exp.bench.options import StepOptions
from mixlora_exp.bench.report import markdown, paper_rows
from mixlora_exp.bench.row_registry import BUILDERS, ROWS
from mixlora_exp.bench.row_registry import row as register
from mixlora_exp.bench.runner import Kind, kind_of, measure
from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.config.command import compose
from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.errors import UserError
from mixlora_exp.kernels import MIXTURES, ROUTERS
from mixlora_exp.models.parameters import count_parameters
from mixlora_exp.records.record import read_record
from mixlora_exp.training.saved_bytes import saved_bytes

ROOT = Path(__file__).parents[2]
SMALL = {"model": "tiny", "batch": 2, "length": 8, "dtype": "float32", "memory": False}


def benchmark(config: StepOptions) -> dict:
    """The record of all parts."""
    *_, last = benchmark_parts(config, echo=lambda text: None)
    return last


@pytest.fixture(scope="module")
def result() -> dict:
    rows = ["lora_peft", "lora_peft_again", "dora", "mixlora", "mixlora_triton"]
    config = StepOptions(**SMALL, rounds=2, rows=[*rows, "floor", "base"])
    return benchmark(config)


def test_every_row_is_measured_or_says_why_not(result: dict) -> None:
    rows = result["rows"]
    if not torch.cuda.is_available():
        assert rows.pop("mixlora_triton")["error"] == "not measured: needs a GPU"
    for name, row in rows.items():
        expected = len(range(0, 2, ROWS[name].every))
        assert row["rounds"] == expected, name
        assert row["train_forward_us_per_token"] > 0
        assert row["infer_forward_us_per_token"] > 0
    assert rows["lora_peft"]["train_ratio"] == 1.0
    assert (
        rows["base"]["train_backward_us_per_token"] < rows["floor"]["train_backward_us_per_token"]
    )


CONFIGURED = [name for name, row in ROWS.items() if row.configured]


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_row_of_another_method_has_its_settings(name: str) -> None:
    """And steps: each parameter that a run trains gets a gradient, and no other one."""
    config = model_config("tiny", None)
    base = base_model(config, torch.float32, "cpu", 0)
    row, method = ROWS[name], compose([f"method={name}"]).method
    ranks = getattr(method, "peft", {})
    assert row.rank == ranks.get("r", ranks.get("init_r", getattr(method, "rank", None)))
    model = adapted(base, row, 0.05, 0)
    options = StepOptions(**SMALL, rows=[name])
    made = batch_of(options, config.config["vocab_size"], "cpu")
    model.train()
    step_loss(model, row, made).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == count_parameters(config, method).trainable
    assert all(p.grad.abs().max() > 0 for p in trained.values())
    training_step(model, row, made)
    assert inference_step(model, row, made) > 0
    dropouts = {m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p}
    assert dropouts == (set() if name in ("vera", "fedpara", "hira") else {0.05})


def test_lora_ga_is_measured_as_after_its_start() -> None:
    """Without a start it refuses to train."""
    row = dataclasses.replace(ROWS["lora_ga"], own_rank=8)
    options = StepOptions(**SMALL, rows=["lora_ga"])
    config = model_config("tiny", None)
    model = adapted(base_model(config, torch.float32, "cpu", 0), row, 0.05, 0)
    training_step(model, row, batch_of(options, config.config["vocab_size"], "cpu"))
    assert all(p.any() for n, p in model.named_parameters() if "lora_" in n)


# Some twenty models; `make bench-methods` measures the same rows.
@pytest.mark.slow
def test_a_row_for_each_method_and_router_if_it_is_named() -> None:
    names = [*(f"mixlora_{name}" for name in ROUTERS if name != "top_k"), *MIXTURES]
    files = sorted(path.stem for path in (CONF_DIR / "method").glob("*.yaml"))
    names += [n for n in files if n not in (*names, *PAPER_METHODS, "none", "peft")]
    assert set(names) <= set(ROWS)
    assert not set(names) & set(StepOptions().rows)
    config = StepOptions(**{**SMALL, "model": "smollm2_135m", "layers": 1, "length": 4}, rounds=1,
                         rows=["lora_peft", "methods"])  # fmt: skip
    assert config.rows == ["lora_peft", *names]
    found = benchmark(config)["rows"]
    for name in names:
        assert found[name]["train_forward_us_per_token"] > 0
        assert found[name]["feed_forward_saved_bytes_per_token"] > 0
        one = found[name]["num_experts"] == 1 or found[name]["configured"]
        assert found[name]["rank"] == (found[name]["own_rank"] or (80 if one else 16))


def test_every_step_has_its_turn_in_each_round_in_another_order() -> None:
    order: list[tuple[int, str]] = []

    def step(name: str):
        return lambda number: order.append((number, name)) or {"s": 1.0}

    names = ("a", "b", "c", "d")
    found = interleaved({n: step(n) for n in names}, 6, 0, every={"d": 3})
    assert [sample["round"] for sample in found["a"]] == list(range(6))
    assert [sample["round"] for sample in found["d"]] == [0, 3]
    assert [number for number, _ in order] == sorted(number for number, _ in order)
    orders = {tuple(n for at, n in order if at == number and n != "d") for number in range(6)}
    assert len(orders) > 1
    assert interleaved({"a": step("a")}, 5, 0, deadline=0.0) == {"a": []}


def test_a_row_is_one_line_or_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once registered, a row is measured, written and shown like any other."""
    monkeypatch.setitem(ROWS, "lora_twice", None)
    monkeypatch.setitem(BUILDERS, "lora_twice", None)
    made = []

    @register("lora_twice", method="lora")
    def twice(base, row, dropout, seed):
        made.append(row.method)
        return adapted(base, row, dropout, seed)

    config = StepOptions(**SMALL, rounds=1, rows=["lora_peft", "lora_twice"])
    found = benchmark(config)
    assert made == ["lora"]
    assert found["rows"]["lora_twice"]["rounds"] == 1
    origin = {"hardware": {"cpu": "c", "gpus": []}, "packages": {"torch": "t"}}
    assert "| lora_twice |" in markdown({**found, "provenance": origin})


def test_what_is_measured_stays_whatever_comes_next(tmp_path: Path) -> None:
    def breaking(options):
        yield {"part": 1}
        raise RuntimeError("the machine went away")

    kind = Kind(options=StepOptions, measure=breaking, name=lambda record: "half")
    with pytest.raises(RuntimeError, match="went away"):
        measure(kind, StepOptions(output=str(tmp_path)))
    assert json.loads((tmp_path / "half.json").read_text())["part"] == 1


COMMITTED = ROOT / "results" / "bench"


@pytest.mark.parametrize("name", sorted(p.stem for p in COMMITTED.glob("*-*.md")))
def test_tables_beside_committed_records_are_those_of_the_records(name: str) -> None:
    stem = name.partition("-")[0]
    kind = kind_of(stem if stem in ("adapters", "bytes", "together") else "steps")
    table = kind.markdown(read_record(COMMITTED / f"{name}.json"))
    assert table == (COMMITTED / f"{name}.md").read_text()


def test_ratios_are_taken_within_rounds() -> None:
    """Round 1 is twice as slow for both; the ratio of medians would not be 2."""
    mine = [{"round": 0, "train_forward_s": 2.0, "train_backward_s": 4.0}]
    mine.append({"round": 2, "train_forward_s": 8.0, "train_backward_s": 16.0})
    baseline = [
        {"round": n, "train_forward_s": s, "train_backward_s": 2 * s}
        for n, s in enumerate((1.0, 100.0, 4.0))
    ]
    found = summary(mine, baseline, tokens=1_000_000)
    assert found["train_ratio"] == 2.0
    assert found["train_ratio_quartiles"] == [2.0, 2.0]
    assert found["train_forward_us_per_token"] == 5.0
    assert found["train_backward_us_per_token"] == 10.0


def test_saved_bytes_count_each_storage_once_and_no_parameter() -> None:
    weight = torch.randn(8, 4, requires_grad=True)
    x = torch.randn(3, 4, requires_grad=True)

    def run() -> torch.Tensor:
        y = functional.linear(x, weight)  # keeps x and the weight
        return y.view(-1).exp().view(3, 8).exp()  # keeps its two results

    owned = {weight.untyped_storage().data_ptr()}
    assert saved_bytes(run, owned) == 4 * (3 * 4 + 3 * 8 + 3 * 8)


def test_rows_share_the_frozen_weights() -> None:
    config = model_config("tiny", None)
    base = base_model(config, torch.float32, "cpu", 0)
    frozen = {p.data_ptr() for p in base.parameters()}
    for name in ("lora_peft", "mixdora"):
        model = adapted(base, ROWS[name], 0.05, 0)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.data_ptr() for p in model.parameters() if not p.requires_grad} == frozen
        assert trained
        assert all(p.dtype is torch.float32 for p in trained)
    lowered = adapted(base_model(config, torch.bfloat16, "cpu", 0), ROWS["mixlora_bf16"], 0, 0)
    assert {p.dtype for p in lowered.parameters()} == {torch.bfloat16}


def test_record_and_table(result: dict, tmp_path: Path) -> None:
    config = StepOptions(**SMALL, output=str(tmp_path / "deep" / "folder"), name="here")
    written = measure(dataclasses.replace(kind_of("steps"), measure=lambda _: [result]), config)
    paths, table = written.paths, written.tables
    record = json.loads(paths[0].read_text())
    assert record["provenance"]["packages"]["torch"] == torch.__version__
    assert paths[1].read_text() == table
    for name in result["rows"]:
        assert f"| {name} |" in table
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert len(widths) == 1, "a row has another number of cells"


def test_the_papers_figures_stand_in_the_rows_of_their_method() -> None:
    paper = paper_rows("llama2_7b")
    assert set(paper) == {"lora_peft", "dora_peft", "mixlora_peft", "mixlora_shared"}
    assert float(paper["mixlora_shared"]["train_forward_pct"]) == 188.5
    assert float(paper["dora_peft"]["train_backward_pct"]) == 216.1
    assert paper_rows("smollm2_135m") == {}
    row = {"rounds": 1, "train_forward_us_per_token": 2.0}
    record = {
        "config": {"model": "llama2_7b", "batch": 1, "length": 1, "dtype": "d", "dropout": 0},
        "provenance": {"hardware": {"cpu": "c", "gpus": []}, "packages": {"torch": "t"}},
        "threads": 2,
        "layers": 2,
        "rows": {"mixlora_shared": row, "mixlora": row},
    }
    lines = {line.split(" | ")[0]: line for line in markdown(record).splitlines()}
    assert lines["| mixlora_shared"].endswith("188, 199, 183 |")
    assert lines["| mixlora"].endswith("| - |")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds=0 must be >= 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be in"),
        ({"dtype": "int8"}, "dtype=int8 is not valid: choose float32"),
        ({"rows": ["lora_peft", "mixlra"]}, "rows=mixlra is unknown: choose from"),
        ({"rows": ["mixlora"]}, "lack lora_peft"),
    ],
)
def test_mistakes(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(StepOptions(**{**SMALL, **change}))


def test_unknown_model_is_reported() -> None:
    with pytest.raises(UserError, match=r"model=llama9 is unknown: choose from .*llama2_7b"):
        model_config("llama9", None)


def test_a_row_that_runs_out_of_memory_in_a_round_loses_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mixlora_exp.bench.kinds import steps

    honest = steps._measure

    def full(config, model, row, ids, number):
        if row == "mixlora" and number == 1:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return honest(config, model, row, ids, number)

    monkeypatch.setattr(steps, "_measure", full)
    config = StepOptions(**SMALL, rounds=3, rows=["lora_peft", "mixlora", "dora"])
    rows = benchmark(config)["rows"]
    assert rows["mixlora"]["error"] == "out of memory in round 2"
    assert (rows["lora_peft"]["rounds"], rows["dora"]["rounds"]) == (3, 3)
    assert "train_forward_us_per_token" not in rows["mixlora"]


def test_other_errors_are_not_taken_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixlora_exp.bench.kinds import steps

    def broken(*arguments):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(steps, "_measure", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        benchmark(StepOptions(**SMALL, rounds=1, rows=["lora_peft"]))


def test_a_second_ratio_and_disturbed_rounds_are_reported() -> None:
    config = StepOptions(**SMALL, rounds=3, rows=["lora_peft", "mixlora", "mixlora_16_experts"])
    pair = benchmark(config)["rows"]["mixlora_16_experts"]["train_ratio_to"]
    assert (pair["row"], pair["rounds"]) == ("mixlora", 3)
    assert pair["quartiles"][0] <= pair["median"] <= pair["quartiles"][1]
    taken = [
        {"round": n, "train_forward_s": s, "train_backward_s": s}
        for n, s in enumerate((1.0, 1.1, 0.9, 5.0))
    ]
    assert summary(taken, taken, tokens=1)["disturbed_rounds"] == 1


def test_norms_are_not_part_of_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are computed once for many passes, before the clock starts."""
    from mixlora_exp.adapters import dora_norms
    from mixlora_exp.bench.measure import inference_step

    config = StepOptions(**SMALL, rows=["lora_peft"])
    shape = model_config(config.model, None)
    base = base_model(shape, torch.float32, "cpu", 0)
    model = adapted(base, ROWS["dora"], 0.0, 0)
    batch = batch_of(config, shape.config["vocab_size"], "cpu")
    lengths: list[int] = []
    model.base_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    at: list[int] = []
    real = dora_norms.dora_norms
    monkeypatch.setattr(
        dora_norms, "dora_norms", lambda *values: (at.append(len(lengths)), real(*values))[1]
    )
    inference_step(model, ROWS["dora"], batch)
    assert lengths == [1, 16]
    assert set(at) == {1}, "all in the pass that is not timed"
