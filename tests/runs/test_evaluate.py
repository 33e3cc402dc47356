"""`evaluate.py`: an adapter that exists is scored as its run would score it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import as_rank, run_ranks

from mixlora_exp.cli.evaluate import run, settled
from mixlora_exp.cli.main import main
from mixlora_exp.config.command import compose
from mixlora_exp.config.resolve import to_dict
from mixlora_exp.errors import UserError
from mixlora_exp.evaluation import in_lockstep
from mixlora_exp.plans.memory import scoring_bytes
from mixlora_exp.records.record import read_record
from mixlora_exp.records.show import scores_table
from mixlora_exp.runs import together
from mixlora_exp.system.exit_codes import MISTAKE, guarded


def composed(*words: str) -> Any:
    lines, recorded = settled(words)
    return compose(lines, "evaluate", recorded)


Start = Callable[..., Any]
MIXLORA = ("method=mixlora",)


def score(folder: Path, *words: str) -> dict[str, Any]:
    """The record that the command line leaves."""
    assert guarded(run, [*words, f"output_dir={folder}"]) == 0
    (path,) = folder.glob("*/record.json")
    return read_record(path)


def test_the_same_scores_as_the_run(finished: Start, tmp_path: Path) -> None:
    trained = finished(*MIXLORA)
    record = score(tmp_path, f"run={trained.folder}")
    for found, expected in zip(record["scores"], trained.record["scores"], strict=True):
        assert (found["task"], found["accuracy"]) == (expected["task"], expected["accuracy"])
        assert found["gold_log_likelihood"] == expected["gold_log_likelihood"]
    assert record["train"] is None
    named = "-".join(trained.folder.name.split("-")[:4])
    assert record["name"].startswith(f"{named}-"), "the adapter's method is the run's"
    source = record["adapter"]["trained_by"]
    assert source["name"] == trained.folder.name
    assert source["config"] == trained.record["config"]
    assert record["adapter"]["sha256"] == trained.record["saved_adapter"]["sha256"]


def _evaluate(rank: int, count: int, port: int, words: list[str]) -> None:
    as_rank(rank, count, port)
    os._exit(guarded(run, words))


@pytest.mark.slow
def test_two_processes_score_what_one_does(finished: Start, tmp_path: Path) -> None:
    trained, found = finished(*MIXLORA), {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        words = [
            f"run={trained.folder}", f"output_dir={folder}", "evaluation.batch_tokens=200",
            "evaluation.limit=7", "evaluation.protocols=[label_logits,answer_text,generate]",
            "trainer.parallel=ddp",
        ]  # fmt: skip
        assert run_ranks(count, _evaluate, words) == [0] * count
        (path,) = folder.glob("*/record.json")
        record = read_record(path)
        # When and where it ran, and what it took.
        for name in ("provenance", "content_sha256", "seconds"):
            del record[name]
        del record["config"]["output_dir"]
        for spent in record["scoring"].values():
            del spent["seconds"]
        items = {p.name: p.read_bytes() for p in (path.parent / "predictions").iterdir()}
        found[count] = record, items
    (one, alone), (two, shared) = found[1], found[2]
    assert alone == shared
    assert len(alone) == 3
    assert two == one


def test_an_adapter_s_record_names_the_base_model(finished: Start, tmp_path: Path) -> None:
    trained = finished(*MIXLORA)
    words = [f"adapter={trained.folder / 'adapter'}", "data=embedded", "task=arc_e"]
    record = score(tmp_path, *words, "evaluation.limit=4", "trainer.precision=float32")
    assert record["config"]["model"] == trained.record["config"]["model"]
    # A random base model is drawn from the seed.
    seeded = finished(*MIXLORA, "seed=7")
    words = [f"adapter={seeded.folder / 'adapter'}", *words[1:]]
    assert composed(*words).seed == 7
    assert composed(*words, "seed=8").seed == 8
    other = composed(*words, "model=tiny_gemma")
    assert (other.seed, other.model) == (42, compose(["model=tiny_gemma"]).model)


@pytest.mark.parametrize("name", ["run", "adapter", "both"])
def test_a_plan_is_of_the_command_that_was_given(
    name: str, finished: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished(*MIXLORA).folder
    named = {
        "run": f"run={folder}",
        "adapter": f"adapter={folder / 'adapter'}",
        "both": f"run=[{folder},{finished(*MIXLORA, 'method.rank=4').folder}]",
    }[name]
    words = [named, "protocol=generate", "data=embedded", f"output_dir={tmp_path}"]
    assert guarded(run, [*words, "dry_run=true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (told,) = (line for line in lines if line.startswith("16 GB"))
    # The precision of a run is known, that of an adapter alone is what a GPU would take.
    held = "bf16" if name == "adapter" else "float32"
    found = re.fullmatch(rf"16 GB +fits, in [\d.]+ GiB \({held}\): python evaluate.py (.*)", told)
    assert found[1] == shlex.join(words)


def test_a_plan_counts_the_adapter_that_is_scored(finished: Start) -> None:
    """As the same method is counted before it is trained."""
    trained = finished(*MIXLORA, "method.top_k=1/3")
    found = composed(f"run={trained.folder}")
    assert found.adapter is not None
    assert scoring_bytes(found) == scoring_bytes(trained.config)
    assert scoring_bytes(found) > scoring_bytes(dataclasses.replace(found, adapter=None))


def test_another_protocol_and_fewer_items(finished: Start, tmp_path: Path) -> None:
    trained = finished(*MIXLORA)
    record = score(tmp_path, f"run={trained.folder}", "protocol=answer_text,generate",
                   "evaluation.limit=5", "evaluation.max_new_tokens=2")  # fmt: skip
    assert [(s["protocol"], s["n"]) for s in record["scores"]] == [
        ("answer_text", 5), ("generate", 5),
    ]  # fmt: skip
    assert record["scores"][1]["unparsed"] is not None
    assert set(record["scoring"]) == {"answer_text", "generate"}


def test_lm_eval_on_a_run_and_on_the_base_model(finished: Start, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    trained = finished(*MIXLORA)
    found = score(tmp_path / "a", f"run={trained.folder}", "protocol=lm_eval", "evaluation.limit=6")
    (entry,) = found["scores"]
    assert (entry["protocol"], entry["n"]) == ("lm_eval", 6)
    assert entry["accuracy_normalized"] is not None
    assert entry["expert_load"] is not None
    # A task with acc_norm and one without, which the printed table must bear.
    tasks = "task.evaluate=[boolq,arc_e]"
    words = ("experiment=smoke", "protocol=lm_eval", "evaluation.limit=6", tasks)
    base = score(tmp_path / "b", *words)
    assert [s["accuracy_normalized"] is None for s in base["scores"]] == [True, False]
    assert base["adapter"] is None
    assert base["config"]["method"]["name"] == "none"


def test_the_whole_configuration_is_taken_over(finished: Start) -> None:
    trained = finished(*MIXLORA)
    config = to_dict(composed(f"run={trained.folder}", "protocol=lm_eval", "evaluation.limit=7"))
    before = trained.record["config"]
    for name in ("model", "task", "data", "kernel", "trainer", "seed"):
        assert config[name] == before[name]
    assert config["evaluation"] == {**before["evaluation"], "protocols": ["lm_eval"], "limit": 7}
    assert config["method"] == {"name": "none"}
    assert config["adapter"] == str(trained.folder / "adapter")
    # A group that is given anew replaces what the record says.
    again = to_dict(composed(f"run={trained.folder}", "evaluation=limit"))
    assert again["evaluation"]["limit"] == 100
    assert again["evaluation"]["batch_check"] == 16


def test_a_preset_goes_before_what_the_record_says(finished: Start) -> None:
    trained = finished(*MIXLORA)
    before = trained.record["config"]
    assert before["evaluation"]["dropout"] is False
    config = composed(f"run={trained.folder}", "preset=official")
    assert config.preset.name == "official"
    assert config.evaluation.dropout
    assert not config.data.boolq_passage
    assert config.evaluation.arc_labels.value == "nine"
    # All else is the record's.
    assert config.evaluation.limit == before["evaluation"]["limit"]


def test_fields_of_a_mapping_are_given_one_by_one(finished: Start) -> None:
    trained = finished(*MIXLORA)
    before = trained.record["config"]
    config = composed(f"run={trained.folder}", "+data.train_limits.arc_e=3", "data.seed=9")
    assert to_dict(config.data) == {**before["data"], "train_limits": {"arc_e": 3}, "seed": 9}
    shallow = composed(f"run={trained.folder}", "model.config={num_hidden_layers: 1}")
    shape = {**before["model"]["config"], "num_hidden_layers": 1}
    assert shallow.model.config == shape


def test_the_configuration_is_shown_with_the_record_s_values(
    finished: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = finished(*MIXLORA)
    words = [f"run={trained.folder}", "evaluation.limit=7", "--cfg", "job"]
    assert guarded(run, words) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown == to_dict(composed(*words[:2]))
    assert guarded(run, [*words, "-p", "evaluation"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == shown["evaluation"]


def test_values_survive_the_grammar(finished: Start, tmp_path: Path) -> None:
    trained = finished(*MIXLORA)
    folder = tmp_path / "run"
    shutil.copytree(trained.folder, folder)
    record = json.loads((folder / "record.json").read_text())
    record["config"]["model"]["access"] = "see https://a.b/c, 'then' \\ go: {x}"
    from mixlora_exp.records.record import finish_record, write_json

    write_json(folder / "record.json", finish_record(record))
    config = composed(f"run={folder}")
    assert config.model.access == "see https://a.b/c, 'then' \\ go: {x}"


def mistakes(folder: Path, copied: Path) -> list[tuple[list[str], str]]:
    return [
        ([f"run={folder / 'nothing'}"], "holds no record.json"),
        ([f"run={copied}"], "holds no adapter/"),
        ([f"run={folder}", f"adapter={copied}"], "were both given"),
        (["method=lora"], "trains nothing"),
        (["rum=x"], r"did you mean run\?"),
        (["protocols=answer_text"], r"did you mean protocol\?"),
        (["adapter=/nowhere", "model=tiny"], "adapter=/nowhere does not exist"),
    ]


@pytest.mark.parametrize("number", range(7))
def test_mistakes_are_reported(number: int, finished: Start, tmp_path: Path) -> None:
    trained = finished(*MIXLORA)
    copied = tmp_path / "copied"
    copied.mkdir()
    shutil.copy(trained.folder / "record.json", copied)
    words, message = mistakes(trained.folder, copied)[number]
    with pytest.raises(UserError, match=message):
        run(words)


def test_a_sweep_over_what_is_scored(finished: Start, tmp_path: Path) -> None:
    trained = finished(*MIXLORA)
    words = ["-m", f"run={trained.folder}", "evaluation.limit=1,2", f"output_dir={tmp_path}"]
    assert guarded(run, words) == 0
    records = [read_record(path) for path in tmp_path.glob("*/record.json")]
    assert sorted(record["scores"][0]["n"] for record in records) == [1, 2]
    assert all(record["adapter"]["trained_by"] for record in records)


def test_an_unknown_protocol_is_reported(
    finished: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    trained = finished(*MIXLORA)
    assert guarded(run, [f"run={trained.folder}", "protocol=lm_evil"]) == MISTAKE
    assert "lm_evil" in capfd.readouterr().err


def test_another_base_model_is_refused(
    finished: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained = finished(*MIXLORA)
    words = [f"run={trained.folder}", "model=tiny_gemma", f"output_dir={tmp_path}"]
    assert guarded(run, words) == MISTAKE
    assert "was trained on tiny" in capfd.readouterr().err
    assert not list(tmp_path.rglob("record.json"))


def test_changed_weights_are_no_longer_the_run_s(finished: Start, tmp_path: Path) -> None:
    """The record beside an adapter tells of these weights, or of none."""
    trained = finished(*MIXLORA)
    folder = tmp_path / "run"
    shutil.copytree(trained.folder, folder)
    from safetensors.torch import load_file, save_file

    path = folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: value * 1.5 for name, value in weights.items()}, path)
    record = score(tmp_path / "out", f"run={folder}")
    assert record["adapter"]["trained_by"] is None


def test_several_runs_in_the_same_passes(
    finished: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is recorded as it is when it is scored by itself."""
    runs = [finished(*MIXLORA), finished("method=dora"), finished("method=lora", "seed=1")]
    passes = []

    def spy(model: Any, *args: Any) -> Any:
        passes.append(list(model.peft_config))
        return in_lockstep(model, *args)

    monkeypatch.setattr(together, "in_lockstep", spy)
    words = ["protocol=answer_text,generate", "evaluation.limit=6"]
    listed = ",".join(str(trained.folder) for trained in runs[:2])
    assert guarded(run, [f"run=[{listed}]", *words, f"output_dir={tmp_path / 'all'}"]) == 0
    assert passes == [["adapter0", "adapter1"]]
    for trained in runs[:2]:
        alone = score(tmp_path / trained.folder.name, f"run={trained.folder}", *words)
        record = read_record(tmp_path / "all" / alone["name"] / "record.json")
        assert record["fingerprint"] == alone["fingerprint"]
        assert f"-{trained.record['config']['method']['name']}-" in record["name"]
        assert record["adapter"] == alone["adapter"]
        assert record["train"] is None
        for found, expected in zip(record["scores"], alone["scores"], strict=True):
            assert (found["protocol"], found["n"]) == (expected["protocol"], expected["n"])
            assert found["accuracy"] == expected["accuracy"]
            if expected["gold_log_likelihood"] is not None:
                close = pytest.approx(expected["gold_log_likelihood"], abs=1e-5)
                assert found["gold_log_likelihood"] == close
    assert (runs[0].folder / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=[{0},]"], "lacks a folder"),
        (["run=[{0},/nowhere]"], "run=/nowhere holds no record.json"),
        (["run=[{0},{0}]"], "entries 1 and 2 are the same run"),
        (["run=[{0},{1}]", "-m"], "-m does not work with several adapters"),
        (["adapter=[{0}/adapter,/nowhere]", "model=tiny"], "adapter=/nowhere does not exist"),
    ],
)
def test_mistakes_with_several_are_reported(
    words: list[str], message: str, finished: Start, tmp_path: Path, capsys: Any
) -> None:
    folders = finished(*MIXLORA).folder, finished("method=dora").folder
    argv = [word.format(*folders) for word in words]
    assert guarded(run, [*argv, f"output_dir={tmp_path / 'out'}"]) == MISTAKE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_shows_its_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate"]) == 0
    assert "protocol=lm_eval" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ([], ""),
        (["preset=official"], "preset=official"),
        (["preset=official", "trainer.order=bucketed"], "preset=official, trainer.order=bucketed"),
        (["evaluation.dropout=true"], "preset=correct, evaluation.dropout=true"),
        (["method=lora", "preset=only_order"], "preset=only_order"),
    ],
)
def test_the_printed_table_says_what_is_set_otherwise(words: list[str], shown: str) -> None:
    config = to_dict(compose(["model=tiny", "data=embedded", "method=mixlora", *words]))
    title = scores_table({"config": config, "scores": [], "scores_before": None}, "p").title
    assert title.partition("\n")[2] == shown
