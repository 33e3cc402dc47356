"""The paper's figures in the tables: all of them, each in its place, contradictions marked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
from composed import compose
from table_cells import PAPER, block, row

from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.models.parameters import count_parameters
from mixlora_exp.results.build import gather
from mixlora_exp.results.paper import TASK_TITLES, WITH_EXPERTS, contradictions, read_paper
from mixlora_exp.results.tables.accuracy_tables import ABLATION, MULTI, SINGLE
from mixlora_exp.tasks import TASKS

Write = Callable[..., Path]


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


def test_committed_figures_are_those_of_the_paper_s_transcript() -> None:
    folder = Path(__file__).resolve().parents[3] / "shared" / "paper"
    if not folder.is_dir():
        pytest.skip("the transcribed tables are not beside this checkout")
    for number in range(1, 10):
        (source,) = folder.glob(f"table{number}_*.csv")
        assert (PAPER / f"table{number}.csv").read_bytes() == source.read_bytes()


def test_table_3_says_where_the_paper_differs(results: Path) -> None:
    table = gather(results).tables[3]
    assert any("accumulation_steps: 8 in the paper, 2 here" in note for note in table.notes)
    assert sum("in the paper" in note for note in table.notes) == 1


def test_paper_s_averages_are_those_of_its_cells_elsewhere() -> None:
    """Where no contradiction is reported, printed and computed averages agree."""
    for number in (1, 2, 5, 8, 9):
        table = read_paper(PAPER, number)
        reported = " ".join(entry.text for entry in contradictions(PAPER, number))
        for line in table.lines:
            computed = mean(float(line[task]) for task in table.tasks)
            if abs(computed - float(line["avg"])) > 0.1:
                assert f"its cells give {computed:.2f}" in reported


def test_columns_and_lines_are_those_of_the_paper() -> None:
    columns = {1: SINGLE, 2: MULTI, 5: MULTI, 8: ABLATION, 9: ABLATION}
    methods = {number: PAPER_METHODS for number in (1, 2, 5)}
    methods |= {8: WITH_EXPERTS, 9: WITH_EXPERTS}
    for number, tasks in columns.items():
        printed = read_paper(PAPER, number)
        assert printed.tasks == tasks
        assert set(tasks) <= set(TASKS)
        assert tuple(dict.fromkeys(line["method"] for line in printed.lines)) == methods[number]
