"""Part A of docs/comparison.md, on made-up runs whose result is known: which runs count, which step
size is chosen, and what is said of it. Written before the runs were finished."""

from __future__ import annotations

import copy
import csv
import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from composed import compose

from mixlora_exp.config.resolve import to_dict
from mixlora_exp.results import findings
from mixlora_exp.results.build import Results
from mixlora_exp.results.cells import Standards
from mixlora_exp.results.data_facts import majority_of_train
from mixlora_exp.results.runs import RecordedRun, load_runs
from mixlora_exp.results.statistics.families import holm
from mixlora_exp.results.step_size_findings import UNSEEN
from mixlora_exp.results.step_sizes import (
    HELD_OUT_LIMIT,
    METHODS,
    SEEDS,
    STEPS,
    TASKS,
    StepSize,
    choose,
    pairs,
    read_cells,
)
from mixlora_exp.results.tables.parts import Table
from mixlora_exp.results.tables.registry import Sources
from mixlora_exp.results.tables.render import details, latex, markdown
from mixlora_exp.results.tables.step_size import NUMBER, differences, scores, step_size_table
from mixlora_exp.results.tidy import differences_csv
from mixlora_exp.tasks import TASKS as TASKS_OF

ITEMS = 400
Place = tuple[str, StepSize, int]
Share = Callable[[str, StepSize, int, str], float]
"""(method, step size, seed, task) -> share of right answers."""
SMALL, MIDDLE, LARGE = STEPS
SPREAD = 0.0025
"""Share of answers by which one seed is above or below the next."""
STUDY = ("experiment=study/step_size", "data.path=d", "hydra.mode=RUN")


@pytest.fixture(scope="module")
def standards(committed: Results) -> Standards:
    return committed.standards


@pytest.fixture(scope="module")
def configs() -> dict[str, dict[str, Any]]:
    return {method: to_dict(compose([*STUDY, f"method={method}"])) for method in METHODS}


def made(
    configs: Mapping[str, dict[str, Any]], place: Place, share: Share, *, held_out: bool = False
) -> RecordedRun:
    """A run whose answers per character have this share right; without normalisation all wrong."""
    method, step, seed = place
    trained = copy.deepcopy(configs[method])
    trained["method"]["alpha"], trained["trainer"]["learning_rate"] = step.alpha, step.rate
    trained["seed"] = seed
    scored = copy.deepcopy(trained)
    scored["evaluation"] |= {"held_out": held_out, "limit": HELD_OUT_LIMIT if held_out else None}
    name = f"{method}-{step.alpha}-{step.rate}-{seed}-{held_out}"
    found: dict[tuple[str, str], dict[str, Any]] = {}
    predictions = {}
    nats = -2.0 + (method == "mixlora") + 0.1 * STEPS.index(step)
    for task in TASKS:
        right = round(share(method, step, seed, task) * ITEMS)
        predictions[task, "answer_text"] = {
            f"{task}-{i}": {
                "answer": 0, "prediction": 1, "prediction_normalized": int(i >= right),
                "gold_log_likelihood": nats,
            }
            for i in range(ITEMS)
        }  # fmt: skip
        found[task, "answer_text"] = {
            "n": ITEMS, "accuracy": 0.0, "chance": 0.5 if task == "piqa" else 0.25,
            "majority_class": 0.27, "clusters": {},
            "gold_log_likelihood": nats,
        }  # fmt: skip
    weights = {"sha256": f"{method}{step}{seed}"}
    origin = {
        "dtype": "bfloat16", "kernel": "exact", "code": "c", "data": FILES,
        "provenance": {"hardware": {"gpus": []}, "packages": {"torch": "2.13.0"}},
    }  # fmt: skip
    record = {
        **origin,
        "saved_adapter": None if held_out else weights,
        "adapter": {**weights, "trained_by": origin} if held_out else None,
        "train": None if held_out else {},
    }
    return RecordedRun(name, Path(name), record, trained, scored, found, predictions)


FILES = {
    f"{task}/{split}": [{"rows": TASKS_OF[task].sizes[split], "sha256": f"{task} {split}"}]
    for task in TASKS
    for split in ("train", "test")
}
PLACES = [(method, step, seed) for method in METHODS for step in STEPS for seed in SEEDS]


def study(
    configs: Mapping[str, dict[str, Any]], tested: Share, held_out: Share
) -> list[RecordedRun]:
    return [
        made(configs, place, share, held_out=held)
        for held, share in ((False, tested), (True, held_out))
        for place in PLACES
    ]


