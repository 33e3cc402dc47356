"""`mixlora-exp show` for a checkout."""

import sys

from mixlora_exp.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["show", *sys.argv[1:]]))
