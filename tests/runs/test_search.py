"""The search over coefficient and learning rate: on held-out rows, pruned, and resumable."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna", reason="the package optuna is not installed")

from mixlora_exp.config import Config, compose  # noqa: E402
from mixlora_exp.data.sources import load_split  # noqa: E402
from mixlora_exp.errors import UserError  # noqa: E402
from mixlora_exp.results.record import finish_record, write_json  # noqa: E402
from mixlora_exp.runlock import RunLock  # noqa: E402
from mixlora_exp.search import SearchSettings, score_of, search  # noqa: E402

ROOT = Path(__file__).parents[2]
SMALL = ["experiment=smoke", "data.train_limit=16"]


class Killed(BaseException):
    pass


class Trainer:
    """Stands in for a run: its score is best at a coefficient of 1e-2 and a rate of 2e-4."""

    def __init__(self, folder: Path, killed_at: int | None = None) -> None:
        self.folder, self.killed_at = folder, killed_at
        self.configs: list[Config] = []

    def __call__(self, config: Config, watch: Callable[[int, float], None]) -> Path:
        self.configs.append(config)
        if len(self.configs) == self.killed_at:
            raise Killed
        coefficient, rate = config.method.router_loss_coef, config.trainer.learning_rate
        worse = abs(math.log10(coefficient / 1e-2)) + abs(math.log10(rate / 2e-4))
        for step in range(1, 4):
            watch(step, 1.0 + worse / step)
        path = self.folder / f"{len(self.configs)}-{self.killed_at}.json"
        write_json(path, finish_record({"scores": [{"gold_log_likelihood": -1.0 - worse}]}))
        return path


def settings(folder: Path, **changes) -> SearchSettings:
    return SearchSettings(output_dir=str(folder), **{"trials": 12, **changes})


def test_it_finds_the_best_settings(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    study = search(settings(tmp_path, trials=30), SMALL, trainer)
    assert study.best_value > -1.5
    assert all(config.evaluation.held_out for config in trainer.configs)
    states = [trial.state.name for trial in study.trials]
    assert states.count("PRUNED") > 0
    assert set(states) == {"COMPLETE", "PRUNED"}


def test_killed_it_goes_on_with_the_same_trials(tmp_path: Path) -> None:
    """The trial that was under way is made again with its settings, so that its run continues."""
    first = Trainer(tmp_path, killed_at=4)
    with pytest.raises(Killed):
        search(settings(tmp_path), SMALL, first)
    second = Trainer(tmp_path)
    study = search(settings(tmp_path), SMALL, second)
    assert second.configs[0] == first.configs[-1]
    finished = [t for t in study.trials if t.state.name in ("COMPLETE", "PRUNED")]
    assert len(finished) == 12
    # Finished, it is only read.
    third = Trainer(tmp_path)
    again = search(settings(tmp_path), SMALL, third)
    assert not third.configs
    assert again.best_params == study.best_params


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with RunLock(tmp_path / ".search.lock") as lock:
        assert lock.acquire()
        with pytest.raises(UserError, match="study=search: another process searches it"):
            search(settings(tmp_path), SMALL, Trainer(tmp_path))


def test_a_protocol_without_likelihood_is_refused() -> None:
    with pytest.raises(UserError, match="label_logits or answer_text"):
        score_of({"scores": [{"gold_log_likelihood": None}]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coef_low": 0.0}, "coef_low=0.0 must be above 0"),
        ({"rate_low": 1.0}, "rate_low=1.0 must be above 0 and below rate_high=0.001"),
        ({"trials": 0}, "trials=0 must be >= 1"),
    ],
)
def test_wrong_ranges_are_told(changes, message) -> None:
    with pytest.raises(UserError, match=message):
        SearchSettings(**changes)


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
        ([], "evaluation.held_out=True is not valid: it takes the rows that data.train_limit"),
        (["data.train_limit=8", "evaluation.protocols=[lm_eval]"], "lm-eval scores its own"),
    ],
)
def test_held_out_rows_need_a_limit(overrides, message) -> None:
    with pytest.raises(UserError, match=message):
        compose(["evaluation.held_out=true", *overrides])


def test_the_script(tmp_path: Path) -> None:
    """Two real trials of a tiny model."""
    command = [sys.executable, str(ROOT / "scripts" / "search.py"), "trials=2", *SMALL,
               f"output_dir={tmp_path}", "evaluation.limit=4"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 trials, 0 pruned" in done.stdout
    assert "best on held-out rows: -" in done.stdout
    assert len(list(tmp_path.glob("*/record.json"))) == 2
    assert (tmp_path / "search.db").is_file()
