"""Run the tests of mutants in forks, so that libraries are imported once."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import inspect
import json
import os
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from mutants_drawn import Mutant
from mutants_tests import LEFT_OUT, tests_of

LIMIT = 900.0
"""Seconds that tests may take without a mutant."""


def differing(old: CodeType, new: CodeType) -> dict[tuple[str, int], CodeType] | None:
    """The functions that differ, by qualified name and line; None if anything outside of functions
    does, which has run by the time that tests are collected."""
    function = bool(old.co_flags & inspect.CO_OPTIMIZED)
    if function and (old.co_name == "<lambda>" or not old.co_name.startswith("<")):
        return {} if old == new else {(old.co_qualname, old.co_firstlineno): new}
    # The module, a class, or a comprehension in one of them.
    alike = (old.co_code, old.co_names, len(old.co_consts)) == (
        new.co_code, new.co_names, len(new.co_consts)
    )  # fmt: skip
    if function or not alike:
        return {} if old == new else None
    found: dict[tuple[str, int], CodeType] = {}
    for one, other in zip(old.co_consts, new.co_consts, strict=True):
        if isinstance(one, CodeType) and isinstance(other, CodeType):
            inner = differing(one, other)
            if inner is None:
                return None
            found |= inner
        elif repr(one) != repr(other):
            return None
    return found


def _functions(mutant: Mutant, path: str) -> dict[tuple[str, int], CodeType] | None:
    texts = (mutant.original, mutant.source)
    return differing(*(compile(text, path, "exec", dont_inherit=True) for text in texts))


class Forks:
    """A plug-in of pytest that runs the collected tests once for each mutant, in a fork where the
    functions have the mutant's code: importing and collecting takes longer than most tests."""

    def __init__(self, folder: Path, mutants: Sequence[Mutant], told: Callable) -> None:
        self.folder, self.mutants, self.told = folder, mutants, told

    def pytest_runtestloop(self, session: Any) -> bool:
        log = self.folder / "log"
        outcome, seconds, failed = in_fork(log, LIMIT, lambda: self._run(session, None))
        self.told("", outcome, seconds, failed)
        for mutant in self.mutants if outcome == "survived" else ():
            with on_disk(self.folder / "clone", mutant):
                ended = in_fork(log, 3 * seconds + 30, lambda m=mutant: self._run(session, m))
            self.told(mutant.key, *ended)
        return True

    def _run(self, session: Any, mutant: Mutant | None) -> int:
        if mutant is not None:
            gc.unfreeze()
            path = str(self.folder / "clone" / mutant.file)
            new = _functions(mutant, path) or {}
            for live in gc.get_objects():
                if isinstance(live, FunctionType) and live.__code__.co_filename == path:
                    code = live.__code__
                    live.__code__ = new.get((code.co_qualname, code.co_firstlineno), code)
        for item, after in zip(session.items, [*session.items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            if session.testsfailed:
                os.write(2, f"\nFAILED {item.nodeid}\n".encode())
                return 1
        return 0


def pytest_main(clone: Path, tests: Sequence[str], *plugins: object) -> int:
    """Run the tests of the clone, in a fork of this process."""
    os.chdir(clone)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mixlora_exp"]:
        del sys.modules[name]
    root = str(Path(__file__).resolve().parents[2])
    sys.path[:] = [str(clone / "src"), *(path for path in sys.path if not path.startswith(root))]
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(clone / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    base = f"--basetemp={clone.parent / 'pytest'}"
    options = ["-x", "-q", "-s", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["--tb=line", base, *(f"--deselect={test}" for test in LEFT_OUT)]
    return int(importlib.import_module("pytest").main([*options, *tests], [*plugins]))


def in_fork(log: Path, limit: float, work: Callable[[], int]) -> tuple[str, float, str]:
    """How the work ends: "survived", "killed" or "timed out"; the seconds; the test that failed."""
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: with its parent.
            with log.open("wb") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            os._exit(work())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(70)
    ended, status = 0, 0
    while not ended and time.monotonic() - begun < limit:
        time.sleep(0.02)
        ended, status = os.waitpid(pid, os.WNOHANG)
    # Also what the tests started and left behind.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        os.waitpid(pid, 0)
    seconds = round(time.monotonic() - begun, 1)
    if not ended:
        return "timed out", seconds, ""
    lines = log.read_text(errors="replace").splitlines()
    failed = [line.split(" - ")[0].partition(" ")[2] for line in lines
              if line.startswith(("FAILED ", "ERROR "))]  # fmt: skip
    return "survived" if status == 0 else "killed", seconds, failed[-1] if failed else ""


@contextlib.contextmanager
def on_disk(clone: Path, mutant: Mutant) -> Iterator[None]:
    """The mutant's file in the clone, for what is imported later or by another process."""
    path = clone / mutant.file
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()
    path.write_text(mutant.source, encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(mutant.original, encoding="utf-8")


def measure(folder: Path, mutants: Sequence[Mutant]) -> Iterator[tuple[Mutant, str, float, str]]:
    """The outcome of every mutant. In forks of the collected tests first; what survives there, or
    is not in a function, runs once more from the start, for it may have acted on an import."""
    clone, log, rows = folder / "clone", folder / "log", folder / "rows"
    together: dict[tuple[str, ...], list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        together[tests_of(mutant.file)].append(mutant)

    def told(*row: object) -> None:
        with rows.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    for tests, group in together.items():
        rows.write_text("")
        plugin = Forks(folder, [m for m in group if _functions(m, "") is not None], told)
        in_fork(folder / "server", 3600, lambda t=tests, p=plugin: pytest_main(clone, t, p))
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        if not found or found[0][1] != "survived":
            text = (log if found else folder / "server").read_text(errors="replace")
            raise SystemExit(f"{text[-3000:]}\n{tests} do not pass without a mutant: {found}")
        limit, quickly = 5 * found[0][2] + 90, {row[0]: tuple(row[1:]) for row in found}
        for mutant in group:
            outcome = quickly.get(mutant.key, ("survived",))
            if outcome[0] == "survived":
                with on_disk(clone, mutant):
                    outcome = in_fork(log, limit, lambda t=tests: pytest_main(clone, t))
            yield mutant, *outcome
