"""`python train.py --from RECORD` runs a record's configuration again and compares."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from mixlora_exp.cli.train import execute, run
from mixlora_exp.config.recorded import rebuilt
from mixlora_exp.config.resolve import fingerprint, to_dict
from mixlora_exp.config.schema import Base
from mixlora_exp.errors import UserError
from mixlora_exp.records.files import RECORD, pack, record_paths
from mixlora_exp.records.record import finish_record, read_run, write_json
from mixlora_exp.runs.repeat import compared, configuration

COMMITTED = record_paths(Path(__file__).parents[2] / "results" / "runs")


@pytest.mark.parametrize("method", ["lora", "mixlora", "loramoe", "vera", "none"])
def test_a_configuration_is_what_its_record_says(configure, method: str) -> None:
    config = configure(f"method={method}", "data.forms=[label,text]", "+data.train_limits.arc_e=3")
    settings = json.loads(json.dumps(to_dict(config)))
    assert rebuilt(settings) == config


def test_nothing_in_a_record_is_resolved(configure) -> None:
    settings = to_dict(configure("method=lora"))
    settings["output_dir"] = "${oc.env:HOME}"
    assert rebuilt(settings).output_dir == "${oc.env:HOME}"


@pytest.mark.parametrize("path", COMMITTED[::5], ids=lambda path: path.stem)
def test_committed_records_of_any_version_can_be_run_again(path: Path) -> None:
    config = rebuilt(read_run(path)["config"])
    again = json.loads(json.dumps(to_dict(config)))
    assert fingerprint(rebuilt(again)) == fingerprint(config)
    assert config.method.name == read_run(path)["config"]["method"]["name"]


def test_the_same_run_is_equal(
    finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = finished("method=mixlora")
    pack(tmp_path / "packed.zip", {RECORD: first.path.read_bytes()})
    for given in (first.folder, tmp_path / "packed.zip"):
        words = ["--from", str(given), f"output_dir={tmp_path / 'again'}"]
        assert run(words) == 0
        out = capsys.readouterr().out
        assert f"Equal to {given}: adapter, last loss, scores, predictions" in out
        assert "Other circumstances" not in out
    (path,) = (tmp_path / "again").glob(f"*/{RECORD}")
    assert path.parent.name == first.folder.name
    assert read_run(path)["saved_adapter"] == first.record["saved_adapter"]


def test_another_result_is_reported_with_what_else_differs(
    finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = copy.deepcopy(finished("method=mixlora").record)
    record["saved_adapter"]["sha256"] = "ab" * 32
    record["train"]["final_loss"] = 1.5
    record["scores"][0]["accuracy"] = 0.125
    key = next(iter(record["predictions_sha256"]))
    record["predictions_sha256"][key] = "cd" * 32
    record["provenance"]["packages"]["torch"] = "1.0"
    record["data"]["arc_e/train"][0]["sha256"] = "ef" * 32
    (tmp_path / "old").mkdir()
    write_json(tmp_path / "old" / RECORD, finish_record(record))
    assert run([f"--from={tmp_path / 'old'}", f"output_dir={tmp_path / 'again'}"]) == 1
    out = capsys.readouterr().out
    for word in ("Differs from", "adapter ", "(was ababababab)", "last loss ", "(was 1.5)",
                 "accuracy of arc_e/label_logits", "(was 0.125)", f"predictions of {key}",
                 "Other circumstances: data of arc_e/train", "torch ", "(was 1.0)"):  # fmt: skip
        assert word in out, word


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["method.rank=2"], "method.rank=2 would not repeat the record: only output_dir"),
        (["output_dir={beside}"], "holds the record itself: choose another folder"),
        (["data.path=/nowhere"], "data.path=/nowhere"),
        (["plan.probe=true"], "it is part of a plan: add dry_run=true"),
    ],
)
def test_what_would_not_repeat_it_is_refused(finished, words: list[str], told: str) -> None:
    first = finished("method=mixlora")
    words = [word.format(beside=first.folder.parent) for word in words]
    with pytest.raises(UserError) as caught:
        run(["--from", str(first.folder), *words])
    assert told in str(caught.value)


@pytest.mark.parametrize("probe", [False, True], ids=["plan", "probe"])
def test_a_dry_run_plans_it_and_leaves_nothing(
    probe: bool, finished, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("a dry run started the run")

    first = finished("method=mixlora")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mixlora_exp.runs.run._carry_out", started)
    words = ["--from", str(first.folder), "dry_run=true"]
    assert execute([*words, "plan.probe=true"] if probe else words) == 0
    out = capsys.readouterr().out
    plan = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert plan["run"] == first.folder.name
    assert plan["steps"].startswith(f"{first.record['train']['steps']} of ")
    assert plan["time"].startswith("about " if probe else "not known (plan.probe=true measures)")
    assert f"train.py --from {first.folder}\n" in out, "the command without the plan's own words"
    assert "Equal to" not in out
    assert not list(tmp_path.iterdir())


def test_a_record_does_not_accept_other_weights(finished) -> None:
    record = copy.deepcopy(finished("method=mixlora").record)
    record["config"]["base"] = "accept"
    assert configuration(record, []).base is Base.check
    assert configuration(record, ["base=accept"]).base is Base.accept


def test_only_what_a_record_holds_is_called_equal(finished) -> None:
    record = dict(finished("method=mixlora").record)
    assert list(compared(record)) == ["adapter", "last loss", "scores", "predictions"]
    record |= {"saved_adapter": None, "predictions_sha256": None}
    assert list(compared(record)) == ["last loss", "scores"]


def test_folders_are_given_as_they_are_typed(finished, tmp_path: Path) -> None:
    words = ["--from", str(finished("method=mixlora").folder), f"output_dir={tmp_path}/a=b (1)"]
    assert run(words) == 0
    assert list((tmp_path / "a=b (1)").glob(f"*/{RECORD}"))


def test_two_records_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--from", "a", "--from", "b"], ["--from=a", "--from=b"]):
        assert execute(words) == 2
        assert "--from is given 2 times: give it once" in capsys.readouterr().err


def test_other_records_are_reported_in_a_line(
    finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(**changes: object) -> str:
        record = {**finished("method=mixlora").record, **changes}
        if "schema_version" not in changes:
            record = finish_record(record)
        (tmp_path / RECORD).write_text(json.dumps(record))
        capsys.readouterr()
        lines = []
        for word in ("dry_run=false", "dry_run=true"):
            assert execute(["--from", str(tmp_path), word]) == 2
            lines += capsys.readouterr().err.splitlines()
        first, second = lines
        assert first == second
        return first

    assert "schema_version=9 is of a later version of mixlora-exp" in told(schema_version=9)
    config = {**finished("method=mixlora").record["config"], "later": 1}
    assert "fields that this version does not know (later)" in told(config=config)
    assert execute(["--from", "nobody"]) == 2
    assert "nobody is not a run" in capsys.readouterr().err
