"""Benchmarks by their command line: help, mistakes, and kinds that are no step."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from mixlora_exp.bench import kinds
from mixlora_exp.bench.runner import run_benchmark
from mixlora_exp.cli.main import main
from mixlora_exp.config.schema import ATTENTION_TARGETS, FEED_FORWARD_TARGETS
from mixlora_exp.errors import UserError


@pytest.mark.slow
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=tiny", "batch=1", "length=4", "rounds=1", "dtype=float32"]
    words += ["rows=[lora_peft]", f"output={tmp_path}", "name=one"]
    assert main(["bench", *words]) == 0
    record = json.loads((tmp_path / "one.json").read_text())
    assert record["rows"]["lora_peft"]["train_peak_memory_bytes"] > 0, "measured in its own process"
    assert "| lora_peft |" in capsys.readouterr().out


def test_help_names_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    told = re.findall(r"^kind=([a-z]+) ", capsys.readouterr().out, re.MULTILINE)
    there = Path(kinds.__file__).parent.glob("[a-z]*.py")
    assert sorted(told) == sorted(path.stem for path in there)


def test_help_of_a_kind_lists_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kind=forms", "--help"]) == 0
    assert {"threads=None", "rank=16"} <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["modle=tiny"], "did you mean model"),
        (["rounds=many"], "rounds=many is not valid"),
        (["kind=adapters", "methd=lora"], "did you mean method"),
        (["kind=peers", "package=other"], "package=other is unknown: choose moe_peft or mixlora"),
        (["kind=peers", "model=gemma_2b"], "choose a model of the Llama family"),
        (["kind=together", "experiment=smoke"], "experiment=smoke has no adapters"),
        (["kind=peer"], "kind=peer is unknown: choose from adapters, bytes, eval, forms, gpu"),
    ],
)
def test_mistakes_in_words(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_benchmark(words)


def test_the_forms_of_the_exact_kernel_are_timed(tmp_path: Path) -> None:
    words = ["tokens=[1,4]", "widths=[[8,16]]", "rank=2", "seconds=0", f"output={tmp_path}"]
    written = run_benchmark(["kind=forms", *words])
    rows = json.loads(written.paths[0].read_text())["forms"]
    assert len(rows) == 2 * 2 * 2
    assert {(row["dtype"], row["dora"], row["tokens"]) for row in rows} == {
        (dtype, dora, n) for dtype in ("bfloat16", "float32") for dora in (0, 1) for n in (1, 4)
    }
    assert all(row["rounds"] >= 3 and row["dense_over_grouped"] > 0 for row in rows)


PEER = """
import json, sys
given = json.loads(sys.argv[1])
assert given["shape"]["hidden_size"] > 0
assert given["attention"] + given["feed_forward"] == PROJECTIONS
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps({"train_forward_s": 1000.0, "train_backward_s": 2000.0}), flush=True)
"""


def test_peers_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a worker that needs no package: it says that each step takes 3,000 seconds."""
    from mixlora_exp.bench.kinds import peers

    projections = [*ATTENTION_TARGETS, *FEED_FORWARD_TARGETS]
    (tmp_path / "worker.py").write_text(PEER.replace("PROJECTIONS", str(projections)))
    monkeypatch.setattr(peers, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(peers, "_environment", lambda folder: Path(sys.executable))
    words = ["model=tiny", "batch=1", "length=4", "rounds=2", "dtype=float32"]
    written = run_benchmark(["kind=peers", *words, f"output={tmp_path}"])
    assert written.paths[0].name == "peers-mixlora-tiny-2layers-float32.json"
    record = json.loads(written.paths[0].read_text())
    assert len(record["samples"]) == 2
    expected = [3000.0 / (s["ours"]["train_forward_s"] + s["ours"]["train_backward_s"])
                for s in record["samples"]]  # fmt: skip
    assert min(expected) <= record["times_as_fast"] * 1.001
    assert record["times_as_fast"] <= max(expected) * 1.001
