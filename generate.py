"""Let a model with an adapter write: `python generate.py adapter=DIR prompt="Question: ..."`."""

import sys

from mixlora_exp.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