def by_step(plain: Mapping[StepSize, float], mixed: Mapping[StepSize, float]) -> Share:
    """A share by method and step size, a little apart from seed to seed: by another sign for each
    method, so that differences are too."""
    return lambda method, step, seed, task: (
        (plain if method == "lora" else mixed)[step]
        + SPREAD * (seed - 43) * (1 if method == "lora" else -1)
    )


LEVEL = {SMALL: 0.5, MIDDLE: 0.5, LARGE: 0.5}
PLAIN = {SMALL: 0.4, MIDDLE: 0.5, LARGE: 0.6}
MIXED = {SMALL: 0.5, MIDDLE: 0.6, LARGE: 0.4}
HELD = by_step({SMALL: 0.3, MIDDLE: 0.45, LARGE: 0.4}, {SMALL: 0.6, MIDDLE: 0.5, LARGE: 0.4})


def table_of(runs: list[RecordedRun], standards: Standards) -> Table:
    sources = Sources(runs, None, standards, [], {}, {})  # type: ignore[arg-type]
    blocks, notes, brief, legend = step_size_table(sources)  # type: ignore[misc]
    return Table(NUMBER, "own step sizes", blocks, notes, brief(blocks), legend)


@pytest.fixture(scope="module")
def full(configs: dict[str, dict[str, Any]]) -> list[RecordedRun]:
    return study(configs, by_step(PLAIN, MIXED), HELD)


def test_the_design_is_that_of_the_experiment(
    configs: dict[str, dict[str, Any]], full: list[RecordedRun], standards: Standards
) -> None:
    """What `make study` runs is what is looked for."""
    assert read_cells(full, standards).complete
    assert [str(step) for step in STEPS] == [
        "alpha 32, rate 2e-4", "alpha 160, rate 2e-4", "alpha 160, rate 6e-4",
    ]  # fmt: skip
    assert [step.size for step in STEPS] == pytest.approx([0.0064, 0.032, 0.096])
    assert configs["lora"]["method"]["rank"] == 80
    assert configs["mixlora"]["method"]["rank"] == 16


@pytest.mark.parametrize("at", [0, 17, 18, 35])
def test_no_result_stands_before_all_runs_are_there(
    full: list[RecordedRun], standards: Standards, at: int
) -> None:
    runs = [run for n, run in enumerate(full) if n != at]
    found = table_of(runs, standards)
    assert all(cell.kind == "text" for cell in found.cells())
    tested, held = (17, 18) if at < 18 else (18, 17)
    # A run that is missing takes its held-out scores with it.
    held -= at < 18
    assert found.blocks[0].heading.startswith(
        f"{tested} of 18 runs are collected, {held} of 18 scored on held-out rows"
    )
    counts = [cell.text for cell in found.cells()]
    assert set(counts) == {"2 of 3", "3 of 3"}
    assert counts.count("3 of 3") == (10 if at < 18 else 11)


OTHER_FILES = {**FILES, "arc_e/train": [{**FILES["arc_e/train"][0], "sha256": "other rows"}]}


def changed(run: RecordedRun, part: str, group: str, name: str, value: Any) -> RecordedRun:
    config = copy.deepcopy(dict(getattr(run, part)))
    config[group][name] = value
    return dataclasses.replace(run, **{part: config})


@pytest.mark.parametrize(
    "other",
    [
        lambda run: changed(run, "trained", "method", "rank", 8),
        lambda run: changed(run, "trained", "trainer", "epochs", 2),
        lambda run: changed(run, "trained", "trainer", "learning_rate", 1e-3),
        lambda run: changed(run, "trained", "data", "train_limits", {"arc_e": 10}),
        lambda run: changed(run, "scored", "evaluation", "limit", 300),
        lambda run: changed(run, "scored", "evaluation", "shuffle_experts", 1),
        lambda run: dataclasses.replace(run, record={**run.record, "code": "other"}),
        lambda run: dataclasses.replace(run, record={**run.record, "dtype": "float32"}),
        lambda run: dataclasses.replace(run, record={**run.record, "data": OTHER_FILES}),
    ],
)
def test_a_run_of_other_conditions_is_none_of_the_design(
    full: list[RecordedRun], standards: Standards, other: Callable[[RecordedRun], RecordedRun]
) -> None:
    assert not read_cells([other(full[0]), *full[1:]], standards).complete
    # Beside the right one it changes nothing.
    both = read_cells([other(full[0]), *full], standards)
    assert both.cells == read_cells(full, standards).cells


