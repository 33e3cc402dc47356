"""Checkpoints whose hashes fit and whose content is odd: refused or passed over, never a crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from composed import compose
from encoded import examples_of
from odd_values import VALUES, changed_somewhere, cut_or_flipped, trouble
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixlora_exp.adapters import attach_adapter
from mixlora_exp.errors import UserError
from mixlora_exp.models import load_model, load_tokenizer
from mixlora_exp.system.hashing import file_sha256
from mixlora_exp.training import fit
from mixlora_exp.training.checkpoints import ADAPTER, MANIFEST, OPTIMIZER, STATE, Checkpoints

Draws = Callable[..., Iterator[Random]]
WORDS = ["experiment=smoke", "trainer.precision=float32", "data.train_limit=8", "method=mixlora",
         "trainer.batch_size=4", "trainer.micro_batch_size=4", "trainer.max_steps=3",
         "trainer.logging_steps=1", "trainer.save_steps=1", "method.rank=2"]  # fmt: skip
IDENTITY = {"data": "a"}


class Killed(BaseException):
    """Stands in for a kill."""


def train(folder: Path, until: int | None = None) -> None:
    """A start of the run in `folder`, which is killed in step `until`."""
    torch.set_num_threads(1)
    config = compose(WORDS)
    base = load_model(config.model, torch.float32, config.seed)
    base.set_attn_implementation("eager")

    def watch(step: int, loss: float) -> None:
        if step == until:
            raise Killed

    folder.mkdir(exist_ok=True)
    summary = fit(
        config=config, model=attach_adapter(base, config.method, config.kernel, config.seed),
        tokenizer=load_tokenizer(config.model), examples=examples_of(config), folder=folder,
        dtype=torch.float32, checkpoints=Checkpoints(folder / "checkpoints", IDENTITY),
        watch=watch,
    )  # fmt: skip
    assert summary.steps == 3
    assert len(summary.stability.step_losses) == 3


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its third step; its folder has two checkpoints."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(Killed):
        train(folder, until=3)
    assert len(list((folder / "checkpoints").glob("step-*"))) == 2
    return folder


def sealed(checkpoint: Path) -> None:
    hashes = {name: file_sha256(checkpoint / name) for name in (ADAPTER, OPTIMIZER, STATE)}
    (checkpoint / MANIFEST).write_text(json.dumps(hashes))


def odd_tensors(path: Path, draw: Random) -> None:
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    match draw.randrange(5):
        case 0:
            tensors.pop(name)
        case 1:
            tensors = {}
        case 2:
            tensors[name] = tensors[name].unsqueeze(0)
        case 3:
            tensors[name] = torch.full_like(tensors[name], float("nan"))
        case 4:
            tensors[draw.choice(("x", f"{name}/y"))] = torch.zeros(1)
    save_file(tensors, path)


def one_odd(draw: Random, checkpoint: Path) -> None:
    if draw.random() < 0.3:
        odd_tensors(checkpoint / draw.choice((ADAPTER, OPTIMIZER)), draw)
    elif draw.random() < 0.2:
        name = draw.choice((ADAPTER, OPTIMIZER, STATE, MANIFEST))
        (checkpoint / name).write_bytes(cut_or_flipped((checkpoint / name).read_bytes(), draw))
        return
    elif draw.random() < 0.2:
        (checkpoint / MANIFEST).write_text(json.dumps(draw.choice(VALUES)))
        return
    else:
        state = changed_somewhere(json.loads((checkpoint / STATE).read_text()), draw)
        (checkpoint / STATE).write_text(json.dumps(state))
    sealed(checkpoint)


def test_odd_checkpoints(draws: Draws, killed: Path, tmp_path: Path, capsys) -> None:
    wrong, ended = {}, []

    def goes_on(folder: Path) -> None:
        ended.append(False)
        train(folder)
        ended[-1] = True

    for number, draw in enumerate(draws("checkpoints", 6, 50)):
        folder = tmp_path / str(number)
        shutil.copytree(killed, folder)
        one_odd(draw, max((folder / "checkpoints").glob("step-*")))
        if what := trouble(lambda folder=folder: goes_on(folder), UserError):
            wrong[number] = what
    capsys.readouterr()
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())
    assert set(ended) == {True, False}, "all were gone on from, or none"


def beyond_the_end(checkpoint: Path) -> str:
    state = json.loads((checkpoint / STATE).read_text())
    track = state["track"]
    for name in ("losses", "norms"):
        track[name] = [*track[name], *[1.0] * 5]
    (checkpoint / STATE).write_text(json.dumps({**state, "step": 7}))
    checkpoint.rename(checkpoint.with_name("step-00000007"))
    return "it is of step 7, and the run has 3"


def without_moments(checkpoint: Path) -> str:
    save_file({}, checkpoint / OPTIMIZER)
    return "the optimizer has no exp_avg of "


def without_a_weight(checkpoint: Path) -> str:
    tensors = load_file(checkpoint / ADAPTER)
    tensors.pop(min(tensors))
    save_file(tensors, checkpoint / ADAPTER)
    return "only one of the two has the weight "


def with_a_state(told: str, *path: str, value: Any) -> Callable[[Path], str]:
    """Sets one value of a checkpoint's state."""

    def spoil(checkpoint: Path) -> str:
        state = json.loads((checkpoint / STATE).read_text())
        owner = state
        for name in path[:-1]:
            owner = owner[name]
        owner[path[-1]] = value
        (checkpoint / STATE).write_text(json.dumps(state))
        return told

    return spoil


