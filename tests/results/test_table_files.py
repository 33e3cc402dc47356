"""Tables as files, and benchmarks in them: three formats that agree, written once."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from table_cells import bench_record

from mixlora_exp.results.build import (
    RESULTS,
    Results,
    data_files,
    gather,
    table_files,
    write_files,
)
from mixlora_exp.results.tidy import AREA

Write = Callable[..., Path]


ROW = {"method": "mixlora", "kernel": "exact", "num_experts": 8, "top_k": 2,
       "adapter_dtype": "float32", "head": "full"}  # fmt: skip
MEASURED = {"train_forward_us_per_token": 10.0, "train_forward_ratio": 0.5,
            "train_backward_us_per_token": 20.0, "train_backward_ratio": 0.8,
            "train_ratio": 0.7, "train_ratio_quartiles": [0.6, 0.75], "rounds": 3}  # fmt: skip
ROWS = {
    "mixlora": {**ROW, **MEASURED},
    "mixlora_triton": {**ROW, "kernel": "triton", "error": "not measured: needs a GPU"},
}


def test_benchmarks_stand_in_tables_6_and_7(results: Path) -> None:
    bench_record(results / "bench", "one", ROWS, model="llama2_7b", layers=2, batch=2, length=8)
    table = gather(results).tables[6]
    found = table.blocks[1]
    assert "2 layers, 2 x 8 tokens, bfloat16" in found.heading
    exact, triton = found.rows
    assert exact.label == ("MixLoRA (exact kernel)", "a cpu, 2 threads, torch 2, dropout 0.05")
    assert [cell.value for cell in exact.cells[:4]] == [10.0, 50.0, 20.0, 80.0]
    assert triton.cells[0].text == "needs a GPU"
    ratio = exact.cells[found.columns.index("forward + backward, % of LoRA")]
    assert (ratio.value, ratio.low, ratio.high) == (70.0, 60.0, 75.0)
    assert ratio.records == ("bench/one.json",)
    assert len(gather(results).tables[7].blocks) == 1


def test_a_spoilt_benchmark_is_left_out_by_name(results: Path) -> None:
    (results / "bench" / "cut.json").write_text("{")
    bench_record(results / "bench", "one", {"mixlora": {}})
    found = gather(results)
    assert {entry.name for entry in found.left_out} == {"bench/cut", "bench/one"}


def test_rendered_files_agree(add: Write, results: Path) -> None:
    add("a", 0.4, "method=lora")
    files = table_files(gather(results))
    tables = gather(results).tables.values()
    assert len(files) == 2 + 3 * len(tables) + sum(bool(table.summary) for table in tables)
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
    assert "40.0 [26.3, 55.4] (n=1)" in files["table2-details.md"]
    assert "| LoRA | MT | 40.0 |" in files["table2.md"]
    assert "answers as letters, full test sets, CPU; 1 seed" in files["table2.md"]
    assert "LLaMA-2 7B: 0 of 8 rows run." in files["table2.md"]
    assert r"\toprule" in files["table2.tex"]
    for name in (f"table{number}.tex" for number in range(1, 10)):
        body = files[name]
        assert body.count(r"\begin{tabular}") == body.count(r"\end{tabular}") > 0
        assert "%" not in body.replace(r"\%", "").split("\\begin", 1)[1]


def test_tidy_files_have_one_figure_a_line(add: Write, results: Path) -> None:
    for seed in (1, 2):
        add(f"lora{seed}", 0.4, "method=lora", f"seed={seed}")
        add(f"mix{seed}", 0.7, "method=mixlora", f"seed={seed}", "trainer.learning_rate=1e-3")
        add(f"same{seed}", 0.8, "method=mixlora", f"seed={seed}")
    files = {
        n: list(csv.DictReader(t.splitlines())) for n, t in data_files(gather(results)).items()
    }
    scores = [line for line in files["scores.csv"] if line["record"] == "mix2"]
    assert len(scores) == 2 * 5, "accuracy and log-likelihood of five tasks"
    first = {**scores[0]}
    assert (first["rank"], first["alpha"], first["rate"]) == ("16", "32.0", "0.001")
    assert (first["task"], first["metric"], first["value"], first["n"]) == (
        "arc_e", "accuracy", "0.7", "40",
    )  # fmt: skip
    assert first["rows"] == "test"
    assert not [line for line in files["scores.csv"] if line["metric"] == AREA], "one answer only"
    assert float(first["se"]) == pytest.approx((0.7 * 0.3 / 40) ** 0.5, rel=1e-4)
    (line,) = [
        found for found in files["differences.csv"]
        if (found["table"], found["task"], found["metric"]) == ("2", "arc_e", "accuracy")
    ]  # fmt: skip
    assert (line["a"], line["b"], line["seeds"], line["n"]) == (
        "MixLoRA, MT",
        "LoRA, MT",
        "2",
        "40",
    )
    assert float(line["delta"]) == pytest.approx(40.0)
    assert float(line["low"]) < 40.0 < float(line["high"])
    assert 0 < float(line["p"]) < float(line["q"])


def test_writing_is_idempotent_and_a_change_is_seen(add: Write, results: Path) -> None:
    add("a", 0.4, "method=lora")
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


def test_committed_tables_are_those_of_the_records(committed: Results) -> None:
    assert write_files(RESULTS / "tables", table_files(committed), check=True) == []
    assert write_files(RESULTS, data_files(committed), check=True) == []


def test_tables_need_no_torch(results: Path) -> None:
    """Of a few committed runs; all of them take a while."""
    for path in sorted((RESULTS / "runs").glob("*.zip"))[:3]:
        shutil.copy(path, results / "runs")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mixlora_exp.results.build import gather, table_files\n"
        f"found = gather(Path({str(results)!r}))\n"
        "assert len(found.runs) == 3\n"
        "assert len(table_files(found)) > 27\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
