"""Several adapters from one command: the records of each as if it had run alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composed import compose
from safetensors.torch import load_file

from mixlora_exp.cli.train import execute
from mixlora_exp.config.choices import PAPER_METHODS
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.records.record import read_record
from mixlora_exp.runs.together import run_together
from mixlora_exp.tasks import embedded

ROOT = Path(__file__).parents[2]
SMALL = [
    "experiment=smoke",
    "trainer.precision=float32",
    "data.train_limit=8",
    "evaluation.batch_check=2",
    "evaluation.protocols=[label_logits,answer_text,generate]",
]
ENTRIES = [
    ["method=mixlora"],
    ["method=lora", "task=obqa", "trainer.max_steps=3"],
    ["method=mixdora", "method.rank=4", "evaluation.limit=5"],
]
# What tells when and beside whom a run took place.
CIRCUMSTANCES = {"provenance", "seconds", "scoring", "content_sha256", "train", "saved_adapter"}


def records(folder: Path) -> dict[str, dict]:
    return {path.parent.name: read_record(path) for path in sorted(folder.rglob("record.json"))}


def settings(record: dict) -> dict:
    """Everything that must be the same, without where the results go and how they were started."""
    skipped = CIRCUMSTANCES | {"scores", "predictions_sha256"}
    found = {key: value for key, value in record.items() if key not in skipped}
    trainer = {**found["config"]["trainer"], "pack_adapters": None}
    return {**found, "config": {**found["config"], "output_dir": None, "trainer": trainer}}


def lists(record: dict, folder: Path) -> dict[str, list]:
    return {
        key: [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for key, name in record["predictions"].items()
    }


def assert_same(found: Path, expected: Path) -> None:
    ours, theirs = records(found), records(expected)
    assert ours.keys() == theirs.keys()
    for name, record in ours.items():
        truth = theirs[name]
        assert settings(record) == settings(truth)
        loss = truth["train"]["final_loss"]
        assert record["train"]["final_loss"] == pytest.approx(loss, rel=1e-5)
        for ours_score, theirs_score in zip(record["scores"], truth["scores"], strict=True):
            assert ours_score["accuracy"] == theirs_score["accuracy"]
            assert ours_score["expert_load"] == theirs_score["expert_load"]
            for key in ("gold_log_likelihood", "majority_class", "n"):
                truth_of_key = theirs_score.get(key)
                if truth_of_key is not None:
                    truth_of_key = pytest.approx(truth_of_key, rel=1e-4)
                assert ours_score.get(key) == truth_of_key
        written = lists(record, found / name)
        for key, items in lists(truth, expected / name).items():
            assert [i["prediction"] for i in written[key]] == [i["prediction"] for i in items]
        for key, value in load_file(expected / name / "adapter/adapter_model.safetensors").items():
            weights = load_file(found / name / "adapter/adapter_model.safetensors")
            torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for entry in ENTRIES:
        assert execute([*SMALL, f"output_dir={folder}", *entry]) == 0
    return folder


def test_records_are_those_of_the_runs_alone(alone, tmp_path) -> None:
    listed = ",".join(
        "{" + ",".join(change.replace("=", ":", 1) for change in entry) + "}" for entry in ENTRIES
    )
    assert execute([*SMALL, f"output_dir={tmp_path}", f"adapters=[{listed}]"]) == 0
    assert_same(tmp_path, alone)
    for name, record in records(tmp_path).items():
        assert set(record["train"]["together"]) == set(records(alone)) - {name}
    assert all(record["train"]["together"] == [] for record in records(alone).values())


def test_a_packed_sweep_gives_the_records_of_an_unpacked_one(tmp_path) -> None:
    sweep = ["-m", *SMALL, "method=lora,mixlora", "method.rank=2,4"]
    assert execute([*sweep, f"output_dir={tmp_path / 'one'}"]) == 0
    assert execute([*sweep, f"output_dir={tmp_path / 'three'}", "trainer.pack_adapters=3"]) == 0
    assert_same(tmp_path / "three", tmp_path / "one")
    together = sorted(len(r["train"]["together"]) for r in records(tmp_path / "three").values())
    assert together == [0, 2, 2, 2]


@pytest.mark.slow
def test_an_experiment_file_with_a_list(tmp_path, capsys) -> None:
    """And a second start runs nothing again."""
    command = ["experiment=multi_adapter/smoke", f"output_dir={tmp_path}"]
    assert execute(command) == 0
    before = records(tmp_path)
    assert {r["config"]["method"]["name"] for r in before.values()} == {
        *PAPER_METHODS,
    }  # fmt: skip
    capsys.readouterr()
    assert execute(command) == 0
    assert records(tmp_path) == before
    assert capsys.readouterr().out.count("Already finished") == 4


@pytest.mark.slow
def test_those_that_are_missing_run(tmp_path) -> None:
    entries = "adapters=[lora,dora,mixlora]"
    assert execute([*SMALL, f"output_dir={tmp_path}", "method=lora"]) == 0
    (first,) = records(tmp_path).values()
    assert execute([*SMALL, f"output_dir={tmp_path}", entries]) == 0
    found = records(tmp_path)
    assert len(found) == 3
    assert found[first["name"]] == first


def test_one_that_fails_does_not_cost_the_others(tmp_path, capsys) -> None:
    entries = "adapters=[lora,{method:mixlora,trainer.learning_rate:1e30,trainer.max_steps:4}]"
    assert execute([*SMALL, f"output_dir={tmp_path}", entries]) == 2
    told = capsys.readouterr().err
    assert "1 of 2 adapters failed, the others are recorded" in told
    assert "trainer.learning_rate=1e+30" in told
    (record,) = records(tmp_path).values()
    assert record["config"]["method"]["name"] == "lora"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[lora,none]", "entry 2 has method=none and no adapter: choose a method"),
        ("[lora,{method:lora,model:tiny_gemma}]", "entry 2 has a different model than entry 1"),
        ("[lora,{method:dora,seed:7}]", "a different seed than entry 1.*random base model"),
        ("[lora,{method:lora}]", "entries 1 and 2 are the same run"),
        ("[lora,{method:lora,method.rnak:8}]", r"entry 2 \(.*rnak=8\).*rank"),
        ("[lora,{method:qlora}]", "entry 2.*qlora"),
        ("[lora,7]", "entry 2 is 7: give a method's name"),
        ("[lora,{adapters:[dora]}]", "entry 2 contains adapters="),
        ("[lora,{method:dora,trainer.precision:bfloat16}]", "a different trainer.precision than"),
        ("[lora,{method:dora,dry_run:true}]", "a different dry_run than"),
        ("[lora,{method:dora,task:[arc_e,obqa]}]", "a mix of tasks is written task: multi"),
    ],
)
def test_wrong_lists_are_reported_before_anything_starts(
    tmp_path, capsys, entries, message
) -> None:
    assert execute([*SMALL, f"output_dir={tmp_path}", f"adapters={entries}"]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Local files of two tasks, one of which is empty."""
    for task in ("arc_e", "obqa"):
        for split in ("train", "test"):
            path = tmp_path / "data" / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = embedded.rows(task, split, seed=0)[:8]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data" / "obqa" / "train.jsonl").write_text("")
    return tmp_path / "data"