@pytest.mark.parametrize(
    ("part", "group", "name", "value"),
    [
        ("trained", "trainer", "epochs", 2.0),
        ("trained", "trainer", "max_steps", 2),
        ("trained", "trainer", "batch_size", 64),
        ("trained", "trainer", "order", "fixed"),
        ("trained", "data", "seed", 7),
        ("trained", "data", "forms", ["text", "letters"]),
        ("trained", "data", "cutoff_length", 64),
        ("trained", "model", "weights", "random"),
        ("trained", "preset", "name", "official"),
        ("scored", "evaluation", "dropout", True),
    ],
)
def test_runs_that_are_alike_but_not_as_designed_do_not_count(
    full: list[RecordedRun], standards: Standards, part: str, group: str, name: str, value: Any
) -> None:
    runs = [changed(run, part, group, name, value) for run in full]
    assert not read_cells(runs, standards).tested
    # Nor do they outnumber runs that are as designed.
    few = read_cells([*runs, *full[:3]], standards)
    assert set(few.tested) == set(PLACES[:3])


def test_files_that_were_cut_short_are_not_the_design(
    full: list[RecordedRun], standards: Standards
) -> None:
    short = {**FILES, "arc_e/test": [{"rows": 30, "sha256": "short"}]}
    runs = [dataclasses.replace(run, record={**run.record, "data": short}) for run in full]
    found = read_cells(runs, standards)
    assert (len(found.tested), found.complete) == (0, False)


def test_held_out_scores_of_other_weights_do_not_choose(
    full: list[RecordedRun], standards: Standards
) -> None:
    record = {**full[-1].record, "adapter": {**full[-1].record["adapter"], "sha256": "others"}}
    other = dataclasses.replace(full[-1], record=record)
    found = read_cells([*full[:-1], other], standards)
    assert (len(found.tested), len(found.held_out), found.complete) == (18, 17, False)


def test_the_step_size_is_chosen_on_held_out_rows_alone(
    full: list[RecordedRun], standards: Standards
) -> None:
    cells = read_cells(full, standards).cells
    # On the test items LoRA is best at the largest, MixLoRA at the middle one.
    assert choose(cells, "lora").step == MIDDLE
    assert choose(cells, "mixlora").step == SMALL


@pytest.mark.parametrize(
    ("held_out", "expected"),
    [
        ({SMALL: 0.4975, MIDDLE: 0.5, LARGE: 0.5}, MIDDLE),
        ({SMALL: 0.5, MIDDLE: 0.5, LARGE: 0.5}, SMALL),
        ({SMALL: 0.4, MIDDLE: 0.4975, LARGE: 0.5}, LARGE),
    ],
)
def test_of_step_sizes_within_a_fifth_of_a_point_the_smallest_is_taken(
    configs: dict[str, dict[str, Any]],
    standards: Standards,
    held_out: dict[StepSize, float],
    expected: StepSize,
) -> None:
    """0.25 points below the highest is too far."""
    runs = study(configs, by_step(LEVEL, LEVEL), by_step(held_out, LEVEL))
    assert choose(read_cells(runs, standards).cells, "lora").step == expected


def test_the_limit_of_the_choice_is_two_tenths_of_a_point(
    configs: dict[str, dict[str, Any]], standards: Standards
) -> None:
    """One answer more in one task of one seed is 0.0025 / 12; ten of them are 0.21 points."""

    def share(more: int) -> Share:
        def found(method: str, step: StepSize, seed: int, task: str) -> float:
            extra = more if (step, seed, task) == (LARGE, 42, "arc_e") else 0
            return 0.5 + extra / ITEMS

        return found

    for more, expected in ((9, SMALL), (10, LARGE)):
        # Of 12 accuracies one is higher by more / 400.
        assert (more / ITEMS / 12 <= 0.002) == (expected == SMALL)
        runs = study(configs, by_step(LEVEL, LEVEL), share(more))
        assert choose(read_cells(runs, standards).cells, "lora").step == expected


def test_differences_are_those_of_the_design(full: list[RecordedRun], standards: Standards) -> None:
    found = differences(table_of(full, standards))
    values = [entry.value for entry in found.values()]
    # Own best: MixLoRA at the smallest, 50 %, LoRA at the middle one, 50 %.
    assert values == pytest.approx([0, 10, 10, -20, 20, -10])
    assert all(entry.seeds == 3 and entry.items == 4 * ITEMS for entry in found.values())
    assert [label[2] for label in found] == ["minus LoRA"] * 4 + ["", ""]


