"""The search's script: what it refuses, and what it does when it is stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna", reason="the package optuna is not installed")

from composed import compose  # noqa: E402

from mixlora_exp.cli.search import run as search  # noqa: E402
from mixlora_exp.data.sources import load_split  # noqa: E402
from mixlora_exp.errors import UserError  # noqa: E402
from mixlora_exp.runs.ownership import GivenUp  # noqa: E402
from mixlora_exp.runs.run import run  # noqa: E402
from mixlora_exp.sweeps.search import score_of  # noqa: E402
from mixlora_exp.system.exit_codes import guarded  # noqa: E402

ROOT = Path(__file__).parents[2]
SMALL = ["experiment=smoke", "data.train_limit=16"]


def script(*arguments: str) -> int:
    """Exit code of the search, in this process."""
    return guarded(search, arguments)


def _damaged(folder: Path) -> None:
    (folder / "search.db").write_bytes(b"no database" * 1000)


def _cut_off(folder: Path) -> None:
    optuna.create_study(study_name="search", storage=f"sqlite:///{folder}/search.db")
    content = (folder / "search.db").read_bytes()
    (folder / "search.db").write_bytes(content[: len(content) // 2])


def _folder(folder: Path) -> None:
    (folder / "search.db").mkdir()


@pytest.mark.parametrize("spoil", [_damaged, _cut_off, _folder])
def test_a_study_that_cannot_be_read(tmp_path: Path, capfd, spoil) -> None:
    spoil(tmp_path)
    assert script(*SMALL, f"output_dir={tmp_path}") == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: study=search: {tmp_path}/search.db cannot be used (")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study=a/b"], "study=a/b is not valid"),
        (["study="], "study= is not valid"),
        ([f"study={300 * 'a'}"], "error: study=aaa"),
        ([f"study={245 * 'a'}"], "this name is too long for a file"),
        (["coef_low=0.0"], "coef_low=0.0 is not valid: it must be above 0"),
        (["rate_low=1.0"], "it must be above 0 and below rate_high=0.001"),
        (["coef_high=inf"], "coef_high=inf is not valid: it must be finite"),
        (["ranges=[method.dropout=0.3:0.2]"], "ranges: method.dropout=0.3:0.2 is not valid"),
        (["trials=0"], "trials=0 is not valid: it must be >= 1"),
        (["prune_after=-1"], "prune_after=-1 is not valid: it must be >= 0"),
        (["method=lora"], "method=lora has no router-loss coefficient to search"),
        (["method=none"], "method=none has no router-loss coefficient to search"),
        (["evaluation.protocols=[generate]"], "evaluation.protocols=generate gives no likelihood"),
        (["evaluation.protocols=[label_logits,lm_eval]"], "protocols=lm_eval gives no likelihood"),
        (["method.router_loss_coef=0.1"], "leave it out (set coef_low and coef_high)"),
        (["trainer.learning_rate=0.1"], "leave it out (set rate_low and rate_high)"),
        (["evaluation.held_out=false"], "a search sets evaluation.held_out itself"),
        (["dry_run=true"], "dry_run=true is not supported by search"),
        (["adapters=[lora,mixlora]"], "which trains one adapter at a time"),
        (["data.train_limit=null"], "set data.train_limit=N"),
        (["trainer.head=liger"], "trainer.head=liger needs"),
    ],
)
def test_mistakes_are_reported_before_anything_begins(
    tmp_path: Path, capfd, arguments, message
) -> None:
    out = tmp_path / "out"
    assert script(*SMALL, f"output_dir={out}", *arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not out.exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, capfd) -> None:
    (tmp_path / "file").write_text("")
    assert script(*SMALL, f"output_dir={tmp_path}/file/out") == 2
    assert f"error: output_dir={tmp_path}/file/out cannot be written" in capfd.readouterr().err


def test_a_score_that_is_no_number_is_none() -> None:
    with pytest.raises(UserError, match="no finite log-likelihood"):
        score_of({"scores": [{"gold_log_likelihood": -1.0}, {"gold_log_likelihood": None}]})


def test_a_run_that_is_given_up_has_not_failed(tmp_path: Path) -> None:
    """And losses under different coefficients are told without what these add."""
    coefficient, seen = 5.0, []
    changes = [f"output_dir={tmp_path}", f"method.router_loss_coef={coefficient}",
               "trainer.logging_steps=1"]  # fmt: skip

    def watch(step: int, loss: float) -> None:
        seen.append(loss)
        raise GivenUp

    with pytest.raises(GivenUp):
        run(compose([*SMALL, *changes]), watch)
    assert not list(tmp_path.glob("*/failure.json"))
    (log,) = tmp_path.glob("*/train_log.jsonl")
    entry = json.loads(log.read_text().splitlines()[0])
    assert seen == [pytest.approx(entry["loss"] - coefficient * entry["router_loss"], abs=1e-4)]


def test_held_out_rows_are_not_trained_on() -> None:
    config = compose(["data=embedded", "data.train_limit=20"]).data
    loaded = load_split(config, "arc_e", "train")
    trained = {item.id for item in loaded.limited(20, config.seed).items}
    scored = {item.id for item in loaded.held_out(20, 30, config.seed).items}
    assert len(trained) == 20
    assert len(scored) == 30
    assert not trained & scored
    everything = {item.id for item in loaded.held_out(20, None, config.seed).items}
    assert everything | trained == {item.id for item in loaded.items}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "evaluation.held_out=true is not valid: it uses the rows that data.train_limit"),
        (["data.train_limit=8", "evaluation.protocols=[lm_eval]"], "lm-eval scores its own"),
    ],
)
def test_held_out_rows_need_a_limit(overrides, message) -> None:
    with pytest.raises(UserError, match=message):
        compose(["evaluation.held_out=true", *overrides])


COMMAND = [sys.executable, str(ROOT / "scripts" / "search.py")]


@pytest.mark.slow
def test_the_script(tmp_path: Path) -> None:
    """Two real trials of a tiny model."""
    command = [*COMMAND, "trials=2", *SMALL, f"output_dir={tmp_path}", "evaluation.limit=4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 trials, 0 pruned" in done.stdout
    assert "best on held-out rows: -" in done.stdout
    assert len(list(tmp_path.glob("*/record.json"))) == 2
    assert (tmp_path / "search.db").is_file()


@pytest.mark.slow
def test_the_script_after_signals(tmp_path: Path) -> None:
    """SIGTERM in the first trial, SIGKILL in its second start: its run goes on, and so does the
    search."""
    own = ["trials=2", *SMALL, "evaluation.limit=4", "trainer.max_steps=40",
           "trainer.save_steps=2", "trainer.logging_steps=2"]  # fmt: skip
    command = [*COMMAND, *own, f"output_dir={tmp_path}"]
    for sent in (signal.SIGTERM, signal.SIGKILL):
        before = set(tmp_path.glob("*/checkpoints/step-*"))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not set(tmp_path.glob("*/checkpoints/step-*")) - before:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(sent)
        assert process.wait() == (75 if sent == signal.SIGTERM else -sent)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "resuming after step" in done.stderr
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/search.db")
    assert [trial.state.name for trial in study.trials] == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert len(list(tmp_path.glob("*/record.json"))) == 2
    assert study.trials[0].params == study.trials[1].params == study.trials[2].params
