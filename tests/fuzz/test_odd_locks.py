"""Lock files that no process wrote: the lock is taken or refused, and nothing hangs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from odd_values import VALUES, cut_or_flipped

from mixlora_exp.errors import UserError
from mixlora_exp.system.runlock import RunLock, holder_of

Draws = Callable[..., Iterator[Random]]
NAMES = ("1", "2", "01", "7", "1²", "٣", "1.5", "9" * 250, "a", ".1.2.3", "1 ")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("lock")
    with RunLock(folder) as lock:
        assert lock.acquire()
        return json.loads((folder / "1").read_text())


def one_odd(draw: Random, folder: Path, sound: dict[str, object]) -> None:
    path = folder / draw.choice(NAMES)
    if path.exists():
        return
    match draw.randrange(6):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.write_bytes(cut_or_flipped(json.dumps(sound).encode(), draw))
        case 3:
            path.write_text(json.dumps(draw.choice(VALUES)))
        case _:
            odd = {draw.choice(sorted(sound)): draw.choice(VALUES) for _ in range(2)}
            path.write_text(json.dumps({**sound, **odd}))


def test_odd_locks(draws: Draws, sound: dict[str, object], tmp_path: Path) -> None:
    got = set()
    for number, draw in enumerate(draws("lock files", 60, 200)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for _ in range(draw.choice((1, 2))):
            one_odd(draw, folder, sound)
        holder_of(folder)
        with RunLock(folder, beat=0.05, patience=0.02) as lock, contextlib.suppress(UserError):
            taken = lock.acquire()
            got.add(taken)
            assert not taken or lock.held()
    assert True in got, "no lock can be had beside an odd file"
