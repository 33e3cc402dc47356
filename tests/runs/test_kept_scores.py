"""What was scored before an interruption is kept, and taken up again to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from mixlora_exp.cli.train import execute
from mixlora_exp.config.schema import Protocol
from mixlora_exp.evaluation import ItemScore, Scorer, TaskScore, in_lockstep
from mixlora_exp.evaluation.share import Share
from mixlora_exp.records.outcome import outcomes
from mixlora_exp.runs import kept_batches, scoring, together
from mixlora_exp.runs.kept_batches import KeptBatches

WORDS = ["experiment=smoke", "method=lora", "trainer.max_steps=4", "trainer.save_steps=100"]


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A process in the foreground: in the background of a shell SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_scores_of_a_finished_protocol_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "evaluation.protocols=[answer_text,label_logits]"]
    assert execute([*words, f"output_dir={tmp_path / 'whole'}"]) == 0
    asked, real = [], scoring.score_tests

    def score_tests(protocol: Protocol, *args, **kwargs):
        asked.append(protocol)
        if protocol is Protocol.label_logits and len(asked) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(protocol, *args, **kwargs)

    monkeypatch.setattr(scoring, "score_tests", score_tests)
    argv = [*words, f"output_dir={tmp_path / 'run'}"]
    assert execute(argv) == 130
    (kept,) = tmp_path.glob("run/*/checkpoints/scores-*")
    assert kept.name == "scores-adapter-answer_text.json"
    capsys.readouterr()
    assert execute(argv) == 0
    assert "answer_text: kept from before the interruption" in capsys.readouterr().out
    assert asked == [Protocol.answer_text, Protocol.label_logits, Protocol.label_logits]
    assert outcomes(tmp_path / "run") == outcomes(tmp_path / "whole")
    assert not kept.exists()


RUNS = {"label_logits": "run_logits", "answer_text": "run_scores", "generate": "run_generate"}
BATCHED = ["experiment=smoke", "trainer.max_steps=2", "evaluation.batch_tokens=150",
           "task.evaluate=[arc_e,obqa]"]  # fmt: skip


def observed(protocol: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[int]], list[int]]:
    """Lengths of the rows of each pass, to come; and in which of them Ctrl-C is pressed."""
    passes: list[list[int]] = []
    stop, real = [0], getattr(Scorer, RUNS[protocol])

    def passed(self: Scorer, rows, *args, **kwargs):
        passes.append([len(row) if isinstance(row, list) else len(row.tokens) for row in rows])
        if len(passes) == stop[0]:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, rows, *args, **kwargs)

    monkeypatch.setattr(Scorer, RUNS[protocol], passed)
    return passes, stop


@pytest.mark.parametrize("protocol", RUNS)
def test_batches_of_a_protocol_that_was_begun_are_kept(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Items of all tasks share batches, so that none of them is done before the last batches."""
    words = [*BATCHED, "method=mixlora", f"evaluation.protocols=[{protocol}]"]
    passes, stop = observed(protocol, monkeypatch)
    assert execute([*words, f"output_dir={tmp_path / 'whole'}"]) == 0
    whole = list(passes)
    assert len(whole) > 5
    passes.clear()
    stop[0] = 4
    argv = [*words, f"output_dir={tmp_path / 'run'}"]
    assert execute(argv) == 130
    (kept,) = tmp_path.glob("run/*/checkpoints/scores-adapter-*-batches-0.jsonl")
    capsys.readouterr()
    stop[0] = 0
    passes.clear()
    assert execute(argv) == 0
    assert f"{protocol}: 3 batches kept from before the interruption" in capsys.readouterr().out
    assert passes == whole[3:]
    assert outcomes(tmp_path / "run") == outcomes(tmp_path / "whole")
    assert not kept.exists()


