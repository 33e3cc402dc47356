"""Runs in tables: each in the right cell, and nothing mixed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from table_cells import LLAMA, block, five, link, multi_task, row

from mixlora_exp.errors import UserError
from mixlora_exp.results.build import gather

Write = Callable[..., Path]


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


def test_seeds_are_averaged(add: Write, results: Path) -> None:
    for seed, value in ((1, 0.4), (2, 0.5), (3, 0.6)):
        add(f"s{seed}", value, "method=lora", f"seed={seed}")
    cells = row(multi_task(results), "LoRA", "MT", "ours")
    assert cells["ARC-e"].value == pytest.approx(50.0)
    assert cells["ARC-e"].seeds == 3
    # Student's interval over seeds, and a little more for the items.
    assert 50.0 - 32 < cells["ARC-e"].low < 50.0 - 4.3027 * 10 / 3**0.5
    assert cells["ARC-e"].records == ("s1", "s2", "s3")


def test_held_out_rows_are_no_test_set(add: Write, results: Path) -> None:
    limited = ["method=lora", "data.train_limit=5"]
    add("test", 0.4, *limited, "seed=1")

    def held_out(record: dict) -> None:
        record["data"] = {k: v for k, v in record["data"].items() if k.endswith("/train")}

    add("held", 0.6, *limited, "seed=2", "evaluation.held_out=true", change=held_out)
    found = gather(results)
    assert not found.left_out
    blocks = {b.heading: row(b, "LoRA", "MT", "ours") for b in found.tables[2].blocks if b.run}
    assert sorted(cells["ARC-e"].value for cells in blocks.values()) == pytest.approx([40.0, 60.0])
    assert sum("evaluation.held_out=true" in heading for heading in blocks) == 1


def test_shuffled_experts_have_a_block_of_their_own(add: Write, results: Path) -> None:
    add("plain", 0.6, "method=mixlora", "seed=1")
    add("shuffled", 0.2, "method=mixlora", "seed=2", "evaluation.shuffle_experts=3")
    found = gather(results)
    assert not found.left_out
    blocks = {b.heading: row(b, "MixLoRA", "MT", "ours") for b in found.tables[2].blocks if b.run}
    assert len(blocks) == 2
    for heading, cells in blocks.items():
        shuffled = "evaluation.shuffle_experts=3" in heading
        assert cells["ARC-e"].value == pytest.approx(20.0 if shuffled else 60.0)


def test_quantised_bases_have_blocks_of_their_own(add: Write, results: Path) -> None:
    def older(record: dict) -> None:
        del record["config"]["model"]["quantization"]

    add("older", 0.6, "method=mixlora", "seed=1", change=older)
    add("plain", 0.4, "method=mixlora", "seed=3")
    add("held", 0.2, "method=mixlora", "seed=2", "model.quantization=nf4")
    found = gather(results)
    assert not found.left_out
    blocks = {b.heading: row(b, "MixLoRA", "MT", "ours") for b in found.tables[2].blocks if b.run}
    assert len(blocks) == 2
    for heading, cells in blocks.items():
        held = "model.quantization=nf4" in heading
        assert cells["ARC-e"].value == pytest.approx(20.0 if held else 50.0)


def test_parameters_are_those_of_the_models_that_ran(add: Write, results: Path) -> None:
    """Not of the shape in conf/model, which `model.path` leaves behind."""

    def other(percent: float) -> Callable[[dict], None]:
        counts = {"percent_paper": None, "percent_true": percent}
        return lambda record: record["parameters"].update(counts)

    words = ["method=lora", "model.path=/elsewhere"]
    add("a", 0.4, *words, "seed=1", change=other(9.876))
    (found,) = (b for b in gather(results).tables[2].blocks if b.run)
    assert row(found, "LoRA", "MT", "ours")["#Params (%)"].text == "9.876 of all"
    # Folders of one name with different models: no figure is right.
    add("b", 0.4, *words, "seed=2", change=other(1.234))
    (found,) = (b for b in gather(results).tables[2].blocks if b.run)
    assert row(found, "LoRA", "MT", "ours")["#Params (%)"].text == ""


@pytest.mark.parametrize(
    "override",
    ["evaluation.limit=100", "data.train_limit=5", "+data.train_limits.piqa=5",
     "trainer.max_steps=9", "trainer.epochs=1", "data.boolq_passage=false",
     "trainer.loss_on=all", "data.forms=[text]",
     "trainer.micro_batch_size=4", "model.weights=random", "model.path=/elsewhere"],
)  # fmt: skip
def test_other_conditions_are_another_block(override: str, add: Write, results: Path) -> None:
    add("full", 0.4, "method=lora", "seed=1")
    add("other", 0.6, "method=lora", "seed=2", override)
    blocks = [b for b in gather(results).tables[2].blocks if b.run]
    assert len(blocks) == 2
    values = {b.heading: row(b, "LoRA", "MT", "ours")["ARC-e"].value for b in blocks}
    assert sorted(values.values()) == pytest.approx([40.0, 60.0])
    name = "data.train_limits" if "limits" in override else override.partition("=")[0]
    assert any(name in heading for heading in values)
    with pytest.raises(UserError, match=rf"full and other cannot share a cell: {name} is"):
        gather(results, ["full", "other"])


def test_other_protocols_and_sources_are_other_blocks(add: Write, results: Path) -> None:
    add("a", 0.4, "method=lora")
    add("b", 0.5, "method=lora", protocol="answer_text")
    add("c", 0.6, "data=embedded", "data.path=null", "method=lora")
    assert len([b for b in gather(results).tables[2].blocks if b.run]) == 3
    for other, name in (("b", "evaluation.protocols"), ("c", "data.name")):
        with pytest.raises(UserError, match=f"{name} is"):
            gather(results, ["a", other])
    with pytest.raises(UserError, match="runs=nothing cannot be used: it is not among the coll"):
        gather(results, ["a", "nothing"])


def test_a_preset_is_named_over_its_block(add: Write, results: Path) -> None:
    add("ours", 0.4, "method=mixdora")
    add("theirs", 0.5, "method=mixdora", "preset=official")
    add("odd", 0.6, "method=mixdora", "preset=official", "evaluation.dropout=false")
    found = {b.heading: b for b in gather(results).tables[2].blocks if b.run}
    values = {
        heading: row(block, "MixDoRA", "MT", "ours")["ARC-e"].value
        for heading, block in found.items()
    }
    assert sorted(values.values()) == pytest.approx([40.0, 50.0, 60.0])
    plain, official, odd = sorted(values, key=values.get)
    assert "preset" not in plain
    # The preset's name stands for its switches; one that is set otherwise is named.
    assert official.endswith("label_logits, preset=official, hardware=cpu, torch=2.13")
    assert "preset=official" in odd
    assert "evaluation.dropout=false" in odd


def test_records_from_before_the_switches_stand_with_later_ones(add: Write, results: Path) -> None:
    def older(record: dict) -> None:
        config = record["config"]
        del config["preset"], config["method"]["train_magnitude"]
        del config["trainer"]["order"], config["trainer"]["padding_in_loss"]
        del config["evaluation"]["dropout"], config["evaluation"]["arc_labels"]

    add("a", 0.4, "method=mixlora", "seed=1", change=older)
    add("b", 0.5, "method=mixlora", "seed=2")
    cells = row(multi_task(results), "MixLoRA", "MT", "ours")
    assert cells["ARC-e"].seeds == 2


def on(
    *, dtype: str = "bfloat16", kernel: str = "exact", gpu: str = "", torch: str = "2.13.0+cpu"
) -> Callable[[dict], None]:
    """Make a record that of a run that was computed so."""

    def change(record: dict) -> None:
        record["dtype"] = dtype
        if record["kernel"] is not None:
            record["kernel"] = kernel
        record["provenance"]["packages"]["torch"] = torch
        record["provenance"]["hardware"]["gpus"] = [gpu] if gpu else []

    return change


def halved(record: dict) -> None:
    record["train"]["halved_micro_batch"] = 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (on(dtype="float32"), "precision=float32"),
        (on(kernel="peft"), "kernel=peft"),
        (on(gpu="NVIDIA H100 80GB HBM3", kernel="triton"), "hardware=H100"),
        (on(torch="2.14.1"), "torch=2.14"),
        (halved, "trainer.micro_batch_size=4"),
    ],
)
def test_what_it_was_computed_with_is_a_condition(
    change: Callable[[dict], None], words: str, add: Write, results: Path
) -> None:
    add("a", 0.4, "method=mixlora", "seed=1")
    add("b", 0.6, "method=mixlora", "seed=2", change=change)
    add("base", 0.3, "method=none")
    blocks = [b for b in gather(results).tables[2].blocks if b.run]
    values = {b.heading: row(b, "MixLoRA", "MT", "ours")["ARC-e"].value for b in blocks}
    assert sorted(values.values()) == pytest.approx([40.0, 60.0])
    assert [words in heading for heading, _ in sorted(values.items(), key=lambda p: p[1])] == [
        False, True,
    ]  # fmt: skip
    name = words.partition("=")[0]
    with pytest.raises(UserError, match=rf"a and b cannot share a cell: {name} is"):
        gather(results, ["a", "b"])
    # A base model is compared with what was scored as it was; how the others trained is not its.
    with_base = [b for b in blocks if any(line.label[0] == "base model" for line in b.rows)]
    trained_only = name in ("kernel", "trainer.micro_batch_size")
    assert len(with_base) == (2 if trained_only else 1)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
    ],
)
def test_one_model_of_gpu_is_one_hardware(
    first: str, second: str, add: Write, results: Path
) -> None:
    for seed, gpu in enumerate((first, second)):
        add(
            f"s{seed}",
            0.4 + seed / 10,
            "method=lora",
            f"seed={seed}",
            change=on(gpu=gpu, kernel="triton"),
        )
    cells = row(multi_task(results), "LoRA", "MT", "ours")
    assert cells["ARC-e"].seeds == 2


def test_what_only_moves_the_last_digits_shares_a_cell(add: Write, results: Path) -> None:
    add("a", 0.4, "method=mixlora", "seed=1")
    more = ["kernel=reference", "trainer.gradient_checkpointing=true"]
    add("b", 0.5, "method=mixlora", "seed=2", *more, change=on(kernel="reference", torch="2.13.2"))
    cells = row(multi_task(results), "MixLoRA", "MT", "ours")
    assert cells["ARC-e"].seeds == 2


def test_ranks_and_coefficients_stand_in_their_tables(add: Write, results: Path) -> None:
    add("r4", 0.4, "method=mixlora", "method.rank=4")
    add("plain", 0.5, "method=mixlora")
    add("c", 0.6, "method=mixlora", "method.router_loss_coef=0.1")
    add("odd", 0.7, "method=mixlora", "method.top_k=1")
    found = gather(results)
    ranks = block(found.tables[8], "SmolLM2")
    assert row(ranks, "MixLoRA r=4", "five mixed", "ours")["ARC-e"].value == pytest.approx(40)
    assert row(ranks, "MixLoRA r=16", "five mixed", "ours")["ARC-e"].value == pytest.approx(50)
    coefficients = block(found.tables[9], "SmolLM2")
    label = ("five mixed", "ours")
    assert row(coefficients, "MixLoRA coef=1e-1", *label)["ARC-e"].value == pytest.approx(60)
    assert row(coefficients, "MixLoRA coef=1e-3", *label)["ARC-e"].value == pytest.approx(50)
    assert row(block(found.tables[2], "SmolLM2"), "MixLoRA", "MT", "ours")["ARC-e"].seeds == 1


def test_scored_again_the_training_run_s_result_counts(add: Write, results: Path) -> None:
    """A second scoring takes no place, and costs the first none of its other protocols."""
    first = add("z", 0.4, "method=mixlora")
    add("again", 0.4, "method=none", "adapter=x", change=link(first))
    add("more", 0.6, "method=none", "adapter=x", protocol="lm_eval", change=link(first))
    found = gather(results)
    assert {entry.name for entry in found.left_out} == {"again"}
    cells = row(block(found.tables[2], "label_logits"), "MixLoRA", "MT", "ours")
    assert (cells["ARC-e"].records, cells["ARC-e"].seeds) == (("z",), 1)
    cells = row(block(found.tables[2], "lm_eval"), "MixLoRA", "MT", "ours")
    assert cells["ARC-e"].records == ("more",)


def test_an_adapter_that_was_scored_elsewhere_is_no_seed_of_its_cell(
    add: Write, results: Path
) -> None:
    first = add("train", 0.4, "method=mixlora", "seed=1")

    def elsewhere(record: dict) -> None:
        link(first)(record)
        on(gpu="NVIDIA H200", kernel="triton")(record)

    add("again", 0.6, "method=none", "adapter=x", change=elsewhere)
    add("other", 0.5, "method=mixlora", "seed=2")
    found = {b.heading: b for b in gather(results).tables[2].blocks if b.run}
    names = [set(row(b, "MixLoRA", "MT", "ours")["ARC-e"].records) for b in found.values()]
    assert sorted(names, key=len) == [{"again"}, {"train", "other"}]


def test_what_an_adapter_was_trained_on_is_not_forgotten(add: Write, results: Path) -> None:
    first = add("train", 0.4, "data=embedded", "data.path=null", "method=mixlora")
    add("again", 0.6, "method=none", "adapter=x", change=link(first))
    add("real", 0.5, "method=mixlora", "seed=2")
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


def test_the_base_model_counts_once(add: Write, results: Path) -> None:
    for seed in (1, 2, 3):
        add(f"b{seed}", 0.3, "method=none", f"seed={seed}")
    found = gather(results)
    cells = row(block(found.tables[2], "SmolLM2"), "base model", "-", "ours")
    assert (cells["ARC-e"].seeds, cells["ARC-e"].records) == (1, ("b1",))
    assert gather(results, ["b1"]).left_out == []


def test_the_order_of_the_mixture_is_no_second_run(add: Write, results: Path) -> None:
    other = "task.train=[piqa,obqa,boolq,arc_c,arc_e]"
    add("a", 0.4, "method=lora")
    add("b", 0.6, "method=lora", other)
    cells = row(multi_task(results), "LoRA", "MT", "ours")
    assert cells["ARC-e"].records == ("a",)


def test_the_base_model_stands_in_the_blocks_of_its_scoring(add: Write, results: Path) -> None:
    add("lora", 0.4, "method=lora", "trainer.max_steps=5")
    add("base", 0.3, "method=none")
    found = multi_task(results)
    assert row(found, "base model", "-", "ours")["ARC-e"].value == pytest.approx(30.0)


def test_an_adapter_scored_again_stands_in_its_run_s_cell(add: Write, results: Path) -> None:
    first = add("train", 0.4, "method=mixlora")
    add("again", 0.6, "method=none", "adapter=x", protocol="lm_eval", change=link(first))
    cells = row(block(gather(results).tables[2], "lm_eval"), "MixLoRA", "MT", "ours")
    assert (cells["ARC-e"].value, cells["ARC-e"].records) == (pytest.approx(60), ("again",))


def test_table_4_has_the_rows_that_were_read(add: Write, results: Path) -> None:
    add("a", 0.4, "method=lora", rows={"arc_e/test": 77})
    (found,) = gather(results).tables[4].blocks
    cells = row(found, "ARC-e")
    assert cells["test: paper"].text == "2,380"
    values = dict(zip(found.columns, [c.text for c in next(
        line for line in found.rows if line.label == ("ARC-e",)).cells], strict=True))  # fmt: skip
    assert values["read, data=local"] == "77"
