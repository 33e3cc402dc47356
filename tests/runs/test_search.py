"""The search over coefficient and learning rate: on held-out rows, pruned, and resumable."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna", reason="the package optuna is not installed")

from safetensors import SafetensorError  # noqa: E402

from mixlora_exp.config.run_names import run_name  # noqa: E402
from mixlora_exp.config.schema import Config  # noqa: E402
from mixlora_exp.errors import NotEnoughMemory, UserError  # noqa: E402
from mixlora_exp.records.record import finish_record, write_json  # noqa: E402
from mixlora_exp.runs.ownership import LostRun  # noqa: E402
from mixlora_exp.sweeps import search as searching  # noqa: E402
from mixlora_exp.sweeps.search import Postponed, SearchSettings, search  # noqa: E402
from mixlora_exp.system.runlock import RunLock  # noqa: E402
from mixlora_exp.system.signals import Terminated  # noqa: E402

SMALL = ["experiment=smoke", "data.train_limit=16"]


class Killed(BaseException):
    pass


class Trainer:
    """Stands in for a run: its score is best at a coefficient of 1e-2 and a rate of 2e-4. `ends`:
    what is raised from which call on, in the first that is not pruned at its first loss."""

    def __init__(self, folder: Path, ends: dict[int, BaseException] | None = None) -> None:
        self.folder, self.ends = folder, ends or {}
        self.configs: list[Config] = []

    def __call__(self, config: Config, watch: Callable[[int, float], None]) -> Path:
        self.configs.append(config)
        coefficient, rate = config.method.router_loss_coef, config.trainer.learning_rate
        worse = abs(math.log10(coefficient / 1e-2)) + abs(math.log10(rate / 2e-4))
        for step in range(1, 4):
            for call, end in self.ends.items():
                if step == 2 and len(self.configs) >= call:
                    raise end
            watch(step, 1.0 + worse / step)
        path = self.folder / f"{run_name(config)}.json"
        write_json(path, finish_record({"scores": [{"gold_log_likelihood": -1.0 - worse}]}))
        return path


class Diverging(Trainer):
    """A run that fails at learning rates above `limit`."""

    def __init__(self, folder: Path, limit: float) -> None:
        super().__init__(folder)
        self.limit = limit

    def __call__(self, config: Config, watch: Callable[[int, float], None]) -> Path:
        if config.trainer.learning_rate > self.limit:
            self.configs.append(config)
            raise UserError("trainer.learning_rate: the loss is nan,\nchoose a lower one")
        return super().__call__(config, watch)


def settings(folder: Path, **changes) -> SearchSettings:
    return SearchSettings(output_dir=str(folder), **{"trials": 12, **changes})


def states(study: optuna.Study) -> list[str]:
    """Of the trials that came to an end; a failed one without a reason was cut off."""
    found = [t for t in study.trials if t.state.name != "FAIL" or "reason" in t.user_attrs]
    return [trial.state.name for trial in found]


@pytest.mark.slow
def test_it_finds_the_best_settings(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    study = search(settings(tmp_path, trials=30), SMALL, trainer)
    assert study.best_value > -1.5
    assert all(config.evaluation.held_out for config in trainer.configs)
    assert states(study).count("PRUNED") > 0
    assert set(states(study)) == {"COMPLETE", "PRUNED"}


def test_killed_it_resumes(tmp_path: Path) -> None:
    """Whatever ended it; the trial that was under way is made again with its settings."""
    wanted, under_way, made = settings(tmp_path, trials=5, prune_after=9), None, []
    for end in (Killed(), KeyboardInterrupt(), Terminated()):
        killed = Trainer(tmp_path, {2: end})
        with pytest.raises(type(end)):
            search(wanted, SMALL, killed)
        assert under_way in (None, killed.configs[0])
        under_way = killed.configs[-1]
        made += killed.configs
    last = Trainer(tmp_path)
    study = search(wanted, SMALL, last)
    assert last.configs[0] == under_way
    assert states(study) == ["COMPLETE"] * 5
    # Every start draws settings of its own.
    assert len({config.trainer.learning_rate for config in [*made, *last.configs]}) == 5
    # Finished, it is only read.
    more = Trainer(tmp_path)
    assert states(search(wanted, SMALL, more)) == ["COMPLETE"] * 5
    assert not more.configs


@pytest.mark.slow
def test_interrupted_it_has_the_trials_of_an_undisturbed_search(tmp_path: Path) -> None:
    """Settings, scores and what was pruned, wherever it stopped, for whatever reason."""

    def ended(study: optuna.Study) -> list[tuple]:
        found = [t for t in study.trials if t.state.name != "FAIL" or "reason" in t.user_attrs]
        return [(t.params, t.value, t.state.name, t.intermediate_values) for t in found]

    wanted = functools.partial(settings, trials=7, prune_after=2)
    whole = search(wanted(tmp_path / "whole"), SMALL, Trainer(tmp_path / "whole"))
    assert {"COMPLETE", "PRUNED"} <= {state for _, _, state, _ in ended(whole)}
    folder, ends = tmp_path / "run", (SafetensorError("No space left on device"), Killed())
    for number in range(4):
        stopped = Trainer(folder, {1 + number % 3: ends[number % 2]})
        with contextlib.suppress(UserError, Killed):
            search(wanted(folder), SMALL, stopped)
    study = search(wanted(folder), SMALL, Trainer(folder))
    assert len(study.trials) > len(whole.trials), "nothing was interrupted"
    assert ended(study) == ended(whole)


def test_ranges_may_change_while_a_trial_is_cut_off(tmp_path: Path) -> None:
    killed = Trainer(tmp_path, {1: Killed()})
    with pytest.raises(Killed):
        search(settings(tmp_path, trials=2), SMALL, killed)
    again = Trainer(tmp_path)
    search(settings(tmp_path, trials=2, rate_low=2e-3, rate_high=4e-3), SMALL, again)
    assert again.configs[0] == killed.configs[0]
    assert 2e-3 <= again.configs[1].trainer.learning_rate <= 4e-3


def test_other_fields_are_searched_by_name(tmp_path: Path) -> None:
    ranges = ["method.dropout=0.01:0.2", "method.rank=2:16"]
    trainer = Trainer(tmp_path)
    study = search(settings(tmp_path, trials=4, ranges=ranges), SMALL, trainer)
    for config, trial in zip(trainer.configs, study.trials, strict=True):
        assert 0.01 <= config.method.dropout == trial.params["method.dropout"] <= 0.2
        assert config.method.rank == trial.params["method.rank"] in range(2, 17)
        assert config.trainer.learning_rate == trial.params["trainer.learning_rate"]
    assert len({config.method.dropout for config in trainer.configs}) == 4


@pytest.mark.parametrize(
    "text", ["method.dropout", "method.dropout=0.2:0.1", "method.dropout=a:b", "seed=1:9",
             "trainer.learning_rate=1e-5:1e-4", "evaluation.held_out=1:2"],
)  # fmt: skip
def test_a_range_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ranges: .* is not valid: give name=low:high"):
        settings(tmp_path, ranges=[text])


def test_a_field_is_searched_or_given(tmp_path: Path) -> None:
    wanted = settings(tmp_path, ranges=["method.dropout=0.01:0.2"])
    with pytest.raises(UserError, match="method.dropout=0.1: ranges also contains method.dropout"):
        search(wanted, [*SMALL, "method.dropout=0.1"], Trainer(tmp_path))
    wanted = settings(tmp_path, ranges=["method.droput=0.01:0.2"])
    with pytest.raises(UserError, match="droput"):
        search(wanted, SMALL, Trainer(tmp_path))


def test_a_trial_that_fails_is_noted_and_the_search_resumes(tmp_path: Path, capfd) -> None:
    study = search(settings(tmp_path), SMALL, Diverging(tmp_path, 3e-4))
    failed = [trial for trial in study.trials if trial.state.name == "FAIL"]
    assert len(study.trials) == 12
    assert 0 < len(failed) < 12
    reason = "trainer.learning_rate: the loss is nan,\\nchoose a lower one"  # One line.
    assert {trial.user_attrs["reason"] for trial in failed} == {reason}
    out, err = capfd.readouterr()
    lines = [line for line in out.splitlines() if "failed with" in line]
    assert [line.split()[1] for line in lines] == [str(trial.number) for trial in failed]
    assert all(line.endswith(reason) for line in lines)
    assert err == ""
    again = Trainer(tmp_path)
    search(settings(tmp_path), SMALL, again)
    assert not again.configs


def test_all_trials_fail(tmp_path: Path) -> None:
    trainer = Diverging(tmp_path, 0.0)
    with pytest.raises(UserError, match="all 3 trials failed, the last one with: trainer.learning"):
        search(settings(tmp_path, trials=3), SMALL, trainer)
    # Each at a point of its own.
    assert len({config.trainer.learning_rate for config in trainer.configs}) == 3
    study = search(settings(tmp_path, trials=4), SMALL, Trainer(tmp_path))
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * 3 + ["COMPLETE"]


def test_a_crash_is_raised_and_not_met_again(tmp_path: Path) -> None:
    crashing = Trainer(tmp_path, {2: RuntimeError("a bug")})
    with pytest.raises(RuntimeError, match="a bug"):
        search(settings(tmp_path, trials=3), SMALL, crashing)
    study = search(settings(tmp_path, trials=3), SMALL, Trainer(tmp_path))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert study.trials[1].user_attrs["reason"] == "RuntimeError: a bug"


def _full_disk() -> UserError:
    error = UserError("cannot write it: the disk is full")
    error.__cause__ = OSError(28, "No space left on device")
    return error


@pytest.mark.parametrize(
    "error",
    [NotEnoughMemory("too large"), Postponed("runs elsewhere"), LostRun("taken over"), _full_disk(),
     OSError("No space left on device"), SafetensorError("No space left on device")],
    ids=["memory", "elsewhere", "taken over", "full disk", "OSError", "SafetensorError"],
)  # fmt: skip
def test_what_stands_in_the_way_of_any_trial_ends_the_search(tmp_path: Path, error) -> None:
    """Once it is mended, the trial is made again."""
    stopped = Trainer(tmp_path, {2: error})
    with pytest.raises(UserError, match=str(error)):
        search(settings(tmp_path, trials=3), SMALL, stopped)
    again = Trainer(tmp_path)
    study = search(settings(tmp_path, trials=3), SMALL, again)
    assert again.configs[0] == stopped.configs[-1]
    assert states(study) == ["COMPLETE"] * 3


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with RunLock(tmp_path / ".search.lock") as lock:
        assert lock.acquire()
        with pytest.raises(UserError, match="study=search is in use by another process"):
            search(settings(tmp_path), SMALL, Trainer(tmp_path))


def test_a_search_that_was_taken_over_writes_nothing_more(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(searching, "RunLock", functools.partial(RunLock, beat=0.01))

    class TakenOver(Trainer):
        def __call__(self, config: Config, watch: Callable[[int, float], None]) -> Path:
            (tmp_path / ".search.lock" / "2").write_text("{}")
            time.sleep(0.5)
            return super().__call__(config, watch)

    with pytest.raises(UserError, match="another process took over this search"):
        search(settings(tmp_path), SMALL, TakenOver(tmp_path))
    (tmp_path / ".search.lock" / "2").write_text(json.dumps({"released": True}))
    study = search(settings(tmp_path, trials=1), SMALL, Trainer(tmp_path))
    assert states(study) == ["COMPLETE"]


def test_trials_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    search(settings(tmp_path, trials=1), SMALL, Trainer(tmp_path))
    trainer = Trainer(tmp_path)
    for override, difference in (
        ("task=boolq", "task.name=arc_e, now boolq"),
        ("method=mixdora", "method.name=mixlora, now mixdora"),
        ("model.config.num_hidden_layers=3", "num_hidden_layers=2, now 3"),
        ("data.seed=1", "data.seed=0, now 1"),
        ("seed=1", "seed=42, now 1"),
        ("data.train_limit=8", "data.train_limit=16, now 8"),
    ):
        with pytest.raises(UserError, match="has trials with other settings") as caught:
            search(settings(tmp_path), [*SMALL, override], trainer)
        assert difference in str(caught.value)
    assert not trainer.configs
    # What determines no score may change, and so may what is searched.
    search(settings(tmp_path, trials=2, coef_low=1e-3), [*SMALL, "trainer.save_steps=7"], trainer)
    assert len(trainer.configs) == 1


def test_trials_on_other_data_are_not_mixed(tmp_path: Path) -> None:
    """Under the same settings."""
    file = tmp_path / "arc_e" / "train.jsonl"
    file.parent.mkdir()
    choices = {"text": ["warm", "cold"], "label": ["A", "B"]}
    rows = [
        {"id": str(i), "question": f"Is {i} warm?", "choices": choices, "answerKey": "A"}
        for i in range(30)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = [*SMALL, "data=local", f"data.path={tmp_path}"]
    search(settings(tmp_path, trials=1), local, Trainer(tmp_path))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    with pytest.raises(UserError, match="other settings: data.arc_e/train differs"):
        search(settings(tmp_path), local, Trainer(tmp_path))


def test_a_study_that_names_no_settings_is_refused(tmp_path: Path) -> None:
    study = optuna.create_study(study_name="search", storage=f"sqlite:///{tmp_path}/search.db")
    study.ask()
    with pytest.raises(UserError, match="study=search does not contain the settings"):
        search(settings(tmp_path), SMALL, Trainer(tmp_path))


def test_a_folder_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "a b,{c}?%20#=1"
    trainer = Trainer(tmp_path)
    search(settings(folder, trials=1), SMALL, trainer)
    assert (folder / "search.db").is_file()
    assert trainer.configs[0].output_dir == str(folder)


def test_a_study_that_fails_while_it_is_used(tmp_path: Path, capfd) -> None:
    class Spoiling(Trainer):
        def __call__(self, config: Config, watch: Callable[[int, float], None]) -> Path:
            (tmp_path / "search.db").write_bytes(b"no database" * 1000)
            return super().__call__(config, watch)

    with pytest.raises(UserError, match="study=search: .*search.db cannot be used"):
        search(settings(tmp_path), SMALL, Spoiling(tmp_path))
    assert capfd.readouterr().err == ""
