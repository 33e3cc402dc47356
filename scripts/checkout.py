"""Runs a command of the checkout that this file lies in, whatever else is installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from mixlora_exp.cli.main import main


def run(command: str) -> None:
    sys.exit(main([command, *sys.argv[1:]]))
