"""What a newcomer does, on a machine that has seen nothing: `python tests/checks/cold_start.py`.

The quickstart, cut to two steps and two items a task, with every cache and the output in an empty
temporary folder: the packaged weights are converted, a model is trained and scored. Then the same
command again, which finds its run finished, and once more with force=true on the warm cache. The
first that fails ends it with its exit code; nothing stays. Takes about two minutes on two cores.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ["experiment=quickstart", "trainer.max_steps=2", "evaluation.limit=2"]
CACHES = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


class Failed(Exception):
    """A command did not do what a newcomer expects of it."""


def quickstart(folder: Path, *more: str) -> str:
    """Carry the command out with caches and output in `folder`, and return what it printed."""
    words = ["train.py", *COMMAND, f"output_dir={folder / 'outputs'}", *more]
    # A newcomer's Python keeps what it compiles.
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    print("$ python", *words, flush=True)
    started, said = time.monotonic(), []
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8",
        env={**inherited, **{name: str(folder / name.lower()) for name in CACHES},
             "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
        if process.wait() != 0:
            raise Failed(f"it ended with {process.returncode}")
    finally:
        process.kill()
    print(f"({time.monotonic() - started:.0f} s)\n", flush=True)
    return "".join(said)


def expect(what: str, holds: bool) -> None:
    if not holds:
        raise Failed(what)


def stamps(folder: Path) -> dict[str, int]:
    """When each file of the converted weights was written, by its path in the cache."""
    cache = folder / "xdg_cache_home" / "mixlora_exp"
    files = (path for path in cache.glob("[!.]*/*") if path.is_file())
    return {str(path.relative_to(cache)): path.stat().st_mtime_ns for path in files}


def main() -> int:
    # Asked to end, it takes the half gigabyte of converted weights away, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="cold-start-") as name:
        folder = Path(name)
        try:
            first = quickstart(folder)
            converted = stamps(folder)
            expect("it says where the record is", "Record: " in first)
            expect("the weights are converted into the cache", bool(converted))
            expect("no figure is cut", "…" not in first)
            again = quickstart(folder)
            expect("a finished run is recognised", "Already finished: " in again)
            warm = quickstart(folder, "force=true")
            expect("it trains again on the warm cache", "Trained 2 steps" in warm)
            expect("the weights are converted once", stamps(folder) == converted)
        except Failed as error:
            print(f"cold start failed: {error}", file=sys.stderr)
            return 1
    print("cold start: done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