def test_empty_data_stops_one_adapter_alone(data, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    argv = [*SMALL, "data=local", f"data.path={data}", f"output_dir={out}"]
    assert execute([*argv, "adapters=[lora,{method:mixlora,task:obqa},{method:dora}]"]) == 2
    told = capsys.readouterr().err
    assert "1 of 3 adapters failed" in told
    assert "obqa" in told
    assert {r["config"]["method"]["name"] for r in records(out).values()} == {"lora", "dora"}
    assert not list(out.glob("*/failure.json"))


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_pack_killed_while_it_is_scored_resumes(tmp_path, monkeypatch) -> None:
    """Nothing is trained again."""
    argv = [*SMALL, f"output_dir={tmp_path / 'run'}", "adapters=[lora,mixlora]"]

    def killed(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("mixlora_exp.runs.together.score_together", killed)
        with pytest.raises(Killed):
            execute(argv)
    assert not records(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("mixlora_exp.training.trainer.MixLoraTrainer.training_step", killed)
        assert execute(argv) == 0
    assert execute([*SMALL, f"output_dir={tmp_path / 'whole'}", "adapters=[lora,mixlora]"]) == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("where", ["a protocol", pytest.param("a pass", marks=pytest.mark.slow)])
def test_scoring_that_fails_costs_that_adapter_alone(tmp_path, monkeypatch, capsys, where) -> None:
    """A pass that fails for all is made for each by itself."""
    from mixlora_exp.evaluation.forward import Scorer
    from mixlora_exp.runs import together

    if where == "a protocol":
        real = together.score_with
        alone = together.score_alone

        def score_with(this, *args):
            if this.config.method.name == "lora":
                raise ValueError("no such luck")
            return real(this, *args)

        def score_alone(this, base):
            if this.config.method.name == "lora":
                raise ValueError("no such luck")
            return alone(this, base)

        monkeypatch.setattr(together, "score_with", score_with)
        monkeypatch.setattr(together, "score_alone", score_alone)
    else:
        real_scores = Scorer.run_scores

        def run_scores(self, questions, **kwargs):
            if len(set(kwargs.get("adapter_names", []))) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real_scores(self, questions, **kwargs)

        monkeypatch.setattr(Scorer, "run_scores", run_scores)
    code = execute([*SMALL, f"output_dir={tmp_path}", "adapters=[lora,mixlora,dora]"])
    found = {r["config"]["method"]["name"] for r in records(tmp_path).values()}
    if where == "a protocol":
        assert code == 2
        assert "scoring failed: no such luck" in capsys.readouterr().err
        assert found == {"mixlora", "dora"}
    else:
        assert code == 0
        assert found == {"lora", "mixlora", "dora"}


@pytest.mark.slow
def test_the_base_model_in_a_packed_sweep(tmp_path) -> None:
    sweep = ["-m", *SMALL, "method=none,lora,dora", "trainer.pack_adapters=2"]
    assert execute([*sweep, f"output_dir={tmp_path}"]) == 0
    assert len(records(tmp_path)) == 3


def test_settings_of_a_group_in_an_entry(tmp_path) -> None:
    """`name` chooses the option, as the plain form does."""
    argv = [*SMALL, f"output_dir={tmp_path}"]
    nested = "adapters=[{method:{name:dora,rank:4},trainer:{max_steps:1}},lora]"
    plain = "adapters=[{method:dora,method.rank:4,trainer.max_steps:1},lora]"
    assert execute([*argv, nested]) == 0
    names = set(records(tmp_path))
    assert execute([*argv, plain]) == 0
    assert set(records(tmp_path)) == names
    assert sum("-dora-" in name for name in names) == 1


@pytest.mark.slow
def test_seeds_pack_on_a_base_that_is_not_drawn(tmp_path) -> None:
    base = load_model(compose(["model=tiny"]).model, torch.float32)
    base.save_pretrained(tmp_path / "base")
    load_tokenizer(compose(["model=tiny"]).model).save_pretrained(tmp_path / "base")
    sweep = ["-m", *SMALL, f"model.path={tmp_path / 'base'}", "seed=1,2"]
    assert execute([*sweep, f"output_dir={tmp_path / 'one'}"]) == 0
    assert execute([*sweep, f"output_dir={tmp_path / 'two'}", "trainer.pack_adapters=2"]) == 0
    assert_same(tmp_path / "two", tmp_path / "one")


def test_lists_are_not_swept(tmp_path, capsys) -> None:
    argv = ["-m", *SMALL, f"output_dir={tmp_path}", "adapters=[lora]", "method.rank=2,4"]
    assert execute(argv) == 2
    assert "trainer.pack_adapters=4" in capsys.readouterr().err


def test_dry_run_shows_all(tmp_path, capsys) -> None:
    argv = ["experiment=multi_adapter/smoke", f"output_dir={tmp_path}", "dry_run=true"]
    assert execute(argv) == 0
    told = capsys.readouterr().out
    assert told.count("adapters like this on one base") == 4
    assert "4 adapters on one base: about" in told
    assert not list(tmp_path.iterdir())


def test_configurations_are_checked_by_the_library_too(tmp_path) -> None:
    config = compose([*SMALL, f"output_dir={tmp_path}", "method=lora"])
    with pytest.raises(UserError, match="the same run"):
        run_together([config, config])


@pytest.mark.slow
def test_the_comparison_of_together_and_alone(tmp_path: Path) -> None:
    """The script behind the record, on the smallest models."""
    words = ["experiment=multi_adapter/smoke", "trainer.precision=float32", f"output={tmp_path}"]
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "kind=together", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = read_record(tmp_path / "together-tiny.json")
    assert len(record["adapters"]) == len(record["alone"]) == 4
    assert all(one["largest_loss_difference"] < 1e-4 for one in record["adapters"].values())
    assert "| mixdora r=4 | piqa |" in (tmp_path / "together-tiny.md").read_text()