def with_a_moment(told: str, key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], str]:
    """Changes one tensor of the optimizer's state."""

    def spoil(checkpoint: Path) -> str:
        tensors = load_file(checkpoint / OPTIMIZER)
        name = min(name for name in tensors if name.endswith(f"/{key}"))
        tensors[name] = change(tensors[name])
        save_file(tensors, checkpoint / OPTIMIZER)
        return told

    return spoil


COUNTS = "is not null or 2 rows of 8 numbers of tokens"
ENTRY = {"step": 1, "loss": 1.0}
ODD_STATES = [
    with_a_state(COUNTS, "track", "counts", value=[[1] * 8] * 3),
    with_a_state(COUNTS, "track", "counts", value=[[1e6, *[0] * 7]]),
    with_a_state(COUNTS, "track", "counts", value=[[1] * 8, [-1] * 8]),
    with_a_state(COUNTS, "track", "window", value=[[1] * 7] * 2),
    with_a_state("track.tokens", "track", "tokens", value=10**39),
    with_a_state("ascending steps", "track", "curve", value=[{**ENTRY, "step": 99}]),
    with_a_state("ascending steps", "track", "curve", value=[{**ENTRY, "step": -1}]),
    with_a_state("ascending steps", "track", "curve", value=[ENTRY, ENTRY]),
    with_a_state("seconds is not", "seconds", value=-5),
    with_a_state("does not have", "not_chosen", value={"x": [99]}),
    with_a_moment("number of steps", "step", lambda t: t.bool()),
    with_a_moment("number of steps", "step", lambda t: t.to(torch.complex64)),
    with_a_moment("number of steps", "step", lambda t: t - 0.5),
    with_a_moment("below 0", "exp_avg_sq", lambda t: t - 1),
]


@pytest.mark.parametrize("spoil", ODD_STATES)
def test_a_state_that_no_run_wrote_is_refused(
    spoil: Callable[[Path], str], killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    told = spoil(newest)
    sealed(newest)
    with pytest.raises(UserError, match="is not a checkpoint of this run") as caught:
        train(tmp_path / "run")
    assert told in str(caught.value)


@pytest.mark.parametrize("spoil", [beyond_the_end, without_moments, without_a_weight])
def test_content_that_no_run_wrote_is_refused(
    spoil: Callable[[Path], str], killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    told = spoil(max((tmp_path / "run" / "checkpoints").glob("step-*")))
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    sealed(newest)
    with pytest.raises(UserError) as caught:
        train(tmp_path / "run")
    assert told in str(caught.value)
    assert "remove it to resume from an earlier one" in str(caught.value)
    shutil.rmtree(newest)
    train(tmp_path / "run")