def test_intervals_hold_the_spread_over_seeds(
    full: list[RecordedRun], standards: Standards
) -> None:
    """Seeds 42, 43 and 44 of MixLoRA minus LoRA are half a point apart: Student's t of three seeds
    alone makes the interval as wide as this."""
    own = differences(table_of(full, standards))
    entry = next(iter(own.values()))
    assert entry.low is not None
    assert entry.value is not None
    over_seeds = 4.303 * 100 * 2 * SPREAD / 3**0.5
    assert entry.value - entry.low > over_seeds
    assert over_seeds == pytest.approx(1.24, abs=0.01)


def test_the_primary_comparison_stands_alone_and_the_others_are_corrected_together(
    configs: dict[str, dict[str, Any]], standards: Standards
) -> None:
    near = {SMALL: 0.5, MIDDLE: 0.515, LARGE: 0.53}
    runs = study(configs, by_step(LEVEL, near), by_step(LEVEL, near))
    own, *others = differences(table_of(runs, standards)).values()
    assert own.q == own.p
    p = [entry.p for entry in others]
    assert None not in p
    assert [entry.q for entry in others] == holm(p)  # type: ignore[arg-type]
    for entry in (own, *others):
        assert entry.q is not None
        assert bool(entry.mark) == (entry.q <= 0.05)
    # The interval that is printed says the same as p.
    for entry in (own, *others):
        assert entry.low is not None
        assert entry.high is not None
        assert entry.p is not None
        assert (entry.low > 0 or entry.high < 0) == (entry.p < 0.05)


def test_only_averages_by_the_metric_that_decides_are_marked(
    full: list[RecordedRun], standards: Standards
) -> None:
    found = table_of(full, standards)
    marked = {(b.heading, column) for b in found.blocks for row in b.rows
              for column, cell in zip(b.columns, row.cells, strict=True) if cell.mark}  # fmt: skip
    assert marked == {(found.blocks[1].heading, "average")}
    metrics = [block.metric for block in found.blocks if "Differences" in block.heading]
    assert metrics == ["accuracy_normalized", "accuracy", "gold_log_likelihood"]
    # MixLoRA's log-likelihood is one nat higher, and that of the next larger step size a tenth.
    nats = [row.cells[-2].value for row in found.blocks[-1].rows]
    assert nats == pytest.approx([0.9, 1, 1, 1, 0.2, 0.2])


def test_accuracies_stand_beside_chance_and_the_choice(
    full: list[RecordedRun], standards: Standards
) -> None:
    found = table_of(full, standards)
    block = scores(found)
    rows = {row.label: row.cells for row in block.rows}
    chosen = [label[:2] for label in rows if label[2] == "chosen"]
    assert chosen == [("LoRA", str(MIDDLE)), ("MixLoRA", str(SMALL))]
    at = dict(zip(block.columns, rows["LoRA", str(MIDDLE), "chosen"], strict=True))
    assert at["average"].value == pytest.approx(50)
    assert at["held out"].value == pytest.approx(45)
    level = rows["chance or majority", "", ""]
    # The most frequent answer of ARC-e's training split is above chance.
    assert level[0].value == pytest.approx(100 * majority_of_train("arc_e"))
    assert level[0].value == pytest.approx(26.1, abs=0.05)
    text = markdown(found)
    assert "chosen" in text
    assert "3 seeds" in text


def tables_with(found: Table) -> dict[int, Table]:
    return {2: Table(2, "", [], []), NUMBER: found}


@pytest.mark.parametrize(
    ("mixed", "said"),
    [
        ({SMALL: 0.5, MIDDLE: 0.5, LARGE: 0.5}, UNSEEN),
        ({SMALL: 0.6, MIDDLE: 0.5, LARGE: 0.5}, "at this size MixLoRA is better than LoRA"),
        ({SMALL: 0.4, MIDDLE: 0.5, LARGE: 0.5}, "at this size MixLoRA is worse than LoRA"),
    ],
)
def test_the_first_sentence_is_the_rule_that_was_written_before(
    configs: dict[str, dict[str, Any]],
    standards: Standards,
    mixed: dict[StepSize, float],
    said: str,
) -> None:
    choice = by_step({**LEVEL, MIDDLE: 0.6}, {**LEVEL, SMALL: 0.6})
    found = table_of(study(configs, by_step(LEVEL, mixed), choice), standards)
    first, _, _ = findings.sentences(tables_with(found), [], [])
    assert first.endswith(f" (3 seeds, mean of four tasks): {said}.")
    chosen = f"choose for it (LoRA: {MIDDLE}; MixLoRA: {SMALL}), is "
    value = 100 * (mixed[SMALL] - 0.5)
    assert f"{chosen}{value:+.1f} [" in first


