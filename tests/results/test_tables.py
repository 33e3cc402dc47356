"""Tables: every figure of the paper, results in the right cells, and nothing mixed."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest

from mixlora_exp.config import compose
from mixlora_exp.config.parameters import count_parameters
from mixlora_exp.errors import UserError
from mixlora_exp.reporting import RESULTS, gather, table_files, write_files
from mixlora_exp.results.paper import METHODS, TASK_TITLES, contradictions, read_paper
from mixlora_exp.results.record import read_record
from mixlora_exp.results.tables.parts import Block, Cell, Table

Write = Callable[..., Path]
PAPER = RESULTS / "paper"
FIVE = ("arc_e", "arc_c", "boolq", "obqa", "piqa")
LLAMA = ("model=llama2_7b", "task=multi", "data=hub")
SMALL = ("model=smollm2_135m", "task=multi", "data=local", "data.path=d")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    (tmp_path / "bench").mkdir()
    return tmp_path


def block(table: Table, *words: str) -> Block:
    found = [b for b in table.blocks if all(word in b.heading for word in words)]
    assert len(found) == 1, [b.heading for b in table.blocks]
    return found[0]


def row(found: Block, *label: str) -> dict[str, Cell]:
    (line,) = [line for line in found.rows if line.label == label]
    return dict(zip(found.columns, line.cells, strict=True))


def five(value: float) -> dict[str, float]:
    return {task: value + 0.05 * i for i, task in enumerate(FIVE)}


@pytest.mark.parametrize("number", range(1, 10))
def test_every_figure_of_the_paper_is_in_its_table(number: int, results: Path) -> None:
    table = gather(results).tables[number]
    shown: dict[tuple[str, ...], list[str]] = {}
    for b in table.blocks:
        for line in b.rows:
            cells = [c.show().removesuffix(" †") for c in line.cells if c.kind in ("paper", "text")]
            shown.setdefault((b.heading, *line.label), []).extend(cells)
    everything = [text for cells in shown.values() for text in cells]
    texts = {"method", "model", "setup", "task", "rank", "router_loss_coef", "hyperparameter",
             "optimized", "models"}  # fmt: skip
    for line in read_paper(PAPER, number).lines:
        for column, value in line.items():
            if column in texts or value == "":
                continue
            plain = [text.replace(",", "") for text in everything]
            assert value in everything or value.replace(",", "") in plain, (number, line, column)


@pytest.mark.parametrize("number", [1, 2, 5, 8, 9])
def test_the_paper_s_lines_stand_under_their_own_model_method_and_setup(
    number: int, results: Path
) -> None:
    from mixlora_exp.results.paper import METHOD_TITLES, MODEL_TITLES

    table, printed = gather(results).tables[number], read_paper(PAPER, number)
    for line in printed.lines:
        value = line.get("rank") and f" r={line['rank']}"
        value = (
            value or (line.get("router_loss_coef") and f" coef={line['router_loss_coef']}") or ""
        )
        label = (METHOD_TITLES[line["method"]] + value, line.get("setup", "ST"), "paper")
        cells = row(block(table, MODEL_TITLES[line["model"]]), *label)
        for task in printed.tasks:
            assert cells[TASK_TITLES[task]].value == float(line[task])
        assert cells["average"].value == float(line["avg"])
        if "params_pct" in line:
            assert cells["#Params (%)"].value == float(line["params_pct"])


def test_parameters_print_every_figure_of_the_paper() -> None:
    compared = 0
    for number in (1, 2, 5, 8):
        for line in read_paper(PAPER, number).lines:
            overrides = [f"model={line['model']}", f"method={line['method']}"]
            if "rank" in line:
                overrides.append(f"method.rank={line['rank']}")
            config = compose(overrides)
            percent = count_parameters(config.model, config.method).percent_paper
            digits = len(line["params_pct"].partition(".")[2])
            assert f"{percent:.{digits}f}" == line["params_pct"], (number, line)
            compared += 1
    assert compared == 16 + 8 + 8 + 10


def test_nothing_run_gives_dashes(results: Path) -> None:
    for number in (1, 2, 5, 8, 9):
        for b in gather(results).tables[number].blocks:
            assert not b.run
            for line in b.rows:
                if line.label[-1] == "ours":
                    assert all(cell.value is None for cell in line.cells)


def test_known_contradictions_are_found() -> None:
    found = {n: [entry.text for entry in contradictions(PAPER, n)] for n in range(1, 10)}
    assert sum("MT minus ST" in line for line in found[2]) == 5
    assert any("LoRA, MT minus ST, PIQA: printed as 2.5" in line for line in found[2])
    assert any("DoRA, MT minus ST, OBQA: printed as -2.8" in line for line in found[2])
    assert any("70.5" in line for line in found[9])
    assert any("71.5" in line for line in found[9])
    assert any("84.4 here, 81.6 in Table 1" in line for line in found[8])
    for number in (1, 2):
        assert any("81.6 here, 84.4 in Table 9" in line for line in found[number])
    assert any("1e-2" in line for line in found[9])
    assert any("3.2 % and 4.3 %" in line for line in found[5])
    assert found[3] == found[4] == []


def test_a_full_run_stands_beside_the_paper(write: Write, results: Path) -> None:
    write(results / "runs", "a", [*LLAMA, "method=mixlora"], five(0.5))
    cells = row(block(gather(results).tables[2], "LLaMA-2 7B"), "MixLoRA", "MT", "ours")
    assert cells["ARC-e"].value == pytest.approx(50.0)
    assert cells["PIQA"].value == pytest.approx(70.0)
    assert cells["average"].value == pytest.approx(60.0)
    assert cells["ARC-e"].records == ("a",)
    difference = row(
        block(gather(results).tables[2], "LLaMA-2 7B"), "MixLoRA", "MT", "ours minus paper"
    )
    assert difference["ARC-e"].value == pytest.approx(50.0 - 76.6)
    # Neither the other table nor the single-task rows take it.
    assert not any(b.run for b in gather(results).tables[5].blocks if "Gemma" in b.heading)
    single = row(block(gather(results).tables[2], "LLaMA-2 7B"), "MixLoRA", "ST", "ours")
    assert single["ARC-e"].value is None


def test_seeds_are_averaged(write: Write, results: Path) -> None:
    for seed, value in ((1, 0.4), (2, 0.5), (3, 0.6)):
        overrides = [*SMALL, "method=lora", f"seed={seed}"]
        write(results / "runs", f"s{seed}", overrides, five(value))
    cells = row(block(gather(results).tables[2], "SmolLM2"), "LoRA", "MT", "ours")
    assert cells["ARC-e"].value == pytest.approx(50.0)
    assert cells["ARC-e"].seeds == 3
    assert cells["ARC-e"].low == pytest.approx(50.0 - 4.3027 * 10 / 3**0.5, abs=0.01)
    assert cells["ARC-e"].records == ("s1", "s2", "s3")


@pytest.mark.parametrize(
    "override",
    ["evaluation.limit=100", "data.train_limit=5", "trainer.max_steps=9", "trainer.epochs=1",
     "data.boolq_passage=false", "trainer.loss_on=all", "data.forms=[text]",
     "trainer.micro_batch_size=4", "model.weights=random", "model.path=/elsewhere"],
)  # fmt: skip
def test_other_conditions_are_another_block(override: str, write: Write, results: Path) -> None:
    write(results / "runs", "full", [*SMALL, "method=lora", "seed=1"], five(0.4))
    write(results / "runs", "other", [*SMALL, "method=lora", "seed=2", override], five(0.6))
    blocks = [b for b in gather(results).tables[2].blocks if b.run]
    assert len(blocks) == 2
    values = {b.heading: row(b, "LoRA", "MT", "ours")["ARC-e"].value for b in blocks}
    assert sorted(values.values()) == pytest.approx([40.0, 60.0])
    name = override.partition("=")[0]
    assert any(name in heading for heading in values)
    with pytest.raises(UserError, match=rf"full and other cannot share a cell: {name} is"):
        gather(results, ["full", "other"])


def test_other_protocols_and_sources_are_other_blocks(write: Write, results: Path) -> None:
    write(results / "runs", "a", [*SMALL, "method=lora"], five(0.4))
    write(results / "runs", "b", [*SMALL, "method=lora"], five(0.5), protocol="answer_text")
    embedded = ["model=smollm2_135m", "task=multi", "data=embedded", "method=lora"]
    write(results / "runs", "c", embedded, five(0.6))
    assert len([b for b in gather(results).tables[2].blocks if b.run]) == 3
    for other, name in (("b", "evaluation.protocols"), ("c", "data.name")):
        with pytest.raises(UserError, match=f"{name} is"):
            gather(results, ["a", other])
    with pytest.raises(UserError, match="runs=nothing cannot be used: there is no such record"):
        gather(results, ["a", "nothing"])


def test_a_preset_is_named_over_its_block(write: Write, results: Path) -> None:
    words = [*SMALL, "method=mixdora"]
    write(results / "runs", "ours", words, five(0.4))
    write(results / "runs", "theirs", [*words, "preset=official"], five(0.5))
    write(results / "runs", "odd", [*words, "preset=official", "evaluation.dropout=false"],
          five(0.6))  # fmt: skip
    found = {b.heading: b for b in gather(results).tables[2].blocks if b.run}
    values = {
        heading: row(block, "MixDoRA", "MT", "ours")["ARC-e"].value
        for heading, block in found.items()
    }
    assert sorted(values.values()) == pytest.approx([40.0, 50.0, 60.0])
    plain, official, odd = sorted(values, key=values.get)
    assert "preset" not in plain
    # The preset's name stands for its switches; one that is set otherwise is named.
    assert official.endswith("preset=official")
    assert "preset=official" in odd
    assert "evaluation.dropout=False" in odd


def test_records_from_before_the_switches_stand_with_later_ones(
    write: Write, results: Path
) -> None:
    def older(record: dict) -> None:
        config = record["config"]
        del config["preset"], config["method"]["train_magnitude"]
        del config["trainer"]["order"], config["trainer"]["padding_in_loss"]
        del config["evaluation"]["dropout"], config["evaluation"]["arc_labels"]

    write(results / "runs", "a", [*SMALL, "method=mixlora", "seed=1"], five(0.4), change=older)
    write(results / "runs", "b", [*SMALL, "method=mixlora", "seed=2"], five(0.5))
    cells = row(block(gather(results).tables[2], "SmolLM2"), "MixLoRA", "MT", "ours")
    assert cells["ARC-e"].seeds == 2


def test_what_does_not_change_results_shares_a_cell(write: Write, results: Path) -> None:
    write(results / "runs", "a", [*SMALL, "method=mixlora", "seed=1"], five(0.4))
    more = ["kernel=reference", "trainer.gradient_checkpointing=true", "trainer.precision=float32"]
    write(results / "runs", "b", [*SMALL, "method=mixlora", "seed=2", *more], five(0.5))
    cells = row(block(gather(results).tables[2], "SmolLM2"), "MixLoRA", "MT", "ours")
    assert cells["ARC-e"].seeds == 2


def test_ranks_and_coefficients_stand_in_their_tables(write: Write, results: Path) -> None:
    base = [*SMALL, "method=mixlora"]
    write(results / "runs", "r4", [*base, "method.rank=4"], five(0.4))
    write(results / "runs", "plain", base, five(0.5))
    write(results / "runs", "c", [*base, "method.router_loss_coef=0.1"], five(0.6))
    write(results / "runs", "odd", [*base, "method.top_k=1"], five(0.7))
    found = gather(results)
    ranks = block(found.tables[8], "SmolLM2")
    assert row(ranks, "MixLoRA r=4", "five mixed", "ours")["ARC-e"].value == pytest.approx(40)
    assert row(ranks, "MixLoRA r=16", "five mixed", "ours")["ARC-e"].value == pytest.approx(50)
    coefficients = block(found.tables[9], "SmolLM2")
    label = ("five mixed", "ours")
    assert row(coefficients, "MixLoRA coef=1e-1", *label)["ARC-e"].value == pytest.approx(60)
    assert row(coefficients, "MixLoRA coef=1e-3", *label)["ARC-e"].value == pytest.approx(50)
    assert row(block(found.tables[2], "SmolLM2"), "MixLoRA", "MT", "ours")["ARC-e"].seeds == 1


def test_methods_are_compared_on_the_same_items(write: Write, results: Path) -> None:
    write(results / "runs", "lora", [*SMALL, "method=lora"], five(0.2), n=200)
    write(results / "runs", "mix", [*SMALL, "method=mixlora"], five(0.6), n=200)
    write(results / "runs", "dora", [*SMALL, "method=dora"], five(0.21), n=200)
    found = block(gather(results).tables[2], "SmolLM2")
    assert row(found, "MixLoRA", "MT", "minus LoRA")["ARC-e"].mark == "better"
    assert row(found, "DoRA", "MT", "minus LoRA")["ARC-e"].mark == ""
    assert row(found, "majority class", "-", "")["ARC-e"].value == pytest.approx(30.0)
    assert row(found, "chance", "-", "")["average"].value == pytest.approx(25.0)
    likelihood = row(found, "LoRA", "MT", "log-likelihood of the gold answer")
    assert likelihood["ARC-e"].value == pytest.approx(-1.25)


def link(source: Path) -> Callable[[dict], None]:
    """Make a record that of an adapter that the run in `source` trained."""
    record = read_record(source / "record.json")

    def change(other: dict) -> None:
        kept = ("name", "fingerprint", "content_sha256", "config", "data", "model", "kernel")
        trained_by = {**{k: record[k] for k in kept}, "git": record["provenance"]["git"]}
        other["adapter"] = {"sha256": "a", "trained_by": trained_by}

    return change


def test_scored_again_the_training_run_s_result_counts(write: Write, results: Path) -> None:
    """A second scoring takes no place, and costs the first none of its other protocols."""
    first = write(results / "runs", "z", [*SMALL, "method=mixlora"], five(0.4))
    write(results / "runs", "again", [*SMALL, "method=none", "adapter=x"], five(0.4),
          change=link(first))  # fmt: skip
    write(results / "runs", "more", [*SMALL, "method=none", "adapter=x"], five(0.6),
          protocol="lm_eval", change=link(first))  # fmt: skip
    found = gather(results)
    assert {entry.name for entry in found.left_out} == {"again"}
    cells = row(block(found.tables[2], "label_logits"), "MixLoRA", "MT", "ours")
    assert (cells["ARC-e"].records, cells["ARC-e"].seeds) == (("z",), 1)
    cells = row(block(found.tables[2], "lm_eval"), "MixLoRA", "MT", "ours")
    assert cells["ARC-e"].records == ("more",)


def test_what_an_adapter_was_trained_on_is_not_forgotten(write: Write, results: Path) -> None:
    embedded = ["model=smollm2_135m", "task=multi", "data=embedded", "method=mixlora"]
    first = write(results / "runs", "train", embedded, five(0.4))
    write(results / "runs", "again", [*SMALL, "method=none", "adapter=x"], five(0.6),
          change=link(first))  # fmt: skip
    write(results / "runs", "real", [*SMALL, "method=mixlora", "seed=2"], five(0.5))
    found = gather(results).tables[2]
    again = row(block(found, "data=local", "train.data.name=embedded"), "MixLoRA", "MT", "ours")
    assert again["ARC-e"].records == ("again",)
    assert len([b for b in found.blocks if b.run]) == 3


def test_files_that_are_not_the_published_splits_are_no_full_run(
    write: Write, results: Path
) -> None:
    overrides = ["model=llama2_7b", "task=hellaswag", "data=local", "data.path=d"]
    write(results / "runs", "part", [*overrides, "method=lora"], {"hellaswag": 0.5},
          rows={"hellaswag/train": 6477})  # fmt: skip
    found = gather(results).tables[1]
    (part,) = [b for b in found.blocks if b.run]
    assert "rows.hellaswag/train=6,477 of 39,905" in part.heading
    assert not any(line.label[-1] == "paper" for line in part.rows)


def test_the_base_model_counts_once(write: Write, results: Path) -> None:
    for seed in (1, 2, 3):
        write(results / "runs", f"b{seed}", [*SMALL, "method=none", f"seed={seed}"], five(0.3))
    found = gather(results)
    cells = row(block(found.tables[2], "SmolLM2"), "base model", "-", "ours")
    assert (cells["ARC-e"].seeds, cells["ARC-e"].records) == (1, ("b1",))
    assert gather(results, ["b1"]).left_out == []


def test_runs_that_no_table_has_a_place_for_are_listed(write: Write, results: Path) -> None:
    write(results / "runs", "odd", [*SMALL, "method=mixlora", "method.top_k=1"], five(0.4))
    pair = ["model=smollm2_135m", "task=multi", "task.train=[arc_e,obqa]", *SMALL[2:]]
    write(results / "runs", "pair", [*pair, "method=lora"], five(0.4))
    found = gather(results)
    assert {entry.name for entry in found.left_out} == {"odd", "pair"}
    assert all("no table has" in entry.reason for entry in found.left_out)


def test_the_order_of_the_mixture_is_no_second_run(write: Write, results: Path) -> None:
    other = "task.train=[piqa,obqa,boolq,arc_c,arc_e]"
    write(results / "runs", "a", [*SMALL, "method=lora"], five(0.4))
    write(results / "runs", "b", [*SMALL, "method=lora", other], five(0.6))
    cells = row(block(gather(results).tables[2], "SmolLM2"), "LoRA", "MT", "ours")
    assert cells["ARC-e"].records == ("a",)


def test_predictions_edited_without_a_trace_are_noticed(write: Write, results: Path) -> None:
    """A right and a wrong answer exchanged leave the accuracy as it was."""

    def sign(record: dict) -> None:
        record["predictions_sha256"] = {"arc_e/label_logits": "0" * 64}

    write(results / "runs", "a", [*SMALL, "method=lora"], five(0.4), change=sign)
    ((entry),) = gather(results).left_out
    assert "was changed after it was written" in entry.reason


def test_differences_of_single_and_multi_task(write: Write, results: Path) -> None:
    table = gather(results).tables[2]
    cells = row(block(table, "LLaMA-2 7B"), "LoRA", "MT minus ST", "paper, recomputed")
    assert cells["PIQA"].value == pytest.approx(72.4 - 82.1)
    printed = row(block(table, "LLaMA-2 7B"), "LoRA", "MT minus ST", "paper, printed")
    assert (printed["PIQA"].value, printed["PIQA"].mark) == (2.5, "†")
    assert (printed["ARC-e"].value, printed["ARC-e"].mark) == (-12.5, "")
    write(results / "runs", "mt", [*SMALL, "method=lora"], five(0.5))
    for task, value in (("arc_e", 0.4), ("piqa", 0.9)):
        single = ["model=smollm2_135m", f"task={task}", *SMALL[2:], "method=lora"]
        write(results / "runs", task, single, {task: value})
    found = block(gather(results).tables[2], "SmolLM2")
    cells = row(found, "LoRA", "MT minus ST", "ours")
    assert cells["ARC-e"].value == pytest.approx(10.0)
    assert cells["PIQA"].value == pytest.approx(-20.0)
    assert cells["OBQA"].value is None
    # Paired, over the same items.
    assert cells["PIQA"].low < -20.0 < cells["PIQA"].high
    assert cells["PIQA"].mark == "worse"
    assert cells["average"].value is None, "not all of the single tasks were run"
    # The other methods stand there too, with dashes.
    assert row(found, "MixDoRA", "MT", "ours")["ARC-e"].value is None
    assert found.filled == {"ST": (2, 20), "MT": (5, 20)}


def test_other_data_is_not_compared_whatever_the_method(write: Write, results: Path) -> None:
    write(results / "runs", "lora", [*SMALL, "method=lora"], five(0.4))
    write(results / "runs", "mix", [*SMALL, "method=mixlora"], five(0.8), data_hash="other")
    found = gather(results)
    assert not any(b.run for b in found.tables[2].blocks)
    reasons = {entry.name: entry.reason for entry in found.left_out}
    assert reasons.keys() == {"lora", "mix"}
    assert "lora, mix read different data under the same conditions" in reasons["mix"]


def test_other_training_data_is_not_compared(write: Write, results: Path) -> None:
    write(results / "runs", "lora", [*SMALL, "method=lora"], five(0.4))
    write(results / "runs", "mix", [*SMALL, "method=mixlora"], five(0.8), train_hash="other")
    assert not any(b.run for b in gather(results).tables[2].blocks)


def test_the_base_model_is_compared_with_every_seed(write: Write, results: Path) -> None:
    for seed in (1, 2):
        write(results / "runs", f"s{seed}", [*SMALL, "method=lora", f"seed={seed}"], five(0.8))
    write(results / "runs", "base", [*SMALL, "method=none"], five(0.2))
    found = block(gather(results).tables[2], "SmolLM2")
    cells = row(found, "LoRA", "MT", "minus the base model")
    assert cells["ARC-e"].value == pytest.approx(60.0)
    assert (cells["ARC-e"].seeds, cells["ARC-e"].mark) == (2, "better")
    assert cells["average"].value == pytest.approx(60.0)
    assert cells["average"].items == 5 * 40


def test_a_difference_from_the_paper_needs_the_paper_s_protocol(
    write: Write, results: Path
) -> None:
    words = ["model=llama2_7b", "task=multi", "data=hub", "method=lora"]
    write(results / "runs", "text", words, five(0.4), protocol="answer_text")
    (found,) = (b for b in gather(results).tables[2].blocks if b.run)
    assert not any("minus paper" in line.label[-1] for line in found.rows)


def test_marks_stand_at_the_contradictory_figures(results: Path) -> None:
    tables = gather(results).tables
    cells = row(block(tables[9], "LLaMA-2 7B"), "MixLoRA coef=0", "ST", "paper")
    assert cells["average"].mark == "†"
    assert cells["ARC-e"].mark == ""
    cells = row(block(tables[8], "LLaMA-2 7B"), "MixLoRA r=16", "ST", "paper")
    assert cells["OBQA"].show() == "84.4 †"


@pytest.mark.parametrize("number", [3, 4, 6, 7])
def test_figures_of_the_other_tables_stand_in_their_rows(number: int, results: Path) -> None:
    table, printed = gather(results).tables[number], read_paper(PAPER, number)
    for index, line in enumerate(printed.lines):
        cells = table.blocks[0].rows[index].cells
        if number == 3:
            assert [cells[0].text, cells[2].text] == [line["lora_dora"], line["mixlora_mixdora"]]
        elif number == 4:
            named = dict(zip(table.blocks[0].columns, cells, strict=True))
            assert named["train: paper"].text == f"{int(line['train']):,}"
            assert named["test: paper"].text == f"{int(line['test']):,}"
            assert named["type: paper"].text == line["type"]
        else:
            figures = [float(line[name]) for name in line if name[:5] in ("train", "infer")]
            assert [cell.value for cell in cells[:10]] == figures


def bench_record(folder: Path, **changes: object) -> None:
    from mixlora_exp.results.record import finish_record, write_json

    row_of = {"method": "mixlora", "kernel": "exact", "num_experts": 8, "top_k": 2,
              "adapter_dtype": "float32", "head": "full"}  # fmt: skip
    measured = {"train_forward_us_per_token": 10.0, "train_forward_ratio": 0.5,
                "train_backward_us_per_token": 20.0, "train_backward_ratio": 0.8,
                "train_ratio": 0.7, "train_ratio_quartiles": [0.6, 0.75], "rounds": 3}  # fmt: skip
    record = {
        "config": {"model": "llama2_7b", "layers": 2, "batch": 2, "length": 8, "dtype": "bfloat16",
                   "dropout": 0.05},
        "layers": 2, "threads": 2,
        "rows": {"mixlora": {**row_of, **measured},
                 "mixlora_triton": {**row_of, "kernel": "triton",
                                    "error": "not measured: needs a GPU"}},
        "provenance": {"git": {"commit": "c", "dirty": False}, "packages": {"torch": "2"},
                       "hardware": {"cpu": "a cpu", "gpus": []}},
    }  # fmt: skip
    write_json(folder / "one.json", finish_record({**record, **changes}))


def test_benchmarks_stand_in_tables_6_and_7(results: Path) -> None:
    bench_record(results / "bench")
    table = gather(results).tables[6]
    found = table.blocks[1]
    assert "2 layers, 2 x 8 tokens, bfloat16" in found.heading
    exact, triton = found.rows
    assert exact.label == ("MixLoRA (exact kernel)", "1 model")
    assert [cell.value for cell in exact.cells[:4]] == [10.0, 50.0, 20.0, 80.0]
    assert triton.cells[0].text == "needs a GPU"
    ratio = exact.cells[found.columns.index("forward + backward, % of LoRA")]
    assert (ratio.value, ratio.low, ratio.high) == (70.0, 60.0, 75.0)
    assert ratio.records == ("bench/one.json",)
    assert len(gather(results).tables[7].blocks) == 1


def test_a_spoilt_benchmark_is_left_out_by_name(results: Path) -> None:
    bench_record(results / "bench")
    (results / "bench" / "cut.json").write_text("{")
    bench_record(results / "bench", rows={"mixlora": {}})
    found = gather(results)
    assert {entry.name for entry in found.left_out} == {"bench/cut", "bench/one"}


def test_committed_figures_are_those_of_the_paper_s_transcript() -> None:
    folder = Path(__file__).resolve().parents[3] / "shared" / "paper"
    if not folder.is_dir():
        pytest.skip("the transcribed tables are not beside this checkout")
    for number in range(1, 10):
        (source,) = folder.glob(f"table{number}_*.csv")
        assert (PAPER / f"table{number}.csv").read_bytes() == source.read_bytes()


def test_the_base_model_stands_in_the_blocks_of_its_scoring(write: Write, results: Path) -> None:
    write(results / "runs", "lora", [*SMALL, "method=lora", "trainer.max_steps=5"], five(0.4))
    write(results / "runs", "base", [*SMALL, "method=none"], five(0.3))
    found = block(gather(results).tables[2], "SmolLM2")
    assert row(found, "base model", "-", "ours")["ARC-e"].value == pytest.approx(30.0)


def test_an_adapter_scored_again_stands_in_its_run_s_cell(write: Write, results: Path) -> None:
    first = write(results / "runs", "train", [*SMALL, "method=mixlora"], five(0.4))
    write(results / "runs", "again", [*SMALL, "method=none", "adapter=x"], five(0.6),
          protocol="lm_eval", change=link(first))  # fmt: skip
    cells = row(block(gather(results).tables[2], "lm_eval"), "MixLoRA", "MT", "ours")
    assert (cells["ARC-e"].value, cells["ARC-e"].records) == (pytest.approx(60), ("again",))


def edited(folder: Path) -> None:
    path = folder / "record.json"
    path.write_text(path.read_text().replace('"accuracy": 0.4', '"accuracy": 0.9'))


def cut(folder: Path) -> None:
    path = folder / "record.json"
    path.write_text(path.read_text()[:500])


def old(folder: Path) -> None:
    path = folder / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 0}))


def prediction(folder: Path) -> None:
    path = folder / "predictions" / "obqa.label_logits.jsonl"
    path.write_text(path.read_text().replace('"prediction": 1', '"prediction": 0', 1))


def no_predictions(folder: Path) -> None:
    (folder / "predictions" / "obqa.label_logits.jsonl").unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(edited, "changed after it was written"), (cut, "cut off"), (old, "schema_version=0"),
     (prediction, "does not give the accuracy"), (no_predictions, "cannot be read")],
)  # fmt: skip
def test_a_spoilt_record_is_left_out_by_name(
    spoil: Callable[[Path], None], reason: str, write: Write, results: Path
) -> None:
    write(results / "runs", "good", [*SMALL, "method=lora", "seed=1"], five(0.5))
    spoil(write(results / "runs", "bad", [*SMALL, "method=lora", "seed=2"], five(0.4)))
    found = gather(results)
    ((name, why),) = {(entry.name, entry.reason) for entry in found.left_out}
    assert name == "bad"
    assert reason in why
    cells = row(block(found.tables[2], "SmolLM2"), "LoRA", "MT", "ours")
    assert cells["ARC-e"].records == ("good",)
    assert f"`bad`: {why}" in table_files(found)["README.md"]


@pytest.mark.parametrize("git", [None, {"commit": "c" * 40, "dirty": True}])
def test_uncommitted_code_is_left_out(git: dict | None, write: Write, results: Path) -> None:
    write(results / "runs", "dirty", [*SMALL, "method=lora"], five(0.5), git=git)
    found = gather(results)
    assert [entry.name for entry in found.left_out] == ["dirty"]
    assert not any(b.run for b in found.tables[2].blocks)


def test_two_records_of_a_cell_with_other_data_are_both_left_out(
    write: Write, results: Path
) -> None:
    write(results / "runs", "a", [*SMALL, "method=lora", "seed=1"], five(0.4), data_hash="1")
    write(results / "runs", "b", [*SMALL, "method=lora", "seed=2"], five(0.5), data_hash="2")
    found = gather(results)
    assert {entry.name for entry in found.left_out} == {"a", "b"}
    assert all("read different data" in entry.reason for entry in found.left_out)
    assert not any(b.run for b in found.tables[2].blocks)
    # The training rows count as well.
    write(results / "runs", "b", [*SMALL, "method=lora", "seed=2"], five(0.5), data_hash="1",
          train_hash="u")  # fmt: skip
    assert {entry.name for entry in gather(results).left_out} == {"a", "b"}


def test_two_records_of_a_cell_and_seed_count_once(write: Write, results: Path) -> None:
    write(results / "runs", "a", [*SMALL, "method=lora"], five(0.4))
    write(results / "runs", "b", [*SMALL, "method=lora", "kernel=reference"], five(0.6))
    found = gather(results)
    assert {entry.name for entry in found.left_out} == {"b"}
    cells = row(block(found.tables[2], "SmolLM2"), "LoRA", "MT", "ours")
    assert cells["ARC-e"].value == pytest.approx(40.0)


def test_table_3_says_where_the_paper_differs(results: Path) -> None:
    table = gather(results).tables[3]
    assert any("accumulation_steps: 8 in the paper, 2 here" in note for note in table.notes)
    assert sum("in the paper" in note for note in table.notes) == 1


def test_table_4_has_the_rows_that_were_read(write: Write, results: Path) -> None:
    write(results / "runs", "a", [*SMALL, "method=lora"], five(0.4), rows={"arc_e/test": 77})
    (found,) = gather(results).tables[4].blocks
    cells = row(found, "ARC-e")
    assert cells["test: paper"].text == "2,380"
    values = dict(zip(found.columns, [c.text for c in next(
        line for line in found.rows if line.label == ("ARC-e",)).cells], strict=True))  # fmt: skip
    assert values["read, data=local"] == "77"


def test_rendered_files_agree(write: Write, results: Path) -> None:
    write(results / "runs", "a", [*SMALL, "method=lora"], five(0.4))
    files = table_files(gather(results))
    assert len(files) == 1 + 3 * len(gather(results).tables)
    lines = list(csv.DictReader(files["table2.csv"].splitlines()))
    (line,) = [
        found for found in lines
        if found["column"] == "ARC-e" and found["kind"] == "ours" and "LoRA" in found["label"]
        and found["records"] and found["seeds"]
    ]  # fmt: skip
    assert float(line["value"]) == pytest.approx(40.0)
    assert line["records"] == "a"
    for found in lines:
        assert all(float(found[name] or 0) is not None for name in ("value", "low", "high"))
    assert "40.0 [26.3, 55.4] (n=1)" in files["table2.md"]
    assert r"\toprule" in files["table2.tex"]
    for name in (f"table{number}.tex" for number in range(1, 10)):
        body = files[name]
        assert body.count(r"\begin{tabular}") == body.count(r"\end{tabular}") > 0
        assert "%" not in body.replace(r"\%", "").replace("{!}{%", "").split("\\begin", 1)[1]


def test_writing_is_idempotent_and_a_change_is_seen(write: Write, results: Path) -> None:
    write(results / "runs", "a", [*SMALL, "method=lora"], five(0.4))
    files = table_files(gather(results))
    folder = results / "tables"
    assert write_files(folder, files, check=False) == []
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write_files(folder, table_files(gather(results)), check=False) == []
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert write_files(folder, files, check=True) == []
    path = folder / "table2.md"
    path.write_text(path.read_text().replace("40.0", "90.0"))
    assert any("90.0" in line for line in write_files(folder, files, check=True))


def test_committed_tables_are_those_of_the_records() -> None:
    assert write_files(RESULTS / "tables", table_files(gather()), check=True) == []


def test_tables_need_no_torch() -> None:
    code = (
        "import sys\n"
        "from mixlora_exp.reporting import gather, table_files\n"
        "assert len(table_files(gather())) > 27\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_paper_s_averages_are_those_of_its_cells_elsewhere() -> None:
    """Where no contradiction is reported, printed and computed averages agree."""
    for number in (1, 2, 5, 8, 9):
        table = read_paper(PAPER, number)
        reported = " ".join(entry.text for entry in contradictions(PAPER, number))
        for line in table.lines:
            computed = mean(float(line[task]) for task in table.tasks)
            if abs(computed - float(line["avg"])) > 0.1:
                assert f"its cells give {computed:.2f}" in reported
    assert {line["method"] for line in read_paper(PAPER, 1).lines} == set(METHODS)
