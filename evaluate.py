"""Score an adapter that exists: `python evaluate.py run=outputs/NAME protocol=lm_eval`."""

import sys

from mixlora_exp.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
