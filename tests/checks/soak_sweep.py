"""A sweep of a real model that is killed again and again, against one that is not:
`python tests/checks/soak_sweep.py data.path=DIR`.

SmolLM2 135M, ranks 2, 4 and 8 of MixLoRA and MixDoRA, a few steps each. The same command runs in
two folders at once, in one of them undisturbed; in the other it is killed at random moments and
started again. Writes `results/soak-sweep.json`: the kills, and whether both came to the same
weights, logs, predictions and records.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from mixlora_exp.cli.parser import Parser
from mixlora_exp.config.command import compose
from mixlora_exp.config.paths import ROOT
from mixlora_exp.errors import UserError
from mixlora_exp.records.outcome import outcomes
from mixlora_exp.records.record import finish_record, provenance, write_json
from mixlora_exp.runs.inputs import check_inputs
from mixlora_exp.system.exit_codes import guarded

SWEEP = (
    "-m", "model=smollm2_135m", "method=mixlora,mixdora", "method.rank=2,4,8", "task=arc_e",
    "data=local", "data.forms=[text]", "data.train_limit=64", "trainer.max_steps=6",
    "trainer.batch_size=8", "trainer.micro_batch_size=4", "trainer.save_steps=1",
    "trainer.logging_steps=1", "evaluation.protocols=[answer_text]", "evaluation.limit=20",
)  # fmt: skip
GO_ON = 75
"""Exit code of a sweep that was asked to end."""


def _start(words: list[str], folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", str(ROOT / "train.py"), *SWEEP, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, f"output_dir={folder}"], cwd=ROOT, env=environment, stdout=log, stderr=log
        )


def _state(folder: Path) -> str:
    """How far the sweep is: cells that are done, and what the one under way has."""
    done = len(list(folder.glob("*/record.json")))
    under_way = sorted(folder.glob("*/checkpoints/step-*"))
    return f"{done} cells done" + (f", {under_way[-1].name}" if under_way else "")


def _disturb(words: list[str], folder: Path, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Kill and start the sweep again until it ends; returns what was done to it."""
    rng, kills = random.Random(settings.draw), []
    while True:
        sweep = _start(words, folder)
        wait = rng.uniform(settings.least, settings.most) if len(kills) < settings.kills else None
        try:
            code = sweep.wait(wait)
        except subprocess.TimeoutExpired:
            # Every third is asked to end, as a scheduler does.
            number = signal.SIGTERM if len(kills) % 3 == 2 else signal.SIGKILL
            sweep.send_signal(number)
            code = sweep.wait()
            kills.append({"signal": number.name, "exit_code": code, "at": _state(folder)})
            print(f"killed ({number.name}), exit code {code}: {kills[-1]['at']}", flush=True)
            if code in (0, GO_ON, -number):
                continue
        if code:
            log = folder.parent / f"{folder.name}.log"
            raise UserError(f"the sweep ended with {code}: {log.read_text()[-1000:]}")
        return kills


def main(argv: list[str]) -> int:
    """Carry out the comparison; returns 1 where the two differ."""
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--least", type=float, default=15.0, help="seconds between kills")
    parser.add_argument("--most", type=float, default=60.0)
    parser.add_argument("--draw", type=int, default=0, help="seed of the moments")
    parser.add_argument("--record", default="results/soak-sweep.json")
    parser.add_argument("overrides", metavar="NAME=VALUE", nargs="*", help="change the runs")
    settings = parser.parse(argv)
    words = settings.overrides
    # A mistake is told here; in the sweep it would stand among its lines.
    swept = ("-m", "method=", "method.rank=")
    check_inputs([compose([*(word for word in SWEEP if not word.startswith(swept)), *words])])
    origin, begun = provenance(ROOT), time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        whole, disturbed = Path(place) / "whole", Path(place) / "disturbed"
        undisturbed = _start(words, whole)
        try:
            kills = _disturb(words, disturbed, settings)
            code = undisturbed.wait()
        finally:
            undisturbed.kill()
        if code:
            raise UserError(f"the undisturbed sweep ended with {code}")
        expected, found = outcomes(whole), outcomes(disturbed)
    same = {name: found.get(name) == one for name, one in sorted(expected.items())}
    record = {
        "command": ["train.py", *SWEEP, *(w for w in words if not w.startswith("data.path="))],
        "kills": kills,
        "same": same,
        "files": {name: one["files"] for name, one in sorted(expected.items())},
        "seconds": round(time.monotonic() - begun, 1),
        "provenance": origin,
    }
    write_json(ROOT / settings.record, finish_record(record))
    print(f"{sum(same.values())} of {len(same)} cells came to the same after {len(kills)} kills")
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