@pytest.mark.parametrize("protocol", RUNS)
def test_batches_of_adapters_that_are_scored_together_are_kept(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A pass is left out that both have; with rows of one alone it would round otherwise."""
    words = [*BATCHED, "adapters=[mixlora,lora]", f"evaluation.protocols=[{protocol}]"]
    passes, stop = observed(protocol, monkeypatch)
    assert execute([*words, f"output_dir={tmp_path / 'whole'}"]) == 0
    whole = list(passes)
    assert len(whole) > 5
    passes.clear()
    stop[0] = 4
    argv = [*words, f"output_dir={tmp_path / 'run'}"]
    assert execute(argv) == 130
    files = sorted(tmp_path.glob("run/*/checkpoints/scores-adapter-*-batches-0.jsonl"))
    assert len(files) == 2
    for place, lines in zip(files, (3, 2), strict=True):
        place.write_text("".join(place.read_text().splitlines(keepends=True)[: 1 + lines]))
    capsys.readouterr()
    stop[0] = 0
    passes.clear()
    assert execute(argv) == 0
    told = capsys.readouterr().out
    assert "3 batches kept from before the interruption" in told
    assert passes == whole[2:]
    assert outcomes(tmp_path / "run") == outcomes(tmp_path / "whole")
    assert not any(place.exists() for place in files)


def test_what_was_scored_beside_others_is_not_taken_for_another_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    words = [*BATCHED, f"output_dir={tmp_path}", "evaluation.protocols=[label_logits]"]
    _, stop = observed("label_logits", monkeypatch)
    stop[0] = 4
    assert execute([*words, "adapters=[mixlora,lora]"]) == 130
    assert len(list(tmp_path.glob("*/checkpoints/scores-adapter-*-batches-0.jsonl"))) == 2
    stop[0] = 0
    capsys.readouterr()
    assert execute([*words, "adapters=[mixlora,lora,dora]"]) == 0
    assert "kept from before" not in capsys.readouterr().out


class Killed(BaseException):
    pass


def test_adapters_that_were_scored_together_end_the_same_after_a_kill_between_their_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The one that has no record yet would have passes of its own."""
    words = [*BATCHED, "trainer.precision=float32", "adapters=[mixlora,lora]"]
    assert execute([*words, f"output_dir={tmp_path / 'whole'}"]) == 0
    argv, real = [*words, f"output_dir={tmp_path / 'run'}"], together.write_record

    def write_record(this, record):
        if list(tmp_path.glob("run/*/record.json")):
            raise Killed
        return real(this, record)

    with monkeypatch.context() as patch:
        patch.setattr(together, "write_record", write_record)
        with pytest.raises(Killed):
            execute(argv)
    assert len(list(tmp_path.glob("run/*/record.json"))) == 1
    capsys.readouterr()
    assert execute(argv) == 0
    assert "kept from before the interruption" in capsys.readouterr().out
    assert outcomes(tmp_path / "run") == outcomes(tmp_path / "whole")
    assert not list(tmp_path.glob("run/*/checkpoints/*"))


def test_scores_that_cannot_be_kept_are_recorded_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scoring, "_keep", full)
    words = [*BATCHED, "adapters=[mixlora,lora]", "evaluation.protocols=[label_logits]"]
    assert execute([*words, f"output_dir={tmp_path}"]) == 0
    assert len(list(tmp_path.glob("*/record.json"))) == 2


def test_items_of_one_id_and_length_are_told_apart(tmp_path: Path) -> None:
    """Batches of a data set that repeats an id, stopped in the third of four."""
    scorer, asked = object.__new__(Scorer), []
    scorer.batch_tokens, scorer.share, scorer.watch, scorer._counts = 1, Share(), None, {}

    def work(batch: list[int]) -> list[str]:
        asked.append(batch)
        if len(asked) == 3:
            raise Killed
        return [f"answer {i}" for i in batch]

    place, found = tmp_path / "batches.jsonl", []
    for _ in range(2):
        scorer.kept = KeptBatches(place, {}, lambda: None)
        with contextlib.suppress(Killed):
            found = scorer.over_batches([5, 5, 5, 5], ["same"] * 4, work)
    assert found == [f"answer {i}" for i in range(4)]
    assert asked == [[0], [1], [2], [2], [3]]


def test_ctrl_c_before_all_adapters_have_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start

    def start(self: threading.Thread) -> None:
        if self.name == "second":
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    tokenizer, work = SimpleNamespace(pad_token_id=0), {"first": str, "second": str}
    with pytest.raises(KeyboardInterrupt):
        in_lockstep(nn.Linear(1, 1), tokenizer, contextlib.nullcontext(), work, 8)


