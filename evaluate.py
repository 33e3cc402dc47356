"""Score an adapter that exists: `python evaluate.py run=outputs/NAME protocol=lm_eval`."""

import sys
from pathlib import Path

# The code beside this script, whatever else is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from mixlora_exp.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