@pytest.mark.parametrize(
    ("large", "told"),
    [
        ((0.5, 0.5), "Of these 5 comparisons none tells two settings apart after correction."),
        ((0.5, 0.6), "Of these 5 comparisons 2 tell two settings apart after correction."),
        ((0.6, 0.6), "Of these 5 comparisons 2 tell two settings apart after correction."),
    ],
)
def test_the_second_sentence_has_all_five_with_their_marks(
    configs: dict[str, dict[str, Any]],
    standards: Standards,
    large: tuple[float, float],
    told: str,
) -> None:
    plain, mixed = ({**LEVEL, LARGE: share} for share in large)
    runs = study(configs, by_step(plain, mixed), by_step(LEVEL, LEVEL))
    first, second, _ = findings.sentences(tables_with(table_of(runs, standards)), [], [])
    # Both chose the smallest.
    assert f"choose for it (both: {SMALL}), is " in first
    assert second.endswith(told)
    head = "MixLoRA minus LoRA at equal step sizes, from the smallest to the largest, in points: "
    assert second.startswith(head)
    figures = re.findall(r"([+-]\d+\.\d) \[[^]]*\]( \(\w+\))?", second)
    gain, more = (100 * (share - 0.5) for share in large)
    wanted = [0.0, 0.0, more - gain, gain, more]
    assert [abs(float(value)) for value, _ in figures] == pytest.approx([abs(v) for v in wanted])
    assert [bool(mark) for _, mark in figures] == [abs(v) > 1 for v in wanted]


def test_one_comparison_tells(configs: dict[str, dict[str, Any]], standards: Standards) -> None:
    mixed = {**LEVEL, MIDDLE: 0.6}
    runs = study(configs, by_step(LEVEL, mixed), by_step(LEVEL, LEVEL))
    _, second, _ = findings.sentences(tables_with(table_of(runs, standards)), [], [])
    assert second.endswith("Of these 5 comparisons 1 tells two settings apart after correction.")


def test_a_task_at_chance_is_grey_and_the_average_over_all_decides(
    configs: dict[str, dict[str, Any]], standards: Standards
) -> None:
    """As it was written before the runs; beside it stands the average without that task."""

    def share(method: str, step: StepSize, seed: int, task: str) -> float:
        return 0.25 if task == "obqa" else 0.68 if method == "mixlora" else 0.58

    found = table_of(study(configs, share, by_step(LEVEL, LEVEL)), standards)
    block, versus_ = found.blocks[:2]
    at = block.columns.index("OBQA")
    assert all(row.cells[at].at_chance for row in block.rows[:-1])
    assert not any(row.cells[0].at_chance for row in block.rows)
    by_column = dict(zip(versus_.columns, versus_.rows[0].cells, strict=True))
    assert by_column["OBQA"].at_chance
    assert not by_column["ARC-e"].at_chance
    assert (by_column["average"].value, by_column["average"].mark) == (
        pytest.approx(7.5),
        "better",
    )
    assert by_column["above chance"].value == pytest.approx(10)
    assert by_column["above chance"].items == 3 * ITEMS
    # Log-likelihoods: over the tasks that are above chance by the metric that decides.
    assert found.blocks[-1].rows[0].cells[-1].items == 3 * ITEMS
    lines = list(csv.DictReader(differences_csv({NUMBER: found}).splitlines()))
    grey = [line for line in lines if line["at_chance"] == "yes"]
    assert {line["task"] for line in grey if line["metric"] == "accuracy_normalized"} == {"obqa"}