@pytest.mark.parametrize(
    "change",
    [{"results": 3}, {"results": [{"item": {"id": 1}}]}, {"results": [{"a": 1, "b": 2}]},
     {"counts": [1]}, {"counts": {"a": [["x"]]}}, {"counts": {"a": [[1], [1, 2]]}},
     {"seconds": "long"}, {"seconds": None}, {"name": 3}],
    ids=str,
)  # fmt: skip
def test_a_kept_batch_with_odd_content_is_computed(change, tmp_path: Path) -> None:
    place = tmp_path / "batches.jsonl"
    kept = KeptBatches(place, {}, lambda: None)
    name = kept.name_of(1, 0, ["x"], [7])
    assert not kept.has(name, 1)
    kept.add(name, ["a text"], {"arc_e": [[1.0, 0.0]]})
    assert KeptBatches(place, {}, lambda: None).has(name, 1)
    entry = {**json.loads(place.read_text()), **change}
    del entry["sha256"]
    place.write_text(json.dumps({**entry, "sha256": kept_batches._hash(entry)}))
    assert not KeptBatches(place, {}, lambda: None).has(name, 1)


def test_kept_batches_that_do_not_fit_are_computed(tmp_path: Path) -> None:
    place, item = tmp_path / "batches.jsonl", ItemScore("x", 0, 1, [0.25, float("inf")], -1.5)
    for number, results in enumerate(([item], [[(-0.5, True), (-1.0, False)]], ["a text"])):
        kept = KeptBatches(place, {"run": "a"}, lambda: None)
        name = kept.name_of(kept.next_call(), 0, [f"arc_e/{number}"], [7])
        assert not kept.has(name, 1)
        kept.add(name, results, {"arc_e": [[1.0, 0.0]]})
        again = KeptBatches(place, {"run": "a"}, lambda: None)
        assert len(again) == number + 1
        assert again.has(name, 1)
        assert not again.has(name, 2)
        assert again.find(name) == (results, {"arc_e": [[1.0, 0.0]]})
    assert kept.name_of(2, 0, ["arc_e/2"], [7]) != name
    assert kept.name_of(1, 1, ["arc_e/2"], [7]) != name
    assert len(KeptBatches(place, {"run": "b"}, lambda: None)) == 0
    content = place.read_text()
    for odd in (content[:-5], content.replace("a text", "a test"), f"{content}\n[1]\nnull\n{{"):
        place.write_text(odd)
        assert len(KeptBatches(place, {"run": "a"}, lambda: None)) == 2 + odd.startswith(content)
    place.unlink()
    place.mkdir()
    kept = KeptBatches(place, {}, lambda: None)
    kept.add("a", [], {})
    assert len(kept) == 0, "what cannot be written is not kept"


@pytest.mark.parametrize("damage", ["cut", "flipped", "another"])
def test_kept_scores_that_do_not_fit_are_not_used(damage: str, tmp_path: Path) -> None:
    place, identity = tmp_path / "scores.json", {"fingerprint": "a"}
    item = ItemScore("x", 0, 1, [0.25, 0.5], -1.5)
    score = TaskScore("arc_e", "p", 1, 0.0, 0.0, None, 1.0, 0.25, -1.5, 0, 0, items=[item])
    scoring._keep(place, identity, ([score], 2.5))
    assert scoring._recall(place, identity) == ([score], 2.5)
    for odd in ({"accuracy": "all"}, {"accuracy": math.nan}, {"items": []}, {"n": None}):
        scoring._keep(tmp_path / "odd.json", identity, ([dataclasses.replace(score, **odd)], 2.5))
        assert scoring._recall(tmp_path / "odd.json", identity) is None
    text = place.read_text()
    if damage == "cut":
        place.write_text(text[: len(text) // 2])
    elif damage == "flipped":
        place.write_text(text.replace("0.25", "0.75"))
    else:
        identity = {"fingerprint": "b"}
    assert scoring._recall(place, identity) is None
