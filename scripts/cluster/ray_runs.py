"""One run for each line of a file on a Ray cluster, one GPU for each:

    python scripts/cluster/ray_runs.py scripts/cluster/runs.txt [--gpus 1] [--dry-run]

Every node needs this checkout at the same place, with its `.venv`, and a common `outputs/`. A run
that its node takes back resumes from its last checkpoint. Needs `pip install ray` (Apache-2.0).
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUEUE, TRIES = 75, 20


def commands(file: Path) -> list[list[str]]:
    """The command of each line that is not blank."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [[sys.executable, "train.py", *line.split()] for line in lines if line.strip()]


def execute(command: list[str]) -> int:
    """Run a command, again as long as it asks for that, and return its exit code."""
    code = REQUEUE
    for _ in range(TRIES):
        if code != REQUEUE:
            break
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
    return code


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--gpus", type=float, default=1)
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    args = parser.parse_args(argv)
    found = commands(args.file)
    if args.dry_run:
        sys.stdout.writelines(f"{shlex.join(command)}\n" for command in found)
        return 0
    import ray

    ray.init(address="auto")
    remote = ray.remote(num_gpus=args.gpus, max_retries=TRIES)(execute)
    codes = ray.get([remote.remote(command) for command in found])
    for command, code in zip(found, codes, strict=True):
        if code:
            sys.stderr.write(f"exit code {code}: {shlex.join(command)}\n")
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