def test_every_file_of_the_table_names_what_it_compares(
    full: list[RecordedRun], standards: Standards
) -> None:
    found = table_of(full, standards)
    lines = list(csv.DictReader(differences_csv({NUMBER: found}).splitlines()))
    # By accuracy, all of whose answers are wrong, no task is above chance.
    assert len(lines) == 3 * 6 * 6 - 6
    first = lines[4]
    assert (first["a"], first["b"], first["task"], first["metric"]) == (
        "MixLoRA, each at its own best step size",
        "LoRA, each at its own best step size",
        "average",
        "accuracy_normalized",
    )
    assert f"own best: LoRA at {MIDDLE}, MixLoRA at {SMALL}" in first["conditions"]
    assert first["p"] == first["q"] != ""
    longer = next(line for line in lines if line["a"].startswith("LoRA, alpha"))
    assert (longer["a"], longer["b"]) == (f"LoRA, {LARGE}", f"LoRA, {SMALL}")
    assert "whether or not one of them is at chance" in details(found)
    page = markdown(found)
    assert "The first line decides, by its own p" in page
    assert "after correction for the number of comparisons" not in page
    rows = [line for line in page.splitlines() if line.startswith("| MixLoRA | each at its own")]
    assert len(rows) == 1
    assert rows[0].endswith(f"| {float(first['p']):.3f} | {float(first['q']):.3f} |")
    assert "$<$0.001" in latex(found)
    assert "¡" not in latex(found)


def test_the_first_screen_is_the_comparison_once_it_is_complete(
    full: list[RecordedRun], standards: Standards
) -> None:
    whole, part = (table_of(runs, standards) for runs in (full, full[1:]))
    block = findings.main_block(tables_with(whole))
    assert block is not None
    assert block.columns == (*map(str, STEPS), "each at its own")
    plain, mixed, minus, level = ([cell.value for cell in row.cells] for row in block.rows)
    assert plain == pytest.approx([40, 50, 60, 50])
    assert mixed == pytest.approx([50, 60, 40, 50])
    assert minus == pytest.approx([10, 10, -20, 0])
    known = [max(0.25 if n < 3 else 0.5, majority_of_train(t)) for n, t in enumerate(TASKS)]
    assert level == pytest.approx([100 * mean(known)] * 4)
    labels = [contrast.label for contrast in findings.contrasts(tables_with(whole))]
    assert labels[0] == "MixLoRA minus LoRA, each at its own best step size"
    assert labels[-1] == f"MixLoRA, {LARGE} minus {SMALL}"
    assert len(labels) == 6
    assert findings.main_block(tables_with(part)) is None
    assert findings.contrasts(tables_with(part)) == []


def test_pairs_are_of_the_cells_that_they_name(
    full: list[RecordedRun], standards: Standards
) -> None:
    cells = read_cells(full, standards).cells
    found = list(pairs(cells, {"lora": "L", "mixlora": "M"}))
    assert [pair.primary for pair in found] == [True] + [False] * 5
    sides = [(p.first.method, p.first.step, p.second.method, p.second.step) for p in found]
    assert sides == [
        ("mixlora", SMALL, "lora", MIDDLE),
        *(("mixlora", step, "lora", step) for step in STEPS),
        ("lora", LARGE, "lora", SMALL),
        ("mixlora", LARGE, "mixlora", SMALL),
    ]
    values = [mean(part.value for part in cells["lora", step].parts()) for step in STEPS]
    assert values == pytest.approx([0.4, 0.5, 0.6])


def test_the_figure_shows_scores_intervals_and_the_choice(
    full: list[RecordedRun], standards: Standards
) -> None:
    figures = pytest.importorskip(
        "mixlora_exp.results.figures", reason="matplotlib is not installed"
    )
    found = table_of(full, standards)
    (ax,) = figures.step_size_figure(scores(found)).axes
    lines = list(ax.lines)
    drawn = {tuple(round(float(v), 6) for v in line.get_ydata()) for line in lines}
    assert {(40.0, 50.0, 60.0), (50.0, 60.0, 40.0)} <= drawn
    rings = [line for line in lines if line.get_markersize() == 14]
    assert [round(float(line.get_ydata()[0]), 6) for line in rings] == [50.0, 50.0]
    places = [round(float(line.get_xdata()[0])) for line in rings]
    # LoRA's middle one, MixLoRA's smallest.
    assert places == [1, 0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["LoRA", "MixLoRA"]


def test_packed_runs_of_the_study_are_of_the_design(committed: Results) -> None:
    """Whatever they scored, which nothing here looks at."""
    place = committed.folder / "study" / "a"
    runs, left_out = load_runs(place)
    assert left_out == []
    found = read_cells(runs, committed.standards)
    assert len(found.tested) == len(found.held_out) == len(runs) / 2 == len([*place.iterdir()]) / 2
    heading = committed.tables[NUMBER].blocks[0].heading
    if not found.complete:
        assert heading.startswith(f"{len(found.tested)} of 18 runs are collected, ")
        assert not {run.name for run in runs} & {run.name for run in committed.runs}
