"""Let a model with an adapter write: `python generate.py adapter=DIR prompt="Question: ..."`."""

import sys
from pathlib import Path

# The code beside this script, whatever else is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from mixlora_exp.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
